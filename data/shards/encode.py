"""Tokenize documents to bytes, in this process or in a pool of processes."""

import contextlib
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple, TypeAlias

import numpy as np

from data.parent import exit_with_parent
from data.sources.shard_format import TOKEN, ShardSplit
from data.sources.split import is_held_out
from data.tokenizer import Tokenizer


class EncodedDocument(NamedTuple):
    """A document as stored in shards.

    Attributes:
        tokens: Token ids, the end-of-document token included, as bytes of uint32 little-endian.
        crc32: Checksum of the bytes.
        split: Split of the document.
    """

    tokens: bytes
    crc32: int
    split: ShardSplit


Encode: TypeAlias = Callable[[list[str]], "Future[list[EncodedDocument]]"]


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    # sched_getaffinity does not exist on every system
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[EncodedDocument]:
    """Tokenize documents.

    Args:
        tokenizer: The tokenizer, whose end-of-document token is appended.
        texts: The documents.
    """
    documents = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        tokens = np.array([*ids, tokenizer.end_of_document_id], dtype=TOKEN).tobytes()
        split: ShardSplit = "held_out" if is_held_out(text) else "train"
        documents.append(EncodedDocument(tokens, zlib.crc32(tokens), split))
    return documents


@contextlib.contextmanager
def encoder(tokenizer: Tokenizer, num_processes: int) -> Iterator[Encode]:
    """Yield a function that tokenizes a batch of documents and returns a future.

    Args:
        tokenizer: The tokenizer.
        num_processes: Size of the process pool; 0 to tokenize in this process.
    """
    if not num_processes:
        yield lambda texts: _completed(encode_documents(tokenizer, texts))
        return
    # not fork: the library's threads would be missing in the child, and the locks that they hold stay locked
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _start_worker, (tokenizer,)) as pool:
        try:
            yield lambda texts: pool.submit(_encode, texts)
        finally:
            pool.shutdown(cancel_futures=True)


def _completed(documents: list[EncodedDocument]) -> Future[list[EncodedDocument]]:
    future: Future[list[EncodedDocument]] = Future()
    future.set_result(documents)
    return future


# the tokenizer of a worker process, set when it starts
_tokenizer: list[Tokenizer] = []


def _start_worker(tokenizer: Tokenizer) -> None:
    # Ctrl-C interrupts every process of the group; the main process shuts the workers down
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # one process per core: the library's own threads would oversubscribe the cores
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer[:] = [tokenizer]
    exit_with_parent()


def _encode(texts: list[str]) -> list[EncodedDocument]:
    return encode_documents(_tokenizer[0], texts)
