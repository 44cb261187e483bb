"""Make a small corpus of real text without a download: the running Python's own standard library.

`python -m data.sample --out .cache/sample` writes train.parquet and validation.parquet in Ultra-FineWeb's
schema (content: string, score: float32, source: string), a tokenizer.json trained on the training split, and
sample.json with counts and the unigram entropy of the held-out text. A complete folder is left unchanged; one
with a missing or damaged file, or with other settings, is made again.
"""

import argparse
import hashlib
import importlib
import json
import math
import platform
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data.sources.split import content_hash, is_held_out
from data.tokenizer import Tokenizer
from data.train_tokenizer import check_vocab_size, train_byte_level_bpe
from disk import replacing, write_text
from errors import UserError, check_out, run_command
from tokens import TOKENIZER_FILE

TRAIN_FILE = "train.parquet"
VALIDATION_FILE = "validation.parquet"
SUMMARY_FILE = "sample.json"

_FORMAT = 1
_SCHEMA = pa.schema([("content", pa.string()), ("score", pa.float32()), ("source", pa.string())])
_ROW_GROUP_ROWS = 128
_BATCH_DOCUMENTS = 64
_MAX_FILE_BYTES = 1 << 18
_MIN_DOCUMENT_BYTES = 200
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "lib2to3"}


class Text(NamedTuple):
    """A document and its origin in the library."""

    content: str
    source: str


def collect(library: Path) -> list[Text]:
    """Collect the documents of a standard library, deduplicated, in order of a hash of their content.

    A module's source is one document, and so is each help topic of pydoc. Tests, generated files, files of
    more than 256 KiB and files that are not UTF-8 are left out.

    Args:
        library: The folder of the library's modules.

    Raises:
        UserError: The folder holds no Python source.
    """
    found: dict[str, str] = {}
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if _SKIPPED_FOLDERS.intersection(parts) or file.stat().st_size > _MAX_FILE_BYTES:
            continue
        try:
            content = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if "generated" not in content[:1000].lower():
            found.setdefault(content, "python-source/" + "/".join(parts))
    if not found:
        raise UserError(
            f"{library} holds no Python source: use a Python whose standard library has its source files"
        )
    for topic, content in _help_topics().items():
        found.setdefault(content, f"python-help/{topic}")
    texts = [
        Text(content, source) for content, source in found.items() if len(content) >= _MIN_DOCUMENT_BYTES
    ]
    # not by the first bytes of the hash, which decide the split: truncation would favor held-out documents
    return sorted(texts, key=lambda text: content_hash(text.content)[8:])


def truncate(texts: Iterable[Text], max_bytes: int) -> list[Text]:
    """Return the first documents of at most `max_bytes` of UTF-8 in all."""
    kept: list[Text] = []
    for text in texts:
        max_bytes -= len(text.content.encode())
        if max_bytes < 0:
            break
        kept.append(text)
    return kept


def unigram_entropy(counts: Counter[int]) -> float:
    """Return the entropy of an empirical token distribution in nats/token.

    It is the lowest loss of a model that ignores a token's context.

    Args:
        counts: Number of occurrences of each token id.
    """
    total = counts.total()
    return sum(count / total * math.log(total / count) for count in counts.values())


