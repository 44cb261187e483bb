"""Sharing the work between GPUs: a process for each, which takes the next runs from a list."""

import multiprocessing
import os
import queue
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from errors import RunError
from eval.mad.runs import Run
from eval.mad.train import Report, train

_POLL_SECONDS = 0.5


def train_all(
    packs: Sequence[Sequence[Run]], devices: Sequence[torch.device], report: Report, *, is_compiled: bool
) -> None:
    """Train packs of runs, on each device in a process of its own.

    A pack that fails ends its process, not those of other packs.

    Args:
        packs: Runs that are trained at once; packs are begun in this order.
        devices: The devices.
        report: Called in this process with a run and its outcome as soon as it ends.
        is_compiled: As in train.

    Raises:
        RunError: Packs have failed; all others are trained.
    """
    workers = _Workers(devices, packs, is_compiled)
    try:
        while workers.has_work():
            workers.handle(report)
    finally:
        workers.end()
    if workers.failures:
        raise RunError("\n".join(workers.failures))


class _Workers:
    """The processes, and what they were given to do."""

    def __init__(
        self, devices: Sequence[torch.device], packs: Sequence[Sequence[Run]], is_compiled: bool
    ) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._messages = self._context.Queue()
        self._is_compiled = is_compiled
        self._waiting = list(packs)
        self._inboxes: dict[torch.device, Any] = {}
        self._processes: dict[torch.device, BaseProcess] = {}
        self._at_work: dict[torch.device, list[Run]] = {}
        self.failures: list[str] = []
        for device in devices:
            self._give(device)

    def has_work(self) -> bool:
        return bool(self._at_work)

    def _give(self, device: torch.device) -> None:
        """Give a device its next pack, if there is one."""
        if not self._waiting:
            return
        if device not in self._processes:
            self._inboxes[device] = self._context.Queue()
            arguments = (device, self._inboxes[device], self._messages, self._is_compiled)
            self._processes[device] = self._context.Process(target=_work, args=arguments)
            self._processes[device].start()
        runs = list(self._waiting.pop(0))
        self._at_work[device] = runs
        self._inboxes[device].put(runs)

    def handle(self, report: Report) -> None:
        """Handle the next message, or the death of processes that send none any more."""
        try:
            device, content = self._messages.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            for device, process in list(self._processes.items()):
                if process.exitcode is not None:
                    self._fail(device, f"the process ended with code {process.exitcode}")
            return
        if isinstance(content, str):
            self._fail(device, content)
            return
        run, outcome = content
        self._at_work[device].remove(run)
        report(run, outcome)
        if not self._at_work[device]:
            del self._at_work[device]
            self._give(device)

    def _fail(self, device: torch.device, reason: str) -> None:
        """Note the failure of a device's pack; the next one gets a new process."""
        runs = self._at_work.pop(device)
        recipe, setting = runs[0].recipe, runs[0].setting
        chosen = f"{recipe.attention} {recipe.optimizer} on {setting.task} {setting.name}"
        self.failures.append(f"{chosen} failed on {device}: {reason}")
        self._processes.pop(device).join()
        self._give(device)

    def end(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.terminate()
            process.join()


def _work(device: torch.device, inbox: Any, messages: Any, is_compiled: bool) -> None:
    """Train packs from the inbox, and send (device, (run, outcome)), or (device, traceback) at a failure."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        while True:
            runs = inbox.get()
            train(runs, device, lambda *ended: messages.put((device, ended)), is_compiled=is_compiled)
    except Exception:
        messages.put((device, traceback.format_exc()))


def _exit_with_parent() -> None:
    """End this process with the one that started it, which may be killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
