"""The command line of a benchmark."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import RESULTS
from errors import check_at_least_1, check_out


def make_parser(module: str, doc: str | None, *, name: str | None = None) -> argparse.ArgumentParser:
    """Return a parser, to which the benchmark adds its own options.

    Args:
        module: Name of the benchmark's module in this folder.
        doc: Its docstring.
        name: Name of the result's file, the default of --name, beside which --out is its folder; None for a
            benchmark that writes none.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if name is not None:
        parser.add_argument("--name", default=name, help=f"name of the JSON file in --out ({name})")
        parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line and check it, before anything is measured.

    Args:
        parser: From make_parser.
        words: The command line; None for this process's.

    Raises:
        UserError: --out cannot be a folder, or an integer is less than 1: each counts something.
    """
    options = parser.parse_args(words)
    check_out(getattr(options, "out", None))
    for name, value in vars(options).items():
        if any(type(each) is int for each in (value if isinstance(value, list) else [value])):
            check_at_least_1(options, name)
    return options


def parse_with_overrides(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Parse this process's command line, `OPTIONS [-- OVERRIDES]`.

    Returns:
        The options, and the words after `--`: overrides as train.py takes them.

    Raises:
        UserError: As parse.
    """
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    return parse(parser, arguments[:split]), arguments[split + 1 :]


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add the option --resume, for a benchmark that writes what it has measured so far."""
    parser.add_argument("--resume", action="store_true", help="keep what the same command has written before")


def command_without_resume(module: str) -> str:
    """Return this process's command line without --resume, as the result of a benchmark names it."""
    words = shlex.join(each for each in sys.argv[1:] if each != "--resume")
    return f"python -m benchmarks.{module} {words}"
