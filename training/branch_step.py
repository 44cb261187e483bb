"""The step that a run branches from; without importing torch."""

from pathlib import Path

from models.run_folder import step_of
from training.run_config import RunConfig


def branch_step(config: RunConfig) -> int:
    """Return the step that a run branches from; 0 for one that is no branch. Its checkpoint may be gone."""
    start_from = config.checkpoint.start_from
    return 0 if start_from is None else step_of(Path(start_from)) or 0
