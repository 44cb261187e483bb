"""Parameters, FLOPs, time and memory of a run, from its model on the meta device."""

from pathlib import Path

from disk import format_bytes
from errors import UserError
from models.qwen3 import Qwen3
from models.run_folder import step_of
from optimizers.param_groups import assign_parameters
from training.branch import check_branch_step
from training.branch_step import branch_step, own_steps
from training.disk_space import num_checkpoints
from training.fit import describe_fit
from training.gpus import GPUS, MEASURED, Gpu, find_gpu
from training.memory import GIB, checkpoint_bytes, estimate_memory
from training.preflight import build_meta_model
from training.replay import missing_kernels
from training.run_config import RunConfig
from training.step_time import estimate_step_time


def dry_run(config: RunConfig, world_size: int, *, gpu: str = MEASURED, mfu: float | None = None) -> str:
    """Describe the size and cost of a run; reads neither data nor tokenizer and needs no GPU.

    Args:
        config: The run.
        world_size: Planned number of ranks, one GPU each.
        gpu: A key of training/gpus.py.
        mfu: Model FLOPs utilization in percent, by whole rows: the mfu_whole_rows_percent of metrics.jsonl.
            None for that of training/step_time.py.

    Returns:
        A table of a few lines.

    Raises:
        UserError: The batch does not fit the ranks, the optimizer groups do not fit the model, the schedule
            is longer than the run, a branch starts after its decay has, at its last step or not from a folder
            step-N, the GPU is unknown, or the MFU is no percentage.
    """
    if world_size < 1:
        raise UserError(f"--world-size must be at least 1, got {world_size}")
    if mfu is not None and not 1.0 <= mfu <= 100.0:
        raise UserError(f"--mfu is a percentage, at least 1 and at most 100; got {mfu}")
    planned = find_gpu(gpu)
    accumulation = config.gradient_accumulation_steps(world_size)
    model = build_meta_model(config)
    start_from = config.checkpoint.start_from
    if start_from is not None:
        # it need not be here yet
        if step_of(Path(start_from)) is None:
            raise UserError(
                f"checkpoint.start_from is {start_from!r}, but its name is not step-N; want one such as "
                "runs/stable/checkpoint/step-1000"
            )
        check_branch_step(config, branch_step(config))
    groups = assign_parameters(model.named_parameters(), config.optimizer.groups)
    counts = model.num_parameters()
    memory = estimate_memory(config, model, world_size)
    seq_len, steps, step_tokens = config.training.seq_len, own_steps(config), config.tokens_per_step
    tokens = len(steps) * step_tokens
    flops = model.num_flops_per_token(seq_len)
    size, kept = checkpoint_bytes(config, model, world_size), num_checkpoints(config, branch_step(config))
    rows = [
        ("run", f"{config.run.name}: {config.model.size}, {config.model.attention.kind}"),
        *((f"parameters, {part}", f"{count / 1e6:.2f}M") for part, count in counts.items()),
        *((f"group {name}", f"{sum(p.numel() for p in ps) / 1e6:.2f}M") for name, ps in groups.items()),
        ("FLOPs per token", f"{flops / 1e9:.3f} GFLOP (training, sequence length {seq_len})"),
        ("step", f"{step_tokens:,} tokens, {_count(accumulation, 'micro-batch', 'es')} on "
                 f"{'each of ' if world_size > 1 else ''}{_count(world_size, 'rank')}"),
        ("this run", f"{_count(len(steps), 'step')} ({steps[0]:,} to {steps[-1]:,}), "
                     f"{_digits(tokens / 1e9)}B tokens, {tokens * flops:.3e} FLOPs"),
        *((f"memory, {part}", f"{size / GIB:.2f} GiB") for part, size in vars(memory).items()),
        *_time_rows(config, model, world_size, planned, mfu),
        ("checkpoint", f"{format_bytes(size)}, up to {kept} at a time: {format_bytes(kept * size)} of disk"),
        *(("note", sentence) for sentence in config.unread_keys()),
        ("memory of the GPU", describe_fit(config, model, world_size, planned)),
        ("memory per rank, peak", f"{memory.peak / GIB:.2f} GiB"),
    ]  # fmt: skip
    return "\n".join(f"{name:<24}{value}" for name, value in rows)


def _time_rows(
    config: RunConfig, model: Qwen3, world_size: int, gpu: Gpu, stated: float | None
) -> list[tuple[str, str]]:
    """Return time and speed of a step and of the run: at a stated MFU, or by the model of a step's time."""
    time = estimate_step_time(config, model, world_size) if stated is None else None
    if stated is None and time is None:
        reason = missing_kernels(model)
        reason = f"for attention.kind {config.model.attention.kind}" if reason is None else f"({reason})"
        return [("time", f"no estimate {reason}; state an MFU by --mfu PERCENT")]
    flops = config.tokens_per_step * model.num_flops_per_token(config.training.seq_len)
    mfu, origin, parts, losses = stated or 0.0, "as stated", "", []
    if time is not None:
        mfu = 100 * flops / (time.total * world_size * GPUS[MEASURED].peak_flops)
        origin = "by training/step_time.py"
        if gpu is GPUS[MEASURED]:
            each = ", ".join(f"{_dashed(name)} {_digits(1e3 * x)}" for name, x in vars(time).items())
            share = vars(time)[time.bottleneck] / time.total
            parts, losses = f", compiled: {each}", [f"{_dashed(time.bottleneck)} {100 * share:.0f}%"]
        else:
            origin = f"{origin} for {GPUS[MEASURED].name}s"
    seconds = flops / (mfu / 100 * world_size * gpu.peak_flops)
    hours, speed = len(own_steps(config)) * seconds / 3600, config.tokens_per_step / seconds
    return [
        ("MFU", f"{mfu:.1f}% by whole rows (mfu_whole_rows_percent), {origin}"),
        ("time per step", f"{_digits(1e3 * seconds)} ms on {_count(world_size, gpu.name)}{parts}"),
        *(("largest loss", loss) for loss in losses),
        ("speed", f"{speed:,.0f} tokens/s, {speed / world_size:,.0f} per GPU"),
        ("time of this run", f"{_format_hours(hours)}, {_digits(hours * world_size)} GPU-hours, without "
                             "evaluations and checkpoints"),
    ]  # fmt: skip


def _digits(value: float) -> str:
    """Format a number of at least 0 with three significant digits, or all before the point if more."""
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:,.{max(0, 2 - exponent)}f}" if value else "0"


def _format_hours(hours: float) -> str:
    """Format a time in hours, or in minutes or seconds if it is shorter."""
    for unit, per_hour in (("hours", 1), ("minutes", 60)):
        if hours * per_hour >= 1:
            return f"{_digits(hours * per_hour)} {unit}"
    return f"{_digits(hours * 3600)} seconds"


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")
