"""Sharing the work between GPUs: a process for each, which takes the next runs from a list."""

import multiprocessing
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from errors import RunError
from eval.gpus import VISIBLE
from eval.mad.runs import Run
from eval.mad.train import Report, train

_POLL_SECONDS = 0.5


def train_all(
    packs: Iterable[Sequence[Run]], gpus: Sequence[str], report: Report, *, is_compiled: bool
) -> None:
    """Train packs of runs, on each GPU in a process of its own that sees no other.

    A pack that fails ends its process, not those of other packs.

    Args:
        packs: Runs that are trained at once; packs are begun in this order, and each is asked for then.
        gpus: The GPUs, as CUDA_VISIBLE_DEVICES names them; without a GPU in the machine, names of processes.
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
        self._inboxes: dict[str, Any] = {}
        self._processes: dict[str, BaseProcess] = {}
        self._at_work: dict[str, list[Run]] = {}
        self.failures: list[str] = []
        for gpu in gpus:
            self._give(gpu)

    def has_work(self) -> bool:
        return bool(self._at_work)

    def _give(self, gpu: str) -> None:
        """Give a GPU its next pack, if there is one."""
        runs = list(next(self._waiting, ()))
        if not runs:
            return
        if gpu not in self._processes:
            self._start(gpu)
        self._at_work[gpu] = runs
        self._inboxes[gpu].put(runs)

    def _start(self, gpu: str) -> None:
        """Start a GPU's process, whose only device is "cuda:0": compiled code is kept for a device's name."""
        self._inboxes[gpu] = self._context.Queue()
        arguments = (gpu, self._inboxes[gpu], self._messages, self._is_compiled)
        self._processes[gpu] = self._context.Process(target=_work, args=arguments)
        visible = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = gpu
        try:
            self._processes[gpu].start()
        finally:
            if visible is None:
                del os.environ[VISIBLE]
            else:
                os.environ[VISIBLE] = visible

    def handle(self, report: Report) -> None:
        """Handle the next message, or the death of processes that send none any more."""
        try:
            gpu, content = self._messages.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            for gpu, process in list(self._processes.items()):
                if process.exitcode is not None:
                    self._fail(gpu, f"the process ended with code {process.exitcode}")
            return
        if isinstance(content, str):
            self._fail(gpu, content)
            return
        run, outcome = content
        self._at_work[gpu].remove(run)
        report(run, outcome)
        if not self._at_work[gpu]:
            del self._at_work[gpu]
            self._give(gpu)

    def _fail(self, gpu: str, reason: str) -> None:
        """Note the failure of a GPU's pack; the next one gets a new process."""
        runs = self._at_work.pop(gpu, None)
        if runs is None:  # it had nothing left to do
            self._processes.pop(gpu).join()
            return
        recipe, setting = runs[0].recipe, runs[0].setting
        chosen = f"{recipe.attention} {recipe.optimizer} on {setting.task} {setting.name}"
        self.failures.append(f"{chosen} failed on GPU {gpu}")
        print(f"{self.failures[-1]}: {reason}", file=sys.stderr, flush=True)
        self._processes.pop(gpu).join()
        self._give(gpu)

    def end(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.terminate()
            process.join()


def _work(gpu: str, inbox: Any, messages: Any, is_compiled: bool) -> None:
    """Train packs from the inbox, and send (gpu, (run, outcome)), or (gpu, traceback) at a failure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        while True:
            runs = inbox.get()
            train(runs, device, lambda *ended: messages.put((gpu, ended)), is_compiled=is_compiled)
    except Exception:
        messages.put((gpu, traceback.format_exc()))


def _exit_with_parent() -> None:
    """End this process with the one that started it, which may be killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
