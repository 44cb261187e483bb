"""Command-line options that describe a source of text, for commands that run without a config."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager

from data.config import DatasetsSource, HubSource, JsonlSource, ParquetSource, TextKind, TextSource
from data.ultra_fineweb import REPOSITORY
from errors import UserError, called, calling_options

_JSONL_NAME = re.compile(r".*\.(jsonl|json|ndjson)(\.(gz|bz2|zst|zstd|lz4|xz))?", re.DOTALL)
# kinds of sources that an option belongs to
_KINDS_OF = {
    "pattern": ("folder",),
    "language": ("parts",),
    "repository": ("parts", "hub_files"),
    "revision": ("parts", "hub_files", "dataset"),
    "name": ("dataset",),
    "split": ("dataset",),
    "streaming": ("dataset",),
}


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a source of text to a parser."""
    group = parser.add_argument_group(
        "source (one of --files, --folder, --parts, --hub-files and --dataset is required)"
    )
    kinds = group.add_mutually_exclusive_group(required=True)
    kinds.add_argument(
        "--files", nargs="+", metavar="GLOB", help="local .parquet or .jsonl[.gz|.zst|..] files"
    )
    kinds.add_argument("--folder", help="a folder of text files, one document per file")
    kinds.add_argument("--parts", help='parts of Ultra-FineWeb on the hub, such as "1-20" or "1-4,9"')
    kinds.add_argument(
        "--hub-files", nargs="+", metavar="PATH", help="parquet files of a dataset on the Hugging Face hub"
    )
    kinds.add_argument(
        "--dataset",
        metavar="NAME",
        help="a dataset of the `datasets` library: its name on the hub, or a folder",
    )
    group.add_argument("--pattern", help='glob of the files in --folder (default "**/*.txt")')
    group.add_argument(
        "--language", choices=("en", "zh"), help='Ultra-FineWeb\'s language for --parts (default "en")'
    )
    group.add_argument("--repository", help=f"dataset on the hub of --hub-files (default {REPOSITORY})")
    group.add_argument("--revision", help="its commit (default: one of Ultra-FineWeb, or --dataset's newest)")
    group.add_argument("--name", help="config of --dataset (default: its only or default one)")
    group.add_argument("--split", help='split of --dataset (default "train")')
    group.add_argument(
        "--streaming", action="store_true", default=None, help="read --dataset without downloading it first"
    )
    group = parser.add_argument_group("columns and filters")
    group.add_argument(
        "--text-column",
        help='column or key, as text or data.text (default "content", for JSONL and --dataset "text")',
    )
    group.add_argument("--score-column", help='column or key of the quality score (default "score")')
    group.add_argument("--min-score", type=float, help="skip rows with a lower score")
    group.add_argument("--min-characters", type=int, help="skip shorter documents")
    group.add_argument("--max-characters", type=int, help="skip longer documents")
    group.add_argument(
        "--on-damaged-file",
        choices=("stop", "skip"),
        default="stop",
        help="stop with the file's name, or skip the rest of the file (default %(default)s)",
    )


@contextmanager
def naming_options(options: argparse.Namespace) -> Iterator[None]:
    """Let errors name the options of a command line in the place of a config's keys.

    Args:
        options: Parsed by a parser that was passed to `add_source_arguments`.
    """
    names = {key: f"--{key.replace('_', '-')}" for key in vars(options)}
    names |= {"path": "--dataset", "files": "--hub-files" if options.files is None else "--files"}
    with calling_options(names):
        yield


def source_from(options: argparse.Namespace) -> TextKind:
    """Build the source that command-line options describe.

    Args:
        options: Parsed by a parser that was passed to `add_source_arguments`.

    Raises:
        UserError: The options contradict each other.
    """
    limits = _given(options, "min_characters", "max_characters", "on_damaged_file")
    columns = _given(options, "text_column", "score_column", "min_score")
    for name, kinds in _KINDS_OF.items():
        if getattr(options, name) is not None and all(getattr(options, kind) is None for kind in kinds):
            those = " or ".join(f"--{kind.replace('_', '-')}" for kind in kinds)
            raise UserError(f"--{name} given without {those}: other sources have none")
    if options.folder is not None:
        if columns:
            names = ", ".join(map(called, columns))
            raise UserError(f"{names} given with --folder: text files have no columns")
        return TextSource(folder=options.folder, **_given(options, "pattern"), **limits)
    if options.dataset is not None:
        dataset = _given(options, "name", "split", "streaming", "revision")
        return DatasetsSource(path=options.dataset, **dataset, **limits, **columns)
    if options.files is None:
        files = _given(options, "language", "parts", "repository", "revision")
        if options.hub_files is not None:
            files["files"] = options.hub_files
        return HubSource(**files, **limits, **columns)
    if all(name.endswith(".parquet") for name in options.files):
        return ParquetSource(files=options.files, **limits, **columns)
    if all(_JSONL_NAME.fullmatch(name) for name in options.files):
        return JsonlSource(files=options.files, **limits, **columns)
    raise UserError(
        f"--files is {options.files}: want all of them .parquet, or all of them .jsonl[.gz|.zst|..]; "
        "text files are read by --folder and --pattern"
    )


def _given(options: argparse.Namespace, *names: str) -> dict:
    """Return the options that are set, by name."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}
