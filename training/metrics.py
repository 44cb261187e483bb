"""Metrics of a run: metrics.jsonl, progress lines on the console, and optionally TensorBoard and wandb."""

import itertools
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from errors import UserError
from models.run_folder import RunFolder
from training.log import logger
from training.memory import GIB
from training.run_config import MetricsConfig

BAR_WIDTH = 20


def format_duration(seconds: float) -> str:
    """Format seconds as 1d02h, 3h05m, 4m07s or 9s."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{total % 60:02}s" if minutes else f"{total}s"


def format_progress(step: int, steps: int) -> str:
    """Format progress as [######..............]  30%."""
    filled = BAR_WIDTH * step // steps
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {100 * step // steps:3}%"


class JsonlWriter:
    """Appends records to a JSONL file: one JSON object per line, each with a "step".

    Args:
        path: The file; created if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record and flush the file."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _lines(self) -> Iterator[tuple[str, int | None]]:
        """Yield (line, step); the step of a damaged line is None."""
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield line, int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                yield line, None

    def truncate_after(self, step: int) -> None:
        """Delete the records of later steps, and damaged lines."""
        self._file.close()
        kept = []
        for line, line_step in self._lines():
            if line_step is None:
                logger.warning(f"{self.path}: deleted a damaged line: {line[:80]}")
            elif line_step <= step:
                kept.append(line + "\n")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def has_records_after(self, step: int) -> bool:
        """Return whether the file has a record of a later step."""
        return any(line_step is not None and line_step > step for _, line_step in self._lines())

    def rotate(self) -> Path:
        """Start an empty file; return the first free name <file>.1, <file>.2, ... that the old one gets."""
        self._file.close()
        names = (self.path.with_name(f"{self.path.name}.{n}") for n in itertools.count(1))
        rotated = next(path for path in names if not path.exists())
        os.replace(self.path, rotated)
        self._file = self.path.open("a", encoding="utf-8")
        return rotated

    def names_at(self, step: int) -> set[str]:
        """Return the names of the metrics recorded for a step."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return {name for record in map(json.loads, lines) if record["step"] == step for name in record}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunMetrics(MetricsProcessor):
    """torchtitan's metrics processor with our sinks; the main rank writes.

    Args:
        job_config: torchtitan's config; its own sinks are disabled.
        parallel_dims: Degrees of parallelism.
        config: The [metrics] table.
        resolved_config: The whole config of the run, for wandb.

    Raises:
        UserError: The run folder cannot be written, or wandb cannot be started.
    """

    def __init__(
        self,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        *,
        config: MetricsConfig,
        resolved_config: Mapping[str, Any],
    ) -> None:
        super().__init__(job_config, parallel_dims)
        self.config = config
        self.world_size = parallel_dims.world_size
        self.is_main_rank = torch.distributed.get_rank() == 0
        self.total_steps = job_config.training.steps
        self.folder = Path(job_config.job.dump_folder)
        self._num_steps = 0  # of this launch
        self._first_step_end = 0.0
        self.jsonl = self.wandb_run = None
        self.tensorboard: SummaryWriter | None = None  # set by start_recording
        if self.is_main_rank:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.jsonl = JsonlWriter(RunFolder(self.folder).metrics_file)
            except OSError as error:
                raise UserError(
                    f"run.folder is {str(self.folder)!r}, which cannot be written ({error}); give another one"
                ) from error
            if config.wandb:
                self.wandb_run = _start_wandb(self.folder, job_config.job.description, resolved_config)

    def start_recording(self, last_step: int | None) -> None:
        """Delete the records after the step that a launch resumes from, and start recording.

        A record without a checkpoint to resume from is kept under another name.

        Args:
            last_step: The last completed step; None for a run that starts at step 0, and evaluates there.
        """
        if self.jsonl is not None:
            has_checkpoint = RunFolder(self.folder).newest_checkpoint() is not None
            if not has_checkpoint and self.jsonl.has_records_after(last_step or 0):
                rotated = self.jsonl.rotate()
                logger.warning(
                    f"{self.folder} has no checkpoint to resume from; the metrics of the previous launch are "
                    f"kept in {rotated}"
                )
            self.jsonl.truncate_after(-1 if last_step is None else last_step)
            if self.config.tensorboard:
                first_step = 0 if last_step is None else last_step + 1
                folder = RunFolder(self.folder).tensorboard
                self.tensorboard = SummaryWriter(str(folder), purge_step=first_step)
        self.reset_throughput()

    def names_at(self, step: int) -> set[str]:
        """Return the names of the metrics recorded for a step, on all ranks; a collective call."""
        names = [self.jsonl.names_at(step) if self.jsonl is not None else set()]
        torch.distributed.broadcast_object_list(names)
        return names[0]

    def reset_throughput(self) -> None:
        """Start a new interval of throughput(), which excludes the evaluation or checkpoint before it."""
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def throughput(self, flops: float) -> dict[str, float | None]:
        """Measure the step that ends now, and start the next interval.

        Args:
            flops: Training FLOPs of the step over all ranks, by the lengths of its documents.

        Returns:
            tokens/s over all ranks; model FLOPs utilization in percent of the bf16 peak, by `flops` and as if
            no documents were masked (None without a GPU); seconds; percentage of the time spent waiting for
            data; peak of allocated and of reserved memory in GiB (None without a GPU).
        """
        now = time.perf_counter()
        seconds = now - self.time_last_log
        self._num_steps += 1
        if self._num_steps == 1:
            self._first_step_end = now
        tokens_per_second = self.ntokens_since_last_log * self.world_size / seconds
        on_gpu = torch.cuda.is_available()
        whole_rows = self.num_flops_per_token * tokens_per_second
        # of the peak of all ranks, in percent per FLOP/s
        utilization = 100 / (self.gpu_peak_flops * self.world_size) if on_gpu else None
        record = {
            "tokens_per_second": tokens_per_second,
            "mfu_percent": utilization and utilization * flops / seconds,
            "mfu_whole_rows_percent": utilization and utilization * whole_rows,
            "step_seconds": seconds,
            "data_wait_percent": 100 * sum(self.data_loading_times) / seconds,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
        }
        self.reset_throughput()
        return record

    def record_launch(
        self, step: int, *, start: Mapping[str, Any], num_parameters: int, tokenizer_fingerprint: str
    ) -> None:
        """Write a record of the launch to metrics.jsonl: start, code, ranks, device, model and tokenizer.

        Args:
            step: Optimizer steps completed before the launch.
            start: What the launch started from and of which code and config it is, by name.
            num_parameters: Parameters of the whole model.
            tokenizer_fingerprint: Fingerprint of the run's tokenizer.
        """
        facts = {
            **start,
            "num_ranks": self.world_size,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU process",
            "flops_per_token": self.num_flops_per_token,
            "num_parameters": num_parameters,
            "tokenizer_fingerprint": tokenizer_fingerprint,
        }
        if self.jsonl is not None:
            self.jsonl.write({"step": step, "launch": facts})

    def progress(self, tokens: int) -> dict[str, float]:
        """Return the tokens trained on and the FLOPs spent, by whole rows, which every record has."""
        return {"tokens": tokens, "flops": float(tokens) * self.num_flops_per_token}

    def record_samples(self, step: int, samples: list[dict[str, str]], progress: Mapping[str, float]) -> None:
        """Write sampled texts to every sink.

        Args:
            step: Completed optimizer steps.
            samples: The "prompt" and the "text" that continues it, for each sample.
            progress: From progress().
        """
        if self.jsonl is not None:
            self.jsonl.write({"step": step, "samples": samples, **progress})
        if self.tensorboard is not None:
            for index, sample in enumerate(samples):
                # indented: Markdown shows the text verbatim
                text = (sample["prompt"] + "|" + sample["text"]).replace("\n", "\n    ")
                self.tensorboard.add_text(f"samples/{index}", "    " + text, step)
        if self.wandb_run is not None:
            import wandb

            table = wandb.Table(["step", "prompt", "text"])
            for sample in samples:
                table.add_data(step, sample["prompt"], sample["text"])
            self.wandb_run.log({"step": step, "samples": table})

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write metrics of a step to every sink.

        Args:
            step: Completed optimizer steps.
            metrics: Numbers, None for one that is not available, and texts; metrics.jsonl alone gets these.
        """
        if self.jsonl is not None:
            self.jsonl.write({"step": step, **metrics})
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb_run is not None:
            self.wandb_run.log({"step": step, **numbers})

    def mean_step_seconds(self) -> float | None:
        """Return the mean seconds per step without the first, which compiles; None before the second."""
        if self._num_steps < 2:
            return None
        return (time.perf_counter() - self._first_step_end) / (self._num_steps - 1)

    def log_step(self, step: int, metrics: Mapping[str, Any], last_step: int) -> None:
        """Log a line with progress, loss, throughput and the time left until last_step."""
        step_seconds = self.mean_step_seconds()
        mfu, whole_rows = metrics["mfu_percent"], metrics["mfu_whole_rows_percent"]
        memory = metrics["peak_memory_gib"]
        parts = [
            f"{format_progress(step, self.total_steps)} step {step}/{self.total_steps}",
            f"loss {metrics['loss']:.4f}",
            f"grad_norm {metrics['grad_norm']:.3f}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            f"MFU {mfu:.1f}% ({whole_rows:.1f}% by whole rows)" if mfu is not None else "",
            f"{memory:.1f} GiB" if memory is not None else "",
            f"{format_duration((last_step - step) * step_seconds)} left" if step_seconds is not None else "",
        ]
        logger.info("  ".join(part for part in parts if part))

    def close(self) -> None:
        """Flush and close every sink."""
        super().close()
        for sink in (self.jsonl, self.tensorboard):
            if sink is not None:
                sink.close()
        if self.wandb_run is not None:
            # closed while an exception propagates: mark the run as failed
            self.wandb_run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _start_wandb(folder: Path, name: str, resolved_config: Mapping[str, Any]) -> Any:
    import wandb

    # kept in the run folder: a resumed run continues its wandb run, one that starts over gets a new one
    id_file = RunFolder(folder).wandb_id_file
    if not id_file.exists() or RunFolder(folder).newest_checkpoint() is None:
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "parallax"),
            name=name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=dict(resolved_config),
        )
    except wandb.Error as error:
        raise UserError(
            f"metrics.wandb is true, but wandb does not start ({' '.join(str(error).split())}); log in with "
            "`wandb login`, set WANDB_MODE=offline in the environment, or metrics.wandb to false"
        ) from error
    # wandb's own steps only increase: it would drop the steps that a resumed run repeats
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
