"""Averaged checkpoints, and the average in a checkpoint: every command opens them."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from config import to_table, to_toml
from data.config import ParquetSource
from errors import UserError
from eval import perplexity
from eval.open_model import add_model_arguments, open_model
from models import average
from models.average import average_checkpoints, newest_checkpoints
from models.checkpoint.load import load_model
from models.checkpoint.verify import verify_checkpoint
from models.checkpoint.write import write_weights
from models.config import ModelConfig, ParallaxConfig
from models.convert.to_hf import convert_to_hf
from models.generation import __main__ as generation
from models.init import init_weights
from models.qwen3 import Qwen3
from models.run_folder import RunFolder
from tests.training.launch import losses, train
from tokens import END_OF_DOCUMENT

CONFIG = ModelConfig(size="debug", vocab_size=304, rope_theta=1e4, attention=ParallaxConfig())
Weights = dict[str, torch.Tensor]


def random_weights(seed: int) -> Weights:
    model = Qwen3(CONFIG)
    init_weights(model, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def make_run(
    folder: Path, corpus: Path, checkpoints: dict[int, Weights], averages: dict[int, Weights] | None = None
) -> Path:
    """Write a run folder with checkpoints by step, and the averages in them."""
    run = RunFolder(folder)
    folder.mkdir()
    data = {"tokenizer": str(corpus), "end_of_document": END_OF_DOCUMENT, "validation_documents": "all"}
    validation = to_table(ParquetSource(files=[str(corpus / "validation.parquet")]))
    run.config_file.write_text(
        to_toml(
            {
                "model": to_table(CONFIG),
                "data": {**data, "validation": validation},
                "training": {"seq_len": 48},
            }
        )
    )
    for step, weights in checkpoints.items():
        own = (averages or {}).get(step, {})
        state = {**weights, **{f"average.{name}": x for name, x in own.items()}}
        write_weights(
            run.checkpoint(step), {n: x.shape for n, x in state.items()}, torch.float32, state.__getitem__
        )
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> str:
    perplexity.main(["--checkpoint", str(run), *words])
    return capsys.readouterr().out


def generate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path, *words: str
) -> str:
    arguments = ["generation", "--checkpoint", str(run), "--prompt", "the", "--max-new-tokens", "12", *words]
    monkeypatch.setattr(sys, "argv", arguments)
    generation.main()
    return capsys.readouterr().out


def mean(weights: Sequence[Weights]) -> Weights:
    return {
        name: torch.stack([each[name].double() for each in weights]).mean(0).float() for name in weights[0]
    }


def equal(model: Qwen3, weights: Weights) -> bool:
    return all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_the_mean_of_the_newest_checkpoints_of_a_run_and_of_several_runs(
    corpus: Path, tmp_path: Path
) -> None:
    weights = [random_weights(seed) for seed in range(4)]
    one = make_run(tmp_path / "one", corpus, dict(zip((2, 10, 9), weights[:3], strict=True)))
    two = make_run(tmp_path / "two", corpus, {4: weights[3]})
    printed = average_checkpoints(newest_checkpoints(one, 2), tmp_path / "last")
    assert "last/checkpoint/step-10: the mean of 2 checkpoints" in printed
    assert equal(load_model(tmp_path / "last"), mean(weights[1:3]))
    chosen = [*newest_checkpoints(one / "checkpoint" / "step-2", 5), *newest_checkpoints(two, 1)]
    average_checkpoints(chosen, tmp_path / "both")
    assert equal(load_model(tmp_path / "both"), mean([weights[0], weights[3]]))
    table = RunFolder(tmp_path / "both").read_config()
    assert table is not None
    assert table["averaged"]["checkpoints"] == [str(path) for path in chosen]


def test_every_command_opens_an_averaged_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = [random_weights(seed) for seed in range(2)]
    run = make_run(tmp_path / "run", corpus, dict(enumerate(weights)))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["average", str(run), "--last", "2", "--out", str(out)])
    average.main()
    capsys.readouterr()
    by_hand = make_run(tmp_path / "hand", corpus, {1: mean(weights)})
    assert evaluate(capsys, out) == evaluate(capsys, by_hand) != evaluate(capsys, run)
    assert generate(monkeypatch, capsys, out) == generate(monkeypatch, capsys, by_hand)
    convert_to_hf(out, tmp_path / "hf")
    convert_to_hf(by_hand, tmp_path / "hf_by_hand")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf_by_hand"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert verify_checkpoint(out / "checkpoint" / "step-1").num_entries == len(weights[0])
    words = ["--model.vocab_size", "304", "--checkpoint.initial_weights", str(out)]
    words += ["--training.stop_at_step", "1"]
    train("debug_parallax_adamw", corpus, tmp_path / "trained", *words)
    assert [step for step, *_ in losses(tmp_path / "trained")] == [1]


def test_average_reads_the_average_in_every_command(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last, averaged = random_weights(0), random_weights(1)
    run = make_run(tmp_path / "run", corpus, {3: last}, {3: averaged})
    alone = make_run(tmp_path / "alone", corpus, {3: averaged})
    assert equal(load_model(run), last)
    assert equal(load_model(run, average=True), averaged)
    assert evaluate(capsys, run, "--average") == evaluate(capsys, alone) != evaluate(capsys, run)
    assert generate(monkeypatch, capsys, run, "--average") == generate(monkeypatch, capsys, alone)
    printed = convert_to_hf(run, tmp_path / "hf", average=True)
    assert "parameters of the average in step-3" in printed
    convert_to_hf(alone, tmp_path / "hf_alone")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf_alone"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    evaluate(capsys, run, "--average", "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text())["average"] is True
    with pytest.raises(UserError, match=r"step-3 has no average of the weights.*models.average"):
        load_model(alone, average=True)


def test_scores_of_the_average_are_not_those_of_the_weights(corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", corpus, {3: random_weights(0)}, {3: random_weights(1)})
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    words = ["--checkpoint", str(run)]
    plain, averaged = (
        open_model(parser.parse_args(each), torch.device("cpu")) for each in (words, [*words, "--average"])
    )
    # by which scores are kept in requests.jsonl
    assert plain.model.identity != averaged.model.identity
    assert (plain.facts["average"], averaged.facts["average"]) == (False, True)


def test_what_cannot_be_averaged_is_refused(corpus: Path, tmp_path: Path) -> None:
    weights = random_weights(0)
    run = make_run(tmp_path / "run", corpus, {1: weights, 2: weights})
    first, second = newest_checkpoints(run, 2)
    with pytest.raises(UserError, match=r"--last is 3, but .*run has 2 checkpoints.*checkpoint.keep"):
        newest_checkpoints(run, 3)
    with pytest.raises(UserError, match="is no checkpoint"):
        newest_checkpoints(tmp_path / "none", 1)
    for same in ([first], [first, first]):
        with pytest.raises(UserError, match="want two or more different checkpoints"):
            average_checkpoints(same, tmp_path / "out")
    with pytest.raises(UserError, match="already has a run"):
        average_checkpoints([first, second], run)
    other = make_run(tmp_path / "other", corpus, {1: weights})
    config = other / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("rope_theta = 10000.0", "rope_theta = 500000.0"))
    with pytest.raises(UserError, match=r"other.*another .* than .*run.*rope_theta = 500000.0.*10000.0"):
        average_checkpoints([first, other / "checkpoint" / "step-1"], tmp_path / "out")
    softmax = re.sub(r"(?<=\[model\.attention\]\n)[^\[]*", 'kind = "softmax"\n', text)
    config.write_text(softmax)
    with pytest.raises(UserError, match=r"model.attention.kind = 'softmax'.*'parallax'"):
        average_checkpoints([first, other / "checkpoint" / "step-1"], tmp_path / "out")
    # how the attention is computed and what it started from may differ
    config.write_text(text.replace("r_gain_init = 0.25", "r_gain_init = 0.0"))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text((corpus / "tokenizer.json").read_text() + "\n")
    config.write_text(config.read_text().replace(f'"{corpus}"', f'"{tokenizer}"'))
    with pytest.raises(UserError, match="another tokenizer"):
        average_checkpoints([first, other / "checkpoint" / "step-1"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
