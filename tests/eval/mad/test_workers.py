"""Processes that train packs of runs: which of their deaths matter."""

import os
import queue
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from errors import RunError
from eval.mad import workers
from eval.mad.runs import Outcome, Recipe, Run, grid
from eval.mad.settings import Setting, settings

RUNS = grid(
    Recipe(attention="softmax"),
    Setting(task="memorization", vocab_size=8, seq_len=4, num_train_rows=128),
)
OUTCOME = Outcome(accuracy=1.0, loss=0.0, num_epochs=1, seconds=0.1)


class Process:
    """A process that does nothing until a test lets it die."""

    def __init__(self, started: list["Process"], args: tuple[Any, ...]) -> None:
        self.place, self.inbox, self.messages = args[:3]
        self.exitcode: int | None = None
        started.append(self)

    def start(self) -> None:
        self.gpu = os.environ["CUDA_VISIBLE_DEVICES"]

    def join(self) -> None:
        pass

    def terminate(self) -> None:
        pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    processes: list[Process] = []
    context = SimpleNamespace(Queue=queue.Queue, Process=lambda target, args: Process(processes, args))
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(workers, "_POLL_SECONDS", 0.0)
    return processes


def end_pack(process: Process) -> None:
    for run in process.inbox.get_nowait():
        process.messages.put((process.place, (run, OUTCOME)))


def run_all(
    packs: list[list[Run]], started: list[Process], events: list[Any], gpus: Sequence[str] = ("0", "1")
) -> list[Run]:
    """Train packs; at each poll without a message the next event happens."""
    trained: list[Run] = []
    get = queue.Queue.get

    def poll(self: Any, *others: Any, **options: Any) -> Any:
        if self is started[0].messages and self.empty():
            events.pop(0)()
        return get(self, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue.Queue, "get", poll)
        workers.train_all(packs, gpus, lambda run, _: trained.append(run), is_compiled=False)
    return trained


def test_the_death_of_a_process_without_work_changes_nothing(started: list[Process]) -> None:
    def die() -> None:
        started[0].exitcode = -9

    events = [lambda: end_pack(started[0]), die, lambda: end_pack(started[1])]
    assert run_all([RUNS[:2], RUNS[2:]], started, events) == RUNS
    assert len(started) == 2


def test_the_death_of_a_process_at_work_fails_its_pack_alone(started: list[Process]) -> None:
    def die() -> None:
        started[0].exitcode = -9

    events = [die, lambda: end_pack(started[1]), lambda: end_pack(started[2])]
    with pytest.raises(RunError, match=r"softmax adamw on memorization .* failed on GPU 0; the same command"):
        run_all([RUNS[:2], RUNS[2:4], RUNS[4:]], started, events)
    # the next pack got a new process of the same GPU
    assert [process.gpu for process in started] == ["0", "1", "0"]


def test_a_gpu_has_several_processes(started: list[Process], capsys: pytest.CaptureFixture[str]) -> None:
    def die() -> None:
        started[3].exitcode = -9

    events = [die, lambda: end_pack(started[2]), lambda: end_pack(started[1]), lambda: end_pack(started[0])]
    packs = [RUNS[:1], RUNS[1:2], RUNS[2:3], RUNS[3:]]
    with pytest.raises(RunError, match="failed on GPU 1; the same command"):
        run_all(packs, started, events, gpus=["0", "1", "0", "1"])
    assert [process.gpu for process in started] == ["0", "1", "0", "1"]
    assert "the process ended with code -9" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_train_all_packs_but_the_one_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    setting = replace(settings("memorization", "baseline")[0], vocab_size=8, seq_len=4)
    recipes = [Recipe(attention="softmax", seed=seed, max_epochs=1) for seed in range(3)]
    packs = [grid(recipe, setting)[:2] for recipe in recipes]
    # runs of two shapes cannot be trained at once
    packs.insert(1, [packs[0][0], replace(packs[0][1], setting=replace(setting, vocab_size=16))])
    outcomes: dict[Run, Outcome] = {}
    with pytest.raises(RunError, match=r"softmax adamw on memorization .* failed on GPU [01]; the same"):
        workers.train_all(
            packs, ["0", "1"], lambda run, outcome: outcomes.update({run: outcome}), is_compiled=False
        )
    assert outcomes.keys() == {run for index in (0, 2, 3) for run in packs[index]}
    assert "runs of different shapes" in capfd.readouterr().err
