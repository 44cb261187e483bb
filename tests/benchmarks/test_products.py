"""The products of a layer, with a workspace and without."""

from collections import Counter

import pytest
import torch

from benchmarks import products
from benchmarks.products import layer_time, matrices, measure, time_products
from models.config import ModelConfig, SoftmaxConfig
from models.qwen3 import Block
from models.sizes import SIZES


@pytest.mark.parametrize("size", ["60m", "0.6b", "1.7b"])
def test_matrices_are_those_of_a_layer(size: str) -> None:
    with torch.device("meta"):
        block = Block(ModelConfig(size=size, vocab_size=16384, attention=SoftmaxConfig()), 0)
    weights = (p for p in block.parameters() if p.ndim == 2)
    assert matrices(SIZES[size]) == Counter(tuple(p.shape) for p in weights)


def test_a_layer_is_the_sum_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SIZES["debug"]
    asked = []

    def time_in_process(workspace: str | None, name: str, num_tokens: int) -> dict[str, float]:
        asked.append(workspace)
        speed = 1.0 if workspace is None else 0.5
        return {
            f"{kind} {m} x {n}": speed * len(asked) for kind in ("y", "dx", "dW") for m, n in matrices(size)
        }

    monkeypatch.setattr(products, "_time_in_process", time_in_process)
    times = measure("debug", 64)
    assert asked == [None, ":0:0"] * 3
    # the medians of 1, 3, 5 and of half of 2, 4, 6, for three products of each of seven matrices
    assert layer_time(size, times["with"]) == 21 * 3
    assert layer_time(size, times["without"]) == 21 * 2


@pytest.mark.gpu
def test_products_on_a_gpu() -> None:
    times = time_products(SIZES["debug"], 1024)
    assert len(times) == 3 * len(matrices(SIZES["debug"]))
    assert all(time > 0 for time in times.values())
