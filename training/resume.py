"""The run folder: the resolved config beside the checkpoints, and what may change between two launches."""

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from config import Table, to_table
from data.tokenizer import Tokenizer
from errors import UserError
from models.qwen3 import Qwen3
from models.run_folder import RunFolder, find_checkpoint, read_run_table
from models.run_tokenizer import find_tokenizer
from tokens import END_OF_DOCUMENT
from training.run_config import RunConfig

# keys of [model] that leave weights and function as they are
_FREE_MODEL_KEYS = ("impl", "init_std", "r_gain_init")


def _defaults(config: Any) -> Table:
    """What a config's keys are where a table does not name them."""
    table = {
        field.name: to_table(field.default)
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING
    }
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            table[field.name] = _defaults(value)
    return table


def _differences(saved: Any, now: Any, defaults: Any, key: str, free: tuple[str, ...] = ()) -> list[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        if saved.get("kind", now.get("kind")) != now.get("kind"):
            return [f"{key}.kind is {saved['kind']!r} there and {now.get('kind')!r} here"]
        below = defaults if isinstance(defaults, dict) else {}
        return [
            line
            for name in sorted({*saved, *now} - {*free})
            for line in _differences(
                saved.get(name, below.get(name)), now.get(name), below.get(name), f"{key}.{name}", free
            )
        ]
    return [] if saved == now else [f"{key} is {saved!r} there and {now!r} here"]


def _who_updates_what(optimizer: Table) -> Table:
    groups = optimizer.get("groups", {})
    return {name: {k: group.get(k) for k in ("kind", "parameters")} for name, group in groups.items()}


def _optimizer_differences(run: RunConfig, saved: Table) -> list[str]:
    before, now = _who_updates_what(saved), _who_updates_what(to_table(run.optimizer))
    with torch.device("meta"):
        names = [name for name, _ in Qwen3(run.model).named_parameters()]

    def matched(group: Table) -> set[str]:
        return {name for name in names for pattern in group["parameters"] if re.fullmatch(pattern, name)}

    for name in before.keys() & now.keys():
        if matched(before[name]) == matched(now[name]):
            # the same parameters, by other patterns
            before[name]["parameters"] = now[name]["parameters"]
    return _differences(before, now, None, "optimizer.groups")


def has_checkpoint(folder: Path) -> bool:
    """Whether a run folder holds a whole checkpoint."""
    return RunFolder(folder).newest_checkpoint() is not None


def saved_config(folder: Path) -> Table | None:
    """The resolved config that lies in a run folder, None where there is none."""
    return RunFolder(folder).read_config()


def _check_model(run: RunConfig, saved: Table, folder: Path, remedy: str) -> None:
    differences = _differences(
        saved["model"], to_table(run.model), _defaults(run.model), "model", _FREE_MODEL_KEYS
    )
    if differences:
        raise ValueError(
            f"{folder} holds checkpoints of another architecture: {'; '.join(differences)}. "
            f"{remedy}, or restore the model's keys"
        )


def check_fits(run: RunConfig, saved: Table, folder: Path, remedy: str) -> None:
    """Refuse to load checkpoints of another model or other optimizers.

    Args:
        run: The run that would load them.
        saved: The config of the run that wrote them.
        folder: Its folder, for the message.
        remedy: What else than restoring the keys helps, for the message.

    Raises:
        ValueError: [model] is another, or the optimizers' state is; names the keys that differ.
    """
    _check_model(run, saved, folder, remedy)
    if "optimizer" not in saved:
        raise ValueError(
            f"{folder} holds weights alone, as models.convert writes them: give this run a folder of its "
            "own, and that one to checkpoint.initial_weights"
        )
    differences = _optimizer_differences(run, saved["optimizer"])
    if differences:
        raise ValueError(
            f"{folder} holds checkpoints of other optimizers: {'; '.join(differences)}. "
            f"{remedy}, or restore the groups"
        )


def check_folder(run: RunConfig) -> None:
    """Refuse to continue a run folder with another model or other optimizers.

    Raises:
        ValueError: The folder can't be a folder, or has checkpoints of another [model], of optimizers whose
            state is another, or of a run with other initial weights; or checkpoint.initial_weights is needed
            and is another model's. Names the keys that differ.
    """
    folder = Path(run.run.folder)
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ValueError(f"run.folder is {str(folder)!r}, but a file is in its place; give another folder")
    saved = saved_config(folder)
    weights = run.checkpoint.initial_weights
    if not has_checkpoint(folder):
        if weights is not None:
            _check_initial_weights(run, Path(weights))
    elif saved is not None:
        check_fits(run, saved, folder, "Give this run another run.folder")
        before = saved.get("checkpoint", {}).get("initial_weights", "none")
        if os.path.abspath(before) != os.path.abspath(weights or "none"):
            raise ValueError(
                f"{folder} holds checkpoints of a run with checkpoint.initial_weights {before!r}, and this "
                f"one has {weights or 'none'!r}; give the same to continue that run, or this run another "
                "run.folder"
            )


def _check_initial_weights(run: RunConfig, path: Path) -> None:
    checkpoint = find_checkpoint(path)
    remedy = (
        "Give checkpoint.initial_weights another folder (one of softmax becomes Parallax by "
        "`python -m models.convert`: to-hf, then from-hf --attention parallax)"
    )
    _check_model(run, read_run_table(checkpoint), checkpoint, remedy)


def remove_partial_checkpoints(run: RunConfig) -> None:
    """Remove what a kill during a write left; only whole checkpoints count for checkpoint.keep."""
    folder = RunFolder(Path(run.run.folder))
    whole = folder.whole_checkpoints()
    for step, path in folder.step_folders().items():
        if step not in whole:
            shutil.rmtree(path)


def other_tokenizer(checkpoint: Path, fingerprint: str) -> str | None:
    """A warning where the weights of a checkpoint belong to another tokenizer, None where they do not.

    Args:
        checkpoint: Of any run, or converted.
        fingerprint: Of the tokenizer that goes on with its weights.
    """
    data = read_run_table(checkpoint).get("data", {})
    end = data.get("end_of_document", END_OF_DOCUMENT)
    try:
        place = find_tokenizer(RunFolder.of_checkpoint(checkpoint), data)
        if place is None:
            return None
        theirs = Tokenizer.load(place, end_of_document=end)
    except UserError as error:
        return f"{checkpoint} names a tokenizer that cannot be compared with this run's: {error}"
    if theirs.fingerprint == fingerprint:
        return None
    return (
        f"the weights of {checkpoint} were trained with the tokenizer {data['tokenizer']}, this run has "
        "another: every row of the embedding means another token; set data.tokenizer to that one unless you "
        "mean it"
    )
