"""training.stop_at_tokens counts steps of one size: it is refused after steps of other sizes."""

from pathlib import Path

from errors import UserError
from models.checkpoint.load import load_state
from models.checkpoint.metadata import DamagedCheckpointError
from training.run_config import RunConfig


def check_saved_tokens(config: RunConfig, step: int, checkpoint: Path) -> None:
    """Check a checkpoint before it is loaded; one that is damaged passes, as loading it says so.

    Args:
        config: The config of the run that is to load it.
        step: Its step.
        checkpoint: The checkpoint.

    Raises:
        UserError: See check_tokens.
    """
    if config.training.stop_at_tokens is None:
        return
    state = {"train_state": {"tokens": 0}}
    try:
        load_state(state, checkpoint)
    except DamagedCheckpointError:
        return
    check_tokens(config, step, state["train_state"]["tokens"], checkpoint)


def check_tokens(config: RunConfig, step: int, tokens: int, checkpoint: Path | None) -> None:
    """Raise if training.stop_at_tokens is set, and the steps so far had other numbers of tokens.

    Args:
        config: The config of the run.
        step: Completed steps.
        tokens: Tokens that they were trained on.
        checkpoint: The checkpoint with these, for the message; None for a run that starts at step 0.

    Raises:
        UserError: With the remedy.
    """
    if config.training.stop_at_tokens is not None and tokens != step * config.tokens_per_step:
        raise UserError(
            f"training.stop_at_tokens is {config.training.stop_at_tokens}, counted in steps of "
            f"{config.tokens_per_step} tokens, but the {step} steps of {checkpoint} have {tokens} in all; "
            'set training.stop_at_step instead, and training.stop_at_tokens to "none"'
        )
