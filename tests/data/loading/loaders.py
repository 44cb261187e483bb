"""Loaders of small sources, and comparisons of their micro-batches, for the tests of loading."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from data.loading.loader import PackedLoader
from data.loading.packing import MicroBatch
from data.tokenizer import Tokenizer

# files with skipped rows at the start, middle and end, and documents shorter and longer than a row
FILES: list[list[object]] = [
    [None, "ab", "", "cdefghijklmnopqrstuvwxyz" * 3, "g", 7],
    [],
    ["hijk", "lmnopqrstu", None, None, "vw", "xyz0123456789", "  "],
]
TEXTS = [text for file in FILES for text in file if isinstance(text, str) and text.strip()]


def token_stream(tokenizer: Tokenizer, texts: Sequence[str], num_epochs: int = 1) -> list[int]:
    """Concatenated tokens of documents."""
    documents = [[*tokenizer.encode(text), tokenizer.end_of_document_id] for text in texts]
    return list(itertools.chain.from_iterable(documents)) * num_epochs


def make_loader(source: Any, tokenizer: Tokenizer, **changes: Any) -> PackedLoader:
    """A loader of small batches; `changes` override its arguments."""
    sizes: dict[str, Any] = {
        "seq_len": 8,
        "local_batch_size": 1,
        "global_batch_size": 4,
        "dp_rank": 0,
        "dp_world_size": 1,
        "prefetch_batches": 0,
    }
    return PackedLoader(source, tokenizer, **{**sizes, **changes})


def take(loader: PackedLoader, count: int) -> list[MicroBatch]:
    """The next `count` micro-batches."""
    return list(itertools.islice(loader, count))


def are_equal(first: Sequence[MicroBatch], second: Sequence[MicroBatch]) -> bool:
    """Whether two lists of micro-batches are bit-identical."""
    return len(first) == len(second) and all(
        torch.equal(a_labels, b_labels)
        and a_input.keys() == b_input.keys()
        and all(torch.equal(a_input[name], b_input[name]) for name in a_input)
        for (a_input, a_labels), (b_input, b_labels) in zip(first, second, strict=True)
    )


def epoch_of(loader: PackedLoader) -> int:
    """The epoch of a loader's position."""
    return (loader.state_dict()["position"]["position"] or {"epoch": 0})["epoch"]


def make_ranks(source: Any, tokenizer: Tokenizer, world: int, **changes: Any) -> list[PackedLoader]:
    """One loader per rank."""
    return [
        make_loader(source, tokenizer, dp_rank=rank, dp_world_size=world, **changes) for rank in range(world)
    ]


def take_steps(loaders: Sequence[PackedLoader], num_micro_steps: int, num_steps: int) -> list[torch.Tensor]:
    """Rows of each global batch in their global order, from the micro-batches of all ranks."""
    iterators = [iter(loader) for loader in loaders]
    steps = []
    for _ in range(num_steps):
        rows = [next(iterator)[0]["input"] for _ in range(num_micro_steps) for iterator in iterators]
        steps.append(torch.cat(rows))
    for loader in loaders:
        loader.close()
    return steps
