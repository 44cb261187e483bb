"""`benchmarks.diagnostics`: shares of training time, and what its runs are told."""

import pytest

from benchmarks.diagnostics import STEPS, cost, run_overrides
from config import load
from training.run_config import RunConfig


def test_the_first_measurement_is_cold_and_shares_count_its_own_time() -> None:
    found = cost([9.0, 1.0, 3.0, 1.0, 1.0, 2.0], [0.5, 0.3, 0.4], num_micro_batches=8)
    assert (found["cold_seconds"], found["seconds"], found["step_seconds"]) == (9.0, 1.0, 0.4)
    assert found["percent_of_micro_batch"] == pytest.approx(100 / 41)
    assert found["percent_of_global_batch"] == pytest.approx(100 / 321)


def test_a_run_measures_six_times_in_micro_batches_of_held_out_text() -> None:
    path = "configs/0.6b_parallax_muon.toml"
    words = ["--data.train.folder", "elsewhere"]
    config = load(RunConfig, path, [*run_overrides(load(RunConfig, path, words)), *words])
    assert config.gradient_accumulation_steps(1) == 1
    every = config.diagnostics.every
    assert every is not None
    assert len(range(0, config.training.last_step + 1, every)) == 6
    assert config.training.last_step == STEPS
    assert config.data.validation == config.data.train
    assert config.data.validation_documents == "held_out"
