"""Plans run by a stand-in for train.py: order, stages, failures, signals, kills."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.folder_lock import FolderLock
from eval.report.plan_file import read_plan
from eval.report.run_records import read_run
from tests.training.launch import ROOT, environment
from tests.training.sweep.plans import observe, rates, run, start, write_plan
from training.sweep.overview import Overview

SEEDS = '[[stages]]\nname = "seeds"\nbest_of = ["rates"]\nseeds = [1, 2]\n'
SECONDS = 120.0


def states(overview: Overview) -> list[str]:
    return [status.state for status in overview.statuses]


def wait_until(is_reached: Callable[[], bool], sweep: subprocess.Popen[bytes] | None = None) -> None:
    """Wait for a condition, while a sweep lives."""
    deadline = time.monotonic() + SECONDS
    while not is_reached():
        assert sweep is None or sweep.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def all_losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and loss of every member, and its held-out losses."""
    found = {}
    for path in sorted(folder.glob("*/*/metrics.jsonl")):
        record = read_run(path.parent)
        name = str(path.parent.relative_to(folder))
        found[name] = [(step["step"], step["loss"]) for step in record.steps]
        found[f"{name} held-out"] = [(each["step"], each["validation_loss"]) for each in record.held_out]
    return found


def holders(folder: Path) -> list[int]:
    """The processes of members that run, by their command lines: a lock's record may be of one that ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "--config" in words and any(word.startswith(f"{folder}/configs/") for word in words):
            found.append(int(path.parent.name))
    return found


def test_a_later_stage_takes_the_best_of_an_earlier_one(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.001, 0.01, 0.1]) + SEEDS, head="members_per_gpu = 3")
    before = observe(path).look()
    assert [status.member.number for status in before.statuses] == list(range(10))
    assert not before.statuses[6].member.is_known
    printed = run(path)
    overview = observe(path).look()
    assert states(overview) == ["finished"] * 10
    assert [status.member.path for status in overview.statuses[6:]] == [
        f"seeds/debug_{kind}_muon_lr0.01_seed{seed}" for kind in ("softmax", "parallax") for seed in (1, 2)
    ]
    assert "warning" not in printed
    assert printed.splitlines()[-1] == "10 of 10 finished"
    stages = read_plan(tmp_path / "plan").stages
    assert [(choice.arm, choice.values) for choice in stages[0].choices] == [
        ("debug_softmax_muon", {"lr": 0.01}),
        ("debug_parallax_muon", {"lr": 0.01}),
    ]


def test_a_finished_plan_imports_no_torch(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.01]))
    run(path)
    code = (
        "import sys\nfrom training.sweep.__main__ import main\n"
        f"for words in ([], ['--status'], ['--collect', {str(tmp_path / 'plan')!r}]):\n"
        f"    assert main([{str(path)!r}, *words]) == 0\n"
        "assert not {'torch', 'numpy', 'torchtitan'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)


def test_a_failing_member_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.01, 2.0]) + SEEDS, head="members_per_gpu = 4")
    printed = run(path, code=1)
    assert states(observe(path).look()) == ["finished", "failed"] * 2 + ["finished"] * 4
    assert "member 1: failed with code 1: error: step 1: the loss is nan" in printed
    assert "1 of 2 have no loss" in printed
    # the same command tries it again, once
    log = tmp_path / "plan/rates/debug_softmax_muon_lr2_seed0/log.txt"
    assert log.read_text().count("sweep: started") == 1
    run(path, code=1)
    assert log.read_text().count("sweep: started") == 2


def test_an_arm_without_a_choice_blocks_its_members_of_a_later_stage(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([2.0]) + SEEDS)
    run(path, code=1)
    assert states(observe(path).look()) == ["failed"] * 2 + ["blocked"] * 4


def test_stages_of_higher_priority_start_first(tmp_path: Path) -> None:
    second = rates([0.02]).replace('"rates"', '"first"') + "\n"
    path = write_plan(
        tmp_path, rates([0.01]) + second.replace('name = "first"', 'name = "first"\npriority = 1')
    )
    run(path)
    started = {
        str(log.parent.relative_to(tmp_path / "plan")): (log.parent / "config.toml").stat().st_mtime
        for log in (tmp_path / "plan").glob("*/*/log.txt")
    }
    assert [name.split("/")[0] for name in sorted(started, key=lambda name: started[name])] == [
        *("first", "first"),
        *("rates", "rates"),
    ]


def test_gpus_have_as_many_members_as_the_plan_says(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.01, 0.02, 0.03, 0.04, 0.05]), head="members_per_gpu = 2")
    path.write_text(path.read_text().replace("steps = 12", "steps = 60"))
    run(path, gpus="3,GPU-ab")
    spans: dict[str, list[tuple[float, float]]] = {"3": [], "GPU-ab": []}
    for each in (tmp_path / "plan/rates").iterdir():
        steps = read_run(each).steps
        spans[steps[0]["device"]].append((steps[0]["time"], steps[-1]["time"]))
    for used in spans.values():
        numbers = [sum(first <= time <= last for first, last in used) for time, _ in used]
        assert max(numbers) == 2
    assert sum(map(len, spans.values())) == 10


def test_a_budget_of_gpu_hours_leaves_members_out(tmp_path: Path) -> None:
    stages = rates([0.001, 0.01, 0.1]).replace('name = "rates"', 'name = "rates"\ngpu_hours = 40')
    path = write_plan(tmp_path, stages)
    # 12 steps of an hour each
    printed = run(path, code=1)
    assert states(observe(path).look()) == ["finished"] * 3 + ["waiting"] * 3
    assert "stage rates has no room for 3 members: raise its gpu_hours" in printed


def test_a_changed_plan_does_not_touch_its_members(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.01]))
    run(path)
    before = all_losses(tmp_path / "plan")
    path.write_text(path.read_text().replace("steps = 12", "steps = 14"))
    printed = run(path, code=1)
    assert "training.steps: saved 12, now 14" in printed
    assert "restore their keys, give --folder another one, or delete their folders" in printed
    assert all_losses(tmp_path / "plan") == before


def test_no_member_of_a_changed_plan_trains_beside_those_of_the_old_one(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.01, 0.02]))
    run(path, "--member", "0")
    changed = ["--set.optimizer.groups.hidden.momentum", "0.5"]
    for selection in ([], ["--member", "1"], ["--sbatch"]):
        printed = run(path, *selection, *changed, code=1)
        assert "member 0: " in printed
        assert "optimizer.groups.hidden.momentum: saved 0.95, now 0.5" in printed
        assert "no member is started beside refused ones" in printed
    assert states(observe(path).look()) == ["finished"] + ["waiting"] * 3
    # the same where it runs
    observer = observe(path)
    lock = FolderLock(observer.folder.run(observer.look().own[0].member).lock_file)
    lock.acquire()
    assert states(observer.look()) == ["running"] + ["waiting"] * 3
    assert "no member is started beside refused ones" in run(path, "--member", "1", *changed, code=1)
    lock.release()
    run(path)
    assert states(observe(path).look()) == ["finished"] * 4


def test_a_second_sweep_is_refused_and_one_of_single_members_is_not(tmp_path: Path) -> None:
    # so many that the first one is still at work when the others have ended
    path = write_plan(tmp_path, rates([0.01 * i for i in range(1, 13)]))
    path.write_text(path.read_text().replace("steps = 12", "steps = 200"))
    first = start(path, stand_in=True)
    wait_until(lambda: bool(holders(tmp_path / "plan")), first)
    assert "is being run by process" in run(path, code=2)
    assert "\na sweep is running it" in run(path, "--status")
    run(path, "--member", "3")
    assert states(observe(path).look())[3] == "finished"
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=SECONDS) == 0
    assert not holders(tmp_path / "plan")
    assert "no sweep is running it" in run(path, "--status")


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 12))])
def test_a_sweep_killed_at_random_moments_ends_like_one_left_alone(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    path = write_plan(tmp_path, rates([0.001, 0.01]) + SEEDS, head="members_per_gpu = 2")
    for _ in range(4):
        sweep = start(path, stand_in=True)
        time.sleep(generator.uniform(0.2, 1.5))
        victims = [sweep.pid, *(holders(tmp_path / "plan") if generator.random() < 0.5 else [])]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        sweep.wait()
    run(path)
    run(path, "--folder", str(tmp_path / "alone"))
    assert all_losses(tmp_path / "plan") == all_losses(tmp_path / "alone")
    assert (tmp_path / "plan/plan.toml").read_text() == (tmp_path / "alone/plan.toml").read_text()


def test_a_killed_sweep_takes_its_members_with_it(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.01]), head="members_per_gpu = 2")
    path.write_text(path.read_text().replace("steps = 12", "steps = 100000"))
    sweep = start(path, stand_in=True)
    # members that train: one that starts has no handler yet
    wait_until(lambda: all(status.progress.step > 2 for status in observe(path).look().statuses), sweep)
    sweep.kill()
    sweep.wait()
    wait_until(lambda: states(observe(path).look()) == ["stopped", "stopped"])


def test_a_member_that_was_stopped_from_outside_is_named(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.01]), head="members_per_gpu = 2")
    path.write_text(path.read_text().replace("steps = 12", "steps = 150"))
    log = tmp_path / "log.txt"
    sweep = start(path, stand_in=True, log=log)
    wait_until(lambda: all(status.progress.step > 2 for status in observe(path).look().statuses), sweep)
    victim = next(pid for pid in holders(tmp_path / "plan"))
    os.kill(victim, signal.SIGTERM)
    assert sweep.wait(timeout=SECONDS) == 1
    assert sorted(states(observe(path).look())) == ["finished", "stopped"]
    assert "was stopped from outside at step" in log.read_text()
    run(path)
    assert states(observe(path).look()) == ["finished", "finished"]
