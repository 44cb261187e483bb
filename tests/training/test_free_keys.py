"""Keys that do not change what is trained exist, are free in reports too, and change no bit of a loss."""

from pathlib import Path

from config import load, to_table
from eval.report import choices
from tests.training.launch import EXACT, ROOT, losses, train
from training.free_keys import is_free
from training.run_config import RunConfig
from training.sweep.plan import flatten

OTHER_VALUES = {
    **{"run.name": "other", "data.prefetch_batches": "0", "training.cuda_graphs": "false"},
    **{"parallelism.timeout_seconds": "99", "eval.every": "1", "eval.max_tokens": "64"},
    **{"eval.sample_prompts": '["the model"]', "eval.sample_tokens": "3", "diagnostics.every": "1"},
    **{"checkpoint.every": "1", "checkpoint.keep": "2", "checkpoint.fall_back": "true"},
    **{"checkpoint.async_save": "true", "metrics.console_every": "2", "metrics.tensorboard": "true"},
    **{"metrics.wandb": "true", "metrics.update_every": "1", "metrics.spectrum_every": "2"},
}
NOT_CHANGED = {
    *("run.folder", "metrics.profile_every"),  # which needs a GPU
    *("eval.tasks", "eval.tasks_every", "eval.tasks_limit", "eval.tasks_num_fewshot", "eval.tasks_data"),
}


def all_keys() -> set[str]:
    return {*flatten(to_table(load(RunConfig, ROOT / "configs" / "debug_parallax_muon.toml")))}


def test_no_free_key_changes_a_bit_of_a_loss(corpus: Path, tmp_path: Path) -> None:
    free = {key for key in all_keys() if is_free(key) and not key.startswith("diagnostics.")}
    assert free == ({*OTHER_VALUES} | NOT_CHANGED) - {"diagnostics.every"}
    words = (*EXACT, "--training.stop_at_step", "5")
    train("debug_parallax_muon", corpus, tmp_path / "a", *words)
    others = [word for key, value in OTHER_VALUES.items() for word in (f"--{key}", value)]
    train("debug_parallax_muon", corpus, tmp_path / "b", *words, *others)
    assert len(losses(tmp_path / "a")) == 5
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_what_changes_nothing_that_is_trained_makes_no_row_of_a_report() -> None:
    keys = all_keys()
    assert {key for key in keys if is_free(key) and not choices.is_free(key)} == set()
    # beside these: seeds, what is only rounding, how long is trained, and where things lie
    assert {key for key in keys if choices.is_free(key) and not is_free(key)} == {
        *("run.seed", "run.deterministic", "data.shuffle_seed", "data.tokenizer", "model.attention.impl"),
        *("average.decay", "average.start_step", "training.stop_at_step", "training.stop_at_tokens"),
        *("training.local_batch_size", "training.compile", "training.activation_checkpointing"),
        *("parallelism.replicate", "parallelism.shard", "parallelism.reshard_after_forward"),
    }
