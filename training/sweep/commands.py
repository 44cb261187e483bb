"""What each option of `python -m training.sweep` does."""

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from data.folder_lock import FolderLock, LockedError, is_held
from errors import RUN_ERROR_CODE, RunError, UserError
from eval.gpus import visible_gpus
from training.sweep.collect import collect
from training.sweep.member_queue import Queue, Selection
from training.sweep.overview import Observer, Overview, Status, select
from training.sweep.sbatch import array_script
from training.sweep.slots import make_slots
from training.sweep.table import Display, format_table


def work(observer: Observer, selection: Selection | None) -> int:
    """Run members.

    Args:
        observer: Of the plan.
        selection: Those to run; None for all, which no other sweep may do in the folder.

    Returns:
        0 if all of them have finished or a signal has stopped the sweep, else 1; none is started beside
        members that are refused.

    Raises:
        UserError: Another sweep works in the folder, or the selection is empty.
    """
    slots = make_slots(observer.plan, visible_gpus())
    display = Display(observer.plan, len(slots))
    is_whole = selection is None
    with _only_one(observer) if is_whole else nullcontext():
        if refused := _refused(observer.look()):
            print("\n".join(_reasons(observer, refused, ())), file=sys.stderr)
            return RUN_ERROR_CODE
        queue = Queue(observer, slots, selection=selection or select, show=display.show, writes_plan=is_whole)
        overview = queue.run()
    display.finish(overview)
    if queue.is_stopped:
        print("stopped by a signal; the same command resumes")
        return 0
    unfinished = [s for s in overview.own if s.member.number in queue.selected and s.state != "finished"]
    for line in _reasons(observer, unfinished, queue.launched):
        print(line, file=sys.stderr)
    return RUN_ERROR_CODE if unfinished else 0


def _refused(overview: Overview) -> list[Status]:
    """Return members whose folders are damaged or of another plan, also where another sweep runs them."""
    return [status for status in overview.own if status.progress.problem is not None]


def _reasons(observer: Observer, unfinished: Sequence[Status], launched: Collection[int]) -> Iterator[str]:
    """Yield a line for each reason why members have not finished."""
    for status in unfinished:
        number, progress = status.member.number, status.progress
        if status.state == "failed" or progress.problem is not None:
            log = observer.folder.run(status.member).log_file
            yield f"member {number}: {progress.problem or progress.failure} ({log})"
        elif number in launched:
            yield f"member {number} was stopped from outside at step {progress.step}: start the sweep again"
    if any(status.progress.problem is not None for status in unfinished):
        yield (
            "no member is started beside refused ones: restore their keys, give --folder another one, or "
            "delete their folders"
        )
    for stage in observer.plan.stages:
        left = [s for s in unfinished if s.member.stage == stage.name and s.member.number not in launched]
        if any(not status.member.is_known and status.state == "waiting" for status in left):
            yield f"stage {stage.name} waits until all members of {', '.join(stage.best_of)} have ended"
        num_lost = sum(s.member.is_known and not s.has_start and s.state == "waiting" for s in left)
        if num_lost:
            yield (
                f"stage {stage.name}: {num_lost} members have no checkpoint to start from: run stage "
                f"{stage.start_from} in the same folder; of members of it that have finished elsewhere, "
                "delete the folders before"
            )
        num_ready = sum(s.is_ready and s.state in ("waiting", "stopped") for s in left)
        if num_ready:
            yield f"stage {stage.name} has no room for {num_ready} members: raise its gpu_hours"


@contextmanager
def _only_one(observer: Observer) -> Iterator[None]:
    path = observer.folder.lock_file
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(path)
    try:
        lock.acquire()
    except LockedError as holder:
        raise UserError(
            f"{observer.folder.path} is being run by {holder}: look at it with --status, or run some of its "
            "members with --member or --stage"
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
    is_run = is_held(observer.folder.lock_file)
    print("a sweep is running it" if is_run else "no sweep is running it")


def print_array(observer: Observer, overrides: Sequence[str], selection: Selection | None) -> None:
    """Print a SLURM job array of the ready members.

    Args:
        observer: Of the plan.
        overrides: Words that override keys of the plan.
        selection: The members to take; None for all.

    Raises:
        UserError: The selection is empty.
        RunError: None is ready, or a member is refused.
    """
    overview = observer.look()
    selected = overview.runs((selection or select)(overview))
    if refused := _refused(overview):
        raise RunError("; ".join(_reasons(observer, refused, ())))
    _write_plan(observer, overview)
    script = array_script(
        observer.plan,
        observer.source.file,
        overview,
        selected,
        overrides=overrides,
        python=sys.executable,
        directory=Path.cwd(),
    )
    if script is None:
        which = "no member" if selection is None else "none of these members"
        raise RunError(f"{which} can be started: see --status")
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
