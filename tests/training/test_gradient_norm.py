"""Gradient norms: clipping, spikes against a plain statement of the rule, and steps that are skipped."""

import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.launch import EXACT, losses, records, train
from training.gradient_norm import MIN_STEPS, WINDOW, GradientNorm
from training.run_config import TrainingConfig


def make(
    *, max_grad_norm: float | None = None, spike_ratio: float = 4.0, skip_spikes: bool = False
) -> GradientNorm:
    config = TrainingConfig(
        steps=1,
        seq_len=16,
        global_batch_size=1,
        local_batch_size=1,
        max_grad_norm=max_grad_norm,
        spike_ratio=spike_ratio,
        skip_spikes=skip_spikes,
    )
    return GradientNorm(config, torch.device("cpu"))


def parameter(norm: float) -> nn.Parameter:
    """Return a parameter whose gradient has a norm."""
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), norm / 2)
    return p


@pytest.mark.parametrize("max_norm", [0.5, 3.0, None])
def test_gradients_are_clipped_as_in_torch_or_not_at_all(max_norm: float | None) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        ours, theirs = ([nn.Parameter(torch.zeros(n)) for n in (3, 7)] for _ in range(2))
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        norm = make(max_grad_norm=max_norm)
        assert norm.clip(ours) == 0.0
        expected = nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
        assert norm.describe(norm.last.tolist()).norm == float(expected)
        for a, b in zip(ours, theirs, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("skip", [False, True])
def test_spikes_follow_the_rule(skip: bool) -> None:
    for seed in range(5):
        draw = random.Random(seed)
        norm, running, count, num_spikes = make(skip_spikes=skip), 0.0, 0, 0
        for step in range(150):
            value = math.exp(draw.gauss(0.0, 0.3)) * (draw.choice((6.0, 200.0)) if step % 9 == 8 else 1.0)
            flag = norm.clip([parameter(value)])
            found = norm.describe(norm.last.tolist())
            is_spike = count >= MIN_STEPS and value > 4.0 * running
            assert found.norm == pytest.approx(value, rel=1e-6)
            assert found.running == pytest.approx(running, rel=1e-4)
            assert (found.is_spike, found.is_skipped, bool(flag)) == (
                is_spike,
                is_spike and skip,
                found.is_skipped,
            )
            assert ("grad_norm_spike" in found.metrics()) == is_spike
            count = min(count + 1, WINDOW)
            running += ((4.0 * running if is_spike else value) - running) / count
            num_spikes += is_spike
        assert 2 < num_spikes < 20


def test_a_lasting_rise_ends_to_be_a_spike() -> None:
    norm, found = make(), []
    for step in range(300):
        norm.clip([parameter(1.0 if step < 100 else 1000.0)])
        found.append(norm.describe(norm.last.tolist()).is_spike)
    assert found[100]
    assert not any(found[:100] + found[250:])


def test_a_first_gradient_after_many_of_zero_is_no_spike() -> None:
    norm = make(skip_spikes=True)
    for _ in range(30):
        norm.clip([parameter(0.0)])
    assert norm.clip([parameter(1.0)]) == 0.0
    assert "grad_norm_spike" not in norm.describe(norm.last.tolist()).metrics()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_of_nan_or_inf_is_skipped_and_leaves_the_running_norm(bad: float, skip: bool) -> None:
    norm = make(skip_spikes=skip)
    for _ in range(30):
        norm.clip([parameter(1.0)])
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert norm.clip([parameter(bad)]) == 1.0
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_a_saved_running_norm_goes_on_bit_identically() -> None:
    draw = random.Random(0)
    norm = make()
    for _ in range(25):
        norm.clip([parameter(draw.random())])
    again = make()
    again.load_state_dict({name: value.clone() for name, value in norm.state_dict().items()})
    for _ in range(60):
        value = draw.random() * draw.choice((1.0, 20.0))
        assert norm.clip([parameter(value)]) == again.clip([parameter(value)])
        assert norm.describe(norm.last.tolist()) == again.describe(again.last.tolist())


def spiked_run(corpus: Path, folder: Path, *, skip: str, ranks: int) -> str:
    """Train with a spike in step 22, check its record, and return what the run prints."""
    words = [*EXACT, "--training.steps", "23", "--average.decay", "0.9", "--metrics.update_every", "1"]
    words += ["--training.skip_spikes", skip, "--data.validation", "none"]
    program = ("-m", "tests.training.spiked")
    printed = train("debug_parallax_muon", corpus, folder, *words, ranks=ranks, program=program)
    spikes = [line for line in records(folder) if "grad_norm_spike" in line]
    assert [line["step"] for line in spikes] == [22]
    ratio = spikes[0]["grad_norm"] / spikes[0]["grad_norm_running"]
    assert spikes[0]["grad_norm_spike"] == pytest.approx(ratio)
    assert spikes[0]["is_skipped"] == (skip == "true")
    assert ("update_rms/hidden" in spikes[0]) == (skip == "false")
    assert f"a spike, {'skipped' if skip == 'true' else 'not skipped'}" in printed
    return printed


def test_a_spike_is_on_record_and_skipped_where_the_config_says_so(corpus: Path, tmp_path: Path) -> None:
    assert "rank 0: changed in step 22" in spiked_run(corpus, tmp_path / "1", skip="false", ranks=1)
    # weights, optimizer state and average
    assert "rank 0: unchanged in step 22" in spiked_run(corpus, tmp_path / "2", skip="true", ranks=1)
    applied, skipped = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert applied[:22] == skipped[:22]
    assert applied[22] != skipped[22]


def test_two_ranks_skip_the_same_step(corpus: Path, tmp_path: Path) -> None:
    printed = spiked_run(corpus, tmp_path / "run", skip="true", ranks=2)
    assert printed.count("unchanged in step 22") == 2
