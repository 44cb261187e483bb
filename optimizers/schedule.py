"""Learning-rate and weight-decay schedules as pure functions of the step."""

import math

from optimizers.config import DEFAULT_DECAY_RATIO, ScheduleConfig


def lr_factor(step: int, config: ScheduleConfig, total_steps: int) -> float:
    """Return the factor of the peak learning rate for one optimizer step.

    With W warm-up steps, N steps in all and D decay steps:

        factor(s) = (s + 1) / W                              s < W
        factor(s) = m + (1 - m) shape(t(s))                  s >= W,  m = min_lr_ratio
        t(s)      = clamp((s - (N - D)) / D, 0, 1)

    D is decay_steps or round(decay_ratio N) for wsd, N - W for cosine, and 0 for constant, where t is always
    0. t would reach 1 at step N, one after the last, so that no step is spent at a learning rate of zero.
    These are the values of torchtitan 0.2.2 (components/lr_scheduler.py, linear_warmup_stable_decay with its
    virtual last step); the 1 - sqrt shape is from Haegele et al., arXiv 2405.18392.

    Args:
        step: Index of the optimizer step about to be taken, from 0.
        config: The schedule.
        total_steps: Steps of the run.

    Returns:
        The factor, in [0, 1].

    Raises:
        ValueError: Warm-up and decay do not fit into the steps.
    """
    if step < config.warmup_steps:
        decay_progress(step, config, total_steps)
        return (step + 1) / config.warmup_steps
    shape = _decay_shape(config, decay_progress(step, config, total_steps))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape


def weight_decay_factor(step: int, config: ScheduleConfig, total_steps: int, gamma: float) -> float:
    """Return the factor of a group's weight decay for one optimizer step, (1 - t(s))^gamma.

    t is that of lr_factor, so that the weight decay stays until the learning rate's decay begins. The paper
    (arXiv 2605.29157) anneals so over its linear decay phase and finds gamma = 2 best. Taking the same t for
    every shape, and for cosine from the end of the warm-up on, is our choice; so is that the update
    multiplies by 1 - lr weight_decay with both of them falling.

    Args:
        step: Index of the optimizer step about to be taken, from 0.
        config: The schedule.
        total_steps: Steps of the run.
        gamma: Exponent, not negative; 0 for a constant weight decay.

    Returns:
        The factor, in [0, 1].

    Raises:
        ValueError: Warm-up and decay do not fit into the steps.
    """
    return (1.0 - decay_progress(step, config, total_steps)) ** gamma


def decay_start(config: ScheduleConfig, total_steps: int) -> int:
    """Return how many steps a run takes before its decay: the index of the first step of the decay phase.

    Args:
        config: The schedule.
        total_steps: Steps of the run.

    Returns:
        N - D of lr_factor; total_steps where nothing decays.

    Raises:
        ValueError: Warm-up and decay do not fit into the steps.
    """
    num_decay_steps = _num_decay_steps(config, total_steps)
    if config.warmup_steps + num_decay_steps > total_steps:
        length = "decay_ratio" if config.decay_steps is None else "decay_steps"
        raise ValueError(
            f"warmup_steps ({config.warmup_steps}) and the decay ({num_decay_steps} steps) must fit into the "
            f"{total_steps} steps of the run; lower schedule.warmup_steps or schedule.{length}"
        )
    return total_steps - num_decay_steps


def decay_progress(step: int, config: ScheduleConfig, total_steps: int) -> float:
    """Return how much of the decay phase lies behind a step, t in lr_factor.

    Args:
        step: Index of the optimizer step about to be taken, from 0.
        config: The schedule.
        total_steps: Steps of the run.

    Returns:
        0 before the decay, towards 1 at its end.

    Raises:
        ValueError: Warm-up and decay do not fit into the steps.
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
