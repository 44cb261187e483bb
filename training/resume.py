"""Decide what a launch starts from, and check that it can."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from config import Table, to_table
from data.tokenizer import Tokenizer
from errors import UserError
from models.run_folder import RunFolder, find_checkpoint, read_run_table, step_of
from models.run_tokenizer import copy_tokenizer, find_tokenizer
from tokens import END_OF_DOCUMENT, TOKENIZER_FILE
from training.branch import branch_warnings, check_branch, checkpoint_step
from training.config_differences import config_differences, describe_difference, training_changes
from training.log import logger
from training.run_config import RunConfig
from training.saved_config import (
    check_compatible,
    check_model,
    sequence_differences,
    training_differences,
)
from training.step_configs import step_configs
from training.token_stop import check_saved_tokens


@dataclass(frozen=True)
class StartPoint:
    """What a launch starts from.

    Attributes:
        kind: "resume" from the newest checkpoint in the run folder; "branch" from checkpoint.start_from, a
            checkpoint of another run; "weights" of checkpoint.initial_weights alone; "scratch", initial
            weights from the seed. The first that exists, in this order.
        checkpoint: The checkpoint to load; None for "scratch".
        step: Optimizer steps completed before the launch.
        restarts_data: Whether a branch reads data.train from its beginning (checkpoint.restart_data).
    """

    kind: Literal["resume", "branch", "weights", "scratch"]
    checkpoint: Path | None
    step: int
    restarts_data: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """The fields that the record of a launch has, by name."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return {"start": self.kind, "start_checkpoint": checkpoint, "restarts_data": self.restarts_data}


def find_start(config: RunConfig) -> StartPoint:
    """Find what a launch starts from; loads nothing.

    Args:
        config: The run.

    Raises:
        UserError: checkpoint.start_from or checkpoint.initial_weights is needed and is not a checkpoint.
    """
    newest = RunFolder(Path(config.run.folder)).newest_checkpoint()
    if newest is not None:
        step = step_of(newest)
        assert step is not None
        return StartPoint("resume", newest, step)
    if config.checkpoint.start_from is not None:
        checkpoint = Path(config.checkpoint.start_from)
        step = checkpoint_step(checkpoint)
        return StartPoint("branch", checkpoint, step, restarts_data=config.checkpoint.restart_data)
    if config.checkpoint.initial_weights is not None:
        return StartPoint("weights", find_checkpoint(Path(config.checkpoint.initial_weights)), 0)
    return StartPoint("scratch", None, 0)


def check_start(config: RunConfig) -> None:
    """Raise unless a launch can load what it starts from.

    Args:
        config: The run.

    Raises:
        UserError: The run folder can't be a folder; the checkpoint to start from is missing, has another
            architecture or other optimizer groups, names the keys that differ; a branch does not fit the
            schedule; the run folder has checkpoints of a run that started from elsewhere, or of one that has
            finished with another config; training.stop_at_tokens is set after steps of other tokens.
    """
    folder = Path(config.run.folder)
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise UserError(f"run.folder is {str(folder)!r}, but a file has this name; give another folder")
    start = find_start(config)
    if start.checkpoint is None:
        return
    if start.kind == "branch":
        check_branch(config, start.checkpoint)
    elif start.kind == "weights":
        _check_initial_weights(config, start.checkpoint)
    else:
        saved = RunFolder(folder).read_config()
        if saved is not None:
            check_compatible(config, saved, folder, "Give this run another run.folder")
            _check_same_origin(config, saved)
        check_saved_tokens(config, start.step, start.checkpoint)
        _check_unfinished(config, start.step)


def start_warnings(config: RunConfig, start: StartPoint, fingerprint: str) -> list[str]:
    """Return the warnings about the checkpoint that a launch starts from.

    Args:
        config: The run; it passes check_start.
        start: From find_start.
        fingerprint: Fingerprint of the run's tokenizer.

    Returns:
        Sentences: the keys of the config that changed since the checkpoint was trained, or another tokenizer
        than the one that the weights were trained with.
    """
    if start.checkpoint is None:
        return []
    if start.kind == "branch":
        # without restart_data the loader refuses another tokenizer
        others = tokenizer_warnings(start.checkpoint, fingerprint) if start.restarts_data else []
        return [*branch_warnings(config, start.checkpoint), *others]
    if start.kind == "weights":
        return tokenizer_warnings(start.checkpoint, fingerprint)
    return resume_warnings(config, start.step)


def describe_finished(config: RunConfig, step: int) -> str:
    """Describe a run that has nothing left to train, and the keys that its config has otherwise."""
    differing = _differences_at_end(config, step)
    changed = f"; changed since: {', '.join(differing)}" if differing else ""
    return (
        f"{config.run.folder} has finished at step {step}; raise {config.training.last_step_key} to "
        f"resume it, or give another run.folder{changed}"
    )


def resume_warnings(config: RunConfig, step: int) -> list[str]:
    """Return what makes a resumed run differ from one trained with this config from the first step.

    Args:
        config: A run whose folder has a checkpoint and the configs of the launches before.
        step: Step of the checkpoint.

    Returns:
        A sentence for each of these configs that differs in the steps that were trained with it.
    """
    run = RunFolder(Path(config.run.folder))
    configs = step_configs(run, step)
    if not configs:
        return [f"{run.config_file} is missing: the first {step} steps may have had another config"]
    warnings = []
    for saved in configs:
        differing = [*sequence_differences(config, saved.table), *training_differences(config, saved)]
        if differing:
            warnings.append(
                f"{saved.steps} of {run.path} had another config: {'; '.join(differing)}; restore these keys "
                "unless the change is intended"
            )
    return warnings


