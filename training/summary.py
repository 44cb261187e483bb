"""The last log lines of a launch: how it ended, losses and where its files are."""

from collections.abc import Mapping
from pathlib import Path

from eval.held_out import HeldOutLoss
from models.run_folder import RunFolder
from training.run_config import RunConfig


def format_summary(
    config: RunConfig,
    step: int,
    loss: float,
    held_out: Mapping[int, HeldOutLoss],
    *,
    stopped: str | None,
    skipped: Mapping[str, int],
) -> str:
    """Describe how a launch ended.

    Args:
        config: The run.
        step: The last step of the launch.
        loss: Training loss of that step, in nats/token.
        held_out: The launch's held-out losses by step; that before training and the newest are shown.
        stopped: What stopped the launch, such as "by a signal"; None if it went to its last step.
        skipped: Number of documents skipped, by reason.
    """
    if stopped is not None:
        end = f"stopped {stopped} after step {step}; the same command resumes"
    elif step < config.training.steps:
        end = f"stopped after step {step} of {config.training.steps} ({config.training.last_step_key})"
    else:
        end = f"finished after step {step}"
    lines = [end, f"training loss        {loss:.4f} nats/token"]
    newest_step = max(held_out, default=0)
    names = {0: "before training", config.training.last_step: "after training"}
    for measured in sorted({0, newest_step} & held_out.keys()):
        when = names.get(measured, f"after step {measured}")
        lines.append(f"held-out loss        {held_out[measured]} ({when})")
    if held_out:
        newest = held_out[newest_step]
        lines.append(f"measured on          {newest.counts}, +/- is the standard error over documents")
        difference = newest.unigram_entropy - newest.loss
        side = f"{difference:.4f} below" if difference >= 0 else f"{-difference:.4f} above"
        entropy = f"{newest.unigram_entropy:.4f} nats/token"
        lines.append(f"unigram entropy      {entropy}; the held-out loss is {side} it")
    counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count)
    if counts:
        lines.append(f"documents skipped    {counts}")
    folder = RunFolder(Path(config.run.folder))
    lines += [
        f"checkpoint           {folder.checkpoint(step)}",
        f"metrics, config      {folder.metrics_file}, {folder.config_file}",
    ]
    return "\n  ".join(lines)
