"""Metrics of a run: metrics.jsonl, progress lines on the console, and optionally TensorBoard and wandb."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from data.progress import format_duration, format_progress
from disk import DiskFullError, describe_free
from errors import UserError
from eval.diagnostics.record import means_of_layers
from eval.report.step_ranges import format_ranges
from models.run_folder import RunFolder
from training import wandb_run
from training.log import logger
from training.memory import GIB
from training.metrics_file import JsonlWriter
from training.run_config import MetricsConfig

# before the slash in names of the run's own
_OWN_GROUPS = (
    *("lr/", "weight_decay/", "update_rms/", "update_sv_min/", "update_sv_median/", "update_sv_max/"),
    *("tasks/", "samples/", "diagnostics/"),
)


def check_scalar_names(names: Iterable[str]) -> None:
    """Refuse names for log_scalar that the run may write, in this record or another.

    All names of the run are without a slash, or have one of _OWN_GROUPS before it: a report, and a resume,
    would take a scalar called "validation_loss" for the held-out loss, and one called "step" for the step.

    Raises:
        UserError: Names the first one.
    """
    for name in sorted(names):
        if "/" not in name or name.startswith(_OWN_GROUPS):
            raise UserError(
                f'log_scalar("{name}"): names without a slash, and {", ".join(_OWN_GROUPS)} are those of '
                f'the run itself; want a group of your own, such as "my/{name}"'
            )


class RunMetrics(MetricsProcessor):
    """torchtitan's metrics processor with our sinks; the main rank writes.

    Args:
        job_config: torchtitan's config; its own sinks are disabled.
        parallel_dims: Degrees of parallelism.
        config: The [metrics] table.
        resolved_config: The whole config of the run, for wandb.
        has_diagnostics: Whether the run records diagnostics of the attention.

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
        has_diagnostics: bool = False,
    ) -> None:
        super().__init__(job_config, parallel_dims)
        self.config = config
        self.world_size = parallel_dims.world_size
        self.is_main_rank = torch.distributed.get_rank() == 0
        self.total_steps = job_config.training.steps
        self.folder = Path(job_config.job.dump_folder)
        self._num_steps = 0  # of this launch
        self._first_step_end = 0.0
        self._interval_start: torch.cuda.Event | None = None
        self.jsonl = self.diagnostics_jsonl = self.wandb_run = None
        self.tensorboard: SummaryWriter | None = None  # set by start_recording
        self._ended: set[str] = set()  # sinks that a full disk has ended
        if self.is_main_rank:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.jsonl = JsonlWriter(RunFolder(self.folder).metrics_file)
                diagnostics_file = RunFolder(self.folder).diagnostics_file
                # a file of an earlier launch is cut back even if this one adds nothing to it
                if has_diagnostics or diagnostics_file.exists():
                    self.diagnostics_jsonl = JsonlWriter(diagnostics_file)
            except OSError as error:
                raise UserError(
                    f"run.folder is {str(self.folder)!r}, which cannot be written ({error}); give another one"
                ) from error
            if config.wandb:
                self._guard("wandb", lambda: self._start_wandb(job_config.job.description, resolved_config))

    def _guard(self, sink: str, write: Callable[[], Any]) -> None:
        """Write to a sink; a full disk ends this sink with a warning, and not the training."""
        if sink in self._ended:
            return
        try:
            write()
        except (OSError, DiskFullError) as error:
            self._ended.add(sink)
            logger.warning(
                f"{sink} ends here and training continues: {error}, {describe_free(self.folder)} in "
                f"{self.folder}; it begins again at the next launch"
            )

    def _write_record(self, record: Mapping[str, Any]) -> None:
        self._append(self.jsonl, record)

    def _append(self, jsonl: JsonlWriter | None, record: Mapping[str, Any]) -> None:
        if jsonl is not None:
            self._guard(jsonl.path.name, lambda: jsonl.write(record))

    def _start_wandb(self, name: str, resolved_config: Mapping[str, Any]) -> None:
        self.wandb_run = wandb_run.start(self.folder, name, resolved_config)

    def _start_tensorboard(self, first_step: int) -> None:
        threading.excepthook = _ignore_tensorboard_thread
        self.tensorboard = SummaryWriter(str(RunFolder(self.folder).tensorboard), purge_step=first_step)

    def start_recording(self, last_step: int | None, first_step: int = 1) -> None:
        """Delete the records after the step that a launch resumes from, and start recording.

        A record without a checkpoint to resume from is kept under another name.

        Args:
            last_step: The last completed step; None for a run that starts at step 0, and evaluates there.
            first_step: First step of this run, which a branch takes after its checkpoint's; a warning names
                the steps since then that have no record.
        """
        if self.jsonl is not None:
            self._cut_back(self.jsonl, last_step)
            if self.diagnostics_jsonl is not None:
                self._cut_back(self.diagnostics_jsonl, last_step)
            missing = self.jsonl.missing_steps(first_step, last_step or 0)
            if missing:
                logger.warning(
                    f"{self.jsonl.path} has no record of {format_ranges(missing)}, which were trained: "
                    "reports will show a gap; stop now and copy the file back if you have it elsewhere"
                )
            if self.config.tensorboard:
                purge_step = 0 if last_step is None else last_step + 1
                self._guard("tensorboard", lambda: self._start_tensorboard(purge_step))
        self.reset_throughput()

    def _cut_back(self, jsonl: JsonlWriter, last_step: int | None) -> None:
        """Delete the records after a step, or keep all under another name if there is no checkpoint."""
        has_checkpoint = RunFolder(self.folder).newest_checkpoint() is not None
        if not has_checkpoint and jsonl.has_records_after(last_step or 0):
            rotated = jsonl.rotate()
            logger.warning(
                f"{self.folder} has no checkpoint to resume from; the metrics of the previous launch are "
                f"kept in {rotated}"
            )
        jsonl.truncate_after(-1 if last_step is None else last_step)

    def names_at(self, step: int) -> set[str]:
        """Return the names recorded for a step, diagnostics' too, on all ranks; a collective call."""
        files = [each for each in (self.jsonl, self.diagnostics_jsonl) if each is not None]
        names = [{name for each in files for name in each.names_at(step)}]
        torch.distributed.broadcast_object_list(names)
        return names[0]

    def reset_throughput(self) -> None:
        """Start a new interval of throughput(), which excludes the evaluation or checkpoint before it."""
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()
        self._start_interval(None)

    def _start_interval(self, start: torch.cuda.Event | None) -> None:
        """Start an interval, on a GPU where `start` was, or where it is now."""
        self.time_last_log = time.perf_counter()
        if start is None and torch.cuda.is_available():
            start = torch.cuda.Event(enable_timing=True)
            start.record()
        self._interval_start = start

    def launch_measures(self, graph_bytes: int) -> tuple[float, dict[str, float | None]]:
        """Measure what the host knows when it has launched a step, and begin with the next one.

        Args:
            graph_bytes: Memory that CUDA graphs use while they run, which torch counts only at their capture.

        Returns:
            Seconds of waiting for data, and for metrics.jsonl the peaks of allocated and of reserved memory
            in GiB (None without a GPU).
        """
        seconds = sum(self.data_loading_times)
        self.data_loading_times.clear()
        on_gpu = torch.cuda.is_available()
        peak = max(torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() + graph_bytes)
        memory = {
            "peak_memory_gib": peak / GIB if on_gpu else None,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
        }
        self.device_memory_monitor.reset_peak_stats()
        return seconds, memory

    def throughput(
        self, num_tokens: int, flops: float, data_seconds: float, end: torch.cuda.Event | None = None
    ) -> dict[str, float | None]:
        """Measure the step that ends now, and start the next interval.

        Args:
            num_tokens: Tokens of the step over all ranks.
            flops: Training FLOPs of the step over all ranks, by the lengths of its documents.
            data_seconds: From launch_measures.
            end: The end of the step on a GPU, which has been waited for; the host may be further on.

        Returns:
            tokens/s over all ranks; model FLOPs utilization in percent of the bf16 peak, by `flops` and as if
            no documents were masked (None without a GPU); seconds; percentage of the time spent waiting for
            data.
        """
        now = time.perf_counter()
        seconds = now - self.time_last_log
        if end is not None and self._interval_start is not None:
            seconds = self._interval_start.elapsed_time(end) / 1e3
        self._num_steps += 1
        if self._num_steps == 1:
            self._first_step_end = now
        tokens_per_second = num_tokens / seconds
        whole_rows = self.num_flops_per_token * tokens_per_second
        # of the peak of all ranks, in percent per FLOP/s
        on_gpu = torch.cuda.is_available()
        utilization = 100 / (self.gpu_peak_flops * self.world_size) if on_gpu else None
        self._start_interval(end)
        return {
            "tokens_per_second": tokens_per_second,
            "mfu_percent": utilization and utilization * flops / seconds,
            "mfu_whole_rows_percent": utilization and utilization * whole_rows,
            "step_seconds": seconds,
            "data_wait_percent": 100 * data_seconds / seconds,
        }

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
        self._write_record({"step": step, "launch": facts})

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
        self._write_record({"step": step, "samples": samples, **progress})
        if self.tensorboard is not None:
            self._guard("tensorboard", lambda: _add_texts(self.tensorboard, step, samples))
        if self.wandb_run is not None:
            self._guard("wandb", lambda: wandb_run.log_samples(self.wandb_run, step, samples))

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write metrics of a step to every sink.

        Args:
            step: Completed optimizer steps.
            metrics: Numbers, None for one that is not available, and texts; metrics.jsonl alone gets these.
        """
        self._write_record({"step": step, **metrics})
        self._record_numbers(step, metrics)

    def record_diagnostics(self, step: int, record: Mapping[str, Any]) -> None:
        """Append to diagnostics.jsonl, and write the means of layers to the other sinks.

        Args:
            step: Completed optimizer steps.
            record: From eval.diagnostics.record.make_record.
        """
        self._append(self.diagnostics_jsonl, {"step": step, **record})
        self._record_numbers(step, means_of_layers(record))

    def _record_numbers(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if self.tensorboard is not None:
            self._guard("tensorboard", lambda: _add_scalars(self.tensorboard, step, numbers))
        if self.wandb_run is not None:
            self._guard("wandb", lambda: self.wandb_run.log({"step": step, **numbers}))

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
        for jsonl in (self.jsonl, self.diagnostics_jsonl):
            if jsonl is not None:
                jsonl.close()
        if self.tensorboard is not None:
            self._guard("tensorboard", self.tensorboard.close)
        if self.wandb_run is not None:
            # closed while an exception propagates: mark the run as failed
            exit_code = 0 if sys.exc_info()[0] is None else 1
            self._guard("wandb", lambda: self.wandb_run.finish(exit_code=exit_code))


def _add_scalars(writer: Any, step: int, numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)


def _add_texts(writer: Any, step: int, samples: list[dict[str, str]]) -> None:
    for index, sample in enumerate(samples):
        # indented: Markdown shows the text verbatim
        text = (sample["prompt"] + "|" + sample["text"]).replace("\n", "\n    ")
        writer.add_text(f"samples/{index}", "    " + text, step)


def _ignore_tensorboard_thread(failure: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, unless it is TensorBoard's, whose error its next write raises."""
    if type(failure.thread).__module__.startswith("tensorboard.") and failure.exc_type is not SystemExit:
        return
    threading.__excepthook__(failure)
