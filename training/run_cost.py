"""What a run costs: FLOPs, and hours on H200s."""

from dataclasses import dataclass

from models.qwen3 import Qwen3
from training.run_config import RunConfig
from training.step_time import estimate_step_time


@dataclass(frozen=True)
class RunCost:
    """What a run costs.

    Attributes:
        flops: FLOPs of all steps, every row counted as one document.
        hours: Estimated hours on the planned H200s; None for attention whose kernels have not been measured.
    """

    flops: float
    hours: float | None


def run_cost(config: RunConfig, model: Qwen3, world_size: int, steps: int) -> RunCost:
    """Compute what a run costs.

    Args:
        config: The run.
        model: Its model, on any device.
        world_size: Planned number of ranks.
        steps: Steps to take.

    Raises:
        UserError: The batch does not fit the ranks.
    """
    flops = model.num_flops_per_token(config.training.seq_len) * config.tokens_per_step * steps
    time = estimate_step_time(config, model, world_size)
    return RunCost(flops, None if time is None else steps * time.total / 3600)
