"""Learning-rate and weight-decay schedules as pure functions of the step."""

import math
from collections.abc import Mapping
from dataclasses import replace

from errors import UserError, check_unread
from optimizers.config import DEFAULT_DECAY_RATIO, UNREAD_KEYS, Group, ScheduleConfig


def group_schedule(group: Group, schedule: ScheduleConfig) -> ScheduleConfig:
    """Return the schedule of a parameter group: the run's, with what the group's own table gives.

    A decay of the group replaces the run's, whether a ratio or a number of steps; with a kind of its own the
    group takes over warm-up and, unless it is constant, minimum alone.

    Args:
        group: The group.
        schedule: The run's schedule.

    Raises:
        UserError: The group gives a key that the kind does not read.
    """
    if group.schedule is None:
        return schedule
    given = {name: value for name, value in vars(group.schedule).items() if value is not None}
    kind = group.schedule.kind or schedule.kind
    check_unread(group.schedule, f"a {kind} schedule", 'kind to "wsd"', *UNREAD_KEYS[kind])
    if kind != schedule.kind:
        minimum = 0.0 if kind == "constant" else schedule.min_lr_ratio
        schedule = ScheduleConfig(kind=kind, warmup_steps=schedule.warmup_steps, min_lr_ratio=minimum)
    elif given.keys() & {"decay_ratio", "decay_steps"}:
        schedule = replace(schedule, decay_ratio=None, decay_steps=None)
    return replace(schedule, **given)


def schedules_by_group(
    groups: Mapping[str, Group], schedule: ScheduleConfig, total_steps: int
) -> dict[str, ScheduleConfig]:
    """Return the schedule of every group, each of which fits the run.

    Args:
        groups: Groups by name.
        schedule: The run's schedule.
        total_steps: Number of steps of the run.

    Returns:
        Schedules by the name of the group.

    Raises:
        UserError: Warm-up and decay together are longer than the run, a group's own schedule contradicts
            itself, or a group anneals its weight decay by a constant schedule; names the group.
    """
    decay_start(schedule, total_steps)
    schedules = {}
    for name, group in groups.items():
        key = f"optimizer.groups.{name}"
        try:
            schedules[name] = group_schedule(group, schedule)
            decay_start(schedules[name], total_steps, f"{key}.schedule")
        except UserError as error:
            raise UserError(f"{key}.schedule: {error}") from None
        if schedules[name].kind == "constant":
            _check_no_annealing(group, key)
    return schedules


def _check_no_annealing(group: Group, key: str) -> None:
    try:
        check_unread(group, "a constant schedule", "choose another kind of schedule", "weight_decay_gamma")
    except UserError as error:
        raise UserError(f"{key}.{error}") from None


def lr_factor(step: int, config: ScheduleConfig, total_steps: int) -> float:
    """Return the factor of the peak learning rate at an optimizer step.

    With W warm-up steps, N steps in total and D decay steps:

        factor(s) = (s + 1) / W                              s < W
        factor(s) = m + (1 - m) shape(t(s))                  s >= W,  m = min_lr_ratio
        t(s)      = clamp((s - (N - D)) / D, 0, 1)

    D is decay_steps or round(decay_ratio N) for wsd, N - W for cosine, and 0 for constant, where t is always
    0. t would reach 1 at step N, one after the last, so that no step has a learning rate of zero. The values
    equal those of torchtitan 0.2.2 (components/lr_scheduler.py, linear_warmup_stable_decay with its virtual
    last step); the 1 - sqrt shape is from Haegele et al., arXiv 2405.18392.

    Args:
        step: Index of the next optimizer step, from 0.
        config: The schedule.
        total_steps: Number of steps of the run.

    Returns:
        The factor, in [0, 1].

    Raises:
        UserError: Warm-up and decay together are longer than the run.
    """
    progress = decay_progress(step, config, total_steps)
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    shape = _decay_shape(config, progress)
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape


def weight_decay_factor(step: int, config: ScheduleConfig, total_steps: int, gamma: float) -> float:
    """Return the factor of a group's weight decay at an optimizer step, (1 - t(s))^gamma.

    t is that of lr_factor, so that the weight decay is constant until the decay phase. The paper (arXiv
    2605.29157) anneals the weight decay in this way over its linear decay phase and finds gamma = 2 best. It
    is our choice to use the same t for every decay shape, and for cosine from the end of the warm-up, and to
    multiply by 1 - lr weight_decay with both factors decaying.

    Args:
        step: Index of the next optimizer step, from 0.
        config: The schedule.
        total_steps: Number of steps of the run.
        gamma: Exponent, at least 0; 0 for a constant weight decay.

    Returns:
        The factor, in [0, 1].

    Raises:
        UserError: Warm-up and decay together are longer than the run.
    """
    return (1.0 - decay_progress(step, config, total_steps)) ** gamma


def decay_start(config: ScheduleConfig, total_steps: int, table: str = "schedule") -> int:
    """Return the index of the first step of the decay phase.

    Args:
        config: The schedule.
        total_steps: Number of steps of the run.
        table: The table that gives the decay, for the error message.

    Returns:
        N - D of lr_factor; total_steps without a decay phase.

    Raises:
        UserError: Warm-up and decay together are longer than the run.
    """
    num_decay_steps = _num_decay_steps(config, total_steps)
    if config.warmup_steps + num_decay_steps > total_steps:
        # the warm-up is the run's; only wsd has a decay whose length can be chosen
        decay = f" and the decay ({num_decay_steps} steps)" if num_decay_steps else ""
        length = "decay_ratio" if config.decay_steps is None else "decay_steps"
        raise UserError(
            f"warmup_steps ({config.warmup_steps}){decay} must fit into the {total_steps} steps of the run; "
            f"lower schedule.warmup_steps{f' or {table}.{length}' if decay else ''}"
        )
    return total_steps - num_decay_steps


def decay_progress(step: int, config: ScheduleConfig, total_steps: int) -> float:
    """Return the fraction of the decay phase before a step, t in lr_factor.

    Args:
        step: Index of the next optimizer step, from 0.
        config: The schedule.
        total_steps: Number of steps of the run.

    Returns:
        0 before the decay, approaching 1 at its end.

    Raises:
        UserError: Warm-up and decay together are longer than the run.
    """
    start = decay_start(config, total_steps)
    if start == total_steps:
        return 0.0
    return min(max((step - start) / (total_steps - start), 0.0), 1.0)


def _num_decay_steps(config: ScheduleConfig, total_steps: int) -> int:
    if config.kind == "wsd":
        if config.decay_steps is not None:
            return config.decay_steps
        ratio = DEFAULT_DECAY_RATIO if config.decay_ratio is None else config.decay_ratio
        return round(total_steps * ratio)
    if config.kind == "cosine":
        return max(total_steps - config.warmup_steps, 0)
    return 0


def _decay_shape(config: ScheduleConfig, t: float) -> float:
    shape = "cosine" if config.kind == "cosine" else config.decay_shape
    if shape == "linear":
        return 1.0 - t
    if shape == "one_minus_sqrt":
        return 1.0 - math.sqrt(t)
    return 0.5 * (1.0 + math.cos(math.pi * t))
