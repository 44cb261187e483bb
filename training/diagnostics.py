"""Diagnostics during training: the attention is measured on a fixed sample of held-out rows and recorded.

Every rank takes part in the forward, over the same rows, and the main rank records. Nothing of training
depends on it: no random generator is used, and weights that were gathered are sharded again.
"""

import time
from pathlib import Path

import torch
from torch import nn

from data.sources.held_out import open_held_out
from data.tokenizer import Tokenizer
from eval.diagnostics.collect import collect, make_record
from eval.diagnostics.sample import QuerySample, draw_queries, num_rows, read_batch
from eval.distributed import is_main_rank, run_on_all_ranks
from eval.report.task_records import Record
from models.qwen3 import Qwen3
from models.run_folder import RunFolder
from training.due import is_due
from training.log import logger
from training.metrics import RunMetrics
from training.run_config import RunConfig


class Diagnostics:
    """Measures the attention at the steps that [diagnostics] names.

    Args:
        config: The run.
        tokenizer: Its tokenizer.
        model: The parallelized model.
        metrics: Where results are recorded.
        device: Device of the model.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        model: nn.Module,
        metrics: RunMetrics,
        device: torch.device,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.model = model
        self.metrics = metrics
        self.device = device
        self._sample: QuerySample | None = None  # on the host, drawn when it is needed first

    def is_due(self, step: int) -> bool:
        """Return whether the attention is measured after a step."""
        due = step == self.config.training.last_step or is_due(step, self.config.diagnostics.every)
        return self.config.has_diagnostics and due

    def measure(self, step: int, progress: Record) -> None:
        """Measure and record; a collective call.

        Args:
            step: Completed optimizer steps.
            progress: From RunMetrics.progress.

        Raises:
            EvaluationError: On all ranks: reading held-out text or a measurement failed on at least one.
        """
        settings, model = self.config.diagnostics, self.model
        assert isinstance(model, Qwen3)
        start = time.perf_counter()
        if self._sample is None:
            self._sample = run_on_all_ranks(self._read_sample, self.device)
        sample = self._sample
        layers = run_on_all_ranks(
            lambda: collect(model, sample, set=settings.set, layers=settings.layers), self.device
        )
        record = make_record(layers, sample, settings.set)
        seconds = time.perf_counter() - start
        self.metrics.record_diagnostics(step, {**record, "seconds": seconds, **progress})
        logger.info(f"step {step}  diagnostics of {sample.num_queries} rows in {seconds:.1f} s")

    def _read_sample(self) -> QuerySample:
        config = self.config
        seq_len = config.training.seq_len
        batch = read_batch(
            open_held_out(
                config.data,
                self.tokenizer,
                max_tokens=config.eval.max_tokens,
                kept_in=RunFolder(Path(config.run.folder)).held_out,
                is_main_rank=is_main_rank(),
            ),
            self.tokenizer,
            seq_len=seq_len,
            num_rows=num_rows(seq_len, config.tokens_per_step),
            mask_documents=config.data.mask_documents,
        )
        return draw_queries(batch, seq_len)
