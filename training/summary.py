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
    held_out: Mapping[str, HeldOutLoss | None],
    *,
    stopped: str | None,
    skipped: Mapping[str, int],
) -> str:
    """Describe how a launch ended.

    Args:
        config: The run.
        step: The last step of the launch.
        loss: Training loss of that step, in nats/token.
        held_out: Held-out losses "before training" and "after training"; None for one not evaluated.
        stopped: What stopped the launch, such as "by a signal"; None if it went to its last step.
        skipped: Number of documents skipped, by reason.
    """
    if stopped is not None:
        end = f"stopped {stopped} after step {step}"
    elif step < config.training.steps:
        end = f"stopped after step {step} of {config.training.steps} (training.stop_at_step)"
    else:
        end = f"finished after step {step}"
    lines = [end, f"training loss        {loss:.4f} nats/token"]
    evaluated = {when: each for when, each in held_out.items() if each is not None}
    for when, each in evaluated.items():
        lines.append(f"held-out loss        {each} ({when})")
    if "after training" in evaluated:
        after = evaluated["after training"]
        lines.append(f"measured on          {after.counts}, +/- is the standard error over documents")
        difference = after.unigram_entropy - after.loss
        side = f"{difference:.4f} below" if difference >= 0 else f"{-difference:.4f} above"
        entropy = f"{after.unigram_entropy:.4f} nats/token"
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
