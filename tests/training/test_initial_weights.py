"""Runs that start with the weights of a converted model; checkpoints that do not fit a run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from torch import nn

from config import ConfigError
from config import load as load_config
from data.tokenizer import Tokenizer
from errors import UserError
from models.checkpoint.load import load_model
from models.config import ModelConfig
from models.convert.format import to_config_json, to_hugging_face
from models.convert.from_hf import convert_from_hf
from models.init import init_weights
from models.qwen3 import Qwen3
from models.run_folder import RunFolder
from tests.training.launch import EXACT, ROOT, SMALL, losses, records, train
from training.resume import check_start, tokenizer_warnings
from training.run_config import RunConfig

INIT_STD = 0.1  # large: losses far from those of the default initialization


def converted(folder: Path, attention: Literal["parallax"] | None = None, *, tied: bool = True) -> Path:
    """Return a run folder with weights converted from a Hugging Face folder, of the debug size."""
    model = Qwen3(
        ModelConfig(size="debug", vocab_size=300, rope_theta=1e4, init_std=INIT_STD, tie_embeddings=tied)
    )
    init_weights(model, 5)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_hugging_face({name: p.detach() for name, p in model.named_parameters()})
    save_file(tensors, folder / "model.safetensors")
    table = to_config_json(model.config, dtype="float32", num_positions=32, eos_token_id=None)
    (folder / "config.json").write_text(json.dumps(table))
    out = folder / (attention or "softmax")
    convert_from_hf(folder, out, attention=attention)
    return out


def held_out(folder: Path) -> dict[int, float]:
    return {r["step"]: r["validation_loss"] for r in records(folder) if "validation_loss" in r}


def test_a_parameter_without_an_initial_value_raises() -> None:
    model = Qwen3(ModelConfig(size="debug", vocab_size=300))
    next(model.attention_modules()).register_parameter("tau", nn.Parameter(torch.empty(4)))
    with pytest.raises(UserError, match=r"layers\.0\.attention\.tau \(4,\) has no initial value"):
        init_weights(model, 0)


def test_a_model_converted_to_parallax_is_trained(corpus: Path, tmp_path: Path) -> None:
    plain, source = converted(tmp_path / "hf"), converted(tmp_path / "hf", "parallax")
    words = [*EXACT, "--checkpoint.initial_weights", str(source), "--training.stop_at_step", "4"]
    printed = train("debug_parallax_muon", corpus, tmp_path / "run", *words)
    assert f"starting with the weights of {source / 'checkpoint' / 'step-0'}" in printed
    assert "training from step 1 to 4" in printed
    start = ["--checkpoint.initial_weights", str(plain), "--training.stop_at_step", "1"]
    train("debug_softmax_muon", corpus, tmp_path / "softmax", *EXACT, *start)
    before = held_out(tmp_path / "run")
    assert before[0] == pytest.approx(held_out(tmp_path / "softmax")[0], abs=1e-5)
    assert losses(tmp_path / "run")[0][1] == pytest.approx(losses(tmp_path / "softmax")[0][1], abs=1e-5)
    assert before[0] > 6.0  # ln 300 = 5.7 with the default initialization
    assert before[4] < before[0] - 0.5
    trained, first = load_model(tmp_path / "run"), load_model(source)
    for name in ("layers.1.attention.wr.weight", "layers.1.attention.r_norm.weight"):
        a, b = (dict(m.named_parameters())[name] for m in (trained, first))
        assert (a - b).abs().max() > 0
    # resumes from its own checkpoint without the initial weights
    shutil.rmtree(source)
    words = [*words[:-1], "5"]
    printed = train("debug_parallax_muon", corpus, tmp_path / "run", *words)
    assert "training from step 5 to 5" in printed
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_untied_weights_are_the_same_on_one_and_two_ranks(corpus: Path, tmp_path: Path) -> None:
    source = converted(tmp_path / "hf", tied=False)
    words = [*EXACT, "--checkpoint.initial_weights", str(source / "checkpoint" / "step-0")]
    words += ["--model.tie_embeddings", "false", "--training.stop_at_step", "2"]
    for ranks in (1, 2):
        train("debug_softmax_muon", corpus, tmp_path / str(ranks), *words, ranks=ranks)
    one, two = (held_out(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one[0] == pytest.approx(two[0], abs=1e-6)
    assert one[2] == pytest.approx(two[2], abs=1e-5)
    assert one[2] < one[0]
    head, embedding = (
        dict(load_model(tmp_path / "2").named_parameters())[name]
        for name in ("output.weight", "tok_embeddings.weight")
    )
    before = dict(load_model(source).named_parameters())
    assert (head - before["output.weight"]).abs().max() > 0
    assert (embedding - before["tok_embeddings.weight"]).abs().max() > 0


def load(folder: Path, *words: str, name: str = "debug_softmax_muon") -> RunConfig:
    return load_config(
        RunConfig, ROOT / "configs" / f"{name}.toml", ["--run.folder", str(folder), *SMALL, *words]
    )


def test_weights_of_another_architecture_and_other_mistakes_are_refused(tmp_path: Path) -> None:
    source = converted(tmp_path / "hf")
    start = ["--checkpoint.initial_weights", str(source)]
    check_start(load(tmp_path / "run", *start))
    with pytest.raises(UserError, match=r"of another architecture: .*from-hf --attention parallax") as error:
        check_start(load(tmp_path / "run", *start, name="debug_parallax_muon"))
    assert 'model.attention.kind: saved "softmax", now "parallax"' in str(error.value)
    with pytest.raises(UserError, match=r"model.tie_embeddings: saved true, now false"):
        check_start(load(tmp_path / "run", *start, "--model.tie_embeddings", "false"))
    with pytest.raises(UserError, match="is no checkpoint: wanted a run folder"):
        check_start(load(tmp_path / "run", "--checkpoint.initial_weights", str(tmp_path)))
    with pytest.raises(ConfigError, match=r"checkpoint\.start_from loads the whole state of a run"):
        load(tmp_path / "run", *start, "--checkpoint.start_from", str(source / "checkpoint" / "step-0"))
    # a converted model cannot be resumed
    message = (
        "holds weights without optimizer state, as models.convert writes them.*checkpoint.initial_weights"
    )
    with pytest.raises(UserError, match=message):
        check_start(load(source))
    with pytest.raises(UserError, match=message):
        check_start(load(tmp_path / "run", "--checkpoint.start_from", str(source / "checkpoint" / "step-0")))


def test_other_initial_weights_for_a_run_folder_with_checkpoints_are_refused(tmp_path: Path) -> None:
    config = load(tmp_path / "run", "--checkpoint.initial_weights", "runs/there")
    RunFolder(Path(config.run.folder)).write_config(config)
    (tmp_path / "run" / "checkpoint" / "step-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "step-3" / ".metadata").write_text("")
    check_start(config)
    with pytest.raises(UserError, match='initial_weights: saved "runs/there", now "none"'):
        check_start(load(tmp_path / "run"))


def test_configs_saved_before_some_keys_and_patterns_were_introduced_are_compatible(tmp_path: Path) -> None:
    config = load(tmp_path / "run", name="debug_parallax_muon")
    RunFolder(Path(config.run.folder)).write_config(config)
    (tmp_path / "run" / "checkpoint" / "step-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "step-3" / ".metadata").write_text("")
    path = tmp_path / "run" / "config.toml"
    new = ("custom_size", "tie_embeddings", "initial_weights")
    kept = [line for line in path.read_text().splitlines() if line.split(" =")[0] not in new]
    old = "\n".join(kept).replace("(tok_embeddings|output)", "tok_embeddings")
    assert len(old) < len(path.read_text()) - 60
    path.write_text(old)
    check_start(config)
    # missing keys have their defaults
    with pytest.raises(UserError, match=r"model.tie_embeddings: saved true, now false"):
        check_start(replace(config, model=replace(config.model, tie_embeddings=False)))
    # patterns that match other parameters are incompatible
    without_probe = re.sub(r"w\[qkvor(\w*)\]", r"w[qkvo\1]", old)
    assert without_probe != old
    path.write_text(without_probe)
    with pytest.raises(UserError, match=r"other optimizers: optimizer\.groups\.hidden\.parameters: saved"):
        check_start(config)


def test_weights_trained_with_another_tokenizer_are_warned_of(tmp_path: Path) -> None:
    paths = []
    for index, word in enumerate(("one", "two")):
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, word: 1}))
        paths.append(tmp_path / f"{index}.json")
        backend.save(str(paths[-1]))
    checkpoint = tmp_path / "run" / "checkpoint" / "step-0"
    checkpoint.mkdir(parents=True)
    config_file = RunFolder.of_checkpoint(checkpoint).config_file
    config_file.write_text(f'[model]\nsize = "debug"\n[data]\ntokenizer = "{paths[0]}"\n')
    ours, other = (Tokenizer.load(path).fingerprint for path in paths)
    assert tokenizer_warnings(checkpoint, ours) == []
    assert "every row of the embedding stands for another token" in tokenizer_warnings(checkpoint, other)[0]
    config_file.write_text('[model]\nsize = "debug"\n[data]\ntokenizer = "gone.json"\n')
    assert "cannot be compared" in tokenizer_warnings(checkpoint, ours)[0]