def make(
    out: Path, *, vocab_size: int = 4096, max_bytes: int = 10_000_000, force: bool = False
) -> dict[str, Any]:
    """Make the sample, unless the folder holds a complete one with the same settings.

    Args:
        out: Folder to write to; created if missing.
        vocab_size: Size of the tokenizer's vocabulary.
        max_bytes: Maximum bytes of text, the held-out split included.
        force: Whether to replace a complete sample too.

    Returns:
        The content of sample.json.

    Raises:
        UserError: There is too little text for a training and a held-out split, or `vocab_size` is out of
            range.
        DiskFullError: The disk is full.
    """
    settings = {
        "format": _FORMAT,
        "python": platform.python_version(),
        "vocab_size": vocab_size,
        "max_bytes": max_bytes,
    }
    check_vocab_size(vocab_size)  # before anything is deleted
    if not force and (summary := _complete(out, settings)) is not None:
        return summary
    texts = truncate(collect(Path(sysconfig.get_paths()["stdlib"])), max_bytes)
    train = [text for text in texts if not is_held_out(text.content)]
    validation = [text for text in texts if is_held_out(text.content)]
    if not train or not validation:
        raise UserError(
            f"max_bytes is {max_bytes}, which leaves {len(train)} training documents and "
            f"{len(validation)} held-out ones: increase it"
        )
    out.mkdir(parents=True, exist_ok=True)
    # the summary marks the folder complete: it is deleted first and written last
    (out / SUMMARY_FILE).unlink(missing_ok=True)
    for name, split in ((TRAIN_FILE, train), (VALIDATION_FILE, validation)):
        with replacing(out / name) as temporary:
            _write_parquet(split, temporary)
    tokenizer = Tokenizer(train_byte_level_bpe((text.content for text in train), vocab_size))
    tokenizer.save(out / TOKENIZER_FILE)
    counts = {"train": _count(train, tokenizer), "validation": _count(validation, tokenizer)}
    summary = {
        "settings": settings,
        "tokenizer_vocab_size": tokenizer.vocab_size,
        **{key: sum(sizes[key] for sizes, _ in counts.values()) for key in ("documents", "bytes", "tokens")},
        **{name: sizes for name, (sizes, _) in counts.items()},
        "unigram_entropy_nats": unigram_entropy(counts["validation"][1]),
        "sha256": {name: _sha256(out / name) for name in (TRAIN_FILE, VALIDATION_FILE, TOKENIZER_FILE)},
    }
    write_text(out / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Command-line arguments; None for sys.argv[1:].

    Raises:
        UserError: The sample cannot be made.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data.sample",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--vocab-size", type=int, default=4096, help="size of the tokenizer's vocabulary")
    parser.add_argument("--max-bytes", type=int, default=10_000_000, help="maximum bytes of text")
    parser.add_argument("--force", action="store_true", help="replace a complete sample too")
    options = parser.parse_args(arguments)
    check_out(options.out)
    summary = make(
        options.out, vocab_size=options.vocab_size, max_bytes=options.max_bytes, force=options.force
    )
    print(f"{options.out}: standard library of Python {summary['settings']['python']}")
    for name in ("train", "validation"):
        sizes = summary[name]
        print(
            f"  {name + ':':<12}{sizes['documents']:>7,} documents {sizes['bytes']:>12,} bytes "
            f"{sizes['tokens']:>11,} tokens"
        )
    print(
        f"  unigram entropy of the held-out text: {summary['unigram_entropy_nats']:.4f} nats/token "
        f"({summary['tokenizer_vocab_size']} token ids)"
    )


def _help_topics() -> dict[str, str]:
    try:
        return dict(sorted(importlib.import_module("pydoc_data.topics").topics.items()))
    except ImportError:  # some distributions leave it out
        return {}


def _complete(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary of a complete sample with the same settings, else None."""
    try:
        summary = json.loads((out / SUMMARY_FILE).read_text())
        has_settings = summary["settings"] == settings
        is_intact = all(_sha256(out / name) == digest for name, digest in summary["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged: it is made again
    return summary if has_settings and is_intact else None


def _count(texts: list[Text], tokenizer: Tokenizer) -> tuple[dict[str, int], Counter[int]]:
    """Return the sizes of texts, and how often each token id is predicted: all but a text's first token."""
    predicted: Counter[int] = Counter()
    num_tokens = 0
    for first in range(0, len(texts), _BATCH_DOCUMENTS):
        batch = [text.content for text in texts[first : first + _BATCH_DOCUMENTS]]
        for ids in tokenizer.encode_batch(batch):
            document = [*ids, tokenizer.end_of_document_id]
            predicted.update(document[1:])
            num_tokens += len(document)
    num_bytes = sum(len(text.content.encode()) for text in texts)
    return {"documents": len(texts), "bytes": num_bytes, "tokens": num_tokens}, predicted


def _write_parquet(texts: list[Text], path: Path) -> None:
    table = pa.table(
        {
            "content": [text.content for text in texts],
            "score": [1.0] * len(texts),
            "source": [text.source for text in texts],
        },
        schema=_SCHEMA,
    )
    pq.write_table(table, path, row_group_size=_ROW_GROUP_ROWS)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(run_command(main))
