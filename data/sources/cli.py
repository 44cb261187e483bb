"""A source of text as words of a command line, for commands that read one without a run's config."""

import argparse

from data.config import HubSource, JsonlSource, ParquetSource, TextSource
from data.ultra_fineweb import REPOSITORY, REVISION

_JSONL_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".jsonl.bz2")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a source of text.

    Args:
        parser: Gets them.
    """
    where = parser.add_argument_group("where the text lies (one of the first four)")
    which = where.add_mutually_exclusive_group(required=True)
    which.add_argument("--files", nargs="+", metavar="GLOB", help="local .parquet or .jsonl[.gz|.zst] files")
    which.add_argument("--folder", help="a folder of text files, one document a file")
    which.add_argument("--parts", help='parts of Ultra-FineWeb on the hub, such as "1-20" or "1-4,9"')
    which.add_argument(
        "--hub-files", nargs="+", metavar="PATH", help="parquet files of a data set on the hub"
    )
    where.add_argument("--pattern", help='files of --folder (default "**/*.txt")')
    where.add_argument(
        "--language", choices=("en", "zh"), default="en", help="Ultra-FineWeb's set for --parts"
    )
    where.add_argument("--repository", default=REPOSITORY, help="data set on the hub (default %(default)s)")
    where.add_argument("--revision", default=REVISION, help="its commit (default: one of Ultra-FineWeb)")
    what = parser.add_argument_group("which of it")
    what.add_argument("--text-column", help='column or key (default "content", in JSONL "text")')
    what.add_argument("--score-column", help='column or key of the quality score (default "score")')
    what.add_argument("--min-score", type=float, help="skip rows of a lower score")
    what.add_argument("--min-characters", type=int, help="skip shorter documents")
    what.add_argument("--max-characters", type=int, help="skip longer documents")
    what.add_argument("--on-damaged-file", choices=("stop", "skip"), default="stop")


def source_from(options: argparse.Namespace) -> ParquetSource | JsonlSource | TextSource | HubSource:
    """Make the source that a command line names.

    Args:
        options: Parsed by a parser that `add_source_arguments` was given.

    Raises:
        ValueError: If the options do not fit each other.
    """
    limits = _given(options, "min_characters", "max_characters", "on_damaged_file")
    columns = _given(options, "text_column", "score_column", "min_score")
    if options.folder is not None:
        if columns:
            raise ValueError(f"{', '.join(columns)} given with --folder: text files have no columns")
        return TextSource(folder=options.folder, **_given(options, "pattern"), **limits)
    if options.pattern is not None:
        raise ValueError("--pattern given without --folder: --files takes globs")
    if options.files is None:
        files = {"language": options.language, "parts": options.parts}
        if options.hub_files is not None:
            files = {"files": options.hub_files}
        where = {"repository": options.repository, "revision": options.revision}
        return HubSource(**where, **files, **limits, **columns)
    if all(name.endswith(".parquet") for name in options.files):
        return ParquetSource(files=options.files, **limits, **columns)
    if all(name.endswith(_JSONL_SUFFIXES) for name in options.files):
        return JsonlSource(files=options.files, **limits, **columns)
    raise ValueError(
        f"--files is {options.files}: want all of them .parquet, or all of them .jsonl[.gz|.zst]"
    )


def _given(options: argparse.Namespace, *names: str) -> dict:
    return {name: value for name in names if (value := getattr(options, name)) is not None}
