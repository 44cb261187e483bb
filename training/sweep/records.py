"""How far a member is, from its records alone; without importing torch."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from data.folder_lock import is_held
from errors import UserError
from eval.report.run_records import RunRecord, read_run
from eval.report.run_values import held_out_loss, own_device_hours
from models.run_folder import RunFolder
from training.branch_step import branch_step
from training.config_differences import config_differences, training_changes
from training.run_config import RunConfig

FAILED = "sweep: failed with code"
"""How the last line of a member's log begins where its last launch failed."""
_RECENT_STEPS = 20
_LOG_BYTES = 4000
LONGEST_NOTE = 900
"""Characters of a note in a log, of at most 4 bytes each: _LOG_BYTES hold the whole of the last line."""
FAILURE_OF_TASKS = "eval.tasks"
"""Name of the failure in training where tasks get no results."""
_PARTS_IN_PLAN = 4  # STAGE/NAME/checkpoint/step-N


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a member is.

    Attributes:
        step: Completed steps on record.
        last_step: The step that it ends with.
        first_step: The step that it starts from: 0, or for a branch that of its checkpoint.
        loss: Held-out loss after the last step in nats/token; None before.
        is_finished: Whether the last step and its evaluations are on record; without a checkpoint, the
            held-out loss suffices.
        is_held: Whether a process has its run folder.
        device_hours: Time of its training steps times ranks.
        seconds_left: Expected time of the steps that are left; None before the second step.
        failure: Why its last launch failed; None if it did not.
        problem: Why it must not be launched: its folder has another config or is damaged; None if it may.
        note: What a finished member lacks; None for nothing.
    """

    step: int = 0
    last_step: int
    first_step: int = 0
    loss: float | None = None
    is_finished: bool = False
    is_held: bool = False
    device_hours: float = 0.0
    seconds_left: float | None = None
    failure: str | None = None
    problem: str | None = None
    note: str | None = None


class Records:
    """Reads the records of run folders, again only where they have changed."""

    def __init__(self) -> None:
        self._runs: dict[Path, tuple[object, RunRecord | UserError]] = {}

    def progress(self, folder: RunFolder, config: RunConfig) -> Progress:
        """Return how far the member of a folder is.

        Args:
            folder: Its run folder; may be missing.
            config: Its config.
        """
        last_step, first_step = config.training.last_step, branch_step(config)
        if not folder.path.is_dir():
            return Progress(last_step=last_step, first_step=first_step)
        held, failure = is_held(folder.lock_file), read_failure(folder)
        try:
            differing = _differences(folder, config)
            run = self._read(folder)
        except UserError as error:
            # a run that begins has not written everything yet
            damage = None if held else str(error)
            return Progress(
                last_step=last_step, first_step=first_step, is_held=held, failure=failure, problem=damage
            )
        problem = f"{folder.path} has another config: {'; '.join(differing)}" if differing else None
        seconds = [step["step_seconds"] for step in run.steps[-_RECENT_STEPS:]]
        step = run.steps[-1]["step"] if run.steps else 0
        has_loss, has_tasks = held_out_loss(run) is not None, _has_tasks(run, config)
        # the records of another machine came without weights: to evaluate tasks would be to train again
        is_record_alone = run.is_finished and folder.newest_checkpoint() is None
        return Progress(
            step=step,
            last_step=last_step,
            first_step=first_step,
            loss=held_out_loss(run),
            is_finished=run.is_finished and has_loss and (has_tasks or is_record_alone),
            is_held=held,
            device_hours=(own_device_hours(run) or 0.0) if run.steps else 0.0,
            seconds_left=(last_step - step) * statistics.median(seconds) if len(seconds) > 1 else None,
            failure=failure,
            problem=problem,
            note=None if has_tasks else "no results of eval.tasks, and no checkpoint to evaluate",
        )

    def _read(self, folder: RunFolder) -> RunRecord:
        signature = tuple(
            (found.st_mtime_ns, found.st_size, found.st_ino)
            if path.exists() and (found := path.stat())
            else None
            for path in (folder.metrics_file, folder.config_file)
        )
        known = self._runs.get(folder.path)
        if known is None or known[0] != signature:
            try:
                known = signature, read_run(folder.path)
            except UserError as error:
                known = signature, error
            self._runs[folder.path] = known
        if isinstance(known[1], UserError):
            raise known[1]
        return known[1]


def read_failure(folder: RunFolder) -> str | None:
    """Return why the last launch of a member failed, by the end of its log; None if it did not."""
    last = log_lines(folder)[-1:]
    return last[0].removeprefix("sweep: ") if last and last[0].startswith(FAILED) else None


def log_lines(folder: RunFolder) -> list[str]:
    """Return the last lines of a member's log that are not empty."""
    if not folder.log_file.exists():
        return []
    with folder.log_file.open("rb") as file:
        file.seek(max(0, folder.log_file.stat().st_size - _LOG_BYTES))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _differences(folder: RunFolder, config: RunConfig) -> list[str]:
    """Describe the keys that differ from the config in a folder and change what is trained.

    A branch may have been trained in another folder of the plan: its start is compared within that.
    """
    saved = folder.read_config()
    if saved is None:
        return []
    differing = training_changes(config_differences(config, saved))
    starts = [config.checkpoint.start_from, saved.get("checkpoint", {}).get("start_from")]
    if None not in starts and len({Path(str(start)).parts[-_PARTS_IN_PLAN:] for start in starts}) == 1:
        return [each for each in differing if not each.startswith("checkpoint.start_from:")]
    return differing


def _has_tasks(run: RunRecord, config: RunConfig) -> bool:
    """Return whether the tasks after the last step are on record, if there are any; an error of them is."""
    if not config.eval.tasks or (run.tasks and run.tasks[-1]["step"] == run.last_step):
        return True
    return any(each.step == run.last_step and each.name == FAILURE_OF_TASKS for each in run.failures)
