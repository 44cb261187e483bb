"""Check a run before anything is built: batch, model, data, tokenizer, tasks, and what it starts from."""

import os
import secrets
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.sources.base import WORTHWHILE_EPOCHS
from data.sources.count import count_epochs, count_not_held_out
from data.sources.open import check_data, check_shards
from data.tokenizer import Tokenizer, check_vocabulary
from errors import UserError
from eval.report.plan_file import is_plan
from models.qwen3 import Qwen3
from optimizers.param_groups import assign_parameters
from optimizers.schedule import schedules_by_group
from training.disk_space import check_space
from training.log import logger
from training.memory import checkpoint_bytes
from training.resume import check_start, tokenizer_source
from training.run_config import RunConfig

# NFS clients may cache the absence of a file for this long
SECONDS_TO_APPEAR = 60.0


def check_run(config: RunConfig, world_size: int) -> Tokenizer:
    """Check all of a run that can be checked without devices and other ranks.

    Args:
        config: The run.
        world_size: Number of ranks.

    Returns:
        The run's tokenizer, whose ids fit the model's vocabulary.

    Raises:
        UserError: The run's folder is a plan's; the batch size or the degrees of parallelism do not fit the
            ranks; the optimizer groups do not fit the model, or the schedule the steps; the checkpoint to
            start from is missing or does not fit; the disk has no room for a checkpoint; the tokenizer is
            missing or has ids beyond the vocabulary; a data file is missing or has no text column, or shards
            are of another tokenizer; a task is unknown or has no documents.
    """
    if is_plan(Path(config.run.folder)):
        raise UserError(
            f"run.folder ({config.run.folder}) is that of a plan of training.sweep: give another run.name"
        )
    if os.environ.get("RANK", "0") == "0":
        for sentence in config.unread_keys():
            logger.warning(sentence)
    config.gradient_accumulation_steps(world_size)
    config.parallelism.degrees(world_size)
    model = build_meta_model(config)
    check_start(config)
    check_space(config, checkpoint_bytes(config, model, world_size))
    check_shards(config.data)
    tokenizer = Tokenizer.load(tokenizer_source(config), end_of_document=config.data.end_of_document)
    check_vocabulary(tokenizer, config.model.vocab_size)
    check_data(config.data, tokenizer.fingerprint)
    # before the process group exists, and by one rank: it reads documents
    if os.environ.get("RANK", "0") == "0":
        log_validation_documents(config)
        log_epochs(config)
    check_tasks(config)
    return tokenizer


def log_validation_documents(config: RunConfig) -> None:
    """Log how many documents of a validation source of its own are not held out from training.

    Args:
        config: The run.

    Raises:
        UserError: A file cannot be read.
    """
    if config.data.validation is None or config.data.validation_documents == "held_out":
        return
    num_trained, num_counted = count_not_held_out(config.data.validation)
    if num_trained:
        logger.info(
            f"{num_trained} of {num_counted} documents of data.validation are not held out by their content: "
            "where data.train has the same documents, it trains on them"
        )


def log_epochs(config: RunConfig) -> None:
    """Log how often the run reads its training shards, as a warning where that is more than four times.

    Args:
        config: The run.

    Raises:
        UserError: A folder holds no complete set of shards.
    """
    num_tokens = config.training.steps * config.tokens_per_step
    for folder, (size, epochs) in count_epochs(config.data.train, num_tokens).items():
        said = f"{folder} has {size:,} training tokens, which {config.training.steps:,} steps read"
        if epochs <= WORTHWHILE_EPOCHS:
            logger.info(f"{said} {epochs:.2f} times")
        else:
            logger.warning(
                f"{said} {epochs:.1f} times; more than {WORTHWHILE_EPOCHS} times teaches little: prepare "
                "more documents, or train fewer steps"
            )


def build_meta_model(config: RunConfig) -> Qwen3:
    """Build the model on the meta device, and check the optimizer groups and the schedule.

    Args:
        config: The run.

    Returns:
        The model; its parameters hold no memory.

    Raises:
        UserError: The model's dimensions do not fit each other, a parameter is in no group or in several,
            warm-up and decay are longer than the run, or a group's own schedule contradicts itself.
    """
    with torch.device("meta"):
        model = Qwen3(config.model)
    assign_parameters(model.named_parameters(), config.optimizer.groups)
    schedules_by_group(config.optimizer.groups, config.schedule, config.training.steps)
    return model


def check_tasks(config: RunConfig) -> None:
    """Check the downstream tasks of [eval], and load their documents once.

    Args:
        config: The run; without tasks nothing is imported.

    Raises:
        UserError: lm-evaluation-harness is missing, a task is unknown, or its documents are missing or
            malformed.
    """
    if not config.eval.tasks:
        return
    try:
        from eval.harness import load_tasks
    except ModuleNotFoundError as error:
        raise UserError(
            f"eval.tasks needs lm-evaluation-harness ({error}): pip install -e '.[eval]', or empty eval.tasks"
        ) from error
    folder = config.eval.tasks_data
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"eval.tasks_data is {folder!r}, but there is no such folder")
    try:
        load_tasks(config.eval.tasks, None if folder is None else Path(folder))
    except OSError as error:  # includes the errors of requests
        raise UserError(
            f"the documents of eval.tasks could not be downloaded ({error}); set eval.tasks_data to a folder "
            "that has them"
        ) from error


def check_shared(folder: Path) -> None:
    """Raise on all ranks unless all of them see the same run folder; a collective call.

    Args:
        folder: The run folder; it exists on the main rank.

    Raises:
        UserError: Some ranks do not see a file that the main rank writes into the folder.
    """
    names = [f".shared-{secrets.token_hex(8)}"]
    if dist.get_rank() == 0:
        (folder / names[0]).touch()
    dist.broadcast_object_list(names)
    path = folder / names[0]
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, path.exists())
    if dist.get_rank() == 0:
        path.unlink()
    if not all(seen):
        ranks = ", ".join(str(rank) for rank, is_seen in enumerate(seen) if not is_seen)
        raise UserError(
            f"run.folder ({folder}) must be on a file system that all nodes share, but rank {ranks} does not "
            "see a file that rank 0 writes there; give a shared folder"
        )
