"""Plans become members: combinations, names, seeds, runs that stages share, and refusals."""

import itertools
import json
from pathlib import Path

import pytest

from config import to_table
from errors import UserError
from eval.report.run_records import flatten
from tests.project_configs import project_configs
from tests.training.sweep.plans import CONFIGS, RATE, observe, write_plan
from training.sweep.__main__ import main
from training.sweep.members import Member
from training.sweep.plan import load_plan

SOFTMAX = json.dumps(str(CONFIGS / "debug_softmax_muon.toml"))
PLANS = project_configs(folder="configs/plans")


def members(path: Path) -> list[Member]:
    return [status.member for status in observe(path).look().statuses]


def stage(axes: str = "", more: str = "", configs: str = SOFTMAX) -> str:
    return f'[[stages]]\nname = "one"\nconfigs = [{configs}]\n{more}\n{axes}'


def axis(keys: list[str], values: str, more: str = "") -> str:
    return f"[[stages.axes]]\nkeys = {json.dumps(keys)}\nvalues = {values}\n{more}\n"


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_resolves(path: Path, tmp_path: Path) -> None:
    plan = load_plan(path, [f"--folder={json.dumps(str(tmp_path))}"])
    found = [status.member for status in observe(path, tmp_path).look().statuses]
    assert len(found) >= 16
    assert {member.stage for member in found} == {stage.name for stage in plan.stages}
    assert {member.variant.arm for member in found} >= {plan.baseline}


def test_members_are_all_combinations_with_what_they_were_given(tmp_path: Path) -> None:
    axes = axis([RATE, "optimizer.groups.embedding.lr"], "[[0.01, 0.003], [0.02, 0.006]]", "tuned = true")
    axes += axis(["optimizer.groups.hidden.momentum"], "[0.9, 0.95]") + axis(
        ["model.tie_embeddings"], "[true, false]"
    )
    found = members(write_plan(tmp_path, stage(axes, "seeds = [3, 5]")))
    wanted = itertools.product((0.01, 0.02), (0.9, 0.95), (True, False), (3, 5))
    for number, (member, (rate, momentum, is_tied, seed)) in enumerate(zip(found, wanted, strict=True)):
        config = flatten(to_table(member.config))
        assert member.number == number
        assert config[RATE] == rate
        assert config["optimizer.groups.embedding.lr"] == pytest.approx(0.3 * rate)
        assert config["optimizer.groups.hidden.momentum"] == momentum
        assert config["model.tie_embeddings"] == is_tied
        assert config["run.seed"] == config["data.shuffle_seed"] == seed
        arm = f"debug_softmax_muon_momentum{momentum}_tie_embeddings{str(is_tied).lower()}"
        assert member.variant.arm == arm
        assert config["run.folder"] == str(tmp_path / "plan" / member.path)
    assert len({member.path for member in found}) == 16
    assert found[0].path == ("one/debug_softmax_muon_lr0.01-0.003_momentum0.9_tie_embeddingstrue_seed3")


def test_a_table_is_a_value_and_drops_the_keys_of_another_kind(tmp_path: Path) -> None:
    values = '[{kind = "softmax", window_size = 8}, {kind = "parallax", r_norm = false}]'
    found = members(write_plan(tmp_path, stage(axis(["model.attention"], values))))
    assert [member.config.model.attention.kind for member in found] == ["softmax", "parallax"]
    assert [member.path for member in found] == [
        "one/debug_softmax_muon_attentionsoftmax_seed0",
        "one/debug_softmax_muon_attentionparallax_seed0",
    ]


def test_an_unshuffled_run_stays_so(tmp_path: Path) -> None:
    config = tmp_path / "plain.toml"
    config.write_text(f'extends = {SOFTMAX}\n[data]\nshuffle_seed = "none"\n')
    found = members(write_plan(tmp_path, stage(more="seeds = [4]", configs=json.dumps(str(config)))))
    assert found[0].config.data.shuffle_seed is None
    assert found[0].config.run.seed == 4


def test_a_run_of_two_stages_is_trained_once(tmp_path: Path) -> None:
    second = stage(more="seeds = [0, 1]").replace('"one"', '"two"')
    found = members(write_plan(tmp_path, stage() + second))
    assert [member.same_as for member in found] == [None, 0, None]
    assert found[1].path == found[0].path
    other = stage(more="seeds = [0]\nset.training.steps = 13").replace('"one"', '"two"')
    assert members(write_plan(tmp_path, stage() + other))[1].same_as is None


LATER = '[[stages]]\nname = "later"\nbest_of = ["one"]\nset.training.step = 5\n'


