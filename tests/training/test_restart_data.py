"""Branches on other data or longer rows: model, optimizer and step go on, the data starts anew."""

import json
import shutil
from pathlib import Path

import pytest

from config import load as load_config
from errors import UserError
from models.run_folder import RunFolder
from tests.conftest import write_parquet
from tests.training.launch import EXACT, ROOT, losses, records, train
from training.branch import branch_warnings
from training.resume import check_start
from training.run_config import RunConfig

NAME = "debug_parallax_muon"
STABLE = ["--schedule.decay_ratio", "0", "--training.stop_at_step", "6"]
DECAY = ["--schedule.decay_ratio", "none", "--schedule.decay_steps", "4", "--training.steps", "12"]
# as many tokens per step
LONGER = ["--training.seq_len", "64", "--training.global_batch_size", "4"]


@pytest.fixture(scope="module")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 6 of a run without decay."""
    folder = tmp_path_factory.mktemp("stable") / "run"
    train(NAME, corpus, folder, *EXACT, *STABLE)
    return RunFolder(folder).checkpoint(6)


@pytest.fixture(scope="module")
def mixture(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a mixture of the run's old data and of new documents."""
    new = tmp_path_factory.mktemp("new") / "new.parquet"
    write_parquet(new, [f"new text {n} of another kind, {n} times over" for n in range(300)])
    sources = ", ".join(
        f'{name} = {{kind = "parquet", files = [{json.dumps(str(path))}]}}'
        for name, path in (("old", corpus / "train.parquet"), ("new", new))
    )
    weights = "{old = 0.3, new = 0.7}"
    return ["--data.train", f'{{kind = "mixture", weights = {weights}, sources = {{{sources}}}}}']


@pytest.mark.parametrize("is_mixture", [True, False], ids=["mixture", "longer_rows"])
def test_a_branch_on_other_data_takes_over_the_state_and_starts_the_data_anew(
    is_mixture: bool, checkpoint: Path, mixture: list[str], corpus: Path, tmp_path: Path
) -> None:
    words = [*EXACT, *DECAY, *(mixture if is_mixture else LONGER)]
    start = ["--checkpoint", str(checkpoint), "--checkpoint.restart_data", "true"]
    branch, weights = tmp_path / "branch", tmp_path / "weights"
    printed = train(NAME, corpus, branch, *words, *start)
    assert f"starting from {checkpoint}, with data.train from its beginning" in printed
    assert "training from step 7 to 12" in printed
    expected = "data.train.kind: saved" if is_mixture else "training.seq_len: saved 32, now 64"
    assert expected in printed
    # the same weights on the first batch of the new data; a new optimizer then takes another step
    initial = ["--checkpoint.initial_weights", str(checkpoint), "--training.stop_at_step", "2"]
    train(NAME, corpus, weights, *words, *initial)
    (_, *first), (_, *second) = losses(weights)
    assert losses(branch)[0] == (7, *first)
    assert losses(branch)[1] != (8, *second)
    lines = [record for record in records(branch) if "loss" in record]
    assert [record["tokens"] for record in lines] == [8 * 32 * step for step in range(7, 13)]
    assert [record["lr/hidden"] / 0.01 for record in lines] == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25])
    launch = next(record["launch"] for record in records(branch) if "launch" in record)
    assert launch["start"] == "branch"
    assert launch["start_checkpoint"] == str(checkpoint)
    assert launch["restarts_data"] is True


def test_a_resume_of_such_a_branch_continues_at_its_own_data_position(
    checkpoint: Path, mixture: list[str], corpus: Path, tmp_path: Path
) -> None:
    source = tmp_path / "stable"
    shutil.copytree(RunFolder.of_checkpoint(checkpoint).path, source)
    start = ["--checkpoint", str(source / "checkpoint" / "step-6"), "--checkpoint.restart_data", "true"]
    words = [*EXACT, *DECAY, *LONGER, *mixture, *start]
    train(NAME, corpus, tmp_path / "straight", *words)
    train(NAME, corpus, tmp_path / "branch", *words, "--training.stop_at_step", "9")
    shutil.rmtree(source)
    printed = train(NAME, corpus, tmp_path / "branch", *words)
    assert "training from step 10 to 12" in printed
    assert "from its beginning" not in printed
    assert losses(tmp_path / "branch") == losses(tmp_path / "straight")
    last = [record["launch"] for record in records(tmp_path / "branch") if "launch" in record][-1]
    assert (last["start"], last["restarts_data"]) == ("resume", False)


def test_other_data_without_the_key_is_refused_and_the_key_is_named(
    checkpoint: Path, mixture: list[str], corpus: Path, tmp_path: Path
) -> None:
    words = [*EXACT, *DECAY, "--checkpoint", str(checkpoint)]
    for other in (mixture, LONGER):
        printed = train(NAME, corpus, tmp_path / "run", *words, *other, code=2)
        assert "checkpoint.restart_data" in printed
        assert "Traceback" not in printed
    assert not (tmp_path / "run" / "config.toml").exists()


def load(folder: Path, *words: str) -> RunConfig:
    return load_config(RunConfig, ROOT / "configs" / f"{NAME}.toml", ["--run.folder", str(folder), *words])


def write_run(folder: Path, *words: str, step: int = 20) -> Path:
    """Write a run folder with a config and an empty checkpoint; return that."""
    checkpoint = RunFolder(folder).checkpoint(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    RunFolder(folder).write_config(load(folder, *words))
    return checkpoint


def test_the_warning_names_what_changed_in_the_data(tmp_path: Path) -> None:
    source = write_run(tmp_path / "stable")
    start = ["--checkpoint.start_from", str(source), "--checkpoint.restart_data", "true"]
    config = load(
        tmp_path / "run",
        *start,
        *("--data.train.files", '["x.parquet"]', "--data.shuffle_seed", "3", "--training.seq_len", "512"),
    )
    check_start(config)
    (warning,) = branch_warnings(config, source)
    assert "training.seq_len: saved 256, now 512" in warning
    assert 'now ["x.parquet"]' in warning
    assert "data.shuffle_seed: saved" in warning


def test_restart_data_belongs_to_a_branch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="restart_data is true, but start_from is none"):
        load(tmp_path / "run", "--checkpoint.restart_data", "true")
    # a resume that drops the key would leave a config that is not how the run came about
    start = ["--checkpoint.start_from", str(write_run(tmp_path / "stable"))]
    write_run(tmp_path / "branch", *start, "--checkpoint.restart_data", "true", step=25)
    check_start(load(tmp_path / "branch", *start, "--checkpoint.restart_data", "true"))
    with pytest.raises(UserError, match=r"checkpoint\.restart_data: saved true, now false"):
        check_start(load(tmp_path / "branch", *start))
