"""Each launch is on record, and earlier configs are kept."""

import json
import socket
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest

import config
from errors import UserError
from eval.report.run_records import read_run
from models.run_folder import RunFolder
from tests.training.launch import ROOT, records, train
from tests.training.test_resume import load, write_run
from training import launch_record
from training.config_differences import config_differences
from training.launch_record import launch_facts
from training.resume import check_start

STOP = ("--training.stop_at_step", "1")


def repository(path: Path) -> None:
    path.mkdir()
    (path / "code.py").write_text("a = 1\n")
    author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "."), (*author, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *words], cwd=path, check=True)


def test_facts_of_a_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "code"
    repository(code)
    monkeypatch.setattr(launch_record, "_CODE", code)
    facts = launch_facts(load(tmp_path / "run"), ["train.py", "--x"])
    assert json.loads(json.dumps(facts)) == facts
    assert abs((datetime.now(UTC) - datetime.fromisoformat(facts["time"])).total_seconds()) < 60
    assert (facts["host"], facts["command"]) == (socket.gethostname(), ["train.py", "--x"])
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=code, capture_output=True, text=True, check=True)
    assert facts["git_commit"] == head.stdout.strip()
    assert facts["config_changes"] is None
    for package in ("torch", "triton", "torchtitan"):
        assert facts["versions"][package] == metadata.version(package)


def test_a_changed_file_and_a_new_module_are_not_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code"
    repository(code)
    monkeypatch.setattr(launch_record, "_CODE", code)

    def is_clean() -> object:
        return launch_facts(load(tmp_path / "run"), [])["git_is_clean"]

    assert is_clean() is True
    (code / "notes.txt").write_text("no code")
    assert is_clean() is True
    (code / "new.py").write_text("")
    assert is_clean() is False
    (code / "new.py").unlink()
    (code / "code.py").write_text("a = 2\n")
    assert is_clean() is False


def test_code_outside_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_record, "_CODE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    facts = launch_facts(load(tmp_path / "run"), [])
    assert (facts["git_commit"], facts["git_is_clean"]) == (None, None)
    monkeypatch.setenv("PATH", "")
    assert launch_facts(load(tmp_path / "run"), [])["git_commit"] is None


def test_every_key_that_differs_is_named_and_the_folder_is_none(tmp_path: Path) -> None:
    saved = config.to_table(load(tmp_path))
    assert config_differences(load(tmp_path / "." / "x" / ".."), saved) == []
    changed = {
        "run.seed": "7",
        "optimizer.groups.hidden.lr": "0.5",
        "schedule.warmup_steps": "2",
        "data.shuffle_seed": "3",
        "eval.every": "9",
        "checkpoint.keep": "none",
        "metrics.console_every": "4",
        "parallelism.timeout_seconds": "60",
    }
    words = [word for key, value in changed.items() for word in (f"--{key}", value)]
    found = config_differences(load(tmp_path, *words), saved)
    assert {each.split(":")[0] for each in found} == {*changed}
    # a config of an earlier version lacks keys
    del saved["parallelism"]["timeout_seconds"], saved["metrics"]
    assert config_differences(load(tmp_path), saved) == []


def test_earlier_configs_are_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    texts = []
    for seed in (1, 1, 2, 1):
        new = load(tmp_path, "--run.seed", str(seed))
        run.keep_config(new)
        run.keep_config(new)  # killed before the new one was written
        run.write_config(new)
        texts.append(run.config_file.read_text())
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["config.1.toml", "config.2.toml", "config.toml"]
    assert [(tmp_path / name).read_text() for name in kept[:2]] == [texts[1], texts[2]]


def test_a_finished_run_with_another_config_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    write_run(tmp_path, "--training.steps", "20")
    check_start(load(tmp_path, "--training.steps", "20"))
    # an evaluation that is not on record may be made up for
    check_start(load(tmp_path, "--training.steps", "20", "--eval.max_tokens", "9"))
    for key, value in (
        *(("diagnostics.every", "3"), ("metrics.tensorboard", "true"), ("training.cuda_graphs", "false")),
        *(("data.prefetch_batches", "0"), ("checkpoint.every", "7"), ("parallelism.timeout_seconds", "9")),
    ):
        check_start(load(tmp_path, "--training.steps", "20", f"--{key}", value))
    check_start(load(tmp_path, "--training.steps", "30", "--run.seed", "1"))
    message = r"has finished at step 20 with another config: run\.seed: saved 0, now 1\. Restore"
    with pytest.raises(UserError, match=message):
        check_start(load(tmp_path, "--training.steps", "20", "--run.seed", "1"))
    with pytest.raises(UserError, match=r"training\.stop_at_step: saved \"none\", now 10"):
        check_start(load(tmp_path, "--training.steps", "20", "--training.stop_at_step", "10"))


def test_launches_of_a_run(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("debug_softmax_adamw", corpus, folder, *STOP)
    first = (folder / "config.toml").read_text()
    words = ("--training.stop_at_step", "2", "--metrics.update_every", "none")
    train("debug_softmax_adamw", corpus, folder, *words)
    one, two = (record["launch"] for record in records(folder) if "launch" in record)
    assert (one["start"], two["start"]) == ("scratch", "resume")
    assert one["config_changes"] is None
    assert two["config_changes"] == [
        "training.stop_at_step: saved 1, now 2",
        'metrics.update_every: saved 10, now "none"',
    ]
    assert (folder / "config.1.toml").read_text() == first
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert two["git_commit"] == (commit.stdout.strip() if commit.returncode == 0 else None)
    assert "train.py" in two["command"]
    assert two["command"][-2:] == ["--metrics.update_every", "none"]
    assert [record["step"] for record in read_run(folder).steps] == [1, 2]
