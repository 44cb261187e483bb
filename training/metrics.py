"""Metrics of a run: every step in a JSONL, a console line now and then, TensorBoard and wandb on request."""

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

from models.run_folder import RunFolder
from training.log import logger
from training.resume import has_checkpoint
from training.run_config import MetricsConfig

GIB = 2**30
BAR_WIDTH = 20


def duration(seconds: float) -> str:
    """Seconds as 1d02h, 3h05m, 4m07s or 9s."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{total % 60:02}s" if minutes else f"{total}s"


def progress_bar(step: int, steps: int) -> str:
    """[######..............]  30% of a run."""
    filled = BAR_WIDTH * step // steps
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {100 * step // steps:3}%"


class JsonlWriter:
    """The run's record: one JSON object a line, each with its step."""

    def __init__(self, path: Path) -> None:
        """Open for appending.

        Args:
            path: The file.
        """
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line; it's on its way to the disk when this returns."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _lines(self) -> Iterator[tuple[str, int | None]]:
        """Each line with its step, None where it is damaged."""
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield line, int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                yield line, None

    def forget_after(self, step: int) -> None:
        """Drop what a run wrote past the checkpoint that it now continues from."""
        self._file.close()
        kept = []
        for line, its_step in self._lines():
            if its_step is None:
                logger.warning(f"{self.path}: dropped a damaged line: {line[:80]}")
            elif its_step <= step:
                kept.append(line + "\n")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def has_after(self, step: int) -> bool:
        """Whether a later step is on record."""
        return any(its_step is not None and its_step > step for _, its_step in self._lines())

    def set_aside(self) -> Path:
        """Begin the file anew; gives the first free name <file>.1, .2, ..., under which the record stays."""
        self._file.close()
        names = (self.path.with_name(f"{self.path.name}.{n}") for n in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        os.replace(self.path, aside)
        self._file = self.path.open("a", encoding="utf-8")
        return aside

    def names_at(self, step: int) -> set[str]:
        """What is on record for a step."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return {name for record in map(json.loads, lines) if record["step"] == step for name in record}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunMetrics(MetricsProcessor):
    """torchtitan's metrics processor with our sinks; rank 0 writes."""

    def __init__(
        self,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        *,
        config: MetricsConfig,
        resolved_config: Mapping[str, Any],
    ) -> None:
        """Open the sinks.

        Args:
            job_config: torchtitan's config; its own sinks are off.
            parallel_dims: Degrees of parallelism.
            config: The [metrics] table.
            resolved_config: The whole run, for wandb.
        """
        super().__init__(job_config, parallel_dims)
        self.config = config
        self.world_size = parallel_dims.world_size
        self.is_writer = torch.distributed.get_rank() == 0
        self.total_steps = job_config.training.steps
        self.folder = Path(job_config.job.dump_folder)
        self._num_steps = 0  # of this launch
        self._first_step_end = 0.0
        self.jsonl = self.wandb_run = None
        self.tensorboard: SummaryWriter | None = None  # from resume() on
        if self.is_writer:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.jsonl = JsonlWriter(RunFolder(self.folder).metrics_file)
            if config.wandb:
                self.wandb_run = _start_wandb(self.folder, job_config.job.description, resolved_config)

    def resume(self, step: int) -> None:
        """Continue the record after a step, -1 for a start; the record of a run that starts over is kept."""
        if self.jsonl is not None:
            if not has_checkpoint(self.folder) and self.jsonl.has_after(max(step, 0)):
                aside = self.jsonl.set_aside()
                logger.warning(
                    f"no checkpoint in {self.folder}; starting over, the earlier record is {aside}"
                )
            self.jsonl.forget_after(step)
            if self.config.tensorboard:
                self.tensorboard = SummaryWriter(str(RunFolder(self.folder).tensorboard), purge_step=step + 1)
        self.restart_clock()

    def names_at(self, step: int) -> set[str]:
        """What is on record for a step, on every rank."""
        names = [self.jsonl.names_at(step) if self.jsonl is not None else set()]
        torch.distributed.broadcast_object_list(names)
        return names[0]

    def restart_clock(self) -> None:
        """Begin a new interval of throughput; an evaluation or a checkpoint before it is no training."""
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def throughput(self) -> dict[str, float | None]:
        """Throughput of the step that ends now, over all ranks; begins the next interval.

        Returns:
            tokens/s, model FLOPs utilization in percent of the bf16 peak (None without a GPU), seconds,
            percent of the time spent waiting for data, and peak memory in GiB (None without a GPU).
        """
        now = time.perf_counter()
        seconds = now - self.time_last_log
        self._num_steps += 1
        if self._num_steps == 1:
            self._first_step_end = now
        tokens_per_second = self.ntokens_since_last_log * self.world_size / seconds
        on_gpu = torch.cuda.is_available()
        flops = self.num_flops_per_token * tokens_per_second / self.world_size
        record = {
            "tokens_per_second": tokens_per_second,
            "mfu_percent": 100 * flops / self.gpu_peak_flops if on_gpu else None,
            "step_seconds": seconds,
            "data_wait_percent": 100 * sum(self.data_loading_times) / seconds,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
        }
        self.restart_clock()
        return record

    def record_launch(self, step: int, *, num_parameters: int, tokenizer_fingerprint: str) -> None:
        """Write to the JSONL what holds for all that this launch records, for eval/report/__main__.py.

        Args:
            step: Optimizer steps taken before it.
            num_parameters: Of the whole model.
            tokenizer_fingerprint: Of the run's tokenizer.
        """
        facts = {
            "num_ranks": self.world_size,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU process",
            "flops_per_token": self.num_flops_per_token,
            "num_parameters": num_parameters,
            "tokenizer_fingerprint": tokenizer_fingerprint,
        }
        if self.jsonl is not None:
            self.jsonl.write({"step": step, "launch": facts})

    def progress(self, tokens: int) -> dict[str, float]:
        """Where a record stands: tokens trained on, and the training FLOPs that they took."""
        return {"tokens": tokens, "flops": float(tokens) * self.num_flops_per_token}

    def record_samples(self, step: int, samples: list[dict[str, str]], progress: Mapping[str, float]) -> None:
        """Write sampled texts to every sink.

        Args:
            step: Optimizer steps taken.
            samples: "prompt" and "text", its continuation, of each.
            progress: From progress().
        """
        if self.jsonl is not None:
            self.jsonl.write({"step": step, "samples": samples, **progress})
        if self.tensorboard is not None:
            for index, sample in enumerate(samples):
                # indented, so that Markdown leaves the text as it is
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
            step: Optimizer steps taken.
            metrics: Numbers, None where there is nothing to say, and texts, which go to the JSONL alone.
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
        """Mean time of a step since the first one of this launch, which compiles; None before a second."""
        if self._num_steps < 2:
            return None
        return (time.perf_counter() - self._first_step_end) / (self._num_steps - 1)

    def console(self, step: int, metrics: Mapping[str, Any], last_step: int) -> None:
        """Print a step's line: progress, loss, speed, time left until last_step."""
        step_seconds = self.mean_step_seconds()
        mfu, memory = metrics["mfu_percent"], metrics["peak_memory_gib"]
        parts = [
            f"{progress_bar(step, self.total_steps)} step {step}/{self.total_steps}",
            f"loss {metrics['loss']:.4f}",
            f"grad_norm {metrics['grad_norm']:.3f}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            f"MFU {mfu:.1f}%" if mfu is not None else "",
            f"{memory:.1f} GiB" if memory is not None else "",
            f"{duration((last_step - step) * step_seconds)} left" if step_seconds is not None else "",
        ]
        logger.info("  ".join(part for part in parts if part))

    def close(self) -> None:
        """Flush and close every sink."""
        super().close()
        for sink in (self.jsonl, self.tensorboard):
            if sink is not None:
                sink.close()
        if self.wandb_run is not None:
            # a run that fails closes its sinks on the way out, and is to be seen as failed
            self.wandb_run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _start_wandb(folder: Path, name: str, resolved_config: Mapping[str, Any]) -> Any:
    import wandb

    # the id is the folder's, so that a resumed run goes on in the same wandb run
    id_file = RunFolder(folder).wandb_id_file
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "parallax"),
        name=name,
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(folder),
        config=dict(resolved_config),
    )
    # wandb's own steps never go back, and would drop those that a resumed run takes again
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
