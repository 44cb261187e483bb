"""A branch: a run that starts from a checkpoint of another run and goes on by its own schedule.

One run at a constant learning rate serves several token budgets so: each budget is a branch that starts from
one of its checkpoints and decays.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config import Table, from_table, to_table
from errors import UserError
from models.run_folder import RunFolder, is_whole, nearby_checkpoints, step_of
from optimizers.config import OptimizerConfig, ScheduleConfig
from optimizers.schedule import decay_start, lr_factor, weight_decay_factor
from training.resume import check_fits, has_checkpoint, saved_config
from training.run_config import RunConfig

# (table, key) of what changes the data or what tokens see; the loader refuses another source or tokenizer
_FIXED_KEYS = (("training", "seq_len"), ("data", "mask_documents"))
_KEYS_TO_WARN_OF = (
    *(("training", "global_batch_size"), ("training", "max_grad_norm"), ("training", "precision")),
    *(("run", "seed"), ("data", "validation_documents"), ("eval", "max_tokens")),
)
# of an optimizer group: check_fits compares the parameters, _rate_differences the others
_KEYS_COMPARED_ELSEWHERE = ("parameters", "lr", "weight_decay", "weight_decay_gamma")


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written after.

    Args:
        checkpoint: Folder step-N, as the trainer writes it.

    Raises:
        UserError: It isn't there, is not whole, or has another name; names the checkpoints near it.
    """
    step = step_of(checkpoint)
    if step is not None and is_whole(checkpoint):
        return step
    if not checkpoint.is_dir():
        problem = "there is no such folder"
    elif step is None:
        problem = "it is no folder step-N"
    else:
        problem = "it is no whole checkpoint (it has no .metadata)"
    near = ", ".join(map(str, nearby_checkpoints(checkpoint)))
    near = near or "none near it; want one such as runs/stable/checkpoint/step-1000"
    raise UserError(f"checkpoint.start_from is {str(checkpoint)!r}, but {problem}; checkpoints: {near}")


def check_branch(run: RunConfig) -> None:
    """Refuse a start from a checkpoint that this run could not have written.

    Args:
        run: The run. One whose folder already has checkpoints goes on from them and needs no other.

    Raises:
        ValueError: There is no checkpoint, it comes after the start of this run's decay or after its end, its
            model, optimizer groups, row length or masks are others, or the run folder holds checkpoints of a
            run that started elsewhere.
    """
    start_from = run.checkpoint.start_from
    if has_checkpoint(Path(run.run.folder)):
        _check_same_start(run)
        return
    if start_from is None:
        return
    source = Path(start_from)
    step = checkpoint_step(source)
    _check_step(run, step)
    saved = saved_config(RunFolder.of_checkpoint(source).path)
    if saved is None:
        return
    check_fits(run, saved, source, "Start from another checkpoint")
    differences = _differing(run, saved, _FIXED_KEYS)
    if differences:
        raise ValueError(
            f"{source} was trained on other rows: {'; '.join(differences)}. Start from another checkpoint, "
            "or restore these keys"
        )


def branch_warnings(run: RunConfig) -> list[str]:
    """Return what makes a branch differ from one run that has had this run's config from the start.

    Args:
        run: A run that check_branch has passed and that starts from a checkpoint.

    Returns:
        One sentence each; empty where the steps before the checkpoint were this run's own.
    """
    assert run.checkpoint.start_from is not None
    source = Path(run.checkpoint.start_from)
    saved = saved_config(RunFolder.of_checkpoint(source).path)
    if saved is None:
        return [f"{source} has no config.toml beside it: its schedule, model and batch were not compared"]
    step = checkpoint_step(source)
    paths = _paths_to_warn_of(run, saved)
    differences = [*_differing(run, saved, paths), *_rate_differences(run, saved, step)]
    return [f"the steps before {source} were not this run's: {'; '.join(differences)}"] if differences else []


def resume_warnings(run: RunConfig, step: int) -> list[str]:
    """Return what makes a run that goes on differ from one that has had its config from the start.

    Args:
        run: A run that goes on from a checkpoint in its folder, where the config of the launch before lies.
        step: The step that the checkpoint was written after.

    Returns:
        One sentence; empty where nothing differs, or where there is no config.
    """
    saved = saved_config(Path(run.run.folder))
    if saved is None:
        return []
    paths = [*_FIXED_KEYS, *_paths_to_warn_of(run, saved)]
    differences = [*_differing(run, saved, paths), *_rate_differences(run, saved, step)]
    message = (
        f"the first {step} steps of {run.run.folder} had another config: {'; '.join(differences)}; "
        "restore it unless you mean it"
    )
    return [message] if differences else []


