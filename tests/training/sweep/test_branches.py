"""Members that branch from the checkpoints of another stage, parts of plans, and pairs."""

import json
import shutil
from pathlib import Path

import pytest

from errors import UserError
from eval.report.plan_file import read_plan
from eval.report.run_records import read_run
from tests.training.sweep.plans import CONFIGS, RATE, observe, rates, run, write_plan
from tests.training.sweep.test_queue import all_losses, states
from training.sweep.collect import collect
from training.sweep.costs import describe_costs
from training.sweep.overview import select

TWO = [str(CONFIGS / f"debug_{kind}_muon.toml") for kind in ("softmax", "parallax")]
PAIRS = '[pairs]\ndebug_parallax_muon = "debug_softmax_muon"\n'


def stage(name: str, more: str = "", *, configs: list[str] = TWO, seeds: str = "[1, 2]") -> str:
    return f'\n[[stages]]\nname = "{name}"\nconfigs = {json.dumps(configs)}\nseeds = {seeds}\n{more}\n'


STABLE = stage("stable", "set.training.stop_at_step = 8")
DECAY = stage("decay", 'start_from = "stable"')


def branched(folder: Path, head: str = "") -> Path:
    return write_plan(folder, STABLE + DECAY, head=f"members_per_gpu = 4\n{head}")


def test_a_branch_starts_from_the_member_of_its_config_seed_and_values(tmp_path: Path) -> None:
    axes = f'[[stages.axes]]\nkeys = ["{RATE}"]\nvalues = [0.01, 0.02]\n'
    own = '[[stages.axes]]\nkeys = ["schedule.decay_ratio"]\nname = "ratio"\nvalues = [0.0, 0.25]\n'
    path = write_plan(tmp_path, STABLE + axes + DECAY + axes + own)
    members = [status.member for status in observe(path).look().statuses]
    trunks, branches = members[:8], members[8:]
    assert len(branches) == 16
    for branch in branches:
        assert branch.trunk in trunks
        assert branch.trunk is not None
        assert branch.trunk.variant.config_file == branch.variant.config_file
        assert branch.trunk.seed == branch.seed
        assert branch.trunk.variant.values["lr"] == branch.variant.values["lr"]
        assert branch.checkpoint == tmp_path / "plan" / branch.trunk.path / "checkpoint" / "step-8"
        assert branch.config.training.last_step == 12
    assert all(trunk.trunk is None and trunk.checkpoint is None for trunk in trunks)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (STABLE + DECAY.replace("[1, 2]", "[1, 3]"), "seed 3, has 0 members to start from in stage stable"),
        (DECAY + STABLE, "start_from of decay names 'stable', want stages before it: none"),
        (stage("a", 'compare_with = "b"'), "compare_with of a names 'b'"),
        (
            STABLE + f'[[stages.axes]]\nkeys = ["{RATE}"]\nvalues = [0.01, 0.02]\n' + DECAY,
            "seed 1, has 2 members to start from",
        ),
    ],
)
def test_a_branch_without_one_start_is_refused(stages: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        observe(write_plan(tmp_path, stages)).look()


def test_branches_run_after_their_trunks(tmp_path: Path) -> None:
    path = branched(tmp_path)
    run(path)
    assert states(observe(path).look()) == ["finished"] * 8
    for branch in ("debug_softmax_muon_seed1", "debug_parallax_muon_seed2"):
        record = read_run(tmp_path / "plan/decay" / branch)
        assert [step["step"] for step in record.steps] == list(range(1, 13))
        assert record.num_trunk_steps == 8


def test_a_stage_of_branches_alone_says_what_it_lacks(tmp_path: Path) -> None:
    path = branched(tmp_path)
    text = run(path, "--stage", "decay", code=1)
    assert "stage decay: 4 members have no checkpoint to start from: run stage stable" in text
    run(path, "--stage", "stable", "decay", "--seed", "2")
    found = states(observe(path).look())
    assert found == ["waiting", "finished"] * 4


def test_branches_of_a_failed_trunk_are_blocked(tmp_path: Path) -> None:
    fails = stage("stable", f"set.training.stop_at_step = 8\nset.{RATE} = 2.0")
    path = write_plan(tmp_path, fails + DECAY, head="members_per_gpu = 4")
    run(path, code=1)
    assert states(observe(path).look()) == ["failed"] * 4 + ["blocked"] * 4


def test_branches_of_other_folders_are_brought_together(tmp_path: Path) -> None:
    path = branched(tmp_path)
    part, whole = tmp_path / "part", tmp_path / "whole"
    run(path, "--folder", str(part))
    shutil.rmtree(part / "stable/debug_softmax_muon_seed1/checkpoint")
    (part / "decay/debug_softmax_muon_seed1/diagnostics.jsonl").write_text("{}\n")
    observer = observe(path, whole)
    assert len(collect(observer, [part])) == 8
    overview = observer.look()
    assert states(overview) == ["finished"] * 8
    assert (whole / "decay/debug_softmax_muon_seed1/diagnostics.jsonl").exists()
    # the trunk is found in the folder of its stage, also where the one it was trained in is gone
    losses = all_losses(part)
    shutil.rmtree(part)
    assert all_losses(whole) == losses
    assert len(losses["decay/debug_softmax_muon_seed1"]) == 12


def test_a_branch_costs_its_own_steps(tmp_path: Path) -> None:
    observer = observe(branched(tmp_path))
    text = describe_costs(observer.plan, observer.look(), lambda overview: select(overview, stages=["decay"]))
    lines = text.splitlines()
    assert "stage decay: 4 members" in text
    assert "stage stable" not in text
    whole = describe_costs(observer.plan, observer.look()).splitlines()
    of_trunk, of_branch = (
        float(next(line for line in found if f"{name}/debug_softmax_muon_seed1" in line).split()[2])
        for name, found in (("stable", whole), ("decay", lines))
    )
    assert of_branch == pytest.approx(of_trunk / 2, rel=1e-3)


def test_stages_and_seeds_are_selected(tmp_path: Path) -> None:
    overview = observe(branched(tmp_path)).look()
    assert select(overview) == {*range(8)}
    assert select(overview, stages=["decay"]) == {4, 5, 6, 7}
    assert select(overview, stages=["decay"], seeds=[2]) == {5, 7}
    assert select(overview, [1, 5], seeds=[2]) == {1, 5}
    with pytest.raises(UserError, match="--stage rates: the plan has stable, decay"):
        select(overview, stages=["rates"])
    with pytest.raises(UserError, match="--seed 3: the plan has 1, 2"):
        select(overview, seeds=[3])
    with pytest.raises(UserError, match="no member is of all of them"):
        select(overview, [0], stages=["decay"])


def test_keys_of_a_plan_are_overridden(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.01]))
    text = run(path, "--set.training.steps", "8", "--members_per_gpu=2", "--set.eval.every", "5")
    assert "2 of 2 finished" in text
    assert read_run(tmp_path / "plan/rates/debug_softmax_muon_lr0.01_seed0").config["training.steps"] == 8
    assert "nearest is set" in run(path, "--sets.training.steps", "5", code=2)
    assert "training.step: unknown key" in run(path, "--set.training.step", "5", code=2)


