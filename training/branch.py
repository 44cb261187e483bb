"""Branches: runs that start from a checkpoint of another run, with a schedule of their own.

One run at a constant learning rate serves several token budgets this way: each budget is a branch that starts
from one of its checkpoints and decays the learning rate. With checkpoint.restart_data a branch reads other
data, or longer rows, from their beginning.
"""

from pathlib import Path

from config import Table
from errors import UserError
from models.run_folder import RunFolder, is_whole, nearby_checkpoints, step_of
from optimizers.schedule import decay_start, schedules_by_group
from training.run_config import RunConfig
from training.saved_config import (
    check_compatible,
    data_differences,
    sequence_differences,
    training_differences,
)
from training.step_configs import step_configs
from training.token_stop import check_saved_tokens


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step of the checkpoint that checkpoint.start_from names.

    Args:
        checkpoint: Folder step-N, as the trainer writes it.

    Raises:
        UserError: It is missing or incomplete, or has another name; names the checkpoints near it.
    """
    step = step_of(checkpoint)
    if step is not None and is_whole(checkpoint):
        return step
    if not checkpoint.is_dir():
        problem = "there is no such folder"
    elif step is None:
        problem = "its name is not step-N"
    else:
        problem = "it is incomplete (it has no .metadata)"
    near = ", ".join(map(str, nearby_checkpoints(checkpoint)))
    near = near or "none near it; wanted one such as runs/stable/checkpoint/step-1000"
    raise UserError(f"checkpoint.start_from is {str(checkpoint)!r}, but {problem}; checkpoints: {near}")


def check_branch(config: RunConfig, checkpoint: Path) -> None:
    """Raise unless this run can be a branch from a checkpoint.

    Args:
        config: The branch.
        checkpoint: The checkpoint that it starts from.

    Raises:
        UserError: The checkpoint is missing, is after the start of the branch's decay or its last step, or
            its model or optimizer groups differ, or, without checkpoint.restart_data, its sequence length
            or document masking; or training.stop_at_tokens is set and its steps had other tokens.
    """
    step = checkpoint_step(checkpoint)
    check_branch_step(config, step)
    check_saved_tokens(config, step, checkpoint)
    saved = RunFolder.of_checkpoint(checkpoint).read_config()
    if saved is not None:
        check_branch_config(config, saved, checkpoint)


def check_branch_step(config: RunConfig, step: int) -> None:
    """Raise unless a branch can start after a step.

    Args:
        config: The branch.
        step: Step of the checkpoint.

    Raises:
        UserError: The step is after the start of the branch's decay, or not before its last step.
    """
    training = config.training
    if step >= training.last_step:
        raise UserError(
            f"checkpoint.start_from is a checkpoint of step {step}, but this run ends at step "
            f"{training.last_step}; raise {training.last_step_key}, or start from an earlier checkpoint"
        )
    schedules = schedules_by_group(config.optimizer.groups, config.schedule, training.steps)
    first = min(schedules.values(), key=lambda schedule: decay_start(schedule, training.steps))
    start = decay_start(first, training.steps)
    if step > start:
        remedy = "shorten the decay, or raise training.steps"
        if first.kind == "cosine":
            remedy = 'or give schedule.kind "wsd": a cosine decays from the end of the warm-up on'
        raise UserError(
            f"checkpoint.start_from is a checkpoint of step {step}, but the decay of this run begins after "
            f"step {start} and takes the last {training.steps - start} of {training.steps} steps; start from "
            f"an earlier checkpoint, {remedy}"
        )


def check_branch_config(config: RunConfig, saved: Table, checkpoint: Path) -> None:
    """Raise unless a branch fits the config that its checkpoint was trained with.

    Args:
        config: The branch.
        saved: The config of the other run.
        checkpoint: The checkpoint, for the message.

    Raises:
        UserError: Model or optimizer groups differ, or, without checkpoint.restart_data, sequence length or
            document masking.
    """
    check_compatible(config, saved, checkpoint, "Start from another checkpoint")
    differing = sequence_differences(config, saved)
    if differing and not config.checkpoint.restart_data:
        raise UserError(
            f"{checkpoint} was trained on other sequences: {'; '.join(differing)}. Set "
            "checkpoint.restart_data to true to read the new ones from the beginning of data.train, or "
            "restore these keys"
        )


def branch_warnings(config: RunConfig, checkpoint: Path) -> list[str]:
    """Return what makes a branch differ from one run trained with the branch's config from the first step.

    Args:
        config: A branch that passes check_branch.
        checkpoint: The checkpoint that it starts from.

    Returns:
        A sentence for each config of the other run that differs in the steps that were trained with it.
    """
    configs = step_configs(RunFolder.of_checkpoint(checkpoint), checkpoint_step(checkpoint))
    if not configs:
        return [f"{checkpoint} has no config.toml beside it: its schedule, model and batch were not compared"]
    warnings = []
    for saved in configs:
        differing = [*sequence_differences(config, saved.table), *training_differences(config, saved)]
        if config.checkpoint.restart_data:
            differing += data_differences(config, saved.table)
        if differing:
            steps = "the steps" if len(configs) == 1 else saved.steps
            warnings.append(f"{steps} before {checkpoint} had another config: {'; '.join(differing)}")
    return warnings
