"""Measurements on a GPU: the values of the CPU, and no wait for the device before the one copy."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.diagnostics import collect as collect_module
from eval.diagnostics.collect import collect, make_record
from eval.diagnostics.record import layer_values
from eval.diagnostics.transfer import to_host
from models.config import ParallaxConfig
from tests.eval.diagnostics.test_collect import SAMPLE, build
from tests.eval.diagnostics.test_cost import SAMPLE as DRAWN

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "attention",
    [ParallaxConfig(), ParallaxConfig(gate="token", r_rank=8, r_norm=False, num_plain_layers=2)],
    ids=["parallax", "gate-low-rank-plain"],
)
def test_values_are_those_of_the_cpu(attention: ParallaxConfig) -> None:
    ours, theirs = (
        make_record(collect(build(attention).to(device), SAMPLE, set="cheap"), SAMPLE, "cheap")
        for device in ("cuda", "cpu")
    )
    for one, two in zip(ours["layers"], theirs["layers"], strict=True):
        values, wanted = layer_values(one), layer_values(two)
        assert values.keys() == wanted.keys()
        for name, value in wanted.items():
            assert values[name] == pytest.approx(value, rel=1e-2, abs=1e-3), name


def test_nothing_waits_for_the_device_before_the_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(ParallaxConfig()).to("cuda", torch.bfloat16)
    collect(model, DRAWN, set="cheap")  # kernels are compiled
    copies: list[int] = []

    def watched(tables: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        copies.append(len(tables))
        torch.cuda.set_sync_debug_mode("default")
        return to_host(tables)

    def watch(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(collect_module, "to_host", watched)
    model.register_forward_pre_hook(watch)
    try:
        layers = collect(model, DRAWN, set="cheap")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copies == [4]
    assert all(values["stable_rank"] for layer in layers for values in layer.weights.values())
