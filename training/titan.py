"""The interface to torchtitan: JobConfig, TrainSpec, and the private names of torchtitan that are used.

tests/training/test_titan.py checks each name that the last section and the other packages' titan.py rely on.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchtitan.train
from torch import nn
from torchtitan.components.checkpoint import DATALOADER, MODEL, CheckpointManager
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.utils import GarbageCollection, device_type

from config import to_table
from data.titan import build_dataloader
from data.tokenizer import Tokenizer
from errors import UserError
from models.checkpoint.load import AVERAGE, load_state
from models.loss import cross_entropy
from models.run_folder import RunFolder
from models.titan import TitanModelArgs, TitanQwen3, device_mesh, parallelize
from optimizers.titan import build_lr_schedulers, build_optimizers
from training.metrics import RunMetrics
from training.run_config import RunConfig

MODEL_NAME = "qwen3_parallax"

# JobConfig


def to_job_config(config: RunConfig, world_size: int) -> JobConfig:
    """Convert a run's config to torchtitan's, as far as torchtitan's Trainer reads it.

    Args:
        config: The run.
        world_size: Number of ranks.

    Returns:
        The job config.

    Raises:
        UserError: metrics.profile_every is set and there is no GPU.
    """
    job = JobConfig()
    job.job.dump_folder = config.run.folder
    job.job.description = config.run.name
    job.model.name = MODEL_NAME
    job.model.flavor = config.model.size
    job.training.seq_len = config.training.seq_len
    job.training.steps = config.training.steps
    job.training.local_batch_size = config.training.local_batch_size
    job.training.global_batch_size = config.training.global_batch_size
    replicate, shard = config.parallelism.degrees(world_size)
    job.parallelism.data_parallel_replicate_degree = replicate
    job.parallelism.data_parallel_shard_degree = shard
    job.compile.enable = False  # models.titan compiles
    job.activation_checkpoint.mode = "none"  # models.titan applies activation checkpointing
    job.debug.seed = config.run.seed
    job.debug.deterministic = config.run.deterministic
    job.metrics.log_freq = 1
    job.checkpoint.enable = True
    job.checkpoint.interval = 1  # the trainer decides after which steps save() is called
    job.checkpoint.keep_latest_k = config.checkpoint.keep or 0
    job.checkpoint.async_mode = "async" if config.checkpoint.async_save else "disabled"
    job.checkpoint.last_save_model_only = False  # a finished run can be resumed with more steps
    if not torch.cuda.is_available():
        job.comm.trace_buf_size = 0  # the flight recorder is NCCL's
    if config.metrics.profile_every is not None:
        if not torch.cuda.is_available():
            raise UserError(
                f"metrics.profile_every is {config.metrics.profile_every}, but torchtitan's profiler needs a "
                "GPU; set it to none here"
            )
        job.profiling.enable_profiling = True
        job.profiling.profile_freq = config.metrics.profile_every
        job.profiling.profiler_active = 2  # the first begins on an idle GPU
        job.profiling.save_traces_folder = RunFolder(Path(config.run.folder)).profile.name
    return job


# TrainSpec


def register_run(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Register the TrainSpec of a run under MODEL_NAME; once per process."""
    register_train_spec(MODEL_NAME, build_train_spec(config, tokenizer))


def build_train_spec(config: RunConfig, tokenizer: Tokenizer) -> TrainSpec:
    """Bind the builders of model, optimizers, data loader and metrics to a run.

    Args:
        config: The run.
        tokenizer: From training.preflight.check_run.

    Returns:
        The spec. Its loss function is unused: the model computes its own loss (models/loss.py).
    """
    return TrainSpec(
        model_cls=TitanQwen3,  # pyrefly: ignore [bad-argument-type]
        model_args={config.model.size: TitanModelArgs(config=config.model, seed=config.run.seed)},
        parallelize_fn=lambda model, dims, job: _parallelize(config, model, dims.world_size),
        pipelining_fn=None,
        build_optimizers_fn=lambda parts, job, dims: build_optimizers(parts, config.optimizer),
        build_lr_schedulers_fn=lambda optimizers, job, steps: build_lr_schedulers(
            optimizers, config.schedule, steps
        ),
        build_dataloader_fn=lambda dp_world_size, dp_rank, **job: build_dataloader(
            config.data,
            tokenizer=tokenizer,
            seq_len=config.training.seq_len,
            local_batch_size=config.training.local_batch_size,
            global_batch_size=config.training.global_batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
        ),
        build_tokenizer_fn=None,
        build_loss_fn=lambda job, **parts: cross_entropy,
        build_metrics_processor_fn=lambda job, dims, args: RunMetrics(
            job,
            dims,
            config=config.metrics,
            resolved_config=to_table(config),
            has_diagnostics=config.has_diagnostics,
        ),
    )


def _parallelize(config: RunConfig, model: nn.Module, world_size: int) -> nn.Module:
    assert isinstance(model, TitanQwen3)
    return parallelize(
        model,
        device_mesh(device_type, *config.parallelism.degrees(world_size)),
        precision=getattr(torch, config.training.precision),
        activation_checkpointing=config.training.activation_checkpointing,
        compile_blocks=config.training.compile,
        reshard_after_forward=config.parallelism.reshard_after_forward,
    )


OPTIONAL_STATES = (AVERAGE, "gradient_norm")
"""States that a checkpoint may lack: from before [average] was set, or of an earlier version of the code."""


# private names of torchtitan, and module attributes that are replaced


def set_checkpoint_manager(manager: type[CheckpointManager]) -> None:
    """Make torchtitan's Trainer build this class of checkpoint manager."""
    torchtitan.train.CheckpointManager = manager


def add_state(manager: CheckpointManager, name: str, state: Any) -> None:
    """Make checkpoints hold a further state, an object with state_dict and load_state_dict."""
    assert name in OPTIONAL_STATES
    manager.states[name] = state


def load_checkpoint(manager: CheckpointManager, checkpoint: Path, *, with_data: bool) -> None:
    """Load the state of a checkpoint in any folder, by the reader that checks it.

    States of OPTIONAL_STATES that the checkpoint lacks stay as they are.

    torchtitan's own initial_load_path is ignored once the run has a checkpoint folder, even an empty one, and
    its dcp_load takes no reader.

    Args:
        manager: The run's checkpoint manager; model, optimizers and other states are loaded in place.
        checkpoint: Folder step-N.
        with_data: Whether to load the data position; if not, the data loader stays at its beginning.

    Raises:
        DamagedCheckpointError: On all ranks, as models.checkpoint.load.load_state.
    """
    states = manager._states_to_load(model_only=False)
    if not with_data:
        del states[DATALOADER]
    load_state(states, checkpoint, optional=OPTIONAL_STATES)
    # its tensors are those of the state, flattened there
    manager.states[MODEL].load_state_dict(states)
    GarbageCollection.collect("checkpoint loaded")


def delete_in_background(manager: CheckpointManager, checkpoints: Iterable[Path]) -> None:
    """Queue checkpoints for deletion by the manager's thread; it exists if keep_latest_k > 0."""
    assert manager.purge_thread is not None
    for checkpoint in checkpoints:
        manager.purge_queue.put(str(checkpoint))


def collect_garbage(trainer: torchtitan.train.Trainer, step: int) -> None:
    """Collect Python garbage every 1000 steps, at the same step on all ranks; automatic collection is off."""
    trainer.gc_handler.run(step)
