"""Make small faults in a copy of the code, one at a time, and say which of them the tests see.

`python -m tests.mutate [PACKAGE ...] [--only TEXT] [--list]`; packages are the tables beside this file. The
copy is a temporary folder: the working tree is only read. Tests that fail without a fault are named and left
out.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutate.mutant import Mutant

ROOT = Path(__file__).parents[2]
PACKAGES = ("parallax", "models", "optimizers", "data", "eval", "training")
SECONDS = 600  # a fault that makes the tests hang is seen
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly")
UNMARKED = ("-m", "not gpu and not multi_gpu and not slow and not network")


def _copy(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def _passes(folder: Path, tests: str) -> bool:
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *PYTEST, *UNMARKED, *tests.split()]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    assert done.returncode in (0, 1, 2), f"pytest {tests}: {done.stdout.decode()[-2000:]}"
    return done.returncode == 0


def _judge(mutant: Mutant, folder: Path) -> str:
    """Return "caught", "survived", or "stale" where the code no longer has the text."""
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        return "stale"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return "survived" if _passes(folder, mutant.tests) else "caught"
    finally:
        path.write_text(text, encoding="utf-8")


def _run(package: str, mutants: Sequence[Mutant], folder: Path) -> str:
    """Judge the mutants of a package; returns a row of the table."""
    failing = {tests for tests in {m.tests for m in mutants} if not _passes(folder, tests)}
    for tests in sorted(failing):
        print(f"fails without a fault: {tests}", flush=True)
    verdicts = []
    for mutant in (m for m in mutants if m.tests not in failing):
        start = time.monotonic()
        verdicts.append(_judge(mutant, folder))
        print(f"{verdicts[-1]:<9} {time.monotonic() - start:4.0f} s  {mutant.name[:160]}", flush=True)
    counts = [len(verdicts), *(verdicts.count(verdict) for verdict in ("caught", "survived", "stale"))]
    return f"{package:<12}" + "".join(f"{count:>10}" for count in counts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a mutant survives or is stale."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument(
        "packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}; default all"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only mutants with this text in their name"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.packages) - set(PACKAGES):
        parser.error(f"no package {', '.join(unknown)}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        _copy(Path(name))
        for package in options.packages or PACKAGES:
            mutants: list[Mutant] = importlib.import_module(f"tests.mutate.{package}").MUTANTS
            chosen = [m for m in mutants if options.only in m.name]
            if options.list:
                print(*(m.name for m in chosen), sep="\n")
            elif chosen:
                rows.append(_run(package, chosen, Path(name)))
    print(
        "",
        f"{'package':<12}" + "".join(f"{h:>10}" for h in ("run", "caught", "survived", "stale")),
        *rows,
        sep="\n",
    )
    return int(any(row.split()[3:] != ["0", "0"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
