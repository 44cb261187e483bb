"""Values of a run after its last step: losses, metrics of tasks, gradients, throughput, time."""

import statistics
from collections.abc import Callable

from config import from_table
from eval.report.gradient_peaks import find_peaks
from eval.report.run_records import RunRecord
from optimizers.config import ScheduleConfig
from optimizers.schedule import decay_start

FINAL_STEPS = 20
"""Steps over which the final training loss is averaged."""

Value = Callable[[RunRecord], float | None]
"""A value of a run; None where the run has none."""


def training_loss(run: RunRecord) -> float | None:
    """Return the mean loss of the last FINAL_STEPS steps in nats/token; None for an unfinished run."""
    return statistics.fmean(s["loss"] for s in run.steps[-FINAL_STEPS:]) if run.is_finished else None


def _final_held_out(run: RunRecord, key: str) -> float | None:
    if not run.held_out or run.held_out[-1]["step"] != run.last_step:
        return None
    return run.held_out[-1].get(key)


def held_out_loss(run: RunRecord) -> float | None:
    """Return the held-out loss after the last step in nats/token; None where there is none yet."""
    return _final_held_out(run, "validation_loss")


def _before_decay(run: RunRecord, key: str) -> float | None:
    schedule = from_table(
        ScheduleConfig,
        {name.removeprefix("schedule."): x for name, x in run.config.items() if name.startswith("schedule.")},
        run.folder,
        "schedule",
    )
    steps = run.config["training.steps"]
    # a branch without a decay phase is compared with the others of its trunk
    start = run.num_trunk_steps or decay_start(schedule, steps)
    found = [record for record in run.held_out if record["step"] == start < (run.last_step or steps)]
    return found[-1].get(key) if found else None


def loss_before_decay(run: RunRecord) -> float | None:
    """Return the held-out loss at the last step before the decay phase in nats/token.

    Args:
        run: A run, or a branch: then at the step that it branches from.

    Returns:
        None without a decay phase, or where no held-out loss of that step is on record.

    Raises:
        UserError: The run's schedule is not one of this version of the code.
    """
    return _before_decay(run, "validation_loss")


def average_loss_before_decay(run: RunRecord) -> float | None:
    """Return loss_before_decay of the average of the weights; None where it is not on record."""
    return _before_decay(run, "average_validation_loss")


def own_device_hours(run: RunRecord) -> float | None:
    """Return the time of the run's own recorded steps times ranks in hours; None where ranks are unknown."""
    if any("num_ranks" not in step for step in run.own_steps):
        return None
    return sum(step["step_seconds"] * step["num_ranks"] for step in run.own_steps) / 3600


def num_missing_steps(run: RunRecord) -> int:
    """Return how many of the run's own steps are not on record, up to the last one that is."""
    last = run.steps[-1]["step"] if run.own_steps else run.num_trunk_steps
    return last - run.num_trunk_steps - len(run.own_steps)


def own_tokens(run: RunRecord) -> int:
    """Return the number of tokens that the run itself was trained on, without those of its trunk.

    Where the records of the trunk are missing, by the batch of the run's config.
    """
    own = run.own_steps
    if not own:
        return 0
    trunk = run.steps[: -len(own)]
    if trunk:
        return own[-1]["tokens"] - trunk[-1]["tokens"]
    first = own[0]["tokens"] - (own[0]["step"] - run.num_trunk_steps) * run.batch_tokens
    return own[-1]["tokens"] - (first if run.num_trunk_steps else 0)


def held_out_error(run: RunRecord) -> float | None:
    """Return the standard error over documents of held_out_loss in nats/token; None where there is none."""
    return _final_held_out(run, "validation_stderr")


def average_held_out_loss(run: RunRecord) -> float | None:
    """Return the held-out loss of the averaged weights after the last step; None where there is none."""
    return _final_held_out(run, "average_validation_loss")


def average_held_out_error(run: RunRecord) -> float | None:
    """Return the standard error over documents of average_held_out_loss; None where there is none."""
    return _final_held_out(run, "average_validation_stderr")


def held_out_tokens(run: RunRecord) -> float | None:
    """Return the number of tokens that held_out_loss is the mean over; None where there is none."""
    return _final_held_out(run, "validation_tokens")


def held_out_documents(run: RunRecord) -> float | None:
    """Return the number of documents of held_out_tokens; None where it was not recorded."""
    return _final_held_out(run, "validation_documents")


def held_out_cut_documents(run: RunRecord) -> float | None:
    """Return how many of held_out_documents were cut into rows; None where it was not recorded."""
    return _final_held_out(run, "validation_cut_documents")


def task_metric(run: RunRecord, task: str, metric: str) -> float | None:
    """Return a task's metric after the last step; None where there is none.

    Args:
        run: The run.
        task: The task's name, such as "lambada_openai"; "" for a metric over tasks, such as mean_accuracy.
        metric: The metric's name.
    """
    if not run.tasks or run.tasks[-1]["step"] != run.last_step:
        return None
    return run.tasks[-1].get(f"tasks/{task}/{metric}" if task else f"tasks/{metric}")


def gradient_norms(run: RunRecord) -> list[float]:
    """Return the gradient norm before clipping of each step; empty where a step has none."""
    norms = [step.get("grad_norm") for step in run.steps]
    return [norm for norm in norms if norm is not None] if None not in norms else []


def num_spikes(run: RunRecord) -> float | None:
    """Return the number of steps that are on record as spikes; None unless all were judged, or unfinished."""
    return float(sum("grad_norm_spike" in step for step in run.steps)) if _judges_spikes(run) else None


def num_skipped(run: RunRecord) -> float | None:
    """Return the number of steps that were skipped as spikes; None as in num_spikes."""
    return float(sum(step.get("is_skipped", False) for step in run.steps)) if _judges_spikes(run) else None


def _judges_spikes(run: RunRecord) -> bool:
    """Return whether a run is finished, and each of its steps was recorded by a version that finds spikes."""
    return run.is_finished and all("grad_norm_running" in step for step in run.steps)


def num_peaks(run: RunRecord) -> float | None:
    """Return the number of peaks of the gradient norm; None for an unfinished run, or without a record."""
    norms = gradient_norms(run) if run.is_finished else []
    return float(len(find_peaks(norms))) if norms else None


def median(run: RunRecord, key: str) -> float | None:
    """Return the median of a value over the run's own steps; None where none was recorded."""
    found = [s[key] for s in run.own_steps if s.get(key) is not None]
    return statistics.median(found) if found else None


def peak_memory(run: RunRecord) -> float | None:
    """Return the peak of allocated memory in GiB; None where it was not recorded."""
    found = [s["peak_memory_gib"] for s in run.steps if s.get("peak_memory_gib") is not None]
    return max(found) if found else None


def hours(run: RunRecord) -> float | None:
    """Return the time of training steps so far in hours; None where steps are not on record."""
    seconds = run.steps[-1]["seconds"]
    return None if seconds is None else seconds / 3600


def device_hours(run: RunRecord) -> float | None:
    """Return the time of training steps times ranks in hours, as hours; None where ranks are unknown too."""
    seconds = run.steps[-1]["rank_seconds"]
    return None if seconds is None else seconds / 3600
