"""Slots, tables, costs, job arrays, and records brought together."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import config
from errors import UserError
from eval.gpus import visible_gpus
from models.run_folder import RunFolder
from tests.training.launch import ROOT
from tests.training.sweep.plans import observe, rates, run, write_plan
from tests.training.sweep.test_queue import all_losses, states
from training.preflight import build_meta_model
from training.run_config import RunConfig
from training.sweep.__main__ import main
from training.sweep.collect import collect
from training.sweep.costs import describe_costs
from training.sweep.overview import select
from training.sweep.plan import Plan, Stage
from training.sweep.sbatch import array_script
from training.sweep.slots import Slot, make_slots, slot_environment
from training.sweep.table import format_table, seconds_left


def plan(gpus_per_member: int, members_per_gpu: int) -> Plan:
    return Plan(
        folder="runs/x",
        stages=[Stage(name="one", configs=["x.toml"])],
        gpus_per_member=gpus_per_member,
        members_per_gpu=members_per_gpu,
    )


@pytest.mark.parametrize("num_gpus", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shared", [1, 3])
def test_slots_give_each_gpu_its_members(num_gpus: int, size: int, shared: int) -> None:
    gpus = [f"GPU-{n}" for n in range(num_gpus)]
    if 0 < num_gpus < size:
        with pytest.raises(UserError, match="gpus_per_member"):
            make_slots(plan(size, shared), gpus)
        return
    slots = make_slots(plan(size, shared), gpus)
    assert [slot.number for slot in slots] == list(range(len(slots)))
    used = [gpu for slot in slots for gpu in slot.gpus]
    num_used = num_gpus // size * size
    assert {gpu: used.count(gpu) for gpu in gpus[:num_used]} == dict.fromkeys(gpus[:num_used], shared)
    assert set(used) == set(gpus[:num_used])
    assert {len(slot.gpus) for slot in slots} == {size if num_gpus else 0}
    # the first members spread over all GPUs
    firsts = [gpu for slot in slots[: max(1, num_gpus // size)] for gpu in slot.gpus]
    assert len(set(firsts)) == num_used


def test_the_gpus_of_a_member_are_those_of_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, gpus in (("3, GPU-ab", ["3", "GPU-ab"]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == gpus
    own = slot_environment({"CUDA_VISIBLE_DEVICES": "3,GPU-ab", "A": "b"}, Slot(0, ("GPU-ab",)), 2)
    assert own["CUDA_VISIBLE_DEVICES"] == "GPU-ab"
    assert own["A"] == "b"
    assert int(slot_environment({}, Slot(0, ()), 10**6)["OMP_NUM_THREADS"]) == 1
    assert slot_environment({"OMP_NUM_THREADS": "3"}, Slot(0, ()), 9)["OMP_NUM_THREADS"] == "3"


def test_the_cost_of_a_plan_is_that_of_its_runs(tmp_path: Path) -> None:
    later = '[[stages]]\nname = "seeds"\nbest_of = ["rates"]\nseeds = [0, 1]\ngpu_hours = 0\n'
    observer = observe(write_plan(tmp_path, rates([0.01, 0.02]) + later))
    text = describe_costs(observer.plan, observer.look())
    flops = {}
    for status in observer.look().statuses:
        model = build_meta_model(status.member.config)
        flops[status.member.number] = 12 * 8 * 32 * model.num_flops_per_token(32)
        (line,) = re.findall(rf"^ +{status.member.number}  .*$", text, flags=re.MULTILINE)
        assert f"{flops[status.member.number]:.3e} FLOPs" in line
    assert f"plan: 8 runs, {sum(flops.values()):.3e} FLOPs" in text
    assert "seeds/debug_softmax_muon_best_seed1" in text
    assert re.search(r"memory: up to 0\.\d GiB per member and GPU, with 1 on each", text)
    assert "they do not fit" not in text
    batch = "set.training = {global_batch_size = 65536, local_batch_size = 65536}"
    large = rates([0.01]).replace("seeds", f"{batch}\nseeds")
    crowded = observe(write_plan(tmp_path, large, head="members_per_gpu = 100"))
    assert "warning: they do not fit" in describe_costs(crowded.plan, crowded.look())
    assert "warning: stage seeds is estimated to need more than its budget" in text


def test_a_job_array_has_the_members_that_can_be_started(tmp_path: Path) -> None:
    later = '[[stages]]\nname = "seeds"\nbest_of = ["rates"]\nseeds = [1]\n'
    path = write_plan(tmp_path, rates([0.01, 0.02]) + later)
    run(path, "--member", "1")
    observer = observe(path)
    overview = observer.look()
    script = array_script(
        observer.plan, path, overview, select(overview), python=sys.executable, directory=ROOT
    )
    assert script is not None
    assert "--array=0,2-3\n" in script
    # as SLURM starts a task
    command = script.replace("-m training.sweep", "-m tests.training.sweep.stand_in")
    variables = {"SLURM_ARRAY_TASK_ID": "2", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=variables, check=False)
    assert done.returncode == 0
    for number in "03":
        run(path, "--member", number)
    assert states(observer.look())[:4] == ["finished"] * 4
    overview = observer.look()
    script = array_script(observer.plan, path, overview, select(overview), python="python", directory=ROOT)
    assert script is not None
    assert "--array=4-5\n" in script


def test_a_selection_is_applied_or_refused_and_never_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan(tmp_path, rates([0.01, 0.02], seeds=(3, 4)))
    main([str(path), "--sbatch", "--seed", "4"])
    assert "--array=1,3,5,7\n" in capsys.readouterr().out
    main([str(path), "--sbatch", "--member", "2", "--folder", str(tmp_path / "a b")])
    script = capsys.readouterr().out
    assert "--job-name='a b' --array=2\n" in script
    # argparse takes the value for the plan
    main(["--set.training.steps", "15", str(path), "--sbatch"])
    assert "--set.training.steps=15" in capsys.readouterr().out
    for mode in (["--status"], ["--collect", str(tmp_path)]):
        for option, value in (("--member", "2"), ("--stage", "rates"), ("--seed", "4")):
            with pytest.raises(UserError, match=f"{option} has no effect with {mode[0]}"):
                main([str(path), option, value, *mode])


def test_a_selection_has_its_own_members_alone_and_each_run_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = rates([0.01], seeds=(3, 4, 5)).replace('"rates"', '"shared"')
    again = rates([0.01], seeds=(5,)).replace('"rates"', '"again"\ngpu_hours = 0')
    path = write_plan(tmp_path, rates([0.01], seeds=(3, 4)) + shared + again)
    for words, members, counts in (
        ([], range(12), ["stage rates: 4", "stage shared: 6", "stage again: 2", "plan: 6"]),
        (["--stage", "rates"], range(4), ["stage rates: 4", "plan: 4"]),
        (["--stage", "shared", "again"], range(4, 12), ["stage shared: 6", "stage again: 2", "plan: 6"]),
        (["--stage", "again"], (10, 11), ["stage again: 2", "plan: 2"]),
        (["--seed", "3"], (0, 2, 4, 7), ["stage rates: 2", "stage shared: 2", "plan: 2"]),
        (["--member", "7"], (7,), ["stage shared: 1", "plan: 1"]),
    ):
        main([str(path), "--dry-run", *words])
        text = capsys.readouterr().out
        flops = {int(n): float(f) for n, f in re.findall(r"^ +(\d+) .* (\S+) FLOPs", text, flags=re.M)}
        assert [*flops] == [*members], words
        totals = re.findall(r"^(stage \w+: \d+|plan: \d+) \w+, (\S+) FLOPs", text, flags=re.M)
        assert [name for name, _ in totals] == counts, words
        # members 4, 5, 7, 8, 10 and 11 are the same runs as others
        runs = {{4: 0, 5: 1, 7: 2, 8: 3, 10: 6, 11: 9}.get(n, n): each for n, each in flops.items()}
        assert float(totals[-1][1]) == pytest.approx(sum(runs.values()), rel=1e-3), words
        assert sum(float(each) for _, each in totals[:-1]) == pytest.approx(sum(runs.values()), rel=1e-3)
        # the runs are of the budget of the stage before
        assert "warning" not in text, words
    main([str(path), "--sbatch", "--member", "4", "9"])
    assert "--array=0,9\n" in capsys.readouterr().out


def test_records_of_several_folders_are_brought_together(tmp_path: Path) -> None:
    later = '[[stages]]\nname = "seeds"\nbest_of = ["rates"]\nseeds = [1]\n'
    path = write_plan(tmp_path, rates([0.01, 2.0]) + later, head="members_per_gpu = 4")
    one, two, whole = (tmp_path / name for name in ("one", "two", "whole"))
    run(path, "--folder", str(one), "--member", "0", "1", code=1)
    run(path, "--folder", str(two), code=1)
    shutil.rmtree(two / "rates/debug_softmax_muon_lr0.01_seed0")
    unfinished = RunFolder(two / "seeds/debug_softmax_muon_lr0.01_seed1")
    lines = unfinished.metrics_file.read_text().splitlines(keepends=True)
    unfinished.metrics_file.write_text("".join(lines[:8]))
    observer = observe(path, whole)
    told = collect(observer, [one, two])
    assert states(observer.look()) == ["finished", "failed", "finished", "failed", "waiting", "finished"]
    assert f"taken from {two}, where it failed" in told[3]
    assert told[4].endswith(f"not taken: not finished, step 7 of 12 in {two}")
    assert not list(whole.rglob("checkpoint"))
    assert all_losses(whole).items() <= (all_losses(one) | all_losses(two)).items()
    # nothing is taken twice, and what is missing is trained here
    assert collect(observer, [one, two]) == told[4:5]
    run(path, "--folder", str(whole), code=1)
    assert states(observer.look())[4] == "finished"


def test_records_of_another_config_are_not_taken(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.01]))
    run(path)
    path.write_text(path.read_text().replace("seq_len = 32", "seq_len = 16"))
    observer = observe(path, tmp_path / "other")
    told = collect(observer, [tmp_path / "plan"])
    assert len(told) == 2
    assert all("training.seq_len: saved 32, now 16" in line for line in told)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="no such folder"):
        collect(observer, [tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"it has no folder of a stage \(rates\)"):
        collect(observer, [tmp_path / "plan", tmp_path])


def test_the_table_fits_a_screen_and_shows_what_matters(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.005, 0.01, 2.0]), head="members_per_gpu = 6")
    run(path, "--member", "0", "2", code=1)
    observer = observe(path)
    overview = observer.look()
    lines = format_table(observer.plan, overview, 2).splitlines()
    assert len(lines) == 1 + 6 + 1
    assert lines[-1].startswith("1 of 6 finished, 4 waiting, 1 failed; about ")
    # four members of 12 steps of an hour, two at a time
    assert seconds_left(overview, 2) == 2 * 12 * 3600
    short = format_table(observer.plan, overview, 2, height=5).splitlines()
    assert len(short) == 5
    assert "failed with code 1: error: step 1: the loss is nan" in "".join(short)
    assert "... and 4 more" in short


def test_any_value_is_taken_as_it_is(tmp_path: Path) -> None:
    stage = {
        "name": "one",
        "configs": ["x"],
        "axes": [{"keys": ["a"], "values": [1, "x", [0.5], {"b": True}]}],
    }
    loaded = config.from_table(Plan, {"folder": "x", "stages": [stage]}, "here")
    assert loaded.stages[0].axes[0].values == [1, "x", [0.5], {"b": True}]
    assert config.from_table(Plan, config.to_table(loaded), "here") == loaded


def test_an_override_is_blamed_on_where_it_comes_from() -> None:
    path = ROOT / "configs/debug_softmax_muon.toml"
    with pytest.raises(UserError, match=r"^my plan: training.steps: got \"x\""):
        config.load(RunConfig, path, ["--training.steps=x"], overrides_from="my plan")
