"""The [data] table in TOML."""

import re
from pathlib import Path

import pytest

import config
from config import to_toml
from data.config import HubSource, JsonlSource, MixtureSource, ShardsSource, TextSource
from tests.project_configs import project_configs
from training.run_config import RunConfig

RUN = """
[model]
size = "debug"
vocab_size = 300
[training]
steps = 1
seq_len = 16
global_batch_size = 1
local_batch_size = 1
[schedule]
warmup_steps = 0
[optimizer.groups.all]
kind = "adamw"
parameters = [".*"]
lr = 1e-3
[data]
tokenizer = "Qwen/Qwen3-0.6B-Base"
packing = "best_fit"
shuffle_seed = 7
validation_documents = "held_out"
[data.train]
kind = "mixture"
weights = { web = 0.7, own = 0.2, notes = 0.1 }
[data.train.sources.web]
kind = "hub"
parts = "1-4"
min_score = 0.8
[data.train.sources.own]
kind = "jsonl"
files = ["own.jsonl.zst"]
on_damaged_file = "skip"
[data.train.sources.notes]
kind = "text"
folder = "notes"
max_characters = 100_000
[data.validation]
kind = "shards"
folder = "shards"
"""


def test_a_run_names_every_kind_of_source_in_toml(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    data = config.load(RunConfig, tmp_path / "run.toml").data
    assert isinstance(data.train, MixtureSource)
    assert data.train.weights == {"web": 0.7, "own": 0.2, "notes": 0.1}
    assert data.train.sources == {
        "web": HubSource(parts="1-4", min_score=0.8),
        "own": JsonlSource(files=["own.jsonl.zst"], on_damaged_file="skip"),
        "notes": TextSource(folder="notes", max_characters=100_000),
    }
    assert data.validation == ShardsSource(folder="shards")
    (tmp_path / "again.toml").write_text(to_toml(config.load(RunConfig, tmp_path / "run.toml")))
    assert config.load(RunConfig, tmp_path / "again.toml").data == data
    words = ["--data.train.kind", "hub", "--data.train.parts", "1-20", "--data.shuffle_seed", "none"]
    data = config.load(RunConfig, tmp_path / "run.toml", words).data
    assert data.train == HubSource(parts="1-20")
    assert data.shuffle_seed is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.train.kind", "csv"], "data.train.kind: got 'csv', want one of"),
        (["--data.train.sources.web.kind", "mixture"], "data.train.sources.web.kind"),
        (["--data.train.weights.other", "1"], "data.train.weights of a mixture names"),
        (["--data.train.sources.web.parts", "0"], "data.train.sources.web.parts"),
        (["--data.train.sources.web.min_score", '"high"'], "data.train.sources.web.min_score"),
        (["--data.train.sources.own.on_damaged_file", "ask"], "data.train.sources.own.on_damaged_file"),
        (["--data.packing", "tight"], "data.packing"),
        (["--data.shuffle_window", "0"], "shuffle_window must be at least 1 "),
        (
            ["--data.shuffle_window", "9", "--data.shuffle_seed", "none"],
            "but shuffle_seed is none, for which",
        ),
        (
            ["--data.shuffle_window", "9", "--data.train.kind", "shards", "--data.train.folder", "x"],
            "shuffle_window is 9, but train reads shards alone, for which no window is held",
        ),
    ],
)
def test_a_wrong_source_is_rejected_with_its_key(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        config.load(RunConfig, tmp_path / "run.toml", words)


def test_every_config_of_the_project_reads_shards_or_the_sample() -> None:
    for path in project_configs():
        data = config.load(RunConfig, path).data
        assert data.train is not None
        assert data.shuffle_seed == 0
        if not path.stem.startswith("debug"):
            assert isinstance(data.train, ShardsSource)
            assert data.validation_documents == "held_out"
