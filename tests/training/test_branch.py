"""Runs that start from another run's checkpoint: exact, and refused where they would not be."""

import shutil
from pathlib import Path

import pytest

import config
from models.run_folder import RunFolder
from tests.conftest import write_parquet
from tests.training.launch import EXACT, ROOT, losses, records, train
from training.branch import branch_warnings, check_branch, resume_warnings
from training.run_config import RunConfig

RANKS = pytest.mark.parametrize("ranks", [1, 2])
# five steps of warm-up, no decay
STABLE = ["--schedule.decay_ratio", "0", "--training.stop_at_step", "12", "--checkpoint.every", "6"]
FOUR_STEPS = ["--schedule.decay_ratio", "none", "--schedule.decay_steps", "4"]
DECAY = [*FOUR_STEPS, "--optimizer.groups.hidden.weight_decay_gamma", "2"]


@pytest.fixture(scope="module")
def stable(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of 12 steps on 1 and on 2 ranks that does not decay, with checkpoints after steps 6 and 12."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"stable{ranks}") / "run"
        train("debug_parallax_muon", corpus, folders[ranks], *EXACT, *STABLE, ranks=ranks)
    return folders


def held_out(folder: Path) -> dict[int, float]:
    return {r["step"]: r["validation_loss"] for r in records(folder) if "validation_loss" in r}


@RANKS
def test_a_branch_equals_one_run_with_its_schedule_to_the_last_digit(
    ranks: int, stable: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    words = [*EXACT, *DECAY, "--training.steps", "10"]
    train("debug_parallax_muon", corpus, tmp_path / "straight", *words, ranks=ranks)
    start = ["--checkpoint", str(stable[ranks] / "checkpoint" / "step-6")]
    printed = train("debug_parallax_muon", corpus, tmp_path / "branch", *words, *start, ranks=ranks)
    assert "training from step 7 to 10" in printed
    assert "were not this run's" not in printed
    assert losses(tmp_path / "branch") == losses(tmp_path / "straight")[6:]
    # after the last update
    assert held_out(tmp_path / "branch")[10] == held_out(tmp_path / "straight")[10]
    lines = [r for r in records(tmp_path / "branch") if "loss" in r]
    assert [r["lr/hidden"] / 0.01 for r in lines] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert [r["weight_decay/hidden"] / 0.05 for r in lines] == pytest.approx([1.0, 0.75**2, 0.5**2, 0.25**2])
    assert [r["weight_decay/vectors"] for r in lines] == [0.0] * 4
    assert [r["tokens"] for r in lines] == [8 * 32 * step for step in range(7, 11)]
    # the run that it started from is as it was
    assert [step for step, *_ in losses(stable[ranks])] == list(range(1, 13))


def test_an_interrupted_branch_goes_on_from_its_own_checkpoint(
    stable: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    words = [*EXACT, *DECAY, "--training.steps", "16"]
    train("debug_parallax_muon", corpus, tmp_path / "straight", *words)
    source, folder = tmp_path / "stable", tmp_path / "branch"
    shutil.copytree(stable[1], source)
    start = ["--checkpoint", str(source / "checkpoint" / "step-12")]
    # what a kill during the writing of the first checkpoint leaves
    (folder / "checkpoint" / "step-13").mkdir(parents=True)
    train("debug_parallax_muon", corpus, folder, *words, *start, "--training.stop_at_step", "14")
    shutil.rmtree(source)
    printed = train("debug_parallax_muon", corpus, folder, *words, *start)
    assert "training from step 15 to 16" in printed
    assert losses(folder) == losses(tmp_path / "straight")[12:]
    assert held_out(folder)[16] == held_out(tmp_path / "straight")[16]
    # without the checkpoint it would be another run
    printed = train("debug_parallax_muon", corpus, folder, *words, code=2)
    assert "holds checkpoints of a run with checkpoint.start_from" in printed


def test_what_a_branch_would_not_do_is_said_before_it_starts(
    stable: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "branch"
    words = [*EXACT, *DECAY, "--checkpoint", str(stable[1] / "checkpoint" / "step-6")]
    write_parquet(tmp_path / "other.parquet", ["some other text"])
    other = ["--data.train.files", f'["{tmp_path / "other.parquet"}"]', "--training.steps", "10"]
    printed = train("debug_parallax_muon", corpus, folder, *words, *other, code=2)
    assert "belongs to another source" in printed
    assert "Traceback" not in printed
    printed = train("debug_parallax_muon", corpus, folder, *words, "--training.steps", "9", code=2)
    assert "written after step 6, but this run's decay begins after step 5" in printed
    other = ["--training.steps", "10", "--optimizer.groups.hidden.lr", "0.02", "--training.stop_at_step", "7"]
    printed = train("debug_parallax_muon", corpus, folder, *words, *other)
    assert "lr of group hidden at step 1 was 0.002 there and is 0.004 here" in printed
    assert [step for step, *_ in losses(folder)] == [7]


def load(folder: Path, *words: str, name: str = "debug_parallax_muon") -> RunConfig:
    return config.load(RunConfig, ROOT / "configs" / f"{name}.toml", ["--run.folder", str(folder), *words])


def write_run(folder: Path, *words: str, steps: tuple[int, ...] = (20,)) -> Path:
    """A run folder with a config and empty checkpoints; gives the first one."""
    RunFolder(folder).write_config(load(folder, *words))
    for step in steps:
        (folder / "checkpoint" / f"step-{step}").mkdir(parents=True)
        (folder / "checkpoint" / f"step-{step}" / ".metadata").write_text("")
    return folder / "checkpoint" / f"step-{steps[0]}"


def refusal(run: RunConfig) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        check_branch(run)
    return str(error.value)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    source = write_run(tmp_path / "stable", steps=(20, 30))

    def said(path: Path) -> str:
        return refusal(load(tmp_path / "run", "--checkpoint.start_from", str(path)))

    for near in (source.with_name("step-40"), source.parent, tmp_path / "stable"):
        message = said(near)
        assert f"checkpoint.start_from is {str(near)!r}" in message
        assert f"checkpoints: {source}, {source.with_name('step-30')}" in message
    assert "there is no such folder; checkpoints: none near it" in said(tmp_path / "absent")
    (source.with_name("step-30") / ".metadata").unlink()
    assert "it is no whole checkpoint" in said(source.with_name("step-30"))
    renamed = source.rename(source.with_name("best"))
    assert "it is no folder step-N" in said(renamed)


def test_a_checkpoint_must_come_before_the_decay_and_the_end(tmp_path: Path) -> None:
    source = write_run(tmp_path / "stable", "--schedule.kind", "constant")
    start = ["--checkpoint.start_from", str(source), "--schedule.decay_ratio", "none"]

    def run(*words: str) -> RunConfig:
        return load(tmp_path / "run", *start, *words)

    check_branch(run("--schedule.decay_steps", "40"))
    message = refusal(run("--schedule.decay_steps", "41"))
    assert "written after step 20, but this run's decay begins after step 19" in message
    assert "the last 41 of 60 steps" in message
    message = refusal(run("--training.steps", "20"))
    assert "written after step 20, but this run ends after step 20; raise training.steps" in message
    assert "raise training.stop_at_step" in refusal(run("--training.stop_at_step", "15"))
    cosine = run("--schedule.kind", "cosine", "--schedule.warmup_steps", "5")
    assert "decay begins after step 5" in refusal(cosine)
    check_branch(run("--schedule.kind", "constant"))


def test_a_checkpoint_of_another_model_or_of_other_rows(tmp_path: Path) -> None:
    start = ["--checkpoint.start_from", str(write_run(tmp_path / "stable"))]

    def said(*words: str, name: str = "debug_parallax_muon") -> str:
        return refusal(load(tmp_path / "run", *start, *words, name=name))

    assert "model.attention.kind is 'parallax' there and 'softmax' here" in said(name="debug_softmax_muon")
    assert "optimizer.groups.hidden.kind is 'muon' there" in said(name="debug_parallax_adamw")
    assert "training.seq_len is 256 there and 512 here" in said("--training.seq_len", "512")
    assert "data.mask_documents is True there" in said("--data.mask_documents", "false")


def test_steps_that_another_schedule_took_are_named(tmp_path: Path) -> None:
    source = write_run(tmp_path / "stable", "--schedule.decay_ratio", "0.0", "--training.steps", "1000")

    def warnings(*words: str) -> list[str]:
        run = load(tmp_path / "run", "--checkpoint.start_from", str(source), *words)
        check_branch(run)
        return branch_warnings(run)

    assert warnings() == []
    assert warnings("--optimizer.groups.hidden.weight_decay_gamma", "2") == []
    (warning,) = warnings("--optimizer.groups.embedding.lr", "1e-3", "--training.global_batch_size", "64")
    assert "lr of group embedding at step 1 was 0.0006 there and is 0.0002 here" in warning
    assert "training.global_batch_size is 32 there and 64 here" in warning
    assert "group hidden" not in warning
    (warning,) = warnings("--schedule.warmup_steps", "10", "--optimizer.groups.hidden.weight_decay", "0.1")
    assert "lr of group vectors at step 1 was 0.0006 there and is 0.0003 here" in warning
    assert "weight_decay of group hidden at step 1 was 0.05 there and is 0.1 here" in warning
    # the other run had begun to decay
    source = write_run(tmp_path / "decayed", "--schedule.decay_ratio", "0.75")
    (warning,) = warnings()
    assert "lr of group hidden at step 17 was 0.00977778 there and is 0.01 here" in warning
    (source.parent.parent / "config.toml").unlink()
    (warning,) = warnings()
    assert "has no config.toml" in warning


def test_a_run_that_goes_on_with_another_config_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "--schedule.decay_ratio", "0.75")
    words = ["--schedule.decay_ratio", "0.75"]
    assert resume_warnings(load(tmp_path / "run", *words), 20) == []
    (warning,) = resume_warnings(load(tmp_path / "run", *words, "--training.seq_len", "512"), 20)
    assert "the first 20 steps of" in warning
    assert "training.seq_len is 256 there and 512 here" in warning
    # its decay had begun: more steps put the learning rate up again
    (warning,) = resume_warnings(load(tmp_path / "run", *words, "--training.steps", "1000"), 20)
    assert "lr of group hidden at step 17 was 0.00977778 there and is 0.01 here" in warning
    (tmp_path / "run" / "config.toml").unlink()
    assert resume_warnings(load(tmp_path / "run", "--training.seq_len", "512"), 20) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer.groups.hidden.momentum", "0.5", "is 0.95 there and 0.5 here"),
        ("optimizer.groups.hidden.scale", "unit", "is 'spectral' there and 'unit' here"),
        ("optimizer.groups.hidden.nesterov", "false", "is True there and False here"),
        ("optimizer.groups.embedding.beta2", "0.5", "is 0.95 there and 0.5 here"),
        ("optimizer.groups.embedding.eps", "1e-3", "is 1e-08 there and 0.001 here"),
        ("eval.max_tokens", "1000", "is 100000 there and 1000 here"),
        ("data.validation.files", '["x.parquet"]', "there and ['x.parquet'] here"),
        ("data.validation", "none", "there and 'none' here"),
        ("data.validation_documents", "held_out", "is 'all' there and 'held_out' here"),
    ],
)
def test_a_change_of_what_is_no_rate_went_unsaid(tmp_path: Path, key: str, value: str, said: str) -> None:
    source = write_run(tmp_path / "run")
    words = (f"--{key}", value)
    (resumed,) = resume_warnings(load(tmp_path / "run", *words), 20)
    (branched,) = branch_warnings(load(tmp_path / "b", "--checkpoint.start_from", str(source), *words))
    for warning in (resumed, branched):
        assert f"{key} is " in warning
        assert said in warning
        assert ";" not in warning.partition("restore it")[0].rstrip("; ")  # nothing else
    # groups of a config of before a key was there
    table = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(table.replace("\nmomentum =", "\n# momentum ="))
    assert resume_warnings(load(tmp_path / "run", "--optimizer.groups.hidden.momentum", "0.5"), 20) == []


def test_a_run_folder_with_checkpoints_keeps_its_start(tmp_path: Path) -> None:
    source = write_run(tmp_path / "stable")
    start = ["--checkpoint.start_from", str(source)]
    write_run(tmp_path / "branch", *start, steps=(25,))
    check_branch(load(tmp_path / "branch", *start))
    assert "'none'" in refusal(load(tmp_path / "branch"))
    assert "give the same" in refusal(load(tmp_path / "stable", *start))
