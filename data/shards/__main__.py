"""Tokenize text once into shards, so that training never tokenizes.

    python -m data.shards prepare --parts 1-4 --tokenizer Qwen/Qwen3-0.6B-Base --out .cache/ultra_fineweb
    python -m data.shards verify .cache/ultra_fineweb
    python -m data.shards verify --sources .cache/own_text
    python -m data.shards info .cache/ultra_fineweb

`prepare` may be stopped or killed at any time; the same command resumes it.
data/sources/shard_format.py describes the files.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from data.config import DatasetsSource, HubSource
from data.shards.encode import num_cores
from data.shards.prepare import PrepareOptions, Progress, prepare
from data.shards.source_files import verify_sources
from data.shards.verify import length_histogram, verify
from data.sources.cli import add_source_arguments, naming_options, source_from
from data.sources.files import FileDocuments
from data.sources.open import open_text
from data.sources.shard_format import SPLITS, Manifest, read_manifest
from data.tokenizer import Tokenizer
from errors import check_out, run_command
from tokens import END_OF_DOCUMENT

# rows that `info` lays out for the mean context, of the whole set where it is smaller
_CONTEXT_ROWS = 1 << 14
_BAR = "{percentage:5.1f}%|{bar:20}| {elapsed}, {remaining} left{postfix}"


class _ProgressBar:
    """Progress bar of a preparation, with an estimate of the remaining time."""

    def __init__(self) -> None:
        # a log gets a line per minute, a terminal a moving bar
        self._bar = tqdm(
            total=1.0, bar_format=_BAR, mininterval=0.5 if sys.stderr.isatty() else 60.0, smoothing=0.1
        )
        self._since = time.monotonic()
        self._first: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        if self._first is None:
            # shards of an earlier run do not count for the speed
            self._first = progress
            self._bar.initial = self._bar.n = progress.fraction
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = (progress.tokens - self._first.tokens) / seconds
        self._bar.set_postfix_str(
            f"{progress.tokens:,} tokens, {progress.documents:,} documents, "
            f"{progress.shards} shard{'s' * (progress.shards != 1)}, "
            f"{rate:,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(progress.fraction - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command-line arguments; None for sys.argv[1:].

    Returns:
        The exit code: 0, or 1 if `verify` finds damage.

    Raises:
        UserError: An option is wrong, or the source or the folder cannot be read.
    """
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.shards",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        "prepare", help="tokenize a source into shards, or resume", allow_abbrev=False
    )
    command.set_defaults(run=_prepare)
    command.add_argument("--out", type=Path, required=True, help="folder to write to")
    command.add_argument(
        "--tokenizer", required=True, help="folder, tokenizer.json, or a model's name on the hub"
    )
    command.add_argument("--end-of-document", default=END_OF_DOCUMENT, help="token that ends each document")
    add_source_arguments(command)
    group = command.add_argument_group("shards")
    group.add_argument("--shard-tokens", type=int, default=1 << 26, help="tokens per shard (default 67M)")
    group.add_argument("--max-tokens", type=int, help="stop at this many tokens (default: the whole source)")
    group.add_argument("--processes", type=int, help="processes that tokenize (default: one per core)")
    group.add_argument(
        "--delete-downloads",
        action="store_true",
        help="delete each file of the hub from the cache once it is tokenized",
    )
    for name, run, text in (
        ("verify", _verify, "check every file against its hashes and counts"),
        (
            "info",
            _info,
            "print the counts of the shards, documents by length, and the mean context per token",
        ),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("folder", type=Path, help="a prepared folder")
        if run is _verify:
            command.add_argument(
                "--sources",
                action="store_true",
                help="check the local files that it was prepared from too",
            )
        else:
            command.add_argument(
                "--seq-len", type=int, default=4096, help="tokens per row, for the mean context (4096)"
            )
    return parser


def _prepare(options: argparse.Namespace) -> int:
    disable_progress_bars()
    check_out(options.out)
    with naming_options(options):
        config = source_from(options)
        tokenizer = Tokenizer.load(options.tokenizer, end_of_document=options.end_of_document)
        source = open_text(config)
    prepare_options = PrepareOptions(
        shard_tokens=options.shard_tokens,
        max_tokens=options.max_tokens,
        num_processes=num_cores() if options.processes is None else options.processes,
        delete_downloads=options.delete_downloads,
    )
    try:
        with contextlib.closing(_ProgressBar()) as bar, naming_options(options):
            manifest = prepare(
                options.out,
                source,
                tokenizer,
                prepare_options,
                description=_description(config, source),
                report=bar,
            )
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept, and the same command resumes", file=sys.stderr)
        raise
    _print(options.out, manifest)
    return 0


def _verify(options: argparse.Namespace) -> int:
    damaged: list[Path] = []
    for path, problems in verify(options.folder):
        damaged += [path] if problems else []
        for problem in problems:
            print(problem)
    if damaged:
        print(f"{options.folder} is damaged: delete these, and run the same `prepare` again")
        for path in damaged:
            print(f"  {path}")
        return 1
    _print(options.folder, read_manifest(options.folder))
    print("  all hashes and counts match")
    return _verify_sources(options.folder) if options.sources else 0


def _verify_sources(folder: Path) -> int:
    found = [problem for _, problem in verify_sources(folder)]
    problems = [problem for problem in found if problem is not None]
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} of {len(found)} source files have changed since {folder} was prepared")
        return 1
    print(f"  all {len(found)} source files match their hashes")
    return 0


