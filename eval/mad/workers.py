"""Sharing the work between GPUs: processes for each, which take the next runs from a list."""

import multiprocessing
import os
import queue
import sys
import traceback
from collections.abc import Iterable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from data.parent import exit_with_parent
from errors import RunError
from eval.gpus import VISIBLE
from eval.mad.runs import Run
from eval.mad.train import Report, train

_POLL_SECONDS = 0.5


def train_all(
    packs: Iterable[Sequence[Run]], gpus: Sequence[str], report: Report, *, is_compiled: bool
) -> None:
    """Train packs of runs, each process with one GPU, of which it sees no other.

    A pack that fails ends its process, not those of other packs.

    Args:
        packs: Runs that are trained at once; packs are begun in this order, and each is asked for then.
        gpus: The GPU of each process, as CUDA_VISIBLE_DEVICES names it; a GPU can have several. Without a GPU
            in the machine, any names.
        report: Called in this process with a run and its outcome as soon as it ends.
        is_compiled: As in train.

    Raises:
        RunError: Packs have failed; all others are trained.
    """
    workers = _Workers(gpus, packs, is_compiled)
    try:
        while workers.has_work():
            workers.handle(report)
    finally:
        workers.end()
    if workers.failures:
        raise RunError(f"{'; '.join(workers.failures)}; the same command trains what is missing")


class _Workers:
    """The processes, and what they were given to do."""

    def __init__(self, gpus: Sequence[str], packs: Iterable[Sequence[Run]], is_compiled: bool) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._messages = self._context.Queue()
        self._is_compiled = is_compiled
        self._waiting = iter(packs)
        self._gpus = list(gpus)
        # by place in the list of GPUs
        self._inboxes: dict[int, Any] = {}
        self._processes: dict[int, BaseProcess] = {}
        self._at_work: dict[int, list[Run]] = {}
        self.failures: list[str] = []
        for place in range(len(self._gpus)):
            self._give(place)

    def has_work(self) -> bool:
        return bool(self._at_work)

    def _give(self, place: int) -> None:
        """Give a place its next pack, if there is one."""
        runs = list(next(self._waiting, ()))
        if not runs:
            return
        if place not in self._processes:
            self._start(place)
        self._at_work[place] = runs
        self._inboxes[place].put(runs)

    def _start(self, place: int) -> None:
        """Start a process, whose only device is "cuda:0": compiled code is kept for a device's name."""
        self._inboxes[place] = self._context.Queue()
        arguments = (place, self._inboxes[place], self._messages, self._is_compiled)
        self._processes[place] = self._context.Process(target=_work, args=arguments)
        visible = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = self._gpus[place]
        try:
            self._processes[place].start()
        finally:
            if visible is None:
                del os.environ[VISIBLE]
            else:
                os.environ[VISIBLE] = visible

    def handle(self, report: Report) -> None:
        """Handle the next message, or the death of processes that send none any more."""
        try:
            place, content = self._messages.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            for place, process in list(self._processes.items()):
                if process.exitcode is not None:
                    self._fail(place, f"the process ended with code {process.exitcode}")
            return
        if isinstance(content, str):
            self._fail(place, content)
            return
        run, outcome = content
        self._at_work[place].remove(run)
        report(run, outcome)
        if not self._at_work[place]:
            del self._at_work[place]
            self._give(place)

    def _fail(self, place: int, reason: str) -> None:
        """Note the failure of a place's pack; the next one gets a new process."""
        runs = self._at_work.pop(place, None)
        if runs is None:  # it had nothing left to do
            self._processes.pop(place).join()
            return
        self.failures.append(f"{runs[0].grid_name} failed on GPU {self._gpus[place]}")
        print(f"{self.failures[-1]}: {reason}", file=sys.stderr, flush=True)
        self._processes.pop(place).join()
        self._give(place)

    def end(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.terminate()
            process.join()


def _work(place: int, inbox: Any, messages: Any, is_compiled: bool) -> None:
    """Train packs from the inbox, and send (place, (run, outcome)), or (place, traceback) at a failure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exit_with_parent()
    try:
        while True:
            runs = inbox.get()
            train(runs, device, lambda *ended: messages.put((place, ended)), is_compiled=is_compiled)
    except Exception:
        messages.put((place, traceback.format_exc()))
