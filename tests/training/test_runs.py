"""Runs from the command line: resuming, numbers of ranks, recorded metrics."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import config
from models.run_folder import RunFolder
from tests.training.launch import EXACT, losses, records, train
from training.run_config import RunConfig

RANKS = pytest.mark.parametrize("ranks", [1, 2])


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of 20 steps on 1 and on 2 ranks, with a checkpoint of step 10."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"straight{ranks}") / "run"
        train("debug_parallax_muon", corpus, folders[ranks], *EXACT, "--checkpoint.every", "10", ranks=ranks)
    return folders


@RANKS
def test_ten_steps_and_a_resume_of_ten_are_bit_identical_to_twenty(
    ranks: int, straight: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train("debug_parallax_muon", corpus, folder, *EXACT, "--training.stop_at_step", "10", ranks=ranks)
    assert [step for step, *_ in losses(folder)] == list(range(1, 11))
    train("debug_parallax_muon", corpus, folder, *EXACT, ranks=ranks)
    assert losses(folder) == losses(straight[ranks])


def test_a_checkpoint_of_two_ranks_is_resumed_on_one(
    straight: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight[2], folder)
    shutil.rmtree(folder / "checkpoint" / "step-20")
    # an incomplete checkpoint, from a run that was killed while writing it: shards without metadata
    partial = folder / "checkpoint" / "step-15"
    shutil.copytree(folder / "checkpoint" / "step-10", partial)
    (partial / ".metadata").unlink()
    train("debug_parallax_muon", corpus, folder, *EXACT, "--training.stop_at_step", "14")
    assert [step for step, *_ in losses(folder)] == list(range(1, 15))
    for ours, theirs in zip(losses(folder), losses(straight[2]), strict=False):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_one_and_two_ranks_give_the_same_losses(
    optimizer: str, straight: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    folders = straight
    if optimizer == "adamw":
        folders = {ranks: tmp_path / f"run{ranks}" for ranks in (1, 2)}
        for ranks, folder in folders.items():
            stop = ("--training.stop_at_step", "10")
            train("debug_parallax_adamw", corpus, folder, *stop, ranks=ranks)
    one, two = losses(folders[1])[:10], losses(folders[2])[:10]
    assert len(one) == 10
    for a, b in zip(one, two, strict=True):
        assert a[1] == pytest.approx(b[1], abs=1e-5)
    assert one[-1][1] < one[0][1]


def test_initial_weights_are_bit_identical_on_one_and_two_ranks(corpus: Path, tmp_path: Path) -> None:
    weights = []
    for ranks in (1, 2):
        folder = tmp_path / f"run{ranks}"
        # a learning rate of zero keeps the initial weights
        still = [f"--optimizer.groups.{g}.lr=0.0" for g in ("hidden", "embedding", "vectors")]
        train("debug_parallax_muon", corpus, folder, *still, "--training.stop_at_step", "1", ranks=ranks)
        saved = tmp_path / f"weights{ranks}.pt"
        dcp_to_torch_save(folder / "checkpoint" / "step-1", saved)
        weights.append(torch.load(saved, weights_only=False))
    names = [name for name, value in weights[0].items() if isinstance(value, torch.Tensor)]
    assert sum(name.startswith("layers.") for name in names) == 4 * 13
    for name in names:
        assert torch.equal(weights[0][name], weights[1][name]), name


def test_every_step_is_recorded_with_its_metrics(straight: dict[int, Path]) -> None:
    lines = records(straight[2])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert [line["tokens"] for line in steps] == [8 * 32 * step for step in range(1, 21)]
    for line in steps:
        assert line["tokens_per_second"] > 0
        assert 0 <= line["data_wait_percent"] <= 100
        assert line["mfu_percent"] is line["mfu_whole_rows_percent"] is None
        assert 0 < line["step_flops"] <= line["flops"] / line["step"]
    # warm-up over 5 steps, decay over the last 5 of 20
    rates = [line["lr/hidden"] / 0.01 for line in steps]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[-2:] == pytest.approx([0.4, 0.2])
    assert {line["weight_decay/hidden"] for line in steps} == {0.05}
    assert {line["weight_decay/embedding"] for line in steps} == {0.0}
    held_out = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in held_out] == [0, 20]
    for line in held_out:
        assert line["validation_perplexity"] == pytest.approx(math.exp(line["validation_loss"]))
    assert held_out[1]["validation_loss"] < held_out[0]["validation_loss"] - 0.5
    saved = RunFolder(straight[2]).read_config()
    assert saved is not None
    assert saved["optimizer"]["groups"]["hidden"]["dtype"] == "float32"
    assert config.from_table(RunConfig, saved, "config.toml").run.folder == str(straight[2])


def test_flops_by_documents_are_equal_on_one_and_two_ranks(straight: dict[int, Path]) -> None:
    one, two = ([line["step_flops"] for line in records(straight[n]) if "loss" in line] for n in (1, 2))
    assert one == two
    assert min(one) < max(one)


def test_update_sizes_are_recorded_every_ten_steps_and_equal_on_one_and_two_ranks(
    straight: dict[int, Path],
) -> None:
    names = [f"update_rms/{group}" for group in ("hidden", "embedding", "vectors")]
    sizes = {}
    for ranks, folder in straight.items():
        lines = [line for line in records(folder) if any("update" in key for key in line)]
        assert [line["step"] for line in lines] == [10, 20]
        sizes[ranks] = [line[name] for line in lines for name in names]
        assert not any("update_sv" in key for line in lines for key in line)
    assert sizes[1] == pytest.approx(sizes[2], rel=1e-3)
    assert all(0.005 < size < 2.0 for size in sizes[1])


def test_parallelism_activation_checkpointing_and_async_saves_do_not_change_the_losses(
    straight: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    variants = {
        "hsdp": ["--parallelism.replicate", "2"],
        "selective": ["--training.activation_checkpointing", "selective"],
        "full": ["--training.activation_checkpointing", "full", "--training.local_batch_size", "4"],
        "async": ["--checkpoint.async_save", "true", "--checkpoint.every", "1"],
    }
    updates = ["--metrics.update_every", "2", "--metrics.spectrum_every", "4", "--training.stop_at_step", "4"]
    sizes = {}
    for name, words in variants.items():
        folder = tmp_path / name
        train("debug_parallax_muon", corpus, folder, *EXACT, *words, *updates, ranks=2)
        for ours, theirs in zip(losses(folder), losses(straight[2]), strict=False):
            assert ours == pytest.approx(theirs, abs=1e-5), name
        lines = records(folder)
        sizes[name] = {(r["step"], key): r[key] for r in lines for key in r if key.startswith("update_rms/")}
        assert len(sizes[name]) == 6
        assert sizes[name] == pytest.approx(sizes["hsdp"], rel=1e-3), name
        spreads = [{key: r[key] for key in r if key.startswith("update_sv_")} for r in lines if "loss" in r]
        assert [len(spread) for spread in spreads] == [0, 0, 0, 3]
        least, median, most = (spreads[3][f"update_sv_{which}/hidden"] for which in ("min", "median", "max"))
        assert 0.0 < least <= median <= most < 1.3
        assert median > 0.6
    assert len(list((tmp_path / "async" / "checkpoint").glob("step-*"))) >= 2


def test_unmasked_sequences_give_the_same_losses_on_one_and_two_ranks(corpus: Path, tmp_path: Path) -> None:
    words = ["--data.mask_documents", "false", "--training.stop_at_step", "4"]
    for ranks in (1, 2):
        train("debug_parallax_adamw", corpus, tmp_path / f"run{ranks}", *words, ranks=ranks)
    one, two = losses(tmp_path / "run1"), losses(tmp_path / "run2")
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    # without masking, the label after a document boundary counts too
    assert {line["predicted_tokens"] for line in records(tmp_path / "run1") if "loss" in line} == {8 * 32}


def test_a_stop_by_tokens_z_loss_and_gradients_that_are_not_clipped(corpus: Path, tmp_path: Path) -> None:
    words = ["--training.z_loss", "1e-3", "--training.max_grad_norm", "none"]
    words += ["--training.stop_at_tokens", "700"]
    printed = train("debug_softmax_muon", corpus, tmp_path / "run", *EXACT, *words)
    assert "stopped after step 3 of 20 (training.stop_at_tokens)" in printed
    lines = [line for line in records(tmp_path / "run") if "loss" in line]
    assert [line["tokens"] for line in lines] == [256, 512, 768]
    # of 300 ids with logits near 0
    assert lines[0]["loss"] == pytest.approx(math.log(300), abs=0.1)
    assert lines[0]["z_loss"] == pytest.approx(1e-3 * math.log(300) ** 2, rel=0.02)
    words = ["--training.stop_at_tokens", "2000", "--training.global_batch_size", "16"]
    printed = train("debug_softmax_muon", corpus, tmp_path / "run", *EXACT, *words, code=2)
    assert "counted in steps of 512 tokens, but the 3 steps of" in printed
    assert "have 768 in all; set training.stop_at_step instead" in printed
    # the config of the last launch is not that of all steps
    words = ["--training.global_batch_size", "16", "--training.stop_at_step", "4"]
    train("debug_softmax_muon", corpus, tmp_path / "run", *EXACT, *words)
    words = ["--training.global_batch_size", "16", "--training.stop_at_tokens", "2000"]
    printed = train("debug_softmax_muon", corpus, tmp_path / "run", *EXACT, *words, code=2)
    assert "the 4 steps of" in printed
    assert "have 1280 in all" in printed


def test_tensorboard_and_wandb_offline(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    words = ["--metrics.tensorboard", "true", "--metrics.wandb", "true", "--training.stop_at_step", "2"]
    train("debug_softmax_adamw", corpus, folder, *words)
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("loss")]
    assert curve == [(step, pytest.approx(loss, rel=1e-6)) for step, loss, _ in losses(folder)]
    (offline,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert (folder / "wandb_id").read_text().strip() in offline.name
    assert b"grad_norm" in offline.read_bytes()