def tokenizer_source(config: RunConfig) -> str | Path:
    """Return where to load the run's tokenizer from.

    Args:
        config: The run.

    Returns:
        The run's own copy for a run that is resumed with the same data.tokenizer, which may be a name on the
        hub and not reachable any more; else data.tokenizer.
    """
    run = RunFolder(Path(config.run.folder))
    saved = (run.read_config() or {}).get("data", {}).get("tokenizer")
    is_resumed = run.newest_checkpoint() is not None
    has_copy = (run.tokenizer / TOKENIZER_FILE).is_file()
    return (
        run.tokenizer if is_resumed and has_copy and saved == config.data.tokenizer else config.data.tokenizer
    )


def tokenizer_warnings(checkpoint: Path, fingerprint: str) -> list[str]:
    """Compare the tokenizer of a checkpoint's run with this run's.

    Args:
        checkpoint: A checkpoint of any run, or a converted one.
        fingerprint: Fingerprint of the tokenizer of the run that loads its weights.

    Returns:
        One sentence if the tokenizers differ or cannot be compared.
    """
    data = read_run_table(checkpoint).get("data", {})
    end_of_document = data.get("end_of_document", END_OF_DOCUMENT)
    try:
        path = find_tokenizer(RunFolder.of_checkpoint(checkpoint), data)
        if path is None:
            return []
        tokenizer = Tokenizer.load(path, end_of_document=end_of_document)
    except UserError as error:
        return [f"the tokenizer of {checkpoint} cannot be compared with this run's: {error}"]
    if tokenizer.fingerprint == fingerprint:
        return []
    return [
        f"the weights of {checkpoint} were trained with the tokenizer {data['tokenizer']}, this run has "
        "another: every row of the embedding stands for another token; set data.tokenizer to that one unless "
        "the change is intended"
    ]


def prepare_folder(config: RunConfig, start: StartPoint, tokenizer: Tokenizer) -> None:
    """Write config and tokenizer to the run folder; logs the warnings about the start before.

    Args:
        config: The run.
        start: From find_start.
        tokenizer: The run's tokenizer; a resumed run keeps the copy that it has.
    """
    for warning in start_warnings(config, start, tokenizer.fingerprint):
        logger.warning(warning)
    folder = RunFolder(Path(config.run.folder))
    folder.keep_config(config)
    folder.write_config(config)
    is_kept = start.kind == "resume" and folder.tokenizer.is_dir()
    if tokenizer.file is not None and not is_kept:
        copy_tokenizer(tokenizer.file, folder.tokenizer)


def remove_partial_checkpoints(folder: RunFolder) -> None:
    """Delete the step-N folders that a killed write left incomplete, which checkpoint.keep does not count.

    The caller holds the folder's lock: no other process is writing them. Names that only resemble a
    checkpoint's are reported and left.

    Args:
        folder: The run folder.
    """
    for line in folder.odd_names():
        logger.warning(f"{line}: it is neither loaded nor deleted")
    whole = folder.whole_checkpoints()
    for step, path in folder.step_folders().items():
        if step in whole:
            continue
        if path.is_symlink():
            logger.warning(
                f"{path} is a link to a folder without .metadata: it is neither loaded nor deleted"
            )
            continue
        logger.warning(
            f"deleting {path}: it has no .metadata, which is written last, so its write was cut short"
        )
        shutil.rmtree(path)


def _check_same_origin(config: RunConfig, saved: Table) -> None:
    """Raise if the run in the folder started from another checkpoint than this config names."""
    unset = {"initial_weights": "none", "start_from": "none", "restart_data": False}
    saved_table, table = unset | saved.get("checkpoint", {}), to_table(config.checkpoint)
    for key, default in unset.items():
        before, now = saved_table[key], table[key]
        is_path = isinstance(default, str)
        if os.path.abspath(before) != os.path.abspath(now) if is_path else before != now:
            difference = describe_difference(f"checkpoint.{key}", before, now)
            raise UserError(
                f"{config.run.folder} holds checkpoints of a run with another start ({difference}); restore "
                "the key to resume that run, or give this run another run.folder"
            )


def _differences_at_end(config: RunConfig, step: int) -> list[str]:
    """Describe the keys that differ from the config that the last of a number of steps had."""
    configs = step_configs(RunFolder(Path(config.run.folder)), step)
    return config_differences(config, configs[-1].table) if configs else []


def _check_unfinished(config: RunConfig, step: int) -> None:
    """Raise if nothing is left to train, and the steps were trained with another config.

    Keys that do not change what is trained are no reason: evaluations that are not on record are made up for.
    """
    if step < config.training.last_step:
        return
    differing = _differences_at_end(config, step)
    changes = training_changes(differing)
    if changes:
        others = [each for each in differing if each not in changes]
        free = f" (these may differ: {'; '.join(others)})" if others else ""
        raise UserError(
            f"{config.run.folder} has finished at step {step} with another config: {'; '.join(changes)}. "
            f"Restore these keys{free}, raise {config.training.last_step_key} to resume it, or give another "
            "run.folder"
        )


def _check_initial_weights(config: RunConfig, checkpoint: Path) -> None:
    remedy = (
        "Give checkpoint.initial_weights another folder (softmax attention is converted to Parallax by "
        "`python -m models.convert`: to-hf, then from-hf --attention parallax)"
    )
    check_model(config, read_run_table(checkpoint), checkpoint, remedy)
