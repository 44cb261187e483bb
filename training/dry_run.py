"""Parameters, FLOPs, time and memory of a run, from its model on the meta device."""

from disk import format_bytes
from errors import UserError
from models.qwen3 import Qwen3
from optimizers.param_groups import assign_parameters
from training.disk_space import num_checkpoints
from training.memory import GIB, checkpoint_bytes, estimate_memory
from training.preflight import build_meta_model
from training.run_config import RunConfig
from training.run_cost import run_cost
from training.step_time import estimate_step_time


def dry_run(config: RunConfig, world_size: int) -> str:
    """Describe the size and cost of a run; reads neither data nor tokenizer and needs no GPU.

    Args:
        config: The run.
        world_size: Planned number of ranks.

    Returns:
        A table of a few lines.

    Raises:
        UserError: The batch does not fit the ranks, the optimizer groups do not fit the model, or the
            schedule is longer than the run.
    """
    if world_size < 1:
        raise UserError(f"--world-size must be at least 1, got {world_size}")
    accumulation = config.gradient_accumulation_steps(world_size)
    model = build_meta_model(config)
    groups = assign_parameters(model.named_parameters(), config.optimizer.groups)
    counts = model.num_parameters()
    memory = estimate_memory(config, model, world_size)
    seq_len, steps, step_tokens = config.training.seq_len, config.training.steps, config.tokens_per_step
    flops = model.num_flops_per_token(seq_len)
    cost = run_cost(config, model, world_size, steps)
    size, kept = checkpoint_bytes(config, model, world_size), num_checkpoints(config)
    rows = [
        ("run", f"{config.run.name}: {config.model.size}, {config.model.attention.kind}"),
        *((f"parameters, {part}", f"{count / 1e6:.2f}M") for part, count in counts.items()),
        *((f"group {name}", f"{sum(p.numel() for p in ps) / 1e6:.2f}M") for name, ps in groups.items()),
        ("FLOPs per token", f"{flops / 1e9:.3f} GFLOP (training, sequence length {seq_len})"),
        ("step", f"{step_tokens:,} tokens, {accumulation} micro-batches on each of {world_size} ranks"),
        ("whole run", f"{steps:,} steps, {steps * step_tokens / 1e9:.3f}B tokens, "
                      f"{cost.flops:.3e} FLOPs"),
        *((f"memory, {part}", f"{size / GIB:.2f} GiB") for part, size in vars(memory).items()),
        *_time_rows(config, model, world_size, cost.hours),
        ("checkpoint", f"{format_bytes(size)}, up to {kept} at a time: {format_bytes(kept * size)} of disk"),
        *(("note", sentence) for sentence in config.unread_keys()),
        ("memory per rank, peak", f"{memory.peak / GIB:.2f} GiB"),
    ]  # fmt: skip
    return "\n".join(f"{name:<24}{value}" for name, value in rows)


def _time_rows(
    config: RunConfig, model: Qwen3, world_size: int, hours: float | None
) -> list[tuple[str, str]]:
    time = estimate_step_time(config, model, world_size)
    if time is None or hours is None:
        return [("time", f"no estimate for attention.kind {config.model.attention.kind}")]
    gpus = f"{world_size} H200" + ("s" if world_size > 1 else "")
    parts = ", ".join(f"{name.replace('_', '-')} {1e3 * x:.0f}" for name, x in vars(time).items())
    speed = config.tokens_per_step / time.total
    return [
        ("time per step", f"{1e3 * time.total:.0f} ms on {gpus}, compiled: {parts}"),
        ("speed", f"{speed:,.0f} tokens/s, {speed / world_size:,.0f} per GPU"),
        (
            "time of the whole run",
            f"{hours:,.1f} hours, {hours * world_size:,.0f} GPU-hours",
        ),
    ]
