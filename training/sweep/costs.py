"""The cost of a plan before it runs: members with FLOPs and estimated GPU-hours."""

from dataclasses import replace
from typing import NamedTuple

from training.branch_step import branch_step, own_steps
from training.gpus import GPUS, MEASURED
from training.memory import GIB, estimate_memory
from training.preflight import build_meta_model
from training.run_config import RunConfig
from training.step_time import estimate_step_time
from training.sweep.member_queue import Selection
from training.sweep.members import Member
from training.sweep.overview import Overview, select
from training.sweep.plan import Plan

_NOTE = (
    "GPU-hours are those of compiled steps on H200s, each member alone on its GPUs, without starts, "
    "evaluations and checkpoints"
)


class RunCost(NamedTuple):
    """What a run costs.

    Attributes:
        flops: FLOPs of all steps, every row counted as one document.
        hours: Estimated hours on its GPUs; None for attention whose kernels have not been measured.
        memory_gib: Estimated peak memory on each of its GPUs.
    """

    flops: float
    hours: float | None
    memory_gib: float


def describe_costs(plan: Plan, overview: Overview, selection: Selection | None = None) -> str:
    """Describe members, FLOPs and GPU-hours; reads neither data nor tokenizer and needs no GPU.

    Args:
        plan: The plan.
        overview: Its members.
        selection: The members to count; None for all.

    Returns:
        A line for each member, a sum for each stage and for the plan. A run that several of the members are
        is counted with the first of them.

    Raises:
        UserError: The batch of a member does not fit its GPUs, or its optimizer groups its model.
    """
    costs: dict[str, RunCost] = {}
    lines: list[str] = []
    total, counted = RunCost(0.0, 0.0, 0.0), set[int]()
    selected = (selection or select)(overview)
    for stage in plan.stages:
        of_stage = in_budget = RunCost(0.0, 0.0, 0.0)
        members = [
            status.member
            for status in overview.statuses
            if status.member.stage == stage.name and status.member.number in selected
        ]
        if not members:
            continue
        for member in members:
            key = _shape(member.config)
            if key not in costs:
                costs[key] = _cost(member.config, plan.gpus_per_member)
            lines.append(_line(member, costs[key], plan.gpus_per_member))
            if member.run_number not in counted:
                counted.add(member.run_number)
                of_stage = _sum(of_stage, costs[key])
            if member.same_as is None:
                in_budget = _sum(in_budget, costs[key])
        hours = None if in_budget.hours is None else in_budget.hours * plan.gpus_per_member
        limit = "" if stage.gpu_hours is None else f", budget {stage.gpu_hours:g}"
        lines.append(
            f"stage {stage.name}: {len(members)} members, {_format(of_stage, plan.gpus_per_member)}{limit}"
        )
        if hours is not None and stage.gpu_hours is not None and hours > stage.gpu_hours:
            lines.append(f"warning: stage {stage.name} is estimated to need more than its budget")
        total = _sum(total, of_stage)
    lines += [f"plan: {len(counted)} runs, {_format(total, plan.gpus_per_member)}", _NOTE]
    gpu, memory = GPUS[MEASURED], total.memory_gib * plan.members_per_gpu
    lines.append(
        f"memory: up to {total.memory_gib:.1f} GiB per member and GPU, with {plan.members_per_gpu} on each "
        f"{memory:.1f} GiB of the {gpu.memory_gib:.0f} GiB of {gpu.name}"
    )
    if memory > gpu.memory_gib:
        lines.append("warning: they do not fit: lower members_per_gpu or training.local_batch_size")
    return "\n".join(lines)


def _line(member: Member, cost: RunCost, num_gpus: int) -> str:
    same = "" if member.same_as is None else f"  the same run as {member.same_as}"
    name = member.path if member.is_known else f"{member.stage}/{member.variant.name}_seed{member.seed}"
    return f"{member.number:>4}  {name}  {_format(cost, num_gpus)}{same}"


def _format(cost: RunCost, num_gpus: int) -> str:
    hours = "no estimate of time" if cost.hours is None else f"{cost.hours * num_gpus:.3f} GPU-hours"
    return f"{cost.flops:.3e} FLOPs, {hours}"


def _sum(one: RunCost, other: RunCost) -> RunCost:
    hours = None if one.hours is None or other.hours is None else one.hours + other.hours
    return RunCost(one.flops + other.flops, hours, max(one.memory_gib, other.memory_gib))


def _cost(run: RunConfig, num_gpus: int) -> RunCost:
    model, steps = build_meta_model(run), len(own_steps(run))
    flops = model.num_flops_per_token(run.training.seq_len) * run.tokens_per_step * steps
    time = estimate_step_time(run, model, num_gpus)
    memory = estimate_memory(run, model, num_gpus).peak / GIB
    return RunCost(flops, None if time is None else steps * time.total / 3600, memory)


def _shape(run: RunConfig) -> str:
    """Return what the cost depends on: members that differ in rates and seeds cost the same."""
    groups = {
        name: replace(group, lr=1e-3, weight_decay=0.0, weight_decay_gamma=None, schedule=None)
        for name, group in run.optimizer.groups.items()
    }
    shape = (run.model, run.training, run.parallelism, groups, run.average.decay is None)
    return repr((*shape, run.data.mask_documents, branch_step(run)))
