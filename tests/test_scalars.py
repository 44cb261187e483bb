"""Scalars that code logs: means over calls, with and without compiled blocks and checkpointing."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor

import scalars
from errors import UserError
from scalars import ScalarRecorder, log_scalar


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.linear(x).sigmoid()
        log_scalar("gate/mean", gate.mean())
        log_scalar("gate/constant", 3.0)
        return x + gate * x


@pytest.fixture(autouse=True)
def _no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "_rows", {})


def run(wrap: Callable[[nn.Module], nn.Module], is_compiled: bool) -> tuple[Any, ...]:
    """Take three steps of two micro-batches; return means, output and gradients of the last."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = nn.ModuleList(wrap(Block(8)) for _ in range(3))
    for block in blocks if is_compiled else ():
        block.compile(fullgraph=True)
    recorder = ScalarRecorder(torch.device("cpu"))
    x = torch.randn(2, 4, 8)
    for step in range(3):
        blocks.zero_grad()
        with recorder.step():
            outputs = []
            for micro_batch in x + step:
                for block in blocks:
                    micro_batch = block(micro_batch)
                micro_batch.square().mean().backward()
                outputs.append(micro_batch.detach())
        # an evaluation, which is not recorded
        with torch.no_grad():
            blocks[0](x[0])
    assert not any(total.requires_grad for total in recorder.totals().values())
    means = {name: float(total / number) for name, (total, number) in recorder.totals().items()}
    return means, torch.stack(outputs), [p.grad for p in blocks.parameters()]


def plain(module: nn.Module) -> nn.Module:
    return module


@pytest.mark.parametrize("wrap", [plain, checkpoint_wrapper], ids=["saved", "recomputed"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_the_mean_over_micro_batches_and_layers_is_recorded(
    wrap: Callable[[nn.Module], nn.Module], is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    means, outputs, gradients = run(wrap, is_compiled)
    assert means["gate/constant"] == 3.0
    torch.manual_seed(0)
    blocks, expected = [Block(8) for _ in range(3)], []
    for micro_batch in torch.randn(2, 4, 8) + 2:
        for block in blocks:
            gate = block.linear(micro_batch).sigmoid()
            expected.append(float(gate.mean().detach()))
            micro_batch = micro_batch + gate * micro_batch
    assert means["gate/mean"] == pytest.approx(sum(expected) / 6, rel=1e-5)
    # what is logged changes nothing
    monkeypatch.setitem(globals(), "log_scalar", lambda *_: None)
    _, same_outputs, same_gradients = run(wrap, is_compiled)
    assert torch.equal(outputs, same_outputs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


def test_a_step_starts_from_zero_and_a_name_that_is_not_logged_has_no_value() -> None:
    recorder = ScalarRecorder(torch.device("cpu"))
    for values in ((1.0, 5.0), (torch.tensor(2.0),), ()):
        with recorder.step():
            for value in values:
                log_scalar("a", value)
        total, number = recorder.totals()["a"].tolist()
        assert (total, number) == (sum(map(float, values)), len(values))
    log_scalar("outside", 1.0)
    assert [*recorder.totals()] == ["a"]


def test_a_failed_step_ends_the_recording() -> None:
    recorder = ScalarRecorder(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), recorder.step():
        raise ZeroDivisionError
    log_scalar("later", 1.0)
    assert recorder.totals() == {}


def test_values_that_are_no_scalar_of_this_rank_are_refused() -> None:
    recorder = ScalarRecorder(torch.device("cpu"))
    with recorder.step():
        with pytest.raises(UserError, match=r"shape \[2\], want a scalar"):
            log_scalar("a", torch.zeros(2))
        with pytest.raises(UserError, match="DTensor; take its to_local"):
            log_scalar("a", Mock(spec=DTensor))
        for index in range(scalars.MAX_NAMES):
            log_scalar(f"name {index}", 0.0)
        with pytest.raises(UserError, match="at most 256 names"):
            log_scalar("one more", 0.0)