def test_pairs_are_of_equal_seeds_and_values_or_of_the_stage_named(tmp_path: Path) -> None:
    axis = '[[stages.axes]]\nkeys = ["optimizer.groups.hidden.momentum"]\nvalues = [0.9, 0.95]\n'
    gain = '[[stages.axes]]\nkeys = ["model.attention.r_gain_init"]\nname = "gain"\nvalues = [0.0, 1.0]\n'
    later = stage("gain", 'compare_with = "stable"', configs=TWO[1:], seeds="[2, 3]") + gain
    path = write_plan(tmp_path, STABLE + stage("momentum") + axis + later, head=PAIRS)
    observer = observe(path)
    overview = observer.look()
    members = [status.member for status in overview.statuses]
    observer.folder.write_plan(observer.plan, members, overview.choices)
    found = {
        each.run: each.compared_with for one in read_plan(tmp_path / "plan").stages for each in one.members
    }
    assert found["stable/debug_softmax_muon_seed1"] is None
    assert found["stable/debug_parallax_muon_seed1"] == "stable/debug_softmax_muon_seed1"
    assert (
        found["momentum/debug_parallax_muon_momentum0.9_seed2"]
        == "momentum/debug_softmax_muon_momentum0.9_seed2"
    )
    assert found["gain/debug_parallax_muon_gain1_seed2"] == "stable/debug_softmax_muon_seed2"
    assert found["gain/debug_parallax_muon_gain1_seed3"] is None


def test_pairs_are_of_the_plans_configs(tmp_path: Path) -> None:
    path = write_plan(tmp_path, STABLE, head='[pairs]\ndebug_parallax_muon = "softmax"\n')
    with pytest.raises(
        UserError, match=r"plan.toml: pairs: got 'softmax', want the plan's configs without .toml: deb"
    ):
        observe(path).look()
