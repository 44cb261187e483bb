"""A uniform sample of documents from one pass over text: those whose content has the smallest hash.

The hash is keyed by a constant, so that every run draws the same documents from the same text, whatever the
order of the files and the number of ranks. Memory is bounded by the sample: after any number of documents, it
is the shortest list of those seen so far, by ascending hash, that has the wanted number of tokens. Documents
of equal content are drawn together.
"""

import hashlib
import heapq
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.progress import Progress
from data.sources.base import DocumentSource, Position, Row, TokenSequence, batches
from data.tokenizer import Tokenizer
from disk import replacing
from errors import UserError

# not that of data/sources/split.py: the split must not decide which of its documents are drawn
_HASH_KEY = b"held-out sample"


class DocumentSample:
    """Drawn documents as a source.

    Args:
        tokens: Tokens of all documents, int32 `[n]`, each with its end-of-document token unless truncated.
        ends: Index after each document's last token, int64 `[N]`.
        fingerprint: Hash of what the sample was drawn from, and how.
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, fingerprint: str) -> None:
        self._tokens, self._ends = tokens, ends
        self.fingerprint = fingerprint

    def __str__(self) -> str:
        return f"a sample of {len(self._ends):,} documents"

    @property
    def num_documents(self) -> int:
        """Number of drawn documents."""
        return len(self._ends)

    @property
    def num_tokens(self) -> int:
        """Number of their tokens."""
        return len(self._tokens)

    def read(self, position: Position | None = None, *, repeat: bool) -> Iterator[Row]:
        """Yield the documents in ascending order of their hashes.

        Args:
            position: A row's `next_position`; None for the start.
            repeat: Must be False.
        """
        assert not repeat, "a sample is read for validation"
        first = 0 if position is None else position["document"]
        bounds = list(pairwise([0, *self._ends.tolist()]))
        for number, (start, stop) in enumerate(bounds[first:], first + 1):
            yield Row({"document": number}, tokens=self._tokens[start:stop])

    def progress(self, position: Position | None) -> float:
        """Return the fraction of the tokens that precede a position."""
        num_documents = 0 if position is None else position["document"]
        return float(self._ends[num_documents - 1]) / len(self._tokens) if num_documents else 0.0

    def save(self, path: Path) -> None:
        """Write the sample to a .npz file, atomically; creates its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, tokens=self._tokens, ends=self._ends)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "DocumentSample":
        """Read a sample that `save` wrote.

        Raises:
            UserError: The file is damaged.
        """
        try:
            with np.load(path) as arrays:
                return cls(arrays["tokens"], arrays["ends"], fingerprint)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): delete it, and it is drawn again") from error


class _SmallestHashes:
    """The documents of smallest hash that together have max_tokens, in a heap with the largest hash first."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = self._count = 0
        # the count keeps documents of equal hash from being compared
        self._heap: list[tuple[int, int, TokenSequence]] = []

    def is_candidate(self, value: int) -> bool:
        """Return whether a document of this hash would be kept if it were added now."""
        return self._num_tokens < self._max_tokens or value < -self._heap[0][0]

    def add(self, value: int, tokens: TokenSequence) -> None:
        """Add a document, and drop those of larger hash that are not needed any more."""
        self._count += 1
        self._num_tokens += len(tokens)
        heapq.heappush(self._heap, (-value, self._count, tokens))
        while self._num_tokens - len(self._heap[0][2]) >= self._max_tokens:
            self._num_tokens -= len(heapq.heappop(self._heap)[2])

    def tokens(self) -> list[np.ndarray]:
        """Read the tokens of the documents by ascending hash, the last one truncated to max_tokens in all."""
        documents = [tokens[:].astype(np.int32) for _, _, tokens in sorted(self._heap, reverse=True)]
        excess = max(self._num_tokens - self._max_tokens, 0)
        return [*documents[:-1], *(last[: len(last) - excess] for last in documents[-1:])]


def draw_sample(
    sources: Sequence[DocumentSource],
    tokenizer: Tokenizer,
    max_tokens: int,
    fingerprint: str,
    progress: Progress | None = None,
) -> DocumentSample:
    """Draw documents until they have a number of tokens; reads every document of the sources once.

    Args:
        sources: Sources of text, or of shards in stored order, sampled as one set. Text is read whole, of
            shards the index.
        tokenizer: Tokenizes text.
        max_tokens: Number of tokens; the last document is truncated to it.
        fingerprint: Hash of what the sample is drawn from.
        progress: Told how much of the sources is read.

    Raises:
        UserError: A source is damaged.
    """
    drawn = _SmallestHashes(max_tokens)
    for index, source in enumerate(sources):
        shards, number = source.fingerprint, 0
        for batch in batches(source.read(repeat=False)):
            candidates: list[tuple[int, Row]] = []
            for row in batch:
                number += 1
                # tokens of shards stay unread: their place among all of the same content is as good
                content = f"{shards} {number}" if row.text is None else row.text
                value = _hash(content) if row.skipped is None else None
                if value is not None and drawn.is_candidate(value):
                    candidates.append((value, row))
            texts = [row.text for _, row in candidates if row.text is not None]
            encoded = iter(tokenizer.encode_batch(texts))
            for value, row in candidates:
                tokens = row.tokens
                if tokens is None:
                    tokens = np.array([*next(encoded), tokenizer.end_of_document_id], dtype=np.int32)
                drawn.add(value, tokens)
            if progress is not None:
                progress.update((index + source.progress(batch[-1].next_position)) / len(sources))
    documents = drawn.tokens()
    ends = np.cumsum([len(tokens) for tokens in documents], dtype=np.int64)
    return DocumentSample(np.concatenate(documents), ends, fingerprint)


def _hash(content: str) -> int:
    return int.from_bytes(hashlib.blake2b(content.encode(), key=_HASH_KEY, digest_size=16).digest())
