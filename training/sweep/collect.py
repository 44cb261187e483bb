"""Bring together the records of members that were trained in other folders; no weights."""

from collections.abc import Sequence
from pathlib import Path

from disk import replacing
from errors import UserError
from eval.task_results import RESULTS_FILE
from models.run_folder import RunFolder
from training.sweep.overview import Observer, Status
from training.sweep.plan_folder import PlanFolder
from training.sweep.records import Records


def collect(observer: Observer, sources: Sequence[Path]) -> list[str]:
    """Copy config, metrics, diagnostics, log and results of members that have ended into the plan's folder.

    Args:
        observer: Of the plan.
        sources: Folders of the same plan, copied from other machines for example.

    Returns:
        A line for each member that was copied or could not be.

    Raises:
        UserError: A folder is missing, or is none of this plan.
    """
    for source in sources:
        if not source.is_dir():
            raise UserError(f"--collect {source}: there is no such folder; want another folder of this plan")
        stages = [stage.name for stage in observer.plan.stages]
        if not any((source / name).is_dir() for name in stages):
            raise UserError(
                f"--collect {source}: it has no folder of a stage ({', '.join(stages)}); want another folder "
                "of this plan"
            )
    records, told = Records(), dict[int, str]()
    has_copied = True
    while has_copied:  # members of a later stage are known once those before are here
        has_copied = False
        for status in observer.look().own:
            source, line = _best_source(records, status, sources)
            if source is not None:
                _copy(PlanFolder(source).run(status.member), observer.folder.run(status.member))
                has_copied = True
            if line is not None and (source is not None or status.member.number not in told):
                told[status.member.number] = f"member {status.member.number}, {status.member.path}: {line}"
    return [told[number] for number in sorted(told)]


def _best_source(records: Records, status: Status, sources: Sequence[Path]) -> tuple[Path | None, str | None]:
    """Return the folder to take a member from, None for none, and what to tell of it."""
    member = status.member
    if not member.is_known or status.state in ("finished", "running"):
        return None, None
    if status.state == "refused":
        return None, f"not taken: {status.progress.problem}"
    folders = {source: PlanFolder(source).run(member) for source in sources}
    found = {
        source: records.progress(folder, member.config)
        for source, folder in folders.items()
        if folder.path.is_dir()
    }
    for source, progress in found.items():
        if progress.problem is None and progress.is_finished:
            return source, f"taken from {source}"
    for source, progress in found.items():
        if progress.problem is not None:
            return None, f"not taken: {progress.problem}"
        if progress.failure is not None and status.state == "waiting":
            return source, f"taken from {source}, where it failed"
        if progress.failure is not None and status.state == "failed":
            return None, None
    unfinished = [f"step {each.step} of {each.last_step} in {source}" for source, each in found.items()]
    return None, f"not taken: not finished, {', '.join(unfinished)}" if unfinished else None


def _copy(source: RunFolder, target: RunFolder) -> None:
    """Copy the records of a run, the metrics last: only they make it a finished one."""
    results = (*source.path.glob(RESULTS_FILE), *source.path.glob(f"*/{RESULTS_FILE}"))
    configs = source.path.glob("config*.toml")
    files = [*configs, *results, source.log_file, source.diagnostics_file, source.metrics_file]
    for file in files:
        if file.exists():
            path = target.path / file.relative_to(source.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(file.read_bytes())
