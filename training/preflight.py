"""A run's model without memory, once its parts are known to fit each other."""

import torch

from models.qwen3 import Qwen3
from optimizers.param_groups import assign_parameters
from optimizers.schedule import lr_factor
from training.run_config import RunConfig


def build_meta_model(run: RunConfig) -> Qwen3:
    """Build the model on the meta device and check groups and schedule against it.

    Args:
        run: The run.

    Returns:
        The model; its parameters hold no memory.

    Raises:
        ValueError: The model's dimensions do not fit each other, a parameter is in no group or in two, or the
            schedule is longer than the run.
    """
    with torch.device("meta"):
        model = Qwen3(run.model)
    assign_parameters(model.named_parameters(), run.optimizer.groups)
    lr_factor(0, run.schedule, run.training.steps)
    return model