def _info(options: argparse.Namespace) -> int:
    manifest = read_manifest(options.folder)
    _print(options.folder, manifest)
    for split in SPLITS:
        print(f"  {split} documents by length in tokens:")
        rows = length_histogram(options.folder, split)
        largest = max((documents for _, documents, _ in rows), default=0)
        for power, documents, tokens in rows:
            bar = "#" * round(30 * documents / largest)
            print(f"  {power:>11,} to {2 * power - 1:>11,} {documents:>13,} {tokens:>17,} tokens  {bar}")
    if manifest.splits["train"].documents:
        _print_context(options.folder, options.seq_len)
    return 0


def _print_context(folder: Path, seq_len: int) -> None:
    # it imports torch, which the worker processes of `prepare` would import too
    from data.shards.context import measure_context

    print(f"  mean context per token in rows of {seq_len:,} (tokens of its document before it in its row):")
    for each in measure_context(folder, seq_len, _CONTEXT_ROWS):
        sample = "all" if each.is_whole else "the first"
        print(
            f"  {each.packing:>14} {each.served:>11,.1f}, without the shuffle of rows {each.in_order:,.1f} "
            f"({sample} {each.num_rows:,} rows of an epoch)"
        )


def _description(config: Any, source: FileDocuments) -> dict[str, Any]:
    """Return the manifest's entries about the source."""
    match config:
        case HubSource():
            return asdict(config)
        case DatasetsSource():
            # the commit that "the newest one" was
            return {**asdict(config), "identity": source.files[0].identity}
        case _:
            return {**asdict(config), "files": [str(file) for file in source.files]}


def _print(folder: Path, manifest: Manifest) -> None:
    settings = manifest.settings
    source, tokenizer = settings["source"], settings["tokenizer"]
    num_shards = len(manifest.shards)
    # `prepare` of a program may leave the source unnamed
    kind = f" of {source['kind']} files" if "kind" in source else ""
    print(f"{folder}: {num_shards} shard{'s' * (num_shards > 1)}{kind}")
    if "revision" in source:
        name = source["repository"] if "repository" in source else source["path"]
        print(f"  {'source':<11}{name} at revision {source['revision'] or 'none'}")
    print(f"  {'tokenizer':<11}{tokenizer['name']}, {tokenizer['vocab_size']:,} ids")
    for split, summary in manifest.splits.items():
        print(f"  {split:<11}{summary.documents:>13,} documents {summary.tokens:>17,} tokens")
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items())
    print(f"  {'skipped':<11}{skipped or 'none'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
