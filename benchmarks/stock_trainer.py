"""Stock torchtitan's Qwen3, as `benchmarks.stock` trains it: torchtitan's own Trainer, model and optimizer.

Replaced are the tokenizer, the data set and the place that metrics are written to. Rows are random tokens
drawn on the host, without documents, and attention is unmasked but for causality: torchtitan's default.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.qwen3 import Qwen3ModelArgs
from torchtitan.models.qwen3 import get_train_spec as stock_train_spec
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.train import Trainer

from benchmarks.stock_size import StockSize
from models.config import SoftmaxConfig
from models.qwen3 import Qwen3
from models.run_folder import RunFolder
from training.memory import GIB
from training.run_config import RunConfig

_NAME = "qwen3_stock"


def job_config(config: RunConfig, *, rows: int, rows_per_step: int, steps: int, folder: Path) -> JobConfig:
    """Return torchtitan's config of its own Qwen3 with softmax attention and AdamW, at the sizes of a run.

    Whether blocks are compiled, the precision and the clipping are those of the run, and metrics are read
    after every step as the run does. Activations are not recomputed, which is faster than torchtitan's
    default. All else, such as fused AdamW and one GPU without FSDP, is torchtitan's default.

    Args:
        config: The run whose model size, vocabulary and sequence length stock torchtitan takes.
        rows: Rows of a micro-batch.
        rows_per_step: Rows of an optimizer step, over all ranks.
        steps: Optimizer steps.
        folder: Folder of whatever torchtitan writes.
    """
    job = JobConfig()
    job.job.dump_folder = str(folder)
    job.model.name, job.model.flavor = _NAME, _NAME
    job.training.seq_len = config.training.seq_len
    job.training.local_batch_size = rows
    job.training.global_batch_size = rows_per_step
    job.training.steps = steps
    job.training.mixed_precision_param = config.training.precision
    job.training.max_norm = config.training.max_grad_norm or float("inf")
    job.compile.enable = config.training.compile
    job.activation_checkpoint.mode = "none"
    job.metrics.log_freq = 1
    if not torch.cuda.is_available():
        job.comm.trace_buf_size = 0  # the flight recorder is NCCL's
    return job


def model_args(config: RunConfig) -> Qwen3ModelArgs:
    """Return torchtitan's arguments of the softmax model of a run's size."""
    stock = StockSize.of(config)
    size = stock.size
    return Qwen3ModelArgs(
        dim=size.width,
        n_layers=size.num_layers,
        n_heads=size.num_heads,
        n_kv_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        hidden_dim=size.mlp_width,
        vocab_size=stock.vocab_size,
        max_seq_len=stock.seq_len,
        rope_theta=config.model.rope_theta,
        norm_eps=config.model.norm_eps,
        enable_weight_tying=config.model.tie_embeddings,
    )


def flops_per_token(config: RunConfig) -> float:
    """Count the training FLOPs per token of that model as those of ours are counted, without documents."""
    plain = replace(config.model, size=StockSize.of(config).name, attention=SoftmaxConfig())
    with torch.device("meta"):
        return Qwen3(plain).num_flops_per_token(config.training.seq_len)


class RandomRows(BaseDataLoader):
    """Endless micro-batches of random tokens, in the form of torchtitan's data loaders.

    Args:
        rows: Rows of a micro-batch.
        seq_len: Tokens per row.
        vocab_size: Number of ids.
        seed: Seed of the tokens; each rank has its own.
    """

    def __init__(self, rows: int, seq_len: int, vocab_size: int, seed: int) -> None:
        self.shape, self.vocab_size = (rows, seq_len + 1), vocab_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            tokens = torch.randint(self.vocab_size, self.shape, generator=self.generator)
            yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: no checkpoint is written."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: no checkpoint is read."""


class StepRecords(MetricsProcessor):
    """torchtitan's metrics processor, which also writes a record of every step as a run of ours does.

    Args:
        job: torchtitan's config.
        dims: Degrees of parallelism.
        flops_per_token: Training FLOPs per token of the model, which MFU counts.
    """

    def __init__(self, job: JobConfig, dims: ParallelDims, flops_per_token: float) -> None:
        super().__init__(job, dims)
        self.flops_per_token = flops_per_token

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Append the step to metrics.jsonl on the main rank, then log as torchtitan does."""
        seconds = time.perf_counter() - self.time_last_log
        on_gpu = torch.cuda.is_available()
        if torch.distributed.get_rank() == 0:
            world_size = self.parallel_dims.world_size
            tokens_per_second = self.ntokens_since_last_log * world_size / seconds
            # all of a row is visible, so both counts of MFU agree
            mfu = 100 * self.flops_per_token * tokens_per_second / (self.gpu_peak_flops * world_size)
            record = {
                "step": step,
                "loss": float(global_avg_loss),
                "tokens_per_second": tokens_per_second,
                "mfu_percent": mfu if on_gpu else None,
                "mfu_whole_rows_percent": mfu if on_gpu else None,
                "step_seconds": seconds,
                "data_wait_percent": 100 * sum(self.data_loading_times) / seconds,
                "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
                "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
            }
            path = RunFolder(Path(self.job_config.job.dump_folder)).metrics_file
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)


def train_spec(config: RunConfig) -> TrainSpec:
    """Return torchtitan's TrainSpec of Qwen3 with the model of a run's size and random rows."""
    size = StockSize.of(config)
    return replace(
        stock_train_spec(),
        model_args={_NAME: model_args(config)},
        build_tokenizer_fn=None,
        build_dataloader_fn=lambda dp_rank, job_config, **parts: RandomRows(
            job_config.training.local_batch_size, size.seq_len, size.vocab_size, seed=dp_rank
        ),
        build_metrics_processor_fn=lambda job, dims, args: StepRecords(job, dims, flops_per_token(config)),
    )


def train(config: RunConfig, *, rows: int, rows_per_step: int, steps: int, folder: Path) -> None:
    """Train stock torchtitan's Qwen3; torchrun's variables are in the environment. See `job_config`."""
    register_train_spec(_NAME, train_spec(config))
    job = job_config(config, rows=rows, rows_per_step=rows_per_step, steps=steps, folder=folder)
    trainer = Trainer(job)
    try:
        trainer.train()
    finally:
        trainer.close()
    torch.distributed.destroy_process_group()
