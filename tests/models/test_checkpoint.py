"""Loading models from run folders, and the errors of checkpoints that do not fit."""

from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed.checkpoint as dcp

from config import to_table, to_toml
from errors import UserError
from models.checkpoint.load import find_checkpoint, load_model, load_weights
from models.config import AttentionConfig, ModelConfig, ParallaxConfig
from models.init import init_weights
from models.qwen3 import Qwen3
from models.run_folder import nearby_checkpoints


def save_run(folder: Path, config: ModelConfig, step: int = 3, seed: int = 0) -> Qwen3:
    model = Qwen3(config)
    init_weights(model, seed)
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml({"model": to_table(config)}))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    dcp.save(weights, checkpoint_id=folder / "checkpoint" / f"step-{step}", no_dist=True)
    return model


@pytest.mark.parametrize("attention", [each() for each in get_args(AttentionConfig)], ids=lambda a: a.kind)
def test_a_loaded_model_is_bit_identical(tmp_path: Path, attention: AttentionConfig) -> None:
    config = ModelConfig(size="debug", vocab_size=50, attention=attention)
    model = save_run(tmp_path, config)
    loaded = load_model(tmp_path)
    ids = torch.arange(20).unsqueeze(0)
    assert loaded.config == config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(ids), model(ids))
    low = load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert low.output.weight is low.tok_embeddings.weight


def test_a_run_folder_stands_for_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    config = ModelConfig(size="debug", vocab_size=50)
    for step in (9, 10):
        save_run(tmp_path, config, step=step, seed=step)
    (tmp_path / "checkpoint" / "step-11").mkdir()
    assert find_checkpoint(tmp_path).name == "step-10"
    first, last = (
        load_model(path).tok_embeddings.weight for path in (tmp_path / "checkpoint" / "step-9", tmp_path)
    )
    assert not torch.equal(first, last)


def test_a_renamed_checkpoint_is_not_the_newest(tmp_path: Path) -> None:
    for name in ("step-9", "step-10.before-lr-change"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
        (tmp_path / "checkpoint" / name / ".metadata").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint" / "step-9"


def test_checkpoints_are_suggested_by_step_and_runs_by_similar_names(tmp_path: Path) -> None:
    for name in ("tiny/checkpoint/step-4", "tiny/checkpoint/step-12", "other/checkpoint/step-3"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / ".metadata").touch()
    checkpoints = tmp_path / "tiny" / "checkpoint"
    by_step = [checkpoints / "step-4", checkpoints / "step-12"]
    for path in (tmp_path / "tiny", checkpoints, checkpoints / "step-9"):
        assert nearby_checkpoints(path) == by_step
    assert nearby_checkpoints(tmp_path / "tinny") == by_step[1:]
    assert nearby_checkpoints(tmp_path / "absent" / "checkpoint" / "step-4") == []
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"in Hugging Face's format, for `python -m models\.convert from-hf`"):
        find_checkpoint(tmp_path)


def test_missing_and_other_models_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no checkpoint: wanted a run folder"):
        load_model(tmp_path)
    save_run(tmp_path, ModelConfig(size="debug", vocab_size=50))
    parallax = Qwen3(ModelConfig(size="debug", vocab_size=60, attention=ParallaxConfig()))
    with pytest.raises(UserError, match=r"tok_embeddings.weight is \[50, 128\], wanted \[60, 128\]") as error:
        load_weights(parallax, find_checkpoint(tmp_path))
    assert str(error.value).count("wr.weight is missing") == 4
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace('"softmax"', '"hyena"'))
    with pytest.raises(UserError, match=r"model\.attention\.kind: got 'hyena', want one of .softmax"):
        load_model(tmp_path)
    config.unlink()
    with pytest.raises(UserError, match=r"config.toml is missing"):
        load_model(tmp_path)


def test_a_damaged_checkpoint_raises(tmp_path: Path) -> None:
    save_run(tmp_path, ModelConfig(size="debug", vocab_size=50))
    for file in (tmp_path / "checkpoint" / "step-3").glob("*.distcp"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"__0_0.distcp is damaged: it has 0 bytes, wanted [\d,]+; no other"):
        load_model(tmp_path)
