"""Make small faults in a copy of the code, one at a time, and say which of them the tests see.

`python -m tests.mutate [PACKAGE ...] [--only TEXT] [--list]`; packages are the tables beside this file. The
copy is a temporary folder: the working tree is only read. The test that sees a fault is run once more without
it; if it fails then too, it tells nothing. Each run of pytest is a fork of this process, which has imported
the large libraries already, and nothing of the project that it tests.
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.mutate.mutant import Mutant

ROOT = Path(__file__).parents[2]
PACKAGES = ("parallax", "models", "optimizers", "data", "eval", "training")
LIBRARIES = (
    "hypothesis",
    "numpy",
    "pyarrow.parquet",
    "tokenizers",
    "torch.distributed.checkpoint",
    "torch._dynamo",
)
SECONDS = 600  # a fault that makes the tests hang is seen
_NO_TEST = "none: pytest hung, or was ended"
UNMARKED = "not gpu and not multi_gpu and not slow and not network"


class _FirstFailure:
    """Writes the first test that fails, or the file that cannot be imported, to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _record(self, report: Any) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid, encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._record(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._record(report)


def _copy(folder: Path) -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def _pytest(folder: Path, tests: list[str], failed: Path) -> int:
    """Run pytest in this process, in the copy; returns its exit code."""
    os.chdir(folder)
    os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(each for each in sys.path if Path(each).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", UNMARKED]
    return pytest.main([*options, *tests], plugins=[_FirstFailure(failed)])


def _first_failure(folder: Path, tests: list[str]) -> str | None:
    """Run tests in a fork; returns the first that fails, None if all pass."""
    failed = folder.with_name("failed")
    failed.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os.setsid()
        with folder.with_name("log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os._exit(_pytest(folder, tests, failed))
    deadline = time.monotonic() + SECONDS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return _NO_TEST
        time.sleep(0.05)
    if failed.exists():
        return failed.read_text(encoding="utf-8")
    log = folder.with_name("log").read_text(encoding="utf-8", errors="replace")
    code = os.waitstatus_to_exitcode(ended[1])
    assert code not in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED), log[-2000:]
    return _NO_TEST if code else None


def _judge(mutant: Mutant, folder: Path) -> str:
    """Return "caught", "survived", "stale" (the text is not there), or "broken" (the test fails anyway)."""
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        return "stale"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        failed = _first_failure(folder, mutant.tests.split())
    finally:
        path.write_text(text, encoding="utf-8")
    if failed is None:
        return "survived"
    # without its parameters, whose names may not survive the command line
    again = failed.partition("[")[0]
    return "caught" if failed == _NO_TEST or _first_failure(folder, [again]) is None else "broken"


def _run(package: str, mutants: Sequence[Mutant], folder: Path) -> list[str]:
    """Judge the mutants of a package; returns the verdicts."""
    verdicts = []
    for mutant in mutants:
        start = time.monotonic()
        verdicts.append(_judge(mutant, folder))
        print(f"{verdicts[-1]:<9}{time.monotonic() - start:4.0f} s  {mutant.name[:150]}", flush=True)
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts))
    print(f"{package}: {len(verdicts)} mutants, {counts}\n", flush=True)
    return verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 unless every mutant is caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}; all if none"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only mutants with this text in their name"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.packages) - set(PACKAGES):
        parser.error(f"no package {', '.join(unknown)}")
    chosen: dict[str, list[Mutant]] = {}
    for package in options.packages or PACKAGES:
        mutants: list[Mutant] = importlib.import_module(f"tests.mutate.{package}").MUTANTS
        chosen[package] = [mutant for mutant in mutants if options.only in mutant.name]
    if options.list:
        print(*(mutant.name for mutants in chosen.values() for mutant in mutants), sep="\n")
        return 0
    for name in LIBRARIES:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        folder.mkdir()
        _copy(folder)
        verdicts = [each for package, mutants in chosen.items() for each in _run(package, mutants, folder)]
    return int(set(verdicts) != {"caught"})


if __name__ == "__main__":
    sys.exit(main())
