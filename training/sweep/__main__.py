"""Run all members of a plan: on the GPUs of this machine, on CPU, or piece by piece on several machines.

    python -m training.sweep configs/plans/X.toml              # start, or resume after any kind of end
    python -m training.sweep configs/plans/X.toml --dry-run    # members, FLOPs, GPU-hours
    python -m training.sweep configs/plans/X.toml --status     # from another shell
    python -m training.sweep configs/plans/X.toml --stage seeds --seed 1 --set.data.tokenizer PATH
    python -m eval.report runs/X

docs/sweeps.md has the keys of a plan. Each can be given on the command line: --set.training.steps 100.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from errors import UserError, run_command
from training.sweep import commands
from training.sweep.member_queue import Selection
from training.sweep.overview import Observer, select
from training.sweep.plan import Plan, PlanSource, load_plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("plan", type=Path, help="TOML file of the plan")
    parser.add_argument("--folder", help="another folder than the plan's own")
    parser.add_argument(
        "--member",
        type=int,
        nargs="+",
        metavar="N",
        help="run these members only, by number; others may run in the same folder",
    )
    parser.add_argument("--stage", nargs="+", metavar="NAME", help="run the members of these stages only")
    parser.add_argument(
        "--seed", type=int, nargs="+", metavar="N", help="run the members of these seeds only"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print members, FLOPs and GPU-hours and exit")
    mode.add_argument("--status", action="store_true", help="print the table and exit")
    mode.add_argument("--sbatch", action="store_true", help="print a SLURM job array of the ready members")
    mode.add_argument(
        "--collect",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="copy the records of finished members from other folders of this plan",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m training.sweep`.

    Args:
        arguments: Words of the command line; None for this process's.

    Returns:
        0 if the work is done or was stopped by a signal, 1 if members failed or could not be started.

    Raises:
        UserError: The plan or a config is wrong, an option has no effect, or another sweep works in the
            folder.
    """
    words = sys.argv[1:] if arguments is None else arguments
    options, overrides = _parser().parse_known_args(_join_overrides(words))
    if options.status or options.collect:
        _refuse_selection(options, "--status" if options.status else "--collect")
    folder = [] if options.folder is None else [f"--folder={json.dumps(options.folder)}"]
    words = [*folder, *overrides]
    observer = Observer(load_plan(options.plan, words), PlanSource(options.plan, words))
    if not (options.status or options.collect):
        _check(observer)
    if options.dry_run:
        from training.sweep.costs import describe_costs  # imports torch

        print(describe_costs(observer.plan, observer.look(), _selection(options)))
    elif options.status:
        commands.print_status(observer)
    elif options.sbatch:
        commands.print_array(observer, overrides, _selection(options))
    elif options.collect:
        commands.bring_together(observer, options.collect)
    else:
        return commands.work(observer, _selection(options))
    return 0


def _check(observer: Observer) -> None:
    """Check all members, unless all have finished."""
    statuses = observer.look().statuses
    if any(status.state != "finished" for status in statuses):
        from training.sweep.check import check_members  # imports torch

        check_members(observer.plan, [status.member for status in statuses])


def _refuse_selection(options: argparse.Namespace, mode: str) -> None:
    for name in ("member", "stage", "seed"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} has no effect with {mode}, which is of all members: leave it out")


def _join_overrides(words: Sequence[str]) -> list[str]:
    """Write "--key value" of a plan's key as "--key=value": argparse takes the value for the plan's file."""
    keys = {field.name for field in dataclasses.fields(Plan)} - {"folder"}
    joined: list[str] = []
    for word in words:
        key = joined[-1][2:].partition(".")[0] if joined and joined[-1].startswith("--") else ""
        if key in keys and "=" not in joined[-1] and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _selection(options: argparse.Namespace) -> Selection | None:
    """Return what selects the members to run; None for all."""
    given = {"numbers": options.member, "stages": options.stage, "seeds": options.seed}
    return None if all(value is None for value in given.values()) else partial(select, **given)


if __name__ == "__main__":
    sys.exit(run_command(main))
