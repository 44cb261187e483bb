"""`benchmarks.training --resume` after an interrupted run."""

import json
import subprocess
import sys

import pytest

import benchmarks.training as benchmark
from errors import UserError

CONFIGS = ["configs/debug_softmax_adamw.toml", "configs/debug_parallax_muon.toml"]
ROW = {
    "peak_memory_gib": 1.0,
    "tokens_per_second": 1.0,
    "step_seconds": 1.0,
    "data_wait_percent": 0.0,
    "first_loss": 9.0,
    "final_loss": 5.0,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command with a stub for the training; return the configs that it trained."""

    def call(*words, fails=()):
        trained = []

        def measure(path, **_):
            trained.append(path)
            if path in fails:
                raise subprocess.CalledProcessError(1, path)
            return dict(ROW)

        monkeypatch.setattr(benchmark, "measure", measure)
        monkeypatch.setattr(benchmark, "predicted_peak_gib", lambda path, **_: 1.0)
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
