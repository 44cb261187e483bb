"""Find hung and dead ranks: each writes step and phase to the store; past a limit the run ends with one line.

The limit is on the time that a rank spends in one phase. A thread checks it, so that it holds for every
backend: NCCL's own watchdog aborts the process without saying who is missing.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from errors import RUN_ERROR_CODE, RunError
from models.run_folder import RunFolder
from training.device import process_group_store, set_collective_timeouts
from training.rank_states import RankState, describe_hang, find_missing, name_ranks
from training.run_config import RunConfig

# between two writes of a rank: 500 writes a second from 1000 ranks
BEAT_SECONDS = 2.0
# a rank that has not written for so many beats is stopped or dead
SILENT_BEATS = 3
# limit of what has no usual duration: loading, compilation, evaluation, checkpoints
SLOW_SECONDS = 1800.0
# limit of waiting for data: the hub's client outlasts outages of about ten minutes
DATA_SECONDS = 900.0
# steps of a launch that may compile; all but the first are measured
_NUM_FIRST_STEPS = 3
# a phase may last so many mean steps, where that is longer than the limit
_MEAN_STEPS = 3.0
# how long a collective may outlast the limits, which are to be reached before
_MARGIN_SECONDS = 300.0
# for an answer from the store
STORE_SECONDS = 10.0
# torchrun ends all ranks as soon as one has: the others wait until one has printed the line
_SECONDS_TO_REPORT = 20.0
# keys of the store: how many ranks would report, and whether one has
_REPORTS = "rank monitor/reports"
_ENDED = "rank monitor/ended"
_ROOT = Path(__file__).parents[1]

T = TypeVar("T")


class RankMonitor:
    """Watches the ranks of a run, from two threads of each; does nothing for a single rank.

    Args:
        config: The run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._timeout = config.parallelism.timeout_seconds
        self._slow = max(SLOW_SECONDS, self._timeout)
        self._checkpoints = RunFolder(Path(config.run.folder)).checkpoints
        self._states: list[RankState] = []  # as last read, by rank
        self._rank = self._step = self._num_steps = self._num_writes = 0
        self._step_seconds = 0.0  # in the measured phases of all steps
        self._is_measured = False
        # the phase and its beginning, replaced together: the thread reads them
        process = f"{socket.gethostname()}, process {os.getpid()}"
        self._current = (RankState(process=process, limit=self._slow), time.monotonic())
        self._store: dist.Store | None = None
        self._is_reporting = False
        self._is_closed = threading.Event()

    def start(self) -> None:
        """Start the threads; a collective call."""
        if dist.get_world_size() == 1:
            return
        self._rank = dist.get_rank()
        self._store = process_group_store()
        self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._write_state()
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self._current[0])  # all have written
        self._states = states
        set_collective_timeouts(timedelta(seconds=self._slow + _MARGIN_SECONDS))
        for work in (self._write, self._watch):
            threading.Thread(target=work, name="rank monitor", daemon=True).start()

    def begin_step(self, step: int) -> None:
        """Count a step; the phases that follow belong to it."""
        self._step = step
        self._num_steps += 1

    def enter(self, phase: str, *, limit: float | None = None) -> None:
        """Enter a phase; all ranks enter the same ones in the same order.

        Args:
            phase: Its name.
            limit: Seconds that it may take. By default parallelism.timeout_seconds, or three mean steps where
                these are longer; SLOW_SECONDS in the first steps.
        """
        now = time.monotonic()
        state, since = self._current
        if self._is_measured:
            self._step_seconds += now - since
        self._is_measured = limit is None and self._num_steps > 1
        if limit is None:
            limit = self._step_limit() if self._num_steps > _NUM_FIRST_STEPS else self._slow
        name = f"step {self._step}: {phase}" if self._step else phase
        state = replace(state, num_phases=state.num_phases + 1, phase=name, limit=max(limit, self._timeout))
        self._current = (state, now)

    def enter_slow(self, phase: str) -> None:
        """Enter a phase without a usual duration, such as an evaluation."""
        self.enter(phase, limit=self._slow)

    def lift_limit(self) -> None:
        """Allow the phase that the run ends in as long as one without a usual duration."""
        state, since = self._current
        self._current = (replace(state, limit=self._slow), since)

    @property
    def place(self) -> str:
        """This rank, its host and process, and the phase that it is in."""
        state = self._current[0]
        return f"rank {self._rank} ({state.process}) in {state.phase}"

    def close(self) -> None:
        """Stop the threads."""
        self._is_closed.set()

    def fail(self, describe: Callable[[], str]) -> NoReturn:
        """End the run since this rank failed: one rank prints the line, and then all end with its exit code.

        Args:
            describe: Returns the line; called on the rank that prints it.

        Raises:
            RunError: There is a single rank.
        """
        if self._store is None:
            raise RunError(describe())
        self._end(describe() if self._is_first_to_report() else None)

    def describe_lost_rank(self, error: Exception) -> str:
        """Name the ranks that stopped answering, after some seconds.

        Args:
            error: What a collective raised.
        """
        found = self._ask(self._read_twice)
        silent = set() if found is None else find_missing(*found, self._rank)[0]
        resume = f"The same command resumes from the newest checkpoint in {self._checkpoints}"
        if silent:
            return (
                f"{name_ranks(dict(enumerate(self._states)), silent)} stopped answering, and {self.place} "
                "lost a connection. Look there for a killed process (dmesg tells of a host out of memory), a "
                f"failed GPU or network. {resume}"
            )
        reason = str(error).strip().splitlines()[0]
        return f"{self.place} lost a connection: {reason}. Look for the rank that failed first. {resume}"

    def _step_limit(self) -> float:
        num_measured = self._num_steps - 2  # without the first and this one
        return max(self._timeout, _MEAN_STEPS * self._step_seconds / num_measured)

    def _watch(self) -> None:
        while not self._is_closed.wait(BEAT_SECONDS):
            state, since = self._current
            if time.monotonic() - since < state.limit:
                continue
            found = self._ask(self._read_twice)
            line = (
                self._describe_lost_store()
                if found is None
                else describe_hang(*found, self._rank, self._checkpoints)
            )
            has_moved = self._current[1] != since or self._is_closed.is_set()
            if line is not None and not has_moved:
                self._end(line if self._is_first_to_report() else None)

    def _describe_lost_store(self) -> str:
        state, since = self._current
        return (
            f"rank {self._rank} has waited for {time.monotonic() - since:.0f} s in {state.phase}, and "
            f"the store on {os.environ.get('MASTER_ADDR')} does not answer: torchrun there, or rank 0, is "
            f"stopped or gone. The same command resumes from the newest checkpoint in {self._checkpoints}"
        )

    def _write(self) -> None:
        """Write this rank's state, until the run ends; end this rank once another has said why."""
        assert self._store is not None
        # without a store the run may still end by itself: torchrun was killed
        with contextlib.suppress(RuntimeError):
            while not self._is_closed.wait(BEAT_SECONDS):
                self._write_state()
                if self._store.check([_ENDED]) and not self._is_reporting:
                    os._exit(RUN_ERROR_CODE)

    def _write_state(self) -> None:
        state, since = self._current
        self._num_writes += 1
        seconds = time.monotonic() - since
        state = replace(state, num_writes=self._num_writes, seconds=seconds, place=_place_of_main_thread())
        assert self._store is not None
        self._store.set(_key(self._rank), json.dumps(asdict(state)))

    def _ask(self, question: Callable[[], T]) -> T | None:
        """Ask the store, from another thread; None without an answer: its clients may wait without end."""
        answers: queue.SimpleQueue[T | None] = queue.SimpleQueue()

        def put() -> None:
            try:
                answers.put(question())
            except RuntimeError:
                answers.put(None)

        threading.Thread(target=put, daemon=True).start()
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=SILENT_BEATS * BEAT_SECONDS + STORE_SECONDS)
        return None

    def _read_twice(self) -> tuple[dict[int, RankState], dict[int, RankState]]:
        before = self._read_states()
        time.sleep(SILENT_BEATS * BEAT_SECONDS)
        return before, self._read_states()

    def _read_states(self) -> dict[int, RankState]:
        assert self._store is not None
        found = self._store.multi_get([_key(rank) for rank in range(len(self._states))])
        self._states = [RankState(**json.loads(each)) for each in found]
        return dict(enumerate(self._states))

    def _is_first_to_report(self) -> bool:
        """Return whether nobody reports yet; no other rank does without a store that could tell."""
        assert self._store is not None
        if (
            self._is_reporting
        ):  # another thread of this rank, while the store may go with the rank that has it
            return False
        store = self._store
        self._is_reporting = self._ask(lambda: store.add(_REPORTS, 1)) in (1, None)
        return self._is_reporting

    def _end_others(self) -> None:
        assert self._store is not None
        self._store.set(_ENDED, "")
        time.sleep(SILENT_BEATS * BEAT_SECONDS)  # the store may end with this rank

    def _end(self, line: str | None) -> NoReturn:
        """End this process, whose main thread may be stuck in a collective."""
        if line is None:
            time.sleep(_SECONDS_TO_REPORT)
        else:
            print(f"error: {line}", file=sys.stderr, flush=True)
            self._ask(self._end_others)
        os._exit(RUN_ERROR_CODE)


def _key(rank: int) -> str:
    return f"rank monitor/{rank}"


def _place_of_main_thread() -> str:
    """Return file and line of the innermost frame in this project."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_ROOT) and ".venv" not in file.parts:
            return f"{file.relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
