"""Diagnostics during training: recorded, the same on any number of ranks, and without effect on training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from config import load as load_config
from eval.diagnostics.record import layer_values, read_records
from tests.training.launch import EXACT, ROOT, losses, records, train
from training.run_config import RunConfig

OFTEN = ("--diagnostics.every", "2", "--training.stop_at_step", "5")


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of five steps on 1 and on 2 ranks."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"diagnosed{ranks}") / "run"
        words = (
            *OFTEN,
            "--metrics.tensorboard",
            "true",
            "--checkpoint.every",
            "2",
            "--checkpoint.keep",
            "none",
        )
        train("debug_parallax_muon", corpus, folders[ranks], *EXACT, *words, ranks=ranks)
    return folders


def diagnostics(folder: Path) -> list[dict[str, Any]]:
    return read_records(folder / "diagnostics.jsonl")


def weights(folder: Path, into: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(folder / "checkpoint" / "step-5", into)
    saved = torch.load(into, weights_only=False)
    return {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}


def test_records_are_made_before_training_at_their_steps_and_after_the_last(runs: dict[int, Path]) -> None:
    found = diagnostics(runs[1])
    assert [record["step"] for record in found] == [0, 2, 4, 5]
    assert [record["tokens"] for record in found] == [256 * record["step"] for record in found]
    for record in found:
        assert [layer["layer"] for layer in record["layers"]] == [0, 1, 2, 3]
        assert record["sample"] == found[0]["sample"]
        assert record["sample"]["num_queries"] <= 256
        for layer in record["layers"]:
            assert all(len(values) == 4 for values in layer["heads"].values())
            assert {*layer["weights"]} == {"wq", "wk", "wv", "wo", "wr"}
    # at first the gain is 0.25, and the probe has its norm; later it is trained
    first, last = (layer_values(found[index]["layers"][1]) for index in (0, -1))
    assert first["gains/r_norm/rms"] == pytest.approx(0.25)
    assert last["gains/r_norm/rms"] != pytest.approx(0.25, rel=1e-4)
    # metrics.jsonl has none of it
    assert not any("layers" in record for record in records(runs[1]))


def test_two_ranks_measure_what_one_does(runs: dict[int, Path]) -> None:
    one, two = (diagnostics(runs[ranks]) for ranks in (1, 2))
    assert [record["sample"] for record in one] == [record["sample"] for record in two]
    # equal weights at first; those of one and two ranks differ by rounding later
    for a, b, tolerance in zip(one, two, (1e-4, 1e-2, 1e-2, 1e-2), strict=True):
        assert a["context"] == b["context"]
        for ours, theirs in zip(a["layers"], b["layers"], strict=True):
            ours, theirs = layer_values(ours), layer_values(theirs)
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert value == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name


def test_means_of_layers_are_in_tensorboard(runs: dict[int, Path]) -> None:
    events = EventAccumulator(str(runs[2] / "tensorboard"))
    events.Reload()
    name = "diagnostics/correction_ratio/mean/layer_02"
    wanted = [layer_values(record["layers"][2])["correction_ratio/mean"] for record in diagnostics(runs[2])]
    assert [event.step for event in events.Scalars(name)] == [0, 2, 4, 5]
    assert [event.value for event in events.Scalars(name)] == pytest.approx(wanted)
    assert len(events.Scalars("diagnostics/weights/wr/stable_rank/layer_03")) == 4


@pytest.mark.parametrize(
    "words",
    [
        ("--parallelism.reshard_after_forward", "false", "--training.activation_checkpointing", "selective"),
        ("--diagnostics.set", "full", "--diagnostics.layers", "[1, 3]"),
    ],
    ids=["gathered", "full"],
)
def test_training_is_the_same_to_the_last_bit_with_and_without(
    words: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    for name, every in (("with", "2"), ("without", "none")):
        folder = tmp_path / name
        often = (*OFTEN, "--diagnostics.every", every, "--optimizer.groups.hidden.dtype", "bfloat16")
        train("debug_parallax_muon", corpus, folder, *often, *words, ranks=2)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert len(losses(tmp_path / "with")) == 5
    one, two = (weights(tmp_path / name, tmp_path / f"{name}.pt") for name in ("with", "without"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    assert not (tmp_path / "without" / "diagnostics.jsonl").exists()
    if "full" in words:
        layers = diagnostics(tmp_path / "with")[-1]["layers"]
        assert [layer["layer"] for layer in layers] == [1, 3]
        assert "probe_alignment/mean" in layers[0]["heads"]


def test_a_resume_cuts_the_records_back_and_repeats_none(
    runs: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    shutil.rmtree(folder / "checkpoint" / "step-5")
    with (folder / "diagnostics.jsonl").open("a") as file:
        file.write('{"step": 6, "lay')
    train("debug_parallax_muon", corpus, folder, *EXACT, *OFTEN)
    lines = [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    for ours, theirs in zip(lines, diagnostics(runs[1]), strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    # one that is not on record is made up for
    (folder / "diagnostics.jsonl").write_text("")
    train("debug_parallax_muon", corpus, folder, *EXACT, *OFTEN)
    (again,) = diagnostics(folder)
    assert {**again, "seconds": 0} == {**lines[-1], "seconds": 0}


def test_a_failure_on_one_rank_is_recorded_and_training_continues(corpus: Path, tmp_path: Path) -> None:
    program = ("-m", "tests.training.failing_diagnostics")
    train("debug_parallax_muon", corpus, tmp_path, *EXACT, *OFTEN, ranks=2, program=program)
    (failure,) = (record for record in records(tmp_path) if "eval_error" in record)
    assert failure["step"] == 0
    assert failure["eval_error"] == "diagnostics: rank 1: RuntimeError: out of memory"
    assert [record["step"] for record in diagnostics(tmp_path)] == [2, 4, 5]
    assert len(losses(tmp_path)) == 5


def test_without_held_out_documents_there_are_none_and_the_run_says_so(corpus: Path, tmp_path: Path) -> None:
    words = ("--data.validation", "none", "--training.stop_at_step", "1")
    path = ROOT / "configs" / "debug_parallax_muon.toml"
    config = load_config(RunConfig, path, ["--run.folder", str(tmp_path), *words])
    assert config.unread_keys()[-1] == "diagnostics need data.validation, which is none: there will be none"
    assert not config.has_diagnostics
    off = load_config(RunConfig, path, [*words, "--diagnostics.every", "none"])
    assert not any("diagnostics" in each for each in off.unread_keys())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--diagnostics.every", "0"), "every must be at least 1"),
        (("--diagnostics.layers", "[0, 4]"), r"layers has 4, but the model's layers are 0 to 3"),
        (("--diagnostics.layers", "[]"), "at least one layer"),
        (("--diagnostics.layers", "[1, 1]"), "each once"),
        (("--diagnostics.set", "all"), "cheap"),
    ],
)
def test_invalid_keys_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(RunConfig, ROOT / "configs" / "debug_parallax_muon.toml", words)
