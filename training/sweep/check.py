"""Check all members of a plan as their launches would, before any of them starts."""

from collections.abc import Sequence
from dataclasses import replace

from config import to_table
from errors import UserError
from optimizers.schedule import schedules_by_group
from training.branch import check_branch_config, check_branch_step
from training.preflight import build_meta_model
from training.run_config import RunConfig
from training.sweep.members import Member
from training.sweep.plan import Plan
from training.token_stop import check_tokens


def check_members(plan: Plan, members: Sequence[Member]) -> None:
    """Check what needs neither data, tokenizer nor GPU.

    Args:
        plan: The plan.
        members: All of its members.

    Raises:
        UserError: Names the first member that cannot be trained: its batch or its degrees of parallelism do
            not fit its GPUs, its model, optimizer groups or schedule contradict themselves, or it cannot be a
            branch of its trunk.
    """
    checked: set[str] = set()
    for member in members:
        if member.same_as is not None:
            continue
        try:
            _check_run(member.config, plan.gpus_per_member, checked)
            if member.trunk is not None:
                _check_branch(member, member.trunk, checked)
        except UserError as error:
            name = f"{member.variant.name}_seed{member.seed}"
            raise UserError(f"stage {member.stage}, member {member.number}, {name}: {error}") from error


def _check_run(run: RunConfig, num_gpus: int, checked: set[str]) -> None:
    run.gradient_accumulation_steps(num_gpus)
    run.parallelism.degrees(num_gpus)
    if _is_new(_model_key(run), checked):
        build_meta_model(run)
    schedules_by_group(run.optimizer.groups, run.schedule, run.training.steps)


def _check_branch(member: Member, trunk: Member, checked: set[str]) -> None:
    run, step, checkpoint = member.config, trunk.config.training.last_step, member.checkpoint
    assert checkpoint is not None
    check_branch_step(run, step)
    check_tokens(run, step, step * trunk.config.tokens_per_step, checkpoint)
    pair = (run, trunk.config)
    sequences = [(each.training.seq_len, each.data.mask_documents) for each in pair]
    if _is_new(f"{[*map(_model_key, pair)]} {sequences} {run.checkpoint.restart_data}", checked):
        check_branch_config(run, to_table(trunk.config), checkpoint)


def _is_new(key: str, checked: set[str]) -> bool:
    """Return whether a key is seen for the first time: building a model takes most of the time."""
    is_new = key not in checked
    checked.add(key)
    return is_new


def _model_key(run: RunConfig) -> str:
    """Return what the model and its optimizer groups depend on: not the rates, which members differ in."""
    groups = {
        name: replace(group, lr=1e-3, weight_decay=0.0, weight_decay_gamma=None, schedule=None)
        for name, group in run.optimizer.groups.items()
    }
    return repr((run.model, groups))
