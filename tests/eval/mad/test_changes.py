"""Attentions with changed settings: their names, models, runs and columns."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config import from_table, to_table
from errors import UserError
from eval.mad import __main__ as command
from eval.mad import examples
from eval.mad.model import LanguageModel, build_model, canonical_changes
from eval.mad.optimizers import parameter_groups
from eval.mad.packs import pack
from eval.mad.plots import _styles
from eval.mad.runs import Outcome, Recipe, Run
from eval.mad.scores import make_columns, task_grids
from eval.mad.settings import settings
from eval.mad.train import train
from models.attention.key_values import KeyValueAttention
from models.attention.parallax import ParallaxAttention
from optimizers.config import MuonGroup
from optimizers.param_groups import assign_parameters

RECALL = settings("in-context-recall", "baseline")[0]
PARALLAX = Recipe(attention="parallax")
WIDE = replace(PARALLAX, changes="head_dim=32")


def test_the_same_changes_have_one_name() -> None:
    name = canonical_changes("parallax", ["r_gain_init=1", "head_dim=32"])
    assert name == "head_dim=32 r_gain_init=1.0"
    assert canonical_changes("parallax", ["head_dim=32", "rope=true", "r_gain_init=1.0"]) == name
    assert canonical_changes("parallax", name.split()) == name
    assert canonical_changes("parallax", ["head_dim=8", "window_size=none", "r_heads=query"]) == ""
    assert canonical_changes("parallax", ["r_heads=kv", "gate=head"]) == "gate=head r_heads=kv"
    # the default of MAD, not that of a config
    assert canonical_changes("mamba2", ["state_size=16"]) == ""


@pytest.mark.parametrize("head_dim", [2, 4, 16, 32, 64, 128])
@pytest.mark.parametrize("kind", ["softmax", "parallax", "lla"])
def test_heads_of_any_width_fill_the_models_width(kind: str, head_dim: int) -> None:
    model = build_model(kind, RECALL, 0, f"head_dim={head_dim}")
    modules = [module for module in model.modules() if isinstance(module, KeyValueAttention)]
    assert [(m.size.num_heads, m.size.num_kv_heads, m.size.head_dim) for m in modules] == [
        (128 // head_dim, 128 // head_dim, head_dim)
    ] * 2
    assert {m.wq.weight.shape for m in modules} == {(128, 128)}
    assert model(torch.zeros(2, 5, dtype=torch.int64)).isfinite().all()


def test_settings_of_an_attention_are_its_modules() -> None:
    model = build_model("parallax", RECALL, 0, "num_plain_layers=1 r_gain_init=1.0")
    (module,) = [module for module in model.modules() if isinstance(module, ParallaxAttention)]
    assert torch.equal(module.r_norm.weight, torch.ones(8))
    other = build_model("parallax", RECALL, 0)
    assert {m.r_norm.weight[0].item() for m in other.modules() if isinstance(m, ParallaxAttention)} == {0.25}


def _last_logits_of_one_block(changes: str, order: list[int]) -> torch.Tensor:
    model = build_model("softmax", RECALL, 0, changes).double()
    assert isinstance(model, LanguageModel)
    model.encoder.layers = model.encoder.layers[:1]
    return model(torch.tensor([order]))[:, -1]


def test_without_rope_the_last_token_does_not_see_the_order_of_those_before() -> None:
    tokens, permuted = [3, 1, 4, 5, 9, 2, 6], [9, 5, 1, 2, 4, 3, 6]
    one, other = (_last_logits_of_one_block("rope=false", each) for each in (tokens, permuted))
    torch.testing.assert_close(one, other)
    one, other = (_last_logits_of_one_block("", each) for each in (tokens, permuted))
    assert (one - other).abs().max() > 1e-3


def test_factors_of_the_probes_matrix_are_updated_by_muon() -> None:
    (run, *_) = task_grids(
        Recipe(attention="parallax", optimizer="muon", changes="r_rank=4"), "in-context-recall", "baseline"
    )[0]
    groups = parameter_groups(run)
    assert isinstance(groups["hidden"], MuonGroup)
    model = build_model("parallax", RECALL, 0, run.recipe.changes)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[id(p)] for p in assign_parameters(model.named_parameters(), groups)["hidden"]}
    assert {f"encoder.layers.0.attention.{name}.weight" for name in ("wq", "wr_in", "wr_out")} < hidden


def _outcome(accuracy: float) -> Outcome:
    return Outcome(accuracy=accuracy, loss=1.5, num_epochs=200, seconds=3.25)


def test_changes_are_not_trained_with_others_and_have_columns_and_looks_of_their_own() -> None:
    runs = [run for each in (PARALLAX, WIDE) for run in task_grids(each, "in-context-recall", "baseline")[0]]
    assert sorted({run.recipe.changes for run in each} for each in pack(runs)) == [{""}, {"head_dim=32"}]
    with pytest.raises(AssertionError, match="shapes"):
        train([runs[0], runs[-1]], torch.device("cpu"), lambda run, outcome: None)
    columns = make_columns(dict.fromkeys(runs, _outcome(0.5)), {RECALL})
    assert [column.name for column in columns] == ["parallax, adamw", "parallax, adamw, head_dim=32"]
    plain, wide = _styles(columns).values()
    assert plain.color != wide.color
    assert plain.marker != wide.marker


def test_results_that_know_of_no_changes_have_none() -> None:
    run = task_grids(PARALLAX, "in-context-recall", "baseline")[0][0]
    table = to_table(run)
    del table["recipe"]["changes"]
    assert from_table(Run, table, "line 1", "run") == run


@pytest.mark.parametrize(
    ("kinds", "words", "message"),
    [
        ("softmax", ["head_dims=32"], r"--set for softmax: head_dims: unknown key; nearest is head_dim"),
        (
            "parallax,softmax",
            ["r_gain_init=1"],
            r"--set for softmax: r_gain_init: unknown key; want one of win",
        ),
        ("parallax", ["gain=1"], r"gain: unknown key; want one of window_size, r_heads, .*, head_dim, rope$"),
        ("parallax", ["kind=softmax"], r"kind: unknown key"),
        ("kda", ["head_dim=64"], r"--set for kda: head_dim: unknown key; no key is allowed"),
        ("mamba2", ["rope=false"], r"--set for mamba2: rope: unknown key; want one of state_size"),
        ("softmax", ["head_dim=24"], r"head_dim: got 24, want one of 2, 4, 8, 16"),
        ("softmax", ["head_dim=32.0"], r"head_dim: got 32\.0, want one of 2"),
        ("softmax", ["rope=0"], r"rope: got 0, want true or false"),
        ("parallax", ["r_gain_init=high"], r"r_gain_init: got \"high\", want a number"),
        ("parallax", ["num_plain_layers=2"], r"num_plain_layers must be below the 2 layers"),
        ("softmax", ["window_size=0"], r"window_size must be at least 1"),
        ("softmax", ["rope"], r"--set has 'rope', want KEY=VALUE"),
    ],
)
def test_wrong_changes_are_named(tmp_path: Path, kinds: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.main(["--attention", kinds, "--set", *words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_run_of_the_command_with_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "NUM_TEST_ROWS", 64)
    words = ["--attention", "parallax", "--tasks", "memorization", "--max-epochs", "1", "--device", "cpu"]
    words += ["--out", str(tmp_path)]
    command.main([*words, "--set", "head_dim=32", "r_gain_init=1", "rope=false"])
    printed = capsys.readouterr().out
    assert printed.count("parallax head_dim=32 r_gain_init=1.0 rope=false adamw on memorization") == 6
    name = "parallax, adamw, head_dim=32 r_gain_init=1.0 rope=false, 1 epochs"
    assert f"| task | {name} |" in printed
    command.main([*words, "--set", "rope=false", "r_gain_init=1.0", "--set", "head_dim=32"])
    assert "accuracy" not in capsys.readouterr().out
    command.main(words)
    printed = capsys.readouterr().out
    assert printed.count("accuracy") == 6
    assert f"| task | {name} | parallax, adamw, 1 epochs |" in printed