@pytest.mark.parametrize(
    ("stages", "head", "said"),
    [
        (stage("", "seed = [1]"), "", ["seed: unknown key", "nearest is stages[0].seeds"]),
        (stage(axis([RATE], "[]")), "", ["keys and values of an axis need at least one entry"]),
        (stage(axis([RATE, "run.seed"], "[0.1]")), "", ["want a list of 2 values"]),
        (stage(axis([RATE], "[0.1, 0.1]")), "", ["has an entry twice"]),
        (stage(axis([RATE], "[0.1]") * 2), "", ["axes of stage one", "'lr', 'lr'"]),
        (stage(axis(["run.seed"], "[1, 2]")), "", ["run.seed cannot be a key of a plan", "seeds"]),
        (stage(axis(["optimizer.groups.hidden.rate"], "[1]")), "", ["stage one", "hidden.rate: unknown key"]),
        (stage(axis(["training.steps"], '["x"]')), "", ["stage one", "training.steps: got", "an integer"]),
        (stage() + LATER, "", ["stage later", "training.step: unknown key", "training.steps"]),
        (stage() + stage(), "", ["two of them are called 'one'"]),
        (LATER + stage(), "", ["best_of of later names 'one'", "none"]),
        (stage(more='best_of = ["one"]'), "", ["give one of them"]),
        (stage(more='set.data.validation = "none"'), "", ["data.validation is none", "held-out"]),
        (stage(axis([RATE], "[0.12345671, 0.12345672]")), "", ["two members are called", "six digits"]),
        (stage(), 'baseline = "softmax"', ["baseline: got 'softmax'", "debug_softmax_muon"]),
        (stage(), "members_per_gpu = 0", ["members_per_gpu must be at least 1"]),
        (stage(axis([RATE], "[0.1]", 'name = "a/../../../esc"')), "", ["name must be the name of a folder"]),
        (stage(axis([RATE], "[0.1]", 'name = "a\\nb"')), "", ["name must be the name of a folder", "a\\nb"]),
        (stage(axis([RATE], "[0.1]") + axis([RATE], "[1.0]", 'name = "b"')), "", [f"one set {RATE} 2 times"]),
        (stage(axis(["training.steps"] * 2, "[[5, 6]]")), "", ["one set training.steps 2 times"]),
        (
            stage(
                axis(["model.attention"], '[{kind = "softmax"}]') + axis(["model.attention.kind"], '["x"]')
            ),
            "",
            ["one set model.attention.kind 2 times"],
        ),
        (
            stage().replace('"one"', '"plan.toml"'),
            "",
            ["name must be none of configs, plan.toml, sweep.lock"],
        ),
        (stage().replace('"one"', '"../one"'), "", ["name must be the name of a folder", "'../one'"]),
        (stage(axis(["run.name"], "[2026-01-01]")), "", ["run.name cannot be a key"]),
        (stage(axis(["data.tokenizer"], "[2026-01-01]")), "", ["data.tokenizer: got 2026-01-01, which"]),
        (stage(configs='"no.toml"'), "", ["no.toml: no such config file"]),
        ("", "", ["stages: missing"]),
        (stage(), "training.steps = 5", ["training: unknown key; here it is set.training"]),
        (stage(more="training.steps = 5"), "", ["stages[0].training: unknown key; here it is set.training"]),
        (stage(more="set.training.step = 5"), "", ["set or axes of stage one: training.step: unknown key"]),
        (stage(configs='"a.toml", "a.toml"'), "", ["stages[0].configs must be all different", "a.toml"]),
        (stage().replace("[[stages]]", "[stages]"), "", ["stages: got", "want a list", "'[[stages]]'"]),
    ],
)
def test_refusals_name_stage_key_and_remedy(stages: str, head: str, said: list[str], tmp_path: Path) -> None:
    path = write_plan(tmp_path, stages, head=head)
    with pytest.raises(UserError) as error:
        members(path)
    assert [word for word in said if word not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize(
    ("words", "stages", "said"),
    [
        (["--set.training.stepz=5"], stage(), "command line, --set.training.stepz: training.stepz: unknown"),
        (["--set.training={stepz = 5}"], stage(), "command line, --set.training: training.stepz: unknown"),
        (["--set.training=5"], stage(), "command line, --set.training: training: got 5, want a table"),
        (["--set.training.steps=x"], stage(), 'command line, --set.training.steps: training.steps: got "x"'),
        (["--set.training.steps=0"], stage(), "command line, --set.training.steps: training.steps must be"),
        (["--set.training.steps=2026-01-01"], stage(), "command line, --set.training.steps: training.steps"),
        (["--set.run.seed=1"], stage(), "command line, --set.run.seed: run.seed cannot be a key of a plan"),
        (["--set.data.validation=none"], stage(), "command line, --set.data.validation: data.validation is"),
        (["--members_per_gpu=x"], stage(), 'command line: members_per_gpu: got "x"'),
        (["--baseline=x"], stage(), "command line, --baseline: baseline: got 'x'"),
        (["--pairs.x=y"], stage(), "command line, --pairs.x: pairs: got 'x'"),
        # of the file, beside options that are right or that a stage is over
        (
            ["--set.training.steps=5"],
            stage(more="set.training.stepz = 5"),
            "FILE, set or axes of stage one: ",
        ),
        (
            ["--set.training.steps=5"],
            stage(more='set.training.steps = "x"'),
            "FILE, set or axes of stage one",
        ),
        (
            ["--set.training.steps=5"],
            stage(axis(["training.steps"], "[0]")),
            "FILE, set or axes of stage one",
        ),
        (["--members_per_gpu=2"], stage(axis([RATE], "[]")), "FILE: stages[0].axes[0].keys and values"),
    ],
)
def test_a_mistake_is_of_the_option_or_of_the_file_that_has_it(
    words: list[str], stages: str, said: str, tmp_path: Path
) -> None:
    path = write_plan(tmp_path, stages)
    with pytest.raises(UserError) as error:
        main([str(path), "--status", *words])
    assert str(error.value).startswith(said.replace("FILE", str(path))), str(error.value)


def test_a_folder_of_a_run_is_of_the_option_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(
        UserError, match=r"^command line, --folder: folder .* is that of a run; give the plan"
    ):
        main([str(write_plan(tmp_path, stage())), "--status", "--folder", str(tmp_path)])


def test_a_plan_does_not_start_in_the_folder_of_a_run(tmp_path: Path) -> None:
    path = write_plan(tmp_path, stage())
    members(path)
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "config.toml").touch()
    with pytest.raises(UserError, match=r"plan.toml: folder .*plan is that of a run; give the plan another"):
        members(path)
