"""The strict loader: what it merges, what it refuses and how it says so."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

import config
from config import to_toml
from data.config import DataConfig, ParquetSource
from optimizers.config import MuonGroup, ScheduleConfig
from training.run_config import RunConfig

RUN = """
[model]
size = "debug"
vocab_size = 300
[model.attention]
kind = "parallax"
r_gain_init = 0.5
[training]
steps = 10
seq_len = 16
global_batch_size = 4
local_batch_size = 2
[schedule]
warmup_steps = 1
[optimizer.groups.all]
kind = "adamw"
parameters = [".*"]
lr = 1e-3
[data]
tokenizer = "tokenizer.json"
validation = "none"
[data.train]
kind = "parquet"
files = ["a.parquet"]
"""


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    return config.load(RunConfig, path, overrides)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(config.ConfigError) as error:
        load(path, overrides)
    return str(error.value)


def test_a_run_is_typed_and_named_after_its_file(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, RUN))
    assert (loaded.run.name, loaded.run.folder) == ("run", "runs/run")
    assert loaded.training.stop_at_step is None
    assert loaded.data.validation is None
    assert loaded.model.attention.kind == "parallax"


def test_overrides_of_every_spelling(tmp_path: Path) -> None:
    path = write(tmp_path, RUN)
    words = [
        "--training.steps",
        "7",
        "--training.compile=false",
        "--run.name",
        "other",
        "--schedule.kind=cosine",
    ]
    loaded = load(path, [*words, "--data.train.files", '["b.parquet"]', "--training.max_grad_norm", "2"])
    assert (loaded.training.steps, loaded.training.compile, loaded.run.folder) == (7, False, "runs/other")
    assert isinstance(loaded.data.train, ParquetSource)
    assert loaded.data.train.files == ["b.parquet"]
    assert loaded.training.max_grad_norm == 2.0
    assert isinstance(loaded.training.max_grad_norm, float)


def test_extends_merges_tables_and_replaces_values(tmp_path: Path) -> None:
    write(tmp_path, RUN, "base.toml")
    child = 'extends = "base.toml"\n[training]\nsteps = 3\n[model.attention]\nkind = "softmax"\n'
    loaded = load(write(tmp_path, child))
    assert (loaded.training.steps, loaded.training.seq_len) == (3, 16)
    # the parallax options below do not leak into another kind
    assert loaded.model.attention.kind == "softmax"


def test_a_child_says_the_decay_in_steps_where_its_base_says_a_ratio(tmp_path: Path) -> None:
    write(tmp_path, RUN.replace("warmup_steps = 1", "warmup_steps = 1\ndecay_ratio = 0.5"), "base.toml")
    child = 'extends = "base.toml"\n[schedule]\ndecay_ratio = "none"\ndecay_steps = 3\n'
    schedule = load(write(tmp_path, child)).schedule
    assert (schedule.warmup_steps, schedule.decay_ratio, schedule.decay_steps) == (1, None, 3)
    message = refusal(write(tmp_path, child.replace('decay_ratio = "none"\n', "")))
    assert "schedule.decay_ratio (0.5) and decay_steps (3) are both given" in message


@pytest.mark.parametrize(("kind", "minimum"), [("cosine", 0.1), ("constant", 0.0)])
@pytest.mark.parametrize("base_kind", ['kind = "wsd"\n', ""])
def test_another_kind_of_schedule_dropped_the_warm_up(
    tmp_path: Path, kind: str, minimum: float, base_kind: str
) -> None:
    below = (
        f'{base_kind}warmup_steps = 5\ndecay_ratio = 0.5\ndecay_shape = "cosine"\nmin_lr_ratio = {minimum}\n'
    )
    path = write(tmp_path, RUN.replace("warmup_steps = 1", below))
    schedule = load(path, ["--schedule.kind", kind]).schedule
    # of the decay of the base nothing stays
    plain = ScheduleConfig(warmup_steps=5, min_lr_ratio=minimum)
    assert (schedule.kind, dataclasses.replace(schedule, kind="wsd")) == (kind, plain)
    child = write(tmp_path, f'extends = "run.toml"\n[schedule]\nkind = "{kind}"\n', "child.toml")
    assert load(child).schedule == schedule
    back = load(child, ["--schedule.kind", "wsd", "--schedule.decay_steps", "3"]).schedule
    assert (back.warmup_steps, back.decay_ratio, back.decay_steps) == (5, None, 3)


@pytest.mark.parametrize(
    ("key", "value"), [("decay_ratio", "0.5"), ("decay_steps", "3"), ("decay_shape", '"cosine"')]
)
def test_a_key_that_the_kind_of_schedule_does_not_read_was_taken(
    tmp_path: Path, key: str, value: str
) -> None:
    words = ["--schedule.kind=cosine", f"--schedule.{key}={value}"]
    for overrides in (words, words[::-1]):
        message = refusal(write(tmp_path, RUN), *overrides).replace("'", '"')
        assert f"schedule.{key} is {value}, which a cosine schedule does not read" in message
    text = RUN.replace("warmup_steps = 1", f'kind = "constant"\n{key} = {value}')
    message = refusal(write(tmp_path, text)).replace("'", '"')
    assert f"schedule.{key} is {value}, which a constant schedule" in message


def test_the_minimum_of_a_schedule_without_decay_was_taken(tmp_path: Path) -> None:
    text = RUN.replace("warmup_steps = 1", "min_lr_ratio = 0.1")
    message = refusal(write(tmp_path, text), "--schedule.kind=constant")
    assert "schedule.min_lr_ratio is 0.1, which a constant schedule does not read; set it to 0.0" in message
    words = ["--schedule.kind=constant", "--schedule.min_lr_ratio=0"]
    assert load(write(tmp_path, text), words).schedule == ScheduleConfig(kind="constant")


def test_another_kind_of_optimizer_lost_the_parameters_and_the_weight_decay(tmp_path: Path) -> None:
    path = write(tmp_path, RUN.replace("lr = 1e-3", "lr = 1e-3\nweight_decay = 0.1\nbeta1 = 0.5"))
    kind = "--optimizer.groups.all.kind=muon"
    message = refusal(path, kind)
    assert "optimizer.groups.all.lr: missing; want a number (a table whose kind changed needs its" in message
    group = load(path, [kind, "--optimizer.groups.all.lr", "0.01"]).optimizer.groups["all"]
    assert group == MuonGroup(parameters=[".*"], lr=0.01, weight_decay=0.1)


def test_later_files_win_and_cycles_are_found(tmp_path: Path) -> None:
    write(tmp_path, RUN, "a.toml")
    write(tmp_path, "[training]\nsteps = 5\n", "b.toml")
    assert load(write(tmp_path, 'extends = ["a.toml", "b.toml"]')).training.steps == 5
    for name in ("run.toml", "./run.toml", f"../{tmp_path.name}/run.toml"):
        assert "extends itself" in refusal(write(tmp_path, f'extends = "{name}"'))


def test_toml_of_a_run_loads_to_the_same_run(tmp_path: Path) -> None:
    words = ["--run.name", 'run \U0001f600 "quoted"', "--optimizer.groups.all.lr", "1e-7"]
    named = RUN.replace("[optimizer.groups.all]", '[optimizer.groups."every one"]')
    for text, overrides in ((RUN, words), (named, [])):
        loaded = load(write(tmp_path, text), overrides)
        assert load(write(tmp_path, to_toml(loaded), "again.toml")) == loaded


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["--optimizer.groups.al.lr", "1"],
            ["command line: optimizer.groups.al has no kind: correct its name"],
        ),
        (["--training.step", "3"], ["training.step:", "unknown key", "nearest is training.steps"]),
        (["--trainng.steps", "3"], ["trainng:", "nearest is training"]),
        (["--training.steps", "3.5"], ["training.steps:", "3.5", "an integer"]),
        (["--training.steps", "true"], ["training.steps:", "true", "an integer"]),
        (["--training.compile", "1"], ["training.compile:", "true or false"]),
        (["--training.precision", "float16"], ["training.precision:", '"bfloat16"', '"float32"']),
        (["--model.attention.kind", "quadratic"], ["model.attention.kind:", '"softmax"', '"parallax"']),
        (["--model.size", "3b"], ["model.size", "3b", "0.6b"]),
        (["--model.attention.window_size", "0"], ["model.attention.window_size", "at least 1"]),
        (["--training.seq_len", "0"], ["training.seq_len", "at least 1"]),
        (["--training.global_batch_size", "3"], ["training.global_batch_size", "multiple"]),
        (["--data.train.files", "[1]"], ["data.train.files[0]:", "a string"]),
        (["--data.train.files", "a.parquet"], ["data.train.files:", "want a list", """'["a.parquet"]'"""]),
        (
            ["--optimizer.groups.all.momentum", "0.9"],
            ["optimizer.groups.all.momentum:", 'unknown key; it is a key of kind "muon"'],
        ),
        (
            ["--model.attention.kind=softmax", "--model.attention.r_norm=true"],
            ["attention.r_norm: unknown key", 'it is a key of kind "parallax"'],
        ),
        (
            ["--data.train.folder", "x"],
            ["train.folder: unknown key", 'it is a key of kind "text" or "shards"'],
        ),
        (
            ["--optimizer.kind", "adamw"],
            ["optimizer.kind: unknown key", "nearest is optimizer.groups.NAME.kind"],
        ),
        (["--data.folder", "x"], ["data.folder: unknown key", "nearest is data.train.folder"]),
        (
            ["--model.attention", "softmax"],
            ["model.attention:", """a table, such as '{ kind = "softmax" }'"""],
        ),
        (["--schedule", "cosine"], ["schedule:", """want a table, such as '{ kind = "cosine" }'"""]),
        (["--checkpoint.keep", "1"], ["checkpoint.keep", "at least 2"]),
        (["--metrics.update_every", "0"], ["metrics.update_every", "at least 1"]),
        (
            ["--schedule.decay_ratio=0.1", "--schedule.decay_steps=3"],
            ["schedule.decay_ratio (0.1) and decay_steps (3)", '"none"'],
        ),
        (["--training", "3"], ["training:", "a table"]),
        (["--steps", "3"], ["steps:", "nearest is training.steps"]),
        (["--training.max_grad_norm", "-1"], ["training.max_grad_norm", "at least 1e-06"]),
        (["--run.name", "2026"], ["run.name: got 2026", "want a string", "such as '\"2026\"'"]),
        (["--run.name", "2024-01-01"], ["run.name:", "want a string", "such as '\"2024-01-01\"'"]),
        (["--eval.tasks_data", "7"], ['want a string or "none"', "such as '\"7\"'"]),
        (["--model.init_std", "nan"], ["model.init_std", "at least 1e-08", "got nan"]),
    ],
)
def test_refusals_name_key_value_and_remedy(tmp_path: Path, overrides: list[str], said: list[str]) -> None:
    message = refusal(write(tmp_path, RUN), *overrides)
    for part in said:
        assert part in message, message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """A table with a choice of integers."""

    width: Literal[1, 2] = 1


@pytest.mark.parametrize("word", ["1.0", "true", "3", '"1"'])
def test_a_choice_of_integers_is_an_integer(tmp_path: Path, word: str) -> None:
    path = write(tmp_path, "width = 2\n")
    assert config.load(Heads, path, []).width == 2
    with pytest.raises(config.ConfigError, match=r"width: got .*, want one of 1, 2"):
        config.load(Heads, path, ["--width", word])


def test_missing_key_missing_file_bad_toml_and_bad_words(tmp_path: Path) -> None:
    assert "training.steps: missing" in refusal(write(tmp_path, RUN.replace("steps = 10", "", 1)))
    assert "no such config file" in refusal(tmp_path / "absent.toml")
    assert "not valid TOML" in refusal(write(tmp_path, "a = ["))
    quoteless = "[training]\r\nsteps = 3\r\n  max_grad_norm = none\r\n"
    assert '(at line 3, column 19): "max_grad_norm = none"' in refusal(write(tmp_path, quoteless))
    near = tmp_path / "debug_softmax.toml"
    near.write_text(RUN)
    assert f"no such config file; nearest is {near}" in refusal(tmp_path / "debug_sofmax.toml")
    assert f"nearest is {near}" in refusal(write(tmp_path, 'extends = "debug_softmx.toml"'))
    path = write(tmp_path, RUN)
    assert "has no value" in refusal(path, "--training.steps")
    assert "expected an override" in refusal(path, "training.steps=3")


def test_an_override_that_is_wrong_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    write(tmp_path, RUN, "base.toml")
    path = write(tmp_path, 'extends = "base.toml"\n[training]\nlocal_batch_size = 4\n')
    assert refusal(path, "--training.steps", "x").startswith("command line: training.steps: got")
    assert refusal(path, "--training", "3").startswith("command line: training: got 3, want a table")
    assert refusal(path, "--data.train.kind=[]").startswith("command line: data.train.kind: got []")
    # of two keys that do not fit each other, the one that was set last
    assert refusal(path, "--training.global_batch_size", "3").startswith(
        "command line: training.global_batch"
    )
    write(tmp_path, RUN.replace("seq_len = 16", "seq_len = 0"), "base.toml")
    assert refusal(path).startswith(f"{tmp_path / 'base.toml'}: training.seq_len must be at least 1")
    write(tmp_path, RUN.replace("seq_len = 16", ""), "base.toml")
    assert refusal(path).startswith(f"{path}: training.seq_len: missing")


def test_none_is_named_where_a_key_may_be_unset(tmp_path: Path) -> None:
    path = write(tmp_path, RUN)
    assert 'want an integer or "none"' in refusal(path, "--training.stop_at_step", "soon")
    kinds = 'want one of "selective", "full" or "none"'
    assert kinds in refusal(path, "--training.activation_checkpointing", "all")


def test_characters_that_toml_escapes_survive(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, RUN), ["--run.name", "a\x7fb\u2028\t\\"])
    assert load(write(tmp_path, config.to_toml(loaded), "again.toml")) == loaded


def test_a_saved_table_of_another_version_names_file_and_key(tmp_path: Path) -> None:
    table = config.to_table(load(write(tmp_path, RUN)))["data"]
    assert config.to_table(config.from_table(DataConfig, table, "x")) == table
    table["train"]["colour"] = 1
    with pytest.raises(config.ConfigError, match=r"runs/x/config.toml .*: data.train.colour: unknown key"):
        config.from_table(DataConfig, table, "runs/x/config.toml", "data")
