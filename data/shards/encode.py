"""Documents to token bytes, in this process or in several others."""

import contextlib
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple, TypeAlias

import numpy as np

from data.sources.shard_format import TOKEN, ShardSplit
from data.sources.split import is_held_out
from data.tokenizer import Tokenizer


class EncodedDocument(NamedTuple):
    """A document as shards hold it.

    Attributes:
        tokens: Its ids and the one that ends it, uint32 little-endian.
        crc32: Their checksum.
        split: Where it belongs.
    """

    tokens: bytes
    crc32: int
    split: ShardSplit


Encode: TypeAlias = Callable[[list[str]], "Future[list[EncodedDocument]]"]


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    # Not every system has a way to give a process only some.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[EncodedDocument]:
    """Tokenize documents.

    Args:
        tokenizer: Turns them into tokens, and knows which one ends a document.
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
    """Give a function that tokenizes a batch of documents, in other processes if there are to be any.

    Args:
        tokenizer: Turns them into tokens.
        num_processes: Number of other processes; 0 to tokenize in this one.
    """
    if not num_processes:
        yield lambda texts: _done(encode_documents(tokenizer, texts))
        return
    # Not forked: the library's threads would not come along, and what they hold would stay held.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _start_process, (tokenizer,)) as pool:
        try:
            yield lambda texts: pool.submit(_encode, texts)
        finally:
            pool.shutdown(cancel_futures=True)


def _done(documents: list[EncodedDocument]) -> Future[list[EncodedDocument]]:
    future: Future[list[EncodedDocument]] = Future()
    future.set_result(documents)
    return future


# Of a process that tokenizes: the tokenizer it was started with.
_tokenizer: list[Tokenizer] = []


def _start_process(tokenizer: Tokenizer) -> None:
    # An interrupt from the keyboard goes to every process; the first one ends the others in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process a core: the library's own threads would only be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer[:] = [tokenizer]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is killed, which cannot tell its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> list[EncodedDocument]:
    return encode_documents(_tokenizer[0], texts)
