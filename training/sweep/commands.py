"""What each option of `python -m training.sweep` does."""

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from data.folder_lock import FolderLock, LockedError, is_held
from errors import RUN_ERROR_CODE, RunError, UserError
from training.sweep.collect import collect
from training.sweep.member_queue import Queue
from training.sweep.overview import Observer, Overview
from training.sweep.sbatch import array_script
from training.sweep.slots import make_slots, visible_gpus
from training.sweep.table import Display, format_table


def work(observer: Observer, numbers: Collection[int] | None) -> int:
    """Work members off.

    Args:
        observer: Of the plan.
        numbers: Numbers of the members; None for all, which no other sweep may do in the folder.

    Returns:
        0 if all of them have finished or a signal has stopped the sweep, else 1.

    Raises:
        UserError: Another sweep works in the folder, or there is no such member.
    """
    slots = make_slots(observer.plan, visible_gpus(os.environ))
    display = Display(observer.plan, len(slots))
    with _only_one(observer) if numbers is None else nullcontext():
        queue = Queue(observer, slots, selected=numbers, show=display.show, writes_plan=numbers is None)
        overview = queue.run()
    display.finish(overview)
    if queue.is_stopped:
        print("stopped by a signal; the same command resumes")
        return 0
    unfinished = [s for s in overview.own if s.member.number in queue.selected and s.state != "finished"]
    for line in _reasons(observer, overview, {status.member.number for status in unfinished}):
        print(line, file=sys.stderr)
    return RUN_ERROR_CODE if unfinished else 0


def _reasons(observer: Observer, overview: Overview, unfinished: Collection[int]) -> Iterator[str]:
    """Yield a line for each kind of reason why members have not finished."""
    for status in overview.own:
        if status.member.number in unfinished and status.state in ("failed", "refused"):
            why = status.progress.problem or status.progress.failure
            yield f"member {status.member.number}: {why} ({observer.folder.run(status.member).log_file})"
    for stage in observer.plan.stages:
        left = [s for s in overview.own if s.member.stage == stage.name and s.member.number in unfinished]
        waiting = [s for s in left if s.state in ("waiting", "stopped")]
        if not waiting:
            continue
        if not waiting[0].member.is_known:
            yield f"stage {stage.name} waits for all members of {', '.join(stage.best_of)} to end"
        elif stage.gpu_hours is not None:
            yield f"stage {stage.name} has no room for {len(waiting)} members: raise its gpu_hours"


@contextmanager
def _only_one(observer: Observer) -> Iterator[None]:
    path = observer.folder.lock_file
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(path)
    try:
        lock.acquire()
    except LockedError as holder:
        raise UserError(
            f"{observer.folder.path} is being worked off by {holder}: look at it with --status, or work some "
            "of its members off with --member"
        ) from holder
    try:
        yield
    finally:
        lock.release()


def print_status(observer: Observer) -> None:
    """Print the table."""
    overview = observer.look()
    running = sum(status.state == "running" for status in overview.own)
    print(format_table(observer.plan, overview, max(1, running)))
    is_worked_off = is_held(observer.folder.lock_file)
    print("a sweep is working it off" if is_worked_off else "no sweep is working it off")


def print_array(observer: Observer) -> None:
    """Print a SLURM job array of the ready members.

    Raises:
        RunError: None is ready.
    """
    overview = observer.look()
    _write_plan(observer, overview)
    script = array_script(
        observer.plan, observer.source, overview, python=sys.executable, directory=Path.cwd()
    )
    if script is None:
        raise RunError("no member can be started: see --status")
    print(script, end="")


def bring_together(observer: Observer, sources: Sequence[Path]) -> None:
    """Copy records from other folders, and print what was taken and the table."""
    lines = collect(observer, sources)
    overview = observer.look()
    _write_plan(observer, overview)
    print("\n".join([*lines, format_table(observer.plan, overview, 1)]))


def _write_plan(observer: Observer, overview: Overview) -> None:
    members = [status.member for status in overview.statuses]
    observer.folder.write_plan(observer.plan, members, overview.choices)
