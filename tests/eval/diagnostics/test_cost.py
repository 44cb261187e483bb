"""What a measurement costs the host: no wait for the device before its end, and few operators.

On the meta device whatever reads a value raises, such as float(x), a list, a mask as an index.
"""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eval.diagnostics import collect as collect_module
from eval.diagnostics.collect import collect, measure_layer
from eval.diagnostics.sample import draw_queries
from models.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    LocalLinearConfig,
    Mamba2Config,
    ParallaxConfig,
    SoftmaxConfig,
)
from tests.eval.diagnostics.test_collect import BATCH, SEQ_LEN, build

SAMPLE = draw_queries(BATCH, SEQ_LEN, num_queries=100)
MAX_OPERATORS = 420
"""Of a layer's measurement, views included, whose rows are one piece; 410 on 29 November 2026."""


class Counter(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyrefly: ignore
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tensors of each transfer to the host, whose values are made up."""
    found: list[int] = []

    def to_host(tables: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        assert all(x.is_meta for table in tables for x in table.values())
        found.append(sum(map(len, tables)))
        return [{name: torch.rand(x.shape) for name, x in table.items()} for table in tables]

    monkeypatch.setattr(collect_module, "to_host", to_host)
    return found


@pytest.mark.parametrize(
    "attention",
    [
        ParallaxConfig(),
        ParallaxConfig(window_size=6, gate="head", r_heads="kv"),
        ParallaxConfig(num_plain_layers=2, r_rank=8),
        SoftmaxConfig(),
        LocalLinearConfig(),
        Mamba2Config(),
        GatedDeltaNetConfig(),
    ],
    ids=["parallax", "window-gate-kv", "plain-low-rank", "softmax", "lla", "mamba2", "delta-net"],
)
def test_a_measurement_reads_the_device_once(attention: AttentionConfig, transfers: list[int]) -> None:
    layers = collect(build(attention).to("meta"), SAMPLE, set="cheap")
    assert len(transfers) == 1
    assert [layer.layer for layer in layers] == [0, 1, 2, 3]
    assert all(values["stable_rank"] is not None for layer in layers for values in layer.weights.values())


def test_a_layer_takes_few_operators(transfers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def counted(*arguments, **options):  # pyrefly: ignore
        with Counter() as counter:
            found = measure_layer(*arguments, **options)
        counts.append(counter.count)
        return found

    monkeypatch.setattr(collect_module, "measure_layer", counted)
    collect(build(ParallaxConfig()).to("meta"), SAMPLE, set="cheap")
    assert len({*counts}) == 1
    assert counts[0] <= MAX_OPERATORS, counts
