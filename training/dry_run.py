"""What a run would be: parameters, cost and memory, from a model on the meta device."""

from optimizers.param_groups import assign_parameters
from training.memory import GIB, estimate_memory
from training.preflight import build_meta_model
from training.run_config import RunConfig


def dry_run(run: RunConfig, world_size: int) -> str:
    """Describe a run; touches neither data nor tokenizer and needs no GPU.

    Args:
        run: The run.
        world_size: Ranks that it is planned for.

    Returns:
        Text of a few lines.

    Raises:
        ValueError: The run does not fit the ranks, its groups not the model, or its schedule not the steps.
    """
    if world_size < 1:
        raise ValueError(f"--world-size must be at least 1, got {world_size}")
    accumulation = run.gradient_accumulation_steps(world_size)
    model = build_meta_model(run)
    groups = assign_parameters(model.named_parameters(), run.optimizer.groups)
    counts = model.num_parameters()
    memory = estimate_memory(run, model, world_size)
    settings = run.training
    flops = model.num_flops_per_token(settings.seq_len)
    step_tokens = settings.global_batch_size * settings.seq_len
    rows = [
        ("run", f"{run.run.name}: {run.model.size}, {run.model.attention.kind}"),
        *((f"parameters, {part}", f"{count / 1e6:.2f}M") for part, count in counts.items()),
        *((f"group {name}", f"{sum(p.numel() for p in ps) / 1e6:.2f}M") for name, ps in groups.items()),
        ("FLOPs per token", f"{flops / 1e9:.3f} GFLOP (training, sequence length {settings.seq_len})"),
        ("step", f"{step_tokens:,} tokens, {accumulation} micro-batches on each of {world_size} ranks"),
        ("whole run", f"{settings.steps:,} steps, {settings.steps * step_tokens / 1e9:.3f}B tokens, "
                      f"{settings.steps * step_tokens * flops:.3e} FLOPs"),
        *((f"memory, {part}", f"{size / GIB:.2f} GiB") for part, size in vars(memory).items()),
        ("memory per rank, peak", f"{memory.peak / GIB:.2f} GiB"),
    ]  # fmt: skip
    return "\n".join(f"{name:<24}{value}" for name, value in rows)
