"""Values with which no run makes sense are refused with their key, in one line, before anything is built."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
from errors import UserError
from training.dry_run import dry_run
from training.other_names import OTHER_NAMES
from training.preflight import build_meta_model
from training.run_config import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"
RUN = CONFIGS / "debug_parallax_muon.toml"


def load(*words: str) -> RunConfig:
    return config.load(RunConfig, RUN, words)


def refusal(*words: str) -> str:
    with pytest.raises(config.ConfigError) as error:
        load(*words)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("run.seed", ["-1", str(2**63), "9" * 400, "9" * 5000]),
        ("run.name", ["", ".", "..", "../../x", "a/b", "/x", "x" * 300]),
        ("run.folder", [""]),
        ("training.steps", ["0", str(10**18)]),
        ("training.seq_len", ["0", str(2**40)]),
        ("training.stop_at_tokens", ["0", "-1"]),
        ("training.z_loss", ["-1e-4", "2", "nan"]),
        ("training.spike_ratio", ["0.5", "inf", "nan"]),
        ("average.decay", ["-0.1", "1.0", "nan"]),
        ("average.start_step", ["-1"]),
        ("training.max_grad_norm", ["0", "1e-300", "1e300", "inf", "nan", "9" * 400]),
        ("model.rope_theta", ["0", "1e-30", "0.5", "1e300", "nan"]),
        ("model.norm_eps", ["0", "1e-300", "1e308", "nan"]),
        ("model.init_std", ["0", "1e-300", "1e308", "nan"]),
        ("model.vocab_size", ["0", str(10**18)]),
        ("model.attention.r_scale", ["inf", "nan", "1e308"]),
        ("model.attention.r_gain_init", ["-inf", "nan", "1e308"]),
        ("model.attention.window_size", ["0", str(2**31)]),
        ("optimizer.groups.hidden.lr", ["-1e-9", "1e30", "inf", "nan"]),
        ("optimizer.groups.hidden.weight_decay", ["-0.1", "1e30", "inf", "nan"]),
        ("optimizer.groups.hidden.weight_decay_gamma", ["-1", "inf", "nan"]),
        ("optimizer.groups.hidden.momentum", ["-0.1", "1", "nan"]),
        ("optimizer.groups.hidden.num_iterations", ["0", str(10**18)]),
        ("optimizer.groups.vectors.eps", ["0", "1e-300", "inf", "nan"]),
        ("optimizer.groups.vectors.beta2", ["1.0", "nan"]),
        ("schedule.warmup_steps", ["-1", str(10**18)]),
        ("schedule.min_lr_ratio", ["-0.1", "1.1", "nan"]),
        ("schedule.decay_ratio", ["-0.1", "1.1", "nan"]),
        ("data.shuffle_seed", ["-1", str(2**63)]),
        ("data.prefetch_batches", ["-1", str(10**18)]),
        ("data.tokenizer", [""]),
        ("data.train.min_characters", ["-1"]),
        ("data.train.min_score", ["nan", "inf"]),
        ("data.train.files", ["[]", '[""]']),
        ("data.train.text_column", [""]),
        ("eval.every", ["0", "-5"]),
        ("eval.sample_tokens", ["0", str(10**18)]),
        ("checkpoint.every", ["0"]),
        ("checkpoint.start_from", [""]),
        ("checkpoint.initial_weights", [""]),
        ("metrics.profile_every", ["9"]),
    ],
)
def test_a_value_out_of_range_was_trained_with_to_the_end(key: str, values: list[str]) -> None:
    for value in values:
        assert key in refusal(f"--{key}={value}"), value


def test_a_rate_and_a_weight_decay_that_turn_the_weights_around() -> None:
    words = ["--optimizer.groups.hidden.lr=0.1", "--optimizer.groups.hidden.weight_decay=20"]
    assert "optimizer.groups.hidden.lr (0.1) times weight_decay (20.0) must be at most 1" in refusal(*words)


def test_a_mixture_without_a_usable_weight_is_refused() -> None:
    sources = '{a = {kind = "shards", folder = "x"}, b = {kind = "shards", folder = "y"}}'
    for weight in ("0", "-1", "inf", "nan", "1e-300"):
        words = f'--data.train={{kind = "mixture", weights = {{a = 1, b = {weight}}}, sources = {sources}}}'
        assert "data.train.weights.b of a mixture" in refusal(words)
    assert "data.train.sources.b.folder is empty" in refusal(
        words.replace("b = 1e-300", "b = 1").replace('"y"', '""')
    )


def test_blocks_of_rows_that_do_not_divide_were_taken_by_the_dry_run() -> None:
    run = load("--optimizer.groups.hidden.block_rows=100")
    for check in (lambda: dry_run(run, 1), lambda: build_meta_model(run)):
        with pytest.raises(UserError, match=r"block_rows does not divide .*block_rows = 100.* and \d+ more"):
            check()
    assert dry_run(load("--optimizer.groups.hidden.block_rows=64"), 1)


def test_evaluation_keys_without_effect_are_said(caplog: pytest.LogCaptureFixture) -> None:
    words = ("--eval.every=5", "--data.validation=none", "--eval.max_tokens=none", "--eval.tasks_limit=3")
    run = load(*words)
    assert run.unread_keys() == [
        "eval.every is 5, but data.validation is none: it has no effect",
        "eval.tasks_limit is 3, but eval.tasks is empty: it has no effect",
        "diagnostics need data.validation, which is none: there will be none",
    ]
    assert re.search("^note +eval.every is 5, but", dry_run(run, 1), re.MULTILINE)
    # samples are generated at the same steps
    assert load(*words[:3], '--eval.sample_prompts=["a"]', "--diagnostics.every=none").unread_keys() == []
    assert load("--eval.every=5").unread_keys() == []


def test_tables_nested_too_deeply_and_other_oddities_end_in_one_line(tmp_path: Path) -> None:
    deep = ".".join(["a"] * 5000)
    assert "nested more than 32 deep" in refusal(f"--run.{deep}=1")
    assert "run.seed" in refusal("--run.seed=" + "[" * 5000 + "]" * 5000)
    for text in (
        f"{deep} = 1",
        f"[run.{deep}]",
        f"a = {'[' * 5000}",
        f"a = {'{a=' * 5000}",
        "a = " + "9" * 5000,
    ):
        path = tmp_path / "x.toml"
        path.write_text(text)
        with pytest.raises(config.ConfigError, match=r"nested|not valid TOML: ") as error:
            config.load(RunConfig, path)
        assert "\n" not in str(error.value)
    # bytes that are not UTF-8 come from the shell as lone surrogates
    assert "not UTF-8" in refusal("--run.name", "caf\udce9")
    assert "unknown key" in refusal("--run.a\nb", "1")
    # a value is one value
    assert "run.seed: got" in refusal("--run.seed", "1\nname = 2")


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=20))
def test_every_string_survives_the_saved_config(name: str) -> None:
    if name in (".", ".."):
        return
    words = [f"--data.train.text_column={config.to_toml({'x': name}).partition('= ')[2].strip()}"]
    loaded = load("--run.name", "y", *words)
    saved = config.tomllib.loads(config.to_toml(loaded))
    assert config.from_table(RunConfig, saved, "saved") == loaded
    assert saved["data"]["train"]["text_column"] == name


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--checkpoint.interval", "here it is checkpoint.every"),
        ("--eval.interval", "here it is eval.every"),
        ("--save_steps", "here it is checkpoint.every"),
        ("--learning_rate", "here it is optimizer.groups.NAME.lr"),
        ("--training.lr", "nearest is optimizer.groups.NAME.lr"),
        ("--optimizer.groups.hidden.learning_rate", "here it is optimizer.groups.hidden.lr"),
        ("--training.batch_size", "here it is training.global_batch_size"),
        ("--training.max_steps", "here it is training.steps"),
        ("--schedule.warmup_ratio", "here it is schedule.warmup_steps, in steps"),
        ("--num_train_epochs", "here it is training.steps: a run is as long as its steps"),
        ("--gradient_accumulation_steps", "here it is training.global_batch_size: "),
        ("--bf16", "here it is training.precision"),
        ("--output_dir", "here it is run.folder"),
        ("--lr_scheduler.warmup_steps", "here it is schedule"),
        ("--optimizer.name", "here it is optimizer.groups.NAME.kind"),
        ("--checkpoint.folder", "here it is run.folder"),
        ("--checkpoint.colour", "want one of every, keep, "),
    ],
)
def test_what_other_codebases_call_a_key(typed: str, said: str) -> None:
    message = refusal(typed, "1")
    assert "unknown key; " in message
    assert said in message


def test_a_plan_is_no_config_of_a_run() -> None:
    path = "configs/plans/claim_60m.toml"
    with pytest.raises(UserError, match=rf"{path} is a plan, .*: python -m training\.sweep {path} runs it"):
        config.load(RunConfig, path)


def test_other_names_stand_for_keys_and_are_none_themselves() -> None:
    keys = set(config._all_keys(RunConfig))
    assert {re.split("[,:]", key)[0] for key in OTHER_NAMES.values()} <= keys
    names = {key.rpartition(".")[2] for key in keys}
    # a group of Muon has a dtype of its own
    assert set(OTHER_NAMES) & names == {"dtype"}
