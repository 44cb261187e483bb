"""Branches: bit-identical to one run with the same schedule; errors and warnings where they would not be."""

import shutil
from pathlib import Path

import pytest

from config import load as load_config
from errors import UserError
from models.run_folder import RunFolder
from tests.conftest import write_parquet
from tests.training.launch import EXACT, ROOT, SMALL, losses, records, train
from training.branch import branch_warnings
from training.resume import check_start, resume_warnings
from training.run_config import RunConfig

RANKS = pytest.mark.parametrize("ranks", [1, 2])
# five steps of warm-up, no decay
STABLE = ["--schedule.decay_ratio", "0", "--training.stop_at_step", "12", "--checkpoint.every", "6"]
FOUR_STEPS = ["--schedule.decay_ratio", "none", "--schedule.decay_steps", "4"]
DECAY = [*FOUR_STEPS, "--optimizer.groups.hidden.weight_decay_gamma", "2"]


@pytest.fixture(scope="module")
def stable(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of 12 steps without decay, on 1 and on 2 ranks, with checkpoints of steps 6 and 12."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"stable{ranks}") / "run"
        train("debug_parallax_muon", corpus, folders[ranks], *EXACT, *STABLE, ranks=ranks)
    return folders


def held_out(folder: Path) -> dict[int, float]:
    return {r["step"]: r["validation_loss"] for r in records(folder) if "validation_loss" in r}


@RANKS
def test_a_branch_is_bit_identical_to_one_run_with_its_schedule(
    ranks: int, stable: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    words = [*EXACT, *DECAY, "--training.steps", "10"]
    train("debug_parallax_muon", corpus, tmp_path / "straight", *words, ranks=ranks)
    start = ["--checkpoint", str(stable[ranks] / "checkpoint" / "step-6")]
    printed = train("debug_parallax_muon", corpus, tmp_path / "branch", *words, *start, ranks=ranks)
    assert "training from step 7 to 10" in printed
    assert "had another config" not in printed
    assert losses(tmp_path / "branch") == losses(tmp_path / "straight")[6:]
    # after the last update
    assert held_out(tmp_path / "branch")[10] == held_out(tmp_path / "straight")[10]
    lines = [r for r in records(tmp_path / "branch") if "loss" in r]
    assert [r["lr/hidden"] / 0.01 for r in lines] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert [r["weight_decay/hidden"] / 0.05 for r in lines] == pytest.approx([1.0, 0.75**2, 0.5**2, 0.25**2])
    assert [r["weight_decay/vectors"] for r in lines] == [0.0] * 4
    assert [r["tokens"] for r in lines] == [8 * 32 * step for step in range(7, 11)]
    # the run that it started from is unchanged
    assert [step for step, *_ in losses(stable[ranks])] == list(range(1, 13))


def test_an_interrupted_branch_resumes_from_its_own_checkpoint(
    stable: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    words = [*EXACT, *DECAY, "--training.steps", "16"]
    train("debug_parallax_muon", corpus, tmp_path / "straight", *words)
    source, folder = tmp_path / "stable", tmp_path / "branch"
    shutil.copytree(stable[1], source)
    start = ["--checkpoint", str(source / "checkpoint" / "step-12")]
    # an incomplete checkpoint, from a run that was killed while writing it
    (folder / "checkpoint" / "step-13").mkdir(parents=True)
    train("debug_parallax_muon", corpus, folder, *words, *start, "--training.stop_at_step", "14")
    shutil.rmtree(source)
    printed = train("debug_parallax_muon", corpus, folder, *words, *start)
    assert "training from step 15 to 16" in printed
    assert losses(folder) == losses(tmp_path / "straight")[12:]
    assert held_out(folder)[16] == held_out(tmp_path / "straight")[16]
    # without start_from it is another run
    printed = train("debug_parallax_muon", corpus, folder, *words, code=2)
    assert "holds checkpoints of a run with another start (checkpoint.start_from: saved" in printed


def test_a_branch_that_differs_from_its_source_is_refused_or_warned_of(
    stable: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "branch"
    words = [*EXACT, *DECAY, "--checkpoint", str(stable[1] / "checkpoint" / "step-6")]
    write_parquet(tmp_path / "other.parquet", ["some other text"])
    other = ["--data.train.files", f'["{tmp_path / "other.parquet"}"]', "--training.steps", "10"]
    printed = train("debug_parallax_muon", corpus, folder, *words, *other, code=2)
    assert "belongs to another source" in printed
    assert "checkpoint.restart_data" in printed
    assert "Traceback" not in printed
    printed = train("debug_parallax_muon", corpus, folder, *words, "--training.steps", "9", code=2)
    assert "a checkpoint of step 6, but the decay of this run begins after step 5" in printed
    other = ["--training.steps", "10", "--optimizer.groups.hidden.lr", "0.02", "--training.stop_at_step", "7"]
    printed = train("debug_parallax_muon", corpus, folder, *words, *other)
    assert "lr of group hidden at step 1: saved 0.002, now 0.004" in printed
    assert [step for step, *_ in losses(folder)] == [7]


def load(folder: Path, *words: str, name: str = "debug_parallax_muon") -> RunConfig:
    return load_config(RunConfig, ROOT / "configs" / f"{name}.toml", ["--run.folder", str(folder), *words])


def write_run(folder: Path, *words: str, steps: tuple[int, ...] = (20,)) -> Path:
    """Write a run folder with a config and empty checkpoints; return the first checkpoint."""
    RunFolder(folder).write_config(load(folder, *words))
    for step in steps:
        (folder / "checkpoint" / f"step-{step}").mkdir(parents=True)
        (folder / "checkpoint" / f"step-{step}" / ".metadata").write_text("")
    return folder / "checkpoint" / f"step-{steps[0]}"


def refusal(config: RunConfig) -> str:
    with pytest.raises(UserError, match=r".") as error:
        check_start(config)
    return str(error.value)


def test_a_missing_or_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    source = write_run(tmp_path / "stable", steps=(20, 30))

    def error_for(path: Path) -> str:
        return refusal(load(tmp_path / "run", "--checkpoint.start_from", str(path)))

    for near in (source.with_name("step-40"), source.parent, tmp_path / "stable"):
        message = error_for(near)
        assert f"checkpoint.start_from is {str(near)!r}" in message
        assert f"checkpoints: {source}, {source.with_name('step-30')}" in message
    assert "there is no such folder; checkpoints: none near it" in error_for(tmp_path / "absent")
    (source.with_name("step-30") / ".metadata").unlink()
    assert "it is incomplete" in error_for(source.with_name("step-30"))
    renamed = source.rename(source.with_name("best"))
    assert "its name is not step-N" in error_for(renamed)


def test_a_checkpoint_after_the_start_of_the_decay_or_the_last_step_is_refused(tmp_path: Path) -> None:
    source = write_run(tmp_path / "stable", "--schedule.kind", "constant")
    start = ["--checkpoint.start_from", str(source), "--schedule.decay_ratio", "none"]

    def branch(*words: str) -> RunConfig:
        return load(tmp_path / "run", *start, *words)

    check_start(branch("--schedule.decay_steps", "40"))
    message = refusal(branch("--schedule.decay_steps", "41"))
    assert "a checkpoint of step 20, but the decay of this run begins after step 19" in message
    assert "the last 41 of 60 steps; start from an earlier checkpoint, shorten the decay, or raise" in message
    message = refusal(branch("--training.steps", "20"))
    assert "a checkpoint of step 20, but this run ends at step 20; raise training.steps" in message
    assert "raise training.stop_at_step" in refusal(branch("--training.stop_at_step", "15"))
    cosine = branch("--schedule.kind", "cosine", "--schedule.warmup_steps", "5")
    message = refusal(cosine)
    assert "the decay of this run begins after step 5" in message
    # neither more steps nor a shorter decay would help
    assert 'start from an earlier checkpoint, or give schedule.kind "wsd"' in message
    assert "raise" not in message
    check_start(branch("--schedule.kind", "constant"))


def test_a_checkpoint_of_another_model_or_sequence_length_is_refused(tmp_path: Path) -> None:
    start = ["--checkpoint.start_from", str(write_run(tmp_path / "stable"))]

    def error_for(*words: str, name: str = "debug_parallax_muon") -> str:
        return refusal(load(tmp_path / "run", *start, *words, name=name))

    assert 'model.attention.kind: saved "parallax", now "softmax"' in error_for(name="debug_softmax_muon")
    assert 'optimizer.groups.hidden.kind: saved "muon"' in error_for(name="debug_parallax_adamw")
    assert "training.seq_len: saved 256, now 512" in error_for("--training.seq_len", "512")
    assert "data.mask_documents: saved true, now false" in error_for("--data.mask_documents", "false")


def test_differing_rates_and_batch_sizes_are_warned_of(tmp_path: Path) -> None:
    source = write_run(tmp_path / "stable", "--schedule.decay_ratio", "0.0", "--training.steps", "1000")

    def warnings(*words: str) -> list[str]:
        config = load(tmp_path / "run", "--checkpoint.start_from", str(source), *words)
        check_start(config)
        return branch_warnings(config, source)

    assert warnings() == []
    assert warnings("--optimizer.groups.hidden.weight_decay_gamma", "2") == []
    (warning,) = warnings("--optimizer.groups.embedding.lr", "1e-3", "--training.global_batch_size", "64")
    assert "lr of group embedding at step 1: saved 0.0006, now 0.0002" in warning
    assert "training.global_batch_size: saved 32, now 64" in warning
    assert "group hidden" not in warning
    (warning,) = warnings("--schedule.warmup_steps", "10", "--optimizer.groups.hidden.weight_decay", "0.1")
    assert "lr of group vectors at step 1: saved 0.0006, now 0.0003" in warning
    assert "weight_decay of group hidden at step 1: saved 0.05, now 0.1" in warning
    # the decay of the other run had begun
    source = write_run(tmp_path / "decayed", "--schedule.decay_ratio", "0.75")
    (warning,) = warnings()
    assert "lr of group hidden at step 17: saved 0.00977778, now 0.01" in warning
    (source.parent.parent / "config.toml").unlink()
    (warning,) = warnings()
    assert "has no config.toml" in warning


def test_a_run_resumed_with_another_config_is_warned_of(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "--schedule.decay_ratio", "0.75")
    words = ["--schedule.decay_ratio", "0.75"]
    assert resume_warnings(load(tmp_path / "run", *words), 20) == []
    (warning,) = resume_warnings(load(tmp_path / "run", *words, "--training.seq_len", "512"), 20)
    assert "the first 20 steps of" in warning
    assert "training.seq_len: saved 256, now 512" in warning
    # the decay had begun: more steps raise the learning rate again
    (warning,) = resume_warnings(load(tmp_path / "run", *words, "--training.steps", "1000"), 20)
    assert "lr of group hidden at step 17: saved 0.00977778, now 0.01" in warning
    (tmp_path / "run" / "config.toml").unlink()
    (warning,) = resume_warnings(load(tmp_path / "run", "--training.seq_len", "512"), 20)
    assert warning.endswith("config.toml is missing: the first 20 steps may have had another config")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optimizer.groups.hidden.momentum", "0.5", "saved 0.95, now 0.5"),
        ("optimizer.groups.hidden.scale", "unit", 'saved "spectral", now "unit"'),
        ("optimizer.groups.hidden.nesterov", "false", "saved true, now false"),
        ("optimizer.groups.embedding.beta2", "0.5", "saved 0.95, now 0.5"),
        ("optimizer.groups.embedding.eps", "1e-3", "saved 1e-08, now 0.001"),
        ("eval.max_tokens", "1000", "saved 100000, now 1000"),
        ("data.validation.files", '["x.parquet"]', 'now ["x.parquet"]'),
        ("data.validation", "none", 'now "none"'),
        ("data.validation_documents", "held_out", 'saved "all", now "held_out"'),
    ],
)
def test_changed_keys_other_than_rates_are_warned_of(
    tmp_path: Path, key: str, value: str, expected: str
) -> None:
    source = write_run(tmp_path / "run")
    words = (f"--{key}", value)
    (resumed,) = resume_warnings(load(tmp_path / "run", *words), 20)
    (branched,) = branch_warnings(
        load(tmp_path / "b", "--checkpoint.start_from", str(source), *words), source
    )
    for warning in (resumed, branched):
        assert f"{key}: " in warning
        assert expected in warning
        assert ";" not in warning.partition("restore these")[0].rstrip("; ")  # nothing else
    # a config saved before the key was introduced
    table = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(table.replace("\nmomentum =", "\n# momentum ="))
    assert resume_warnings(load(tmp_path / "run", "--optimizer.groups.hidden.momentum", "0.5"), 20) == []


def test_another_start_for_a_run_folder_with_checkpoints_is_refused(tmp_path: Path) -> None:
    source = write_run(tmp_path / "stable")
    start = ["--checkpoint.start_from", str(source)]
    write_run(tmp_path / "branch", *start, steps=(25,))
    check_start(load(tmp_path / "branch", *start))
    assert 'now "none"' in refusal(load(tmp_path / "branch"))
    assert 'checkpoint.start_from: saved "none", now' in refusal(load(tmp_path / "stable", *start))


def test_the_first_stop_counts_and_is_named() -> None:
    def stop(*words: str) -> tuple[int, str]:
        config = load_config(RunConfig, ROOT / "configs" / "debug_softmax_muon.toml", [*SMALL, *words])
        return config.training.last_step, config.training.last_step_key

    step, tokens = "--training.stop_at_step", "--training.stop_at_tokens"
    assert stop() == (20, "training.steps")
    assert stop(tokens, "1") == (1, "training.stop_at_tokens")
    assert stop(tokens, "2560") == (10, "training.stop_at_tokens")
    assert stop(tokens, "2561") == (11, "training.stop_at_tokens")
    assert stop(tokens, "2561", step, "10") == (10, "training.stop_at_step")
    assert stop(tokens, "9999999", step, "21") == (20, "training.steps")
