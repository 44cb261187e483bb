"""Evaluation during training: results are recorded, losses do not change, and failures do not end the run."""

import json
import pickle
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import load as load_config
from data.tokenizer import Tokenizer
from eval.config import EvalConfig
from eval.distributed import EvaluationError
from eval.harness import evaluate_tasks
from eval.report.run_records import read_run
from eval.report.writer import write_report
from eval.scoring.language_model import Qwen3Model
from models.checkpoint.load import load_model
from tests.conftest import make_text
from tests.training.launch import EXACT, ROOT, losses, records, train
from training.evaluation import Evaluator
from training.preflight import check_tasks
from training.run_config import RunConfig
from training.sweep.records import FAILURE_OF_TASKS

FAILING = ("-m", "tests.training.failing_tasks")
NUM_DOCUMENTS = 12


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with local documents of SciQ."""
    folder = tmp_path_factory.mktemp("tasks")
    keys = ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer")
    rows = [
        {key: make_text(10 * seed + index, 3) for index, key in enumerate(keys)}
        for seed in range(NUM_DOCUMENTS)
    ]
    (folder / "sciq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def evaluated(corpus: Path, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks whose first evaluation of tasks, of six, fails on the last rank."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    words = [
        *("--eval.tasks", '["sciq"]', "--eval.tasks_every", "1", "--eval.tasks_data", str(documents)),
        *("--eval.tasks_limit", "8", "--eval.every", "2", "--training.stop_at_step", "6"),
        *("--checkpoint.every", "4", "--checkpoint.keep", "2"),
        *("--eval.sample_prompts", '["the model", "attention"]', "--eval.sample_tokens", "5"),
        # wrappers that rename and reshard the weights
        *("--parallelism.reshard_after_forward", "false"),
        *("--training.activation_checkpointing", "selective", "--metrics.tensorboard", "true"),
    ]
    train("debug_parallax_muon", corpus, folder, *EXACT, *words, ranks=2, program=FAILING)
    return folder


def test_a_failure_on_one_rank_is_recorded_and_training_continues(evaluated: Path) -> None:
    (failure,) = (record for record in records(evaluated) if "eval_error" in record)
    assert failure["step"] == 1
    # the checkpoint was written before
    expected = "eval.tasks: rank 1: RuntimeError: out of memory; checkpoints: ['step-1']"
    assert failure["eval_error"] == expected
    assert [step for step, *_ in losses(evaluated)] == list(range(1, 7))
    whole = {path.parent.name for path in (evaluated / "checkpoint").glob("step-*/.metadata")}
    assert whole == {"step-5", "step-6"}


def test_task_results_are_those_of_the_checkpoint_with_tokens_and_flops(
    evaluated: Path, corpus: Path, documents: Path
) -> None:
    lines = records(evaluated)
    evaluations = [record for record in lines if "tasks/sciq/acc" in record]
    assert [record["step"] for record in evaluations] == [2, 3, 4, 5, 6]
    last = evaluations[-1]
    model = Qwen3Model(load_model(evaluated / "checkpoint" / "step-6"), max_length=32)
    expected = evaluate_tasks(model, Tokenizer.load(corpus), ["sciq"], data=documents, limit=8)
    groups, scores = pickle.loads((evaluated / "scores.pkl").read_bytes())
    for ours, theirs in zip(model.score(groups), scores, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.log_probs == pytest.approx(b.log_probs, abs=1e-6)
    for metric in ("acc", "acc_norm"):
        assert last[f"tasks/sciq/{metric}"] == expected.metrics["sciq"][metric]
    assert last["tasks/sciq/num_documents"] == 8
    # max_length is the run's 32
    assert last["tasks/sciq/num_cut"] == expected.cut["sciq"].num_cut > 0
    assert last["tasks/sciq/num_fewshot"] == 0
    launch = lines[0]["launch"]
    assert launch["num_ranks"] == 2
    assert launch["num_parameters"] == sum(p.numel() for p in load_model(evaluated).parameters())
    for record in (*evaluations, *(line for line in lines if "validation_loss" in line)):
        assert record["tokens"] == record["step"] * 8 * 32
        assert record["flops"] == record["tokens"] * launch["flops_per_token"] >= 0


def test_samples_are_recorded_and_in_tensorboard_with_each_held_out_loss(evaluated: Path) -> None:
    lines = [record for record in records(evaluated) if "samples" in record]
    assert [record["step"] for record in lines] == [0, 2, 4, 6]
    assert [sample["prompt"] for sample in lines[0]["samples"]] == ["the model", "attention"]
    assert all(isinstance(sample["text"], str) for record in lines for sample in record["samples"])
    assert any(sample["text"] for record in lines for sample in record["samples"])
    events = EventAccumulator(str(evaluated / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("tasks/sciq/acc")] == [2, 3, 4, 5, 6]
    assert [event.step for event in events.Tensors("samples/1/text_summary")] == [0, 2, 4, 6]


def test_evaluation_does_not_change_the_losses(evaluated: Path, corpus: Path, tmp_path: Path) -> None:
    words = ("--training.stop_at_step", "6", "--parallelism.reshard_after_forward", "false")
    checkpointing = ("--training.activation_checkpointing", "selective")
    train("debug_parallax_muon", corpus, tmp_path / "run", *EXACT, *words, *checkpointing, ranks=2)
    assert losses(evaluated) == losses(tmp_path / "run")


def test_the_report_reads_the_metrics_of_training(evaluated: Path, tmp_path: Path) -> None:
    text = write_report([evaluated], baseline=None, out=tmp_path).read_text()
    assert "| tasks" not in text
    assert "| sciq/acc |" in text
    assert "2 x CPU process" in text
    assert "at step 1 an evaluation failed: eval.tasks: rank 1: RuntimeError: out of memory" in text
    assert (tmp_path / "loss_flops.png").exists()


def test_what_failed_has_the_name_by_which_a_sweep_knows_it(evaluated: Path) -> None:
    (failure,) = read_run(evaluated).failures
    assert (failure.step, failure.name) == (1, FAILURE_OF_TASKS)
    assert failure.message == "rank 1: RuntimeError: out of memory; checkpoints: ['step-1']"
    evaluator, recorded = Evaluator.__new__(Evaluator), []
    evaluator.device, evaluator.monitor, evaluator.metrics = torch.device("cpu"), Mock(), Mock()
    evaluator._gather_model = Mock(side_effect=EvaluationError("out of memory"))
    evaluator.metrics.record = lambda step, record: recorded.append(record["eval_error"])
    evaluator._evaluate_unsharded(2, {}, has_samples=True, has_tasks=True)
    failed = "no copy of the whole model: out of memory"
    assert recorded == [f"eval.sample_prompts: {failed}", f"{FAILURE_OF_TASKS}: {failed}"]


def check(tmp_path: Path, *words: str) -> None:
    path = ROOT / "configs" / "debug_softmax_muon.toml"
    check_tasks(load_config(RunConfig, path, ["--run.folder", str(tmp_path / "run"), *words]))


def test_tasks_that_cannot_be_evaluated_are_refused_before_training(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tmp_path)
    sciq = ("--eval.tasks", '["sciq"]')
    check(tmp_path, *sciq, "--eval.tasks_data", str(documents))
    with pytest.raises(ValueError, match="has no task sciqq"):
        check(tmp_path, "--eval.tasks", '["sciqq"]', "--eval.tasks_data", str(documents))
    with pytest.raises(ValueError, match=r"eval\.tasks_data is .*missing.*no such folder"):
        check(tmp_path, *sciq, "--eval.tasks_data", str(documents / "missing"))
    with pytest.raises(ValueError, match="has no documents of sciq"):
        check(tmp_path, *sciq, "--eval.tasks_data", str(tmp_path))
    monkeypatch.delitem(sys.modules, "eval.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    check(tmp_path)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[eval\]'"):
        check(tmp_path, *sciq, "--eval.tasks_data", str(documents))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"tasks_every": 0}, "tasks_every must be at least 1"),
        ({"tasks_limit": 0}, "tasks_limit must be at least 1"),
        ({"sample_tokens": 0}, "sample_tokens must be at least 1"),
        ({"sample_prompts": ["the", ""]}, "sample_prompts has an empty string"),
    ],
)
def test_invalid_keys_are_refused(words: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**words)  # pyrefly: ignore [bad-argument-type]


def test_an_evaluation_interrupted_by_a_kill_is_repeated_by_the_next_launch(
    corpus: Path, tmp_path: Path
) -> None:
    words = ("--eval.every", "1", "--eval.sample_prompts", '["the model"]', "--eval.sample_tokens", "3")
    words = (*words, "--training.stop_at_step", "2", "--eval.max_tokens", "150")
    printed = train("debug_parallax_muon", corpus, tmp_path, *EXACT, *words)
    assert printed.count("drawing 1,200 held-out tokens in one pass") == 1
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    cut = [line for line in lines if not (json.loads(line)["step"] == 2 and "validation_loss" in line)]
    assert len(cut) == len(lines) - 1
    file.write_text("\n".join(cut) + "\n")
    printed = train("debug_parallax_muon", corpus, tmp_path, *EXACT, *words)
    # of the sample that the first launch kept
    assert "drawing" not in printed
    again = records(tmp_path)
    assert again[:-1] == [json.loads(line) for line in cut]
    (lost,) = (json.loads(line) for line in lines if line not in cut)
    assert again[-1] == lost
    assert 0 < lost["validation_documents"] < 10
    # five rows of 32 tokens; where a document ends in them, the next one's first token is not predicted
    assert 160 - lost["validation_documents"] < lost["validation_tokens"] <= 160
    assert 0 < lost["validation_cut_documents"] <= lost["validation_documents"]
    assert f"documents, {lost['validation_cut_documents']} cut into rows)" in printed
    assert lost["validation_stderr"] > 0
    assert f"held-out loss {lost['validation_loss']:.4f} +/- {lost['validation_stderr']:.4f}" in printed
    # not repeated once it is recorded
    train("debug_parallax_muon", corpus, tmp_path, *EXACT, *words)
    assert records(tmp_path) == again
