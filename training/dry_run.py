"""What a run would be: parameters, cost and memory, from a model on the meta device."""

import torch

from models.qwen3 import Qwen3
from optimizers.param_groups import assign_parameters
from optimizers.schedule import lr_factor
from training.memory import GIB, estimate_memory
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
    accumulation = run.gradient_accumulation_steps(world_size)
    with torch.device("meta"):
        model = Qwen3(run.model)
    groups = assign_parameters(model.named_parameters(), run.optimizer.groups)
    lr_factor(0, run.schedule, run.training.steps)
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
