"""The held-out loss on a GPU: that of the CPU, without waiting for the device between batches."""

from collections.abc import Iterator

import pytest
import torch

from data.loading.held_out import HeldOutBatch
from eval.held_out import held_out_loss
from tokens import IGNORE_INDEX

pytestmark = pytest.mark.gpu
V, T = 50, 64


def make_batches(pinned: bool) -> list[HeldOutBatch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(40):
        labels = torch.randint(0, V, (1, T), generator=generator)
        labels[0, ::7] = IGNORE_INDEX
        documents = torch.full((1, T), number // 3)
        tensors = [labels.clone().clamp(min=0), labels, documents]
        inputs, labels, documents = [each.pin_memory() if pinned else each for each in tensors]
        batches.append(HeldOutBatch({"input": inputs}, labels, documents, number // 3 + 1, 0, 1.0))
    return batches


def label_as_loss(tokens: torch.Tensor, *, labels_BT: torch.Tensor, **_: object) -> torch.Tensor:
    return torch.where(labels_BT == IGNORE_INDEX, 0, labels_BT).float()


def without_synchronization(batches: list[HeldOutBatch]) -> Iterator[HeldOutBatch]:
    """Make anything that waits for the device raise, from the first batch to the last."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield from batches
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_do_not_wait_for_the_device() -> None:
    settings = {"vocab_size": V, "max_seqlen": T}
    expected = held_out_loss(label_as_loss, make_batches(False), device=torch.device("cpu"), **settings)
    batches = without_synchronization(make_batches(True))
    found = held_out_loss(label_as_loss, batches, device=torch.device("cuda"), **settings)
    assert vars(found) == pytest.approx(vars(expected), rel=1e-12)