def _check_same_start(run: RunConfig) -> None:
    folder = Path(run.run.folder)
    saved = saved_config(folder)
    before = None if saved is None else _get(saved, "checkpoint", "start_from")
    now = run.checkpoint.start_from
    if saved is not None and (before and os.path.abspath(before)) != (now and os.path.abspath(now)):
        raise ValueError(
            f"{folder} holds checkpoints of a run with checkpoint.start_from {before or 'none'!r}, and this "
            f"one has {now or 'none'!r}; give the same to continue that run, or this run another run.folder"
        )


def _check_step(run: RunConfig, step: int) -> None:
    settings = run.training
    if step >= settings.last_step:
        key = "steps" if settings.last_step == settings.steps else "stop_at_step"
        raise ValueError(
            f"checkpoint.start_from was written after step {step}, but this run ends after step "
            f"{settings.last_step}; raise training.{key}, or start from an earlier checkpoint"
        )
    start = decay_start(run.schedule, settings.steps)
    if step > start:
        raise ValueError(
            f"checkpoint.start_from was written after step {step}, but this run's decay begins after step "
            f"{start} and takes the last {settings.steps - start} of {settings.steps} steps; start from a "
            "checkpoint before it, shorten the decay, or raise training.steps"
        )


def _get(table: Table, section: str, key: str) -> Any:
    value = table.get(section, {}).get(key)
    return None if value == "none" else value


def _at(table: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        table = table.get(key) if isinstance(table, dict) else None
    return table


def _paths_to_warn_of(run: RunConfig, saved: Table) -> list[tuple[str, ...]]:
    now = to_table(run)
    paths: list[tuple[str, ...]] = [*_KEYS_TO_WARN_OF]
    for name, group in now["optimizer"]["groups"].items():
        paths += [("optimizer", "groups", name, key) for key in group if key not in _KEYS_COMPARED_ELSEWHERE]
    validation = ("data", "validation")
    texts = (_at(now, validation), _at(saved, validation))
    # key by key, unless one of the two has none
    has_both = all(isinstance(text, dict) for text in texts)
    return paths + ([(*validation, key) for key in texts[0]] if has_both else [validation])


def _differing(run: RunConfig, saved: Table, paths: Iterable[tuple[str, ...]]) -> list[str]:
    """Where the other run said something else; what its config does not name is not compared."""
    now = to_table(run)
    pairs = {".".join(path): (_at(saved, path), _at(now, path)) for path in paths}
    return [
        f"{key} is {there!r} there and {here!r} here"
        for key, (there, here) in pairs.items()
        if there is not None and there != here
    ]


def _rate_differences(run: RunConfig, saved: Table, step: int) -> list[str]:
    """By group, the first step before the checkpoint whose learning rate or weight decay was another."""
    file = RunFolder(Path(run.run.folder)).config_file
    schedule = from_table(ScheduleConfig, saved["schedule"], file, "schedule")
    optimizer = from_table(OptimizerConfig, saved["optimizer"], file, "optimizer")
    before = _rates(optimizer, schedule, saved["training"]["steps"], step)
    now = _rates(run.optimizer, run.schedule, run.training.steps, step)
    differences = []
    for name in now:
        pairs = zip(before[name], now[name], strict=True)
        first = next((s for s, (a, b) in enumerate(pairs) if a != b), None)
        if first is not None:
            values = f"{before[name][first]:.6g} there and is {now[name][first]:.6g} here"
            differences.append(f"{name} at step {first + 1} was {values}")
    return differences


def _rates(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, total: int, step: int
) -> dict[str, list[float]]:
    """Learning rate and weight decay of each group in the first steps of a run."""
    rates: dict[str, list[float]] = {}
    for name, group in optimizer.groups.items():
        gamma = group.weight_decay_gamma or 0.0
        rates[f"lr of group {name}"] = [group.lr * lr_factor(s, schedule, total) for s in range(step)]
        rates[f"weight_decay of group {name}"] = [
            group.weight_decay * weight_decay_factor(s, schedule, total, gamma) for s in range(step)
        ]
    return rates
