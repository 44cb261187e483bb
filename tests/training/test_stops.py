"""Signals, losses of NaN or Inf, and invalid runs: checkpoints are kept and errors name the remedy."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import train as main_program
from config import load as load_config
from errors import UserError
from tests.conftest import write_parquet
from tests.training.launch import LONG, ROOT, command, environment, losses, records, start_long, train
from training.run_config import RunConfig
from training.titan import to_job_config

ANY_RATE = ("-m", "tests.training.any_rate")


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_writes_a_checkpoint_from_which_the_run_is_resumed(
    number: signal.Signals, ranks: int, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start_long(corpus, folder, ranks=ranks)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    # torchrun exits with 1 on a signal, whatever its workers return
    assert process.returncode == (0 if ranks == 1 else 1), printed[-4000:]
    assert "stopped by a signal after step" in printed
    step = losses(folder)[-1][0]
    assert (folder / "checkpoint" / f"step-{step}" / ".metadata").exists()
    train("debug_parallax_muon", corpus, folder, *LONG, "--training.stop_at_step", str(step + 2), ranks=ranks)
    assert [s for s, *_ in losses(folder)] == list(range(1, step + 3))


def test_a_stopped_run_prints_its_newest_held_out_loss(corpus: Path, tmp_path: Path) -> None:
    folder, validation = tmp_path / "run", corpus / "validation.parquet"
    words = ("--data.validation", f'{{kind = "parquet", files = ["{validation}"]}}', "--eval.every", "1")
    process = start_long(corpus, folder, *words)
    while not any(r["step"] and "validation_loss" in r for r in records(folder)):
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    newest = [r for r in records(folder) if "validation_loss" in r][-1]
    assert "the same command resumes" in printed
    (line,) = (line for line in printed.splitlines() if f"(after step {newest['step']})" in line)
    assert f"held-out loss        {newest['validation_loss']:.4f}" in line


def test_a_second_signal_exits_at_once() -> None:
    program = (
        "import time; from training import signals; signals.GRACE_SECONDS = 0.2\n"
        "stop = signals.StopRequest(); stop.install(); print('ready', flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    process = subprocess.Popen(
        [*command(1), "-c", program], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the same request, delivered twice by a launcher
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    printed = train("debug_softmax_adamw", corpus, folder, "--training.stop_at_step", "3")
    assert re.search(r"stopped after step 3 of \d+ \(training\.stop_at_step\)", printed)
    diverging = [f"--optimizer.groups.{group}.lr=1e36" for group in ("hidden", "embedding", "vectors")]
    printed = train("debug_softmax_adamw", corpus, folder, *diverging, code=1, program=ANY_RATE)
    assert "stopped without saving" in printed
    assert "Traceback" not in printed
    bad_step = len(losses(folder)) + 1
    assert f"step {bad_step}: loss " in printed
    assert [p.name for p in (folder / "checkpoint").iterdir()] == ["step-3"]
    # the last good state is resumed
    train("debug_softmax_adamw", corpus, folder, "--training.stop_at_step", "5", program=ANY_RATE)
    assert [step for step, *_ in losses(folder)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "ranks"), [("debug_softmax_adamw", 1), ("debug_softmax_adamw", 2), ("debug_parallax_muon", 2)]
)
def test_a_non_finite_gradient_leaves_weights_and_state_unchanged(
    name: str, ranks: int, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    program = ("-m", "tests.training.poisoned")
    printed = train(name, corpus, folder, "--checkpoint.every", "1", ranks=ranks, code=1, program=program)
    for rank in range(ranks):
        assert re.search(rf"rank {rank}: \d+ tensors are unchanged", printed), printed[-4000:]
    assert re.search(r"step 3: loss \d+\.\d+, gradient norm nan; stopped without saving", printed)
    assert [step for step, *_ in losses(folder)] == [1, 2]
    assert {p.name for p in (folder / "checkpoint").iterdir()} == {"step-1", "step-2"}


def test_non_finite_weights_are_not_saved(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    diverging = [f"--optimizer.groups.{group}.lr=1e36" for group in ("hidden", "embedding", "vectors")]
    words = [*diverging, "--training.stop_at_step", "1"]
    printed = train("debug_softmax_adamw", corpus, folder, *words, code=1, program=ANY_RATE)
    assert "step 1: the norm of the weights is inf; stopped without saving" in printed
    assert not list(folder.glob("checkpoint/step-*"))


def test_a_finished_run_is_reported_and_keeps_its_metrics(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("debug_softmax_adamw", corpus, folder, "--training.stop_at_step", "2")
    before, saved = records(folder), (folder / "config.toml").read_text()
    printed = train("debug_softmax_adamw", corpus, folder, "--training.stop_at_step", "2")
    assert "has finished at step 2; raise training.stop_at_step to resume" in printed
    words = ("--run.seed", "7", "--metrics.update_every", "3")
    printed = train("debug_softmax_adamw", corpus, folder, "--training.stop_at_step", "2", *words, code=2)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "has finished at step 2 with another config: " in line
    assert "run.seed: saved 0, now 7" in line
    assert "Restore these keys (these may differ: metrics.update_every: saved 10, now 3), raise " in line
    assert "Traceback" not in printed
    assert records(folder) == before
    assert (folder / "config.toml").read_text() == saved


def test_a_refused_resume_leaves_the_saved_config_unchanged(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("debug_softmax_adamw", corpus, folder, "--training.stop_at_step", "1")
    saved = (folder / "config.toml").read_text()
    write_parquet(tmp_path / "other.parquet", ["some other text"])
    other = ["--data.train.files", f'["{tmp_path / "other.parquet"}"]']
    printed = train("debug_softmax_adamw", corpus, folder, *other, code=2)
    assert "belongs to another source" in printed
    assert "Traceback" not in printed
    printed = train("debug_softmax_muon", corpus, folder, code=2)
    assert 'checkpoints of other optimizers: optimizer.groups.hidden.kind: saved "adamw"' in printed
    assert (folder / "config.toml").read_text() == saved
    # keys that change neither the weights' shapes nor the function may change
    words = ["--model.init_std", "0.1", "--training.max_grad_norm", "0.5", "--training.stop_at_step", "2"]
    printed = train("debug_softmax_adamw", corpus, folder, *words)
    assert "the first 1 steps of" in printed
    assert "training.max_grad_norm: saved 1.0, now 0.5" in printed
    assert "max_grad_norm = 0.5" in (folder / "config.toml").read_text()


def test_another_rank_prints_its_error_after_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(main_program.time, "sleep", slept.append)
    # rank 0 prints first: torchrun kills the other ranks before they repeat the same error
    for rank, seconds, prefix in (("0", [], "error: "), ("1", [5.0], "rank 1: error: ")):
        slept.clear()
        monkeypatch.setenv("RANK", rank)
        words = ["--config", "configs/debug_softmax_adamw.toml", "--training.no_such_key", "1", "--dry-run"]
        assert main_program.main(words) == 2
        assert slept == seconds
        printed = capsys.readouterr().err
        assert printed.startswith(prefix)
        assert "no_such_key" in printed


def test_a_value_error_that_is_no_user_error_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*words: object) -> None:
        list(zip([1], [], strict=True))

    monkeypatch.setattr(main_program.config, "load", load)
    with pytest.raises(ValueError, match="shorter"):
        main_program.main(["--config", "any.toml"])


def test_profiler_traces_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(RunConfig, "configs/debug_softmax_adamw.toml", ["--metrics.profile_every", "10"])
    with pytest.raises(UserError, match=r"metrics\.profile_every is 10, but .* needs a GPU; set it to none"):
        to_job_config(config, 1)


def test_a_checkpoint_of_another_architecture_is_refused(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("debug_softmax_adamw", corpus, folder, "--training.stop_at_step", "1")
    printed = train("debug_parallax_muon", corpus, folder, code=2)
    assert "holds checkpoints of another architecture" in printed
    assert 'model.attention.kind: saved "softmax", now "parallax"' in printed
    assert "run.folder" in printed


def refusal(corpus: Path, tmp_path: Path, *overrides: str, ranks: int = 1) -> str:
    folder = tmp_path / "refused"
    code = 2 if ranks == 1 else 1  # torchrun gives 1 for any failed worker
    printed = train("debug_softmax_adamw", corpus, folder, *overrides, ranks=ranks, code=code)
    assert not folder.exists()
    assert "Traceback" not in printed or ranks > 1
    return printed


def test_missing_data_and_tokenizer(corpus: Path, tmp_path: Path) -> None:
    printed = refusal(corpus, tmp_path, "--data.train.files", '["absent.parquet"]')
    assert "absent.parquet" in printed
    printed = refusal(corpus, tmp_path, "--data.tokenizer", "absent")
    assert "absent" in printed
    assert "tokenizer" in printed


def test_vocabulary_larger_than_the_model(corpus: Path, tmp_path: Path) -> None:
    printed = refusal(corpus, tmp_path, "--model.vocab_size", "200")
    assert "300" in printed
    assert "200" in printed
    assert "model.vocab_size" in printed


def test_parquet_without_the_text_column(corpus: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "other.parquet", ["some text"])
    words = ["--data.train.files", f'["{tmp_path / "other.parquet"}"]', "--data.train.text_column", "text"]
    printed = refusal(corpus, tmp_path, *words)
    for part in ("other.parquet", "text", "content"):
        assert part in printed


def test_a_schedule_that_does_not_fit_and_a_folder_that_is_a_file(corpus: Path, tmp_path: Path) -> None:
    assert "warmup_steps (5)" in refusal(corpus, tmp_path, "--training.steps", "3")
    (tmp_path / "file").write_text("")
    printed = refusal(corpus, tmp_path, "--run.folder", str(tmp_path / "file" / "run"))
    assert "a file has this name" in printed
    printed = refusal(corpus, tmp_path, "--dry-run", "--world-size", "3")
    assert "training.global_batch_size (8) must be a multiple of" in printed


def test_null_and_empty_rows_are_skipped_and_counted(corpus: Path, tmp_path: Path) -> None:
    table = pa.table({"content": ["the model reads keys", None, "", "  ", "a probe of its past"] * 400})
    pq.write_table(table, tmp_path / "gaps.parquet")
    folder = tmp_path / "run"
    words = ["--data.train.files", f'["{tmp_path / "gaps.parquet"}"]', "--training.stop_at_step", "2"]
    printed = train("debug_softmax_adamw", corpus, folder, *words)
    counts = [line["skipped_documents"] for line in records(folder) if "loss" in line]
    assert 0 < counts[0] < counts[1]
    assert "documents skipped" in printed
    only_nulls = pa.table({"content": pa.array([None, None], pa.string())})
    pq.write_table(only_nulls, tmp_path / "nulls.parquet")
    words = ["--data.train.files", f'["{tmp_path / "nulls.parquet"}"]']
    printed = train("debug_softmax_adamw", corpus, tmp_path / "none", *words, code=2)
    assert "holds no document" in printed


def test_batch_that_does_not_divide_among_the_ranks(corpus: Path, tmp_path: Path) -> None:
    words = ["--training.global_batch_size", "6"]
    printed = refusal(corpus, tmp_path, *words, ranks=2)
    assert "training.global_batch_size (6) must be a multiple of" in printed
    assert "ranks (2)" in printed
