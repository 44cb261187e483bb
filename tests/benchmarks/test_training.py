"""`benchmarks.training`: resuming an interrupted benchmark, and stock torchtitan beside the configs."""

import json
import subprocess
import sys

import pytest

import benchmarks.training as benchmark
from benchmarks.training import Job, Settings, stock_jobs
from benchmarks.training_table import format_table, relative_to_stock
from errors import UserError

CONFIGS = ["configs/debug_softmax_adamw.toml", "configs/debug_parallax_muon.toml"]
STOCK = [Job(CONFIGS[0], 4), Job(CONFIGS[0], 8)]
ROW = {
    "peak_memory_gib": 1.0,
    "tokens_per_second": 1.0,
    "step_seconds": 1.0,
    "data_wait_percent": 0.0,
    "first_loss": 9.0,
    "final_loss": 5.0,
    "size": {"name": "debug"},
    "rows": 4,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command with a stub for the training; return the configs that it trained."""

    def call(*words, fails=()):
        trained = []

        def measure(job, settings, gpus):
            trained.append(job if job.stock_rows else job.config)
            if job.config in fails:
                raise subprocess.CalledProcessError(1, job.config)
            return dict(ROW)

        monkeypatch.setattr(benchmark, "measure", measure)
        monkeypatch.setattr(benchmark, "predicted_peak_gib", lambda path, settings: 1.0)
        monkeypatch.setattr(sys, "argv", ["training.py", *CONFIGS, "--out", str(tmp_path), *words])
        benchmark.main()
        return trained

    return call


def test_resume_measures_only_the_missing_rows(run, tmp_path):
    with pytest.raises(SystemExit, match=f"failed: {CONFIGS[0]}"):
        run(fails=CONFIGS[:1])
    first = json.loads((tmp_path / "training.json").read_text())
    assert [row["config"] for row in first["rows"]] == CONFIGS[1:]

    assert run("--resume") == CONFIGS[:1]
    result = json.loads((tmp_path / "training.json").read_text())
    assert [row["config"] for row in result["rows"]] == CONFIGS
    assert result["command"] == first["command"]
    assert result["rows"][1] == first["rows"][0]
    assert all(row["machine"]["torch"] for row in result["rows"])

    assert run("--resume") == []
    assert run() == CONFIGS


def test_resume_without_a_result_measures_all_configs(run):
    assert run("--resume") == CONFIGS


def test_resume_from_another_command_is_an_error(run):
    run()
    with pytest.raises(UserError, match="is from another command"):
        run("--resume", "--steps", "30")


def test_resume_on_another_machine_is_an_error(run, tmp_path):
    run()
    path = tmp_path / "training.json"
    result = json.loads(path.read_text())
    result["machine"]["device"] = "an abacus"
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match="has device an abacus, this machine"):
        run("--resume")


def _settings(*overrides, rows_per_step=None):
    return Settings(steps=6, num_ranks=1, rows_per_step=rows_per_step, overrides=overrides)


def test_stock_torchtitan_is_measured_once_per_size_and_after_the_configs(run):
    assert run("--stock") == [*CONFIGS, *STOCK]
    assert run("--stock", "--resume") == []


def test_configs_of_other_sizes_or_vocabularies_have_stock_runs_of_their_own():
    configs = ["configs/60m_softmax_adamw.toml", "configs/60m_softmax_parameter_matched_muon.toml", *CONFIGS]
    counts = stock_jobs(configs, _settings("--training.local_batch_size", "16"))
    assert counts == [Job(path, rows) for path in (configs[0], CONFIGS[0]) for rows in (4, 8, 16)]


def test_stock_micro_batches_are_a_part_of_the_step():
    assert stock_jobs(CONFIGS, _settings(rows_per_step=12)) == [Job(CONFIGS[0], 4)]
    assert stock_jobs(CONFIGS, _settings(rows_per_step=16)) == STOCK


def test_ratios_are_to_stock_torchtitan_of_the_same_size():
    other = {"name": "0.6b"}
    ours = ROW | {"config": "x.toml", "stock_rows": None, "tokens_per_second": 6.0, "dry_run_peak_gib": 2.0}
    stock = [
        ROW | {"config": "x.toml", "stock_rows": 4, "tokens_per_second": 4.0, "dry_run_peak_gib": None},
        ROW
        | {
            "config": "x.toml",
            "stock_rows": 8,
            "rows": 8,
            "tokens_per_second": 5.0,
            "dry_run_peak_gib": None,
        },
        ROW | {"config": "y.toml", "stock_rows": 4, "size": other, "dry_run_peak_gib": None},
    ]
    assert relative_to_stock(ours, [ours, *stock]) == (1.5, 1.2)
    assert relative_to_stock(ours | {"rows": 2}, stock) == (None, 1.2)
    assert relative_to_stock(ours, [ours]) == (None, None)
    lines = format_table([ours, *stock]).splitlines()
    assert "| x | 4 | 6 | 1.500 / 1.200 |" in lines[2]
    assert lines[3].startswith("| stock torchtitan, debug, softmax, AdamW | 4 | 4 |  |")


def test_stock_torchtitan_trains_in_a_process_of_its_own():
    overrides = ("--training.seq_len", "32", "--model.vocab_size", "512", "--training.compile", "false")
    row = benchmark.measure(Job(CONFIGS[1], 2), _settings(*overrides, rows_per_step=4), ())
    assert row["rows"] == 2
    assert row["size"]["vocab_size"] == 512
    # 4 rows of 32 tokens per step
    assert row["tokens_per_second"] == pytest.approx(128 / row["step_seconds"], rel=0.5)
    # uniform random tokens: there is nothing to learn but the vocabulary's size
    assert 6 < row["final_loss"] < 12
