"""Which members the GPU-hours of their stages still allow."""

import statistics

from training.sweep.overview import Overview, Status
from training.sweep.plan import Plan


def spent_hours(plan: Plan, status: Status) -> float:
    """Return the GPU-hours of a member so far; members that share a GPU share its hours."""
    return status.progress.device_hours / plan.members_per_gpu


def expected_hours(plan: Plan, status: Status) -> float | None:
    """Return the GPU-hours that a member takes in all, by its steps so far; None before the second."""
    if status.state == "finished":
        return spent_hours(plan, status)
    if status.progress.seconds_left is None:
        return None
    left = status.progress.seconds_left * plan.gpus_per_member / 3600 / plan.members_per_gpu
    return spent_hours(plan, status) + left


def members_in_budget(plan: Plan, overview: Overview) -> list[Status]:
    """Return the runs of their own whose stage has no budget, or one that still has room for them.

    What a member will take is the mean of those of its stage of which it is known.
    """
    found = []
    for stage in plan.stages:
        own = [status for status in overview.own if status.member.stage == stage.name]
        known = [hours for status in own if (hours := expected_hours(plan, status)) is not None]
        mean = statistics.fmean(known) if known else 0.0
        taken = sum(
            (expected_hours(plan, status) or mean) if status.state == "running" else spent_hours(plan, status)
            for status in own
        )
        for status in own:
            left = (expected_hours(plan, status) or mean) - spent_hours(plan, status)
            if stage.gpu_hours is None or taken + max(0.0, left) <= stage.gpu_hours:
                found.append(status)
    return found
