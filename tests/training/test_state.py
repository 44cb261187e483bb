"""What a checkpoint's trainer state restores, and which signals ask for a stop, without a run."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from training import device, signals


def test_a_resume_restores_step_tokens_and_random_generators() -> None:
    device.prepare()
    from training.trainer import Trainer

    trainer = Trainer.__new__(Trainer)
    trainer.device, trainer.step, trainer.tokens = torch.device("cpu"), 7, 700
    torch.rand(3)
    saved = trainer.state_dict()
    drawn = torch.rand(5)
    trainer.step, trainer.tokens = 0, 0
    trainer.load_state_dict(saved)
    assert torch.equal(torch.get_rng_state(), saved["rng"]["cpu"])
    assert (trainer.step, trainer.tokens) == (7, 700)
    assert torch.equal(torch.rand(5), drawn)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_soon_after_the_first_are_the_same_request_and_a_later_one_exits(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: list[int] = []
    times = iter([10.0, 11.5, 12.5])
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(times))
    stop = signals.StopRequest()
    stop.install()
    assert not stop.requested
    signal.raise_signal(number)
    assert stop.requested
    assert exits == []
    signal.raise_signal(number)
    assert exits == []
    # 2.5 s after the first, though only 1 s after the second
    signal.raise_signal(number)
    assert exits == [128 + number]
