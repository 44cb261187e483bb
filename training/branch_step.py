"""The steps of a run that branches from another; without importing torch."""

from pathlib import Path

from models.run_folder import step_of
from training.run_config import RunConfig


def branch_step(config: RunConfig) -> int:
    """Return the step that a run branches from; 0 for one that is no branch. Its checkpoint may be gone."""
    start_from = config.checkpoint.start_from
    return 0 if start_from is None else step_of(Path(start_from)) or 0


def own_steps(config: RunConfig) -> range:
    """Return the steps that a run trains itself, up to the last one of this launch.

    A branch starts after the step of its checkpoint, any other run at 1; what earlier launches of the run
    have trained is among them.
    """
    return range(branch_step(config) + 1, config.training.last_step + 1)
