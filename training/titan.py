"""torchtitan's TrainSpec for a run, put together from the packages' parts."""

import torch
from torch import nn
from torchtitan.protocols import train_spec
from torchtitan.tools.utils import device_type

from config import to_table
from data.sources.open import check_data
from data.titan import build_dataloader
from data.tokenizer import Tokenizer, check_vocabulary
from models.loss import cross_entropy
from models.titan import TitanModelArgs, TitanQwen3, device_mesh, parallelize
from optimizers.titan import build_lr_schedulers, build_optimizers
from training.branch import check_branch
from training.evaluation import check_tasks
from training.metrics import RunMetrics
from training.preflight import build_meta_model
from training.resume import check_folder
from training.run_config import RunConfig


def check_run(run: RunConfig, world_size: int) -> Tokenizer:
    """Find what is wrong with a run before anything is built.

    Args:
        run: The run.
        world_size: Number of ranks.

    Returns:
        The run's tokenizer, which fits the model.

    Raises:
        ValueError: Batch or degrees do not fit the ranks, the groups not the model, or the schedule not the
            steps; the run folder, or the checkpoint to start from, is another architecture's; that checkpoint
            does not fit the schedule; the tokenizer is missing or its vocabulary larger than the model's; a
            data file is missing or has no text column; shards are of another tokenizer; a task of [eval] is
            unknown or has no documents.
    """
    run.gradient_accumulation_steps(world_size)
    run.parallelism.degrees(world_size)
    build_meta_model(run)
    check_folder(run)
    check_branch(run)
    tokenizer = Tokenizer.load(run.data.tokenizer, end_of_document=run.data.end_of_document)
    check_vocabulary(tokenizer, run.model.vocab_size)
    check_data(run.data, tokenizer.fingerprint)
    check_tasks(run)
    return tokenizer


def _parallelized(run: RunConfig, model: nn.Module, world_size: int) -> nn.Module:
    assert isinstance(model, TitanQwen3)
    return parallelize(
        model,
        device_mesh(device_type, *run.parallelism.degrees(world_size)),
        precision=getattr(torch, run.training.precision),
        activation_checkpointing=run.training.activation_checkpointing,
        compile_blocks=run.training.compile,
        reshard_after_forward=run.parallelism.reshard_after_forward,
    )


def build_train_spec(run: RunConfig, tokenizer: Tokenizer) -> train_spec.TrainSpec:
    """All that torchtitan's trainer builds, bound to a run.

    Args:
        run: The run.
        tokenizer: From check_run.

    Returns:
        The spec; training uses the model's own loss (models/loss.py), evaluation is the trainer's
        (training/trainer.py).
    """
    return train_spec.TrainSpec(
        model_cls=TitanQwen3,  # pyrefly: ignore [bad-argument-type]
        model_args={run.model.size: TitanModelArgs(config=run.model, seed=run.run.seed)},
        parallelize_fn=lambda model, dims, job: _parallelized(run, model, dims.world_size),
        pipelining_fn=None,
        build_optimizers_fn=lambda parts, config, dims: build_optimizers(parts, run.optimizer),
        build_lr_schedulers_fn=lambda optimizers, config, steps: build_lr_schedulers(
            optimizers, run.schedule, steps
        ),
        build_dataloader_fn=lambda dp_world_size, dp_rank, **job: build_dataloader(
            run.data,
            tokenizer=tokenizer,
            seq_len=run.training.seq_len,
            local_batch_size=run.training.local_batch_size,
            global_batch_size=run.training.global_batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
        ),
        build_tokenizer_fn=None,
        build_loss_fn=lambda job, **parts: cross_entropy,
        build_metrics_processor_fn=lambda job, dims, args: RunMetrics(
            job, dims, config=run.metrics, resolved_config=to_table(run)
        ),
    )
