"""Whether micro-batches are replayed has one owner, which the run, the estimate and the dry run ask."""

from pathlib import Path

import pytest

from config import load
from training.dry_run import dry_run
from training.preflight import build_meta_model
from training.replay import replay_refusal
from training.run_config import RunConfig
from training.step_time import estimate_step_time

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), None),
        (("--training.cuda_graphs", "false"), "training.cuda_graphs is false"),
        (
            ("--training.activation_checkpointing", "full"),
            "training.activation_checkpointing reads the state",
        ),
    ],
    ids=["replayed", "without graphs", "recomputed"],
)
def test_the_estimate_launches_what_the_run_does_not_replay(words: tuple[str, ...], said: str | None) -> None:
    # micro-batches so small that the host bounds them
    small = ("--training.local_batch_size", "1", "--training.global_batch_size", "8")
    run = load(RunConfig, ROOT / "configs/0.6b_softmax_adamw.toml", [*small, *words])
    model = build_meta_model(run)
    refusal, time = replay_refusal(model, run.training), estimate_step_time(run, model, 8)
    assert time is not None
    assert (refusal is None) == (said is None) == (time.launch_bound == 0.0)
    assert said is None or str(refusal).startswith(said)


def test_the_dry_run_says_why_it_has_no_estimate_as_the_run_does() -> None:
    path, words = ROOT / "configs/60m_parallax_muon.toml", ["--model.attention.impl", "eager"]
    run = load(RunConfig, path, words)
    assert f"no estimate ({replay_refusal(build_meta_model(run), run.training)}); state" in dry_run(run, 1)


def test_nothing_else_in_training_decides_it() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "training").rglob("*.py")}
    for words in ("forward_supports_cuda_graph", "without our kernels, by", "cuda_graphs is false"):
        assert [name for name, text in texts.items() if words in text] == ["replay.py"], words
