"""SOURCE on a command line of evaluation: a text by its own options, or the run's held-out documents."""

import argparse
import re

from data.config import Source
from data.sources.base import DocumentSource
from data.sources.cli import add_source_arguments, source_from
from data.sources.open import open_source
from eval.open_model import OpenedModel
from eval.scored_text import held_out_source


def source_parser(program: str) -> argparse.ArgumentParser:
    """Return a parser of SOURCE alone: SOURCE is optional, but one of its options is required."""
    parser = argparse.ArgumentParser(
        prog=program, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False
    )
    add_source_arguments(parser)
    return parser


def parse_source(program: str, words: list[str]) -> Source | None:
    """Parse SOURCE.

    Args:
        program: The command, for error messages.
        words: Those that the command's own options leave; others than SOURCE's end in an argparse error.

    Returns:
        The source; None without words.
    """
    if not words:
        return None
    parser = source_parser(program)
    known = set(re.findall(r"--[a-z][a-z-]*", parser.format_help()))
    options = [word for word in words if word.startswith("-")]
    unknown = [word for word in options if word.startswith("--") and word.partition("=")[0] not in known]
    if unknown or not options:
        parser.error(f"unrecognized arguments: {' '.join(unknown or words)}")
    return source_from(parser.parse_args(words))


def open_documents(opened: OpenedModel, named: Source | None) -> DocumentSource:
    """Open a source that a command line names, or the run's held-out documents, all of them.

    Raises:
        UserError: There is no such file, or the run has no held-out documents.
    """
    source, split = held_out_source(opened.table.get("data", {})) if named is None else (named, "all")
    return open_source(source, tokenizer_fingerprint=opened.tokenizer.fingerprint, split=split)
