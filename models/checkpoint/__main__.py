"""Check checkpoints for damage.

`python -m models.checkpoint verify runs/X` reads every checkpoint of a run, or one given as
runs/X/checkpoint/step-N, compares every entry with its checksum, and prints a table. Exit code 2 where one is
damaged.
"""

import argparse
import sys
from pathlib import Path

from errors import UserError, run_command
from models.checkpoint.metadata import DamagedCheckpointError
from models.checkpoint.verify import verify_checkpoint
from models.run_folder import RunFolder, find_checkpoint, is_whole


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="read all and check all", allow_abbrev=False)
    verify.add_argument(
        "path", type=Path, metavar="RUN", help="a run folder, or one of its checkpoint/step-N"
    )
    return parser.parse_args()


def main() -> None:
    """Run the command line.

    Raises:
        UserError: There is no checkpoint, or one is damaged.
    """
    path = _parse().path
    run = RunFolder(path)
    folders = run.step_folders()
    if not folders or is_whole(path):
        folders = {0: find_checkpoint(path)}
    for line in run.odd_names():
        print(f"not read: {line}")
    good, bad = list[Path](), list[Path]()
    print(f"{'checkpoint':<16}{'entries':>9}{'GB':>10}  result")
    for step in sorted(folders):
        is_good, columns = _row(folders[step])
        (good if is_good else bad).append(folders[step])
        print(f"{folders[step].name:<16}{columns}", flush=True)
    if bad:
        newest = f"the newest good one is {good[-1]}" if good else "none is good"
        names = ", ".join(each.name for each in bad)
        raise UserError(f"{len(bad)} of {len(folders)} checkpoints of {path} are damaged: {names}; {newest}")


def _row(checkpoint: Path) -> tuple[bool, str]:
    """Check a checkpoint; return whether it is good, and its columns."""
    if not is_whole(checkpoint):
        return False, f"{'':>9}{'':>10}  incomplete: it has no .metadata, which is written last"
    try:
        size = verify_checkpoint(checkpoint)
    except DamagedCheckpointError as error:
        return False, f"{'':>9}{'':>10}  {error}"
    return True, f"{size.num_entries:>9,}{size.num_bytes / 1e9:>10.3f}  good"


if __name__ == "__main__":
    sys.exit(run_command(main))
