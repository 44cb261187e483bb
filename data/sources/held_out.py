"""The documents of a held-out loss: all of data.validation, or a sample of them drawn by a fixed seed.

The sample has eight times the tokens of an evaluation, which takes evenly spaced rows of it
(data/loading/held_out.py). The seed is a constant: all runs of a comparison draw the same documents of the
same source, on any number of ranks. From shards they are taken in the permuted order of the index
(data/permutation.py). From text and mixtures they are drawn in one pass (data/sources/document_sample.py), by
the main rank before the first evaluation, and kept in the run folder for the other ranks and for a resume. A
mixture is sampled as the union of its sources, which is what it reads without a limit. The last document is
truncated.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.config import DataConfig, HubSource, LeafSource, MixtureSource, ShardsSource, Source
from data.progress import Progress
from data.sources.base import DocumentSource, Position, Row, TokenSequence
from data.sources.document_sample import DocumentSample, draw_sample
from data.sources.open import open_source
from data.tokenizer import Tokenizer

logger = logging.getLogger("parallax")

SEED = 0
DRAWN_PER_TOKEN = 8
"""Tokens of the sample per token of an evaluation: more would cost memory, and of text disk."""

MAX_HUB_FILES = 8
"""Files of a hub source from which a sample is drawn: a file of Ultra-FineWeb takes over a gigabyte."""

_POLL_SECONDS = 0.5


def open_held_out(
    config: DataConfig, tokenizer: Tokenizer, *, max_tokens: int | None, kept_in: Path, is_main_rank: bool
) -> DocumentSource:
    """Open the documents on which the held-out loss is measured.

    Args:
        config: The `[data]` table; it has a validation source.
        tokenizer: Tokenizes text.
        max_tokens: Tokens of an evaluation, of which the sample has DRAWN_PER_TOKEN times as many; None for
            all documents.
        kept_in: Folder of the samples drawn from text, shared by all ranks.
        is_main_rank: Whether this rank draws a sample that is not there yet; the others wait for the file:
            a collective would time out.

    Raises:
        UserError: A file is missing or damaged.
    """
    assert config.validation is not None
    source, split = config.validation, config.validation_documents

    def opened(leaf: Source, shuffle_seed: int | None = None) -> DocumentSource:
        return open_source(
            leaf,
            tokenizer_fingerprint=tokenizer.fingerprint,
            split=split,
            shuffle_seed=shuffle_seed,
            log_skipped=is_main_rank,
        )

    if max_tokens is None:
        return opened(source)
    if isinstance(source, ShardsSource):
        return FirstTokens(opened(source, SEED), DRAWN_PER_TOKEN * max_tokens)
    leaves = [_bounded(leaf) for leaf in _leaves(source)]
    sources = [opened(leaf) for leaf in leaves]
    num_tokens = DRAWN_PER_TOKEN * max_tokens
    parts = [SEED, num_tokens, tokenizer.fingerprint, *(each.fingerprint for each in sources)]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    file = kept_in / f"{fingerprint}.npz"
    if is_main_rank and not file.exists():
        _draw(sources, tokenizer, num_tokens, fingerprint).save(file)
    while not file.exists():
        time.sleep(_POLL_SECONDS)
    return DocumentSample.load(file, fingerprint)


class FirstTokens:
    """The first documents of a source, with a number of tokens in all; the last is truncated.

    Args:
        source: Documents as tokens, which stay unread.
        max_tokens: Their number of tokens.
    """

    def __init__(self, source: DocumentSource, max_tokens: int) -> None:
        self._source = source
        self._max_tokens = max_tokens

    def __str__(self) -> str:
        return f"{self._max_tokens:,} tokens of {self._source}"

    @property
    def fingerprint(self) -> str:
        """Hash of the documents."""
        return f"{self._source.fingerprint}-{self._max_tokens}"

    def read(self, position: Position | None = None, *, repeat: bool) -> Iterator[Row]:
        """Yield rows from the start.

        Args:
            position: Must be None: the tokens before a position are not known.
            repeat: Must be False.
        """
        assert position is None, "the sample is read from its start"
        assert not repeat, "the sample is read for validation"
        num_left = self._max_tokens
        for row in self._source.read(repeat=False):
            if row.tokens is None:
                yield row._replace(next_position={"num_left": num_left})
                continue
            length = min(num_left, len(row.tokens))
            num_left -= length
            yield Row({"num_left": num_left}, tokens=_Head(row.tokens, length))
            if not num_left:
                return

    def progress(self, position: Position | None) -> float:
        """Return the fraction of the tokens that precede a position; the source may have fewer of them."""
        return 0.0 if position is None else 1 - position["num_left"] / self._max_tokens


class _Head:
    """The first tokens of a document, unread until they are needed."""

    def __init__(self, tokens: TokenSequence, length: int) -> None:
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, which: slice, /) -> np.ndarray:
        return self._tokens[: self._length][which]


def _draw(
    sources: list[DocumentSource], tokenizer: Tokenizer, max_tokens: int, fingerprint: str
) -> DocumentSample:
    names = ", ".join(map(str, sources))
    logger.info(f"drawing {max_tokens:,} held-out tokens in one pass over {names}; kept for a resume")
    start = time.monotonic()
    progress = Progress(logger.info)
    progress.start("drawing held-out tokens")
    sample = draw_sample(sources, tokenizer, max_tokens, fingerprint, progress)
    seconds = time.monotonic() - start
    logger.info(f"drew {sample.num_tokens:,} tokens of {sample.num_documents:,} documents in {seconds:.0f} s")
    return sample


def _leaves(source: Source) -> list[LeafSource]:
    if isinstance(source, MixtureSource):
        return [source.sources[name] for name in sorted(source.sources)]
    return [source]


def _bounded(leaf: LeafSource) -> LeafSource:
    """Restrict a hub source to MAX_HUB_FILES, which a pass downloads, chosen by a hash of their names."""
    if not isinstance(leaf, HubSource) or len(leaf.file_names) <= MAX_HUB_FILES:
        return leaf
    names = sorted(leaf.file_names, key=lambda name: hashlib.sha256(f"{SEED} {name}".encode()).digest())
    logger.info(
        f"held-out documents are drawn from {MAX_HUB_FILES} of the {len(names)} files of {leaf.repository}"
    )
    return replace(leaf, parts=None, files=sorted(names[:MAX_HUB_FILES]))
