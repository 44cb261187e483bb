"""Evaluation during training: held-out loss, diagnostics, sampled continuations, downstream tasks.

The held-out loss is computed with the sharded model, as in training. Samples and tasks use an unsharded copy
of the model on every rank, in the run's precision, which is freed afterwards. If they fail on any rank, they
are stopped on all ranks, the error is recorded, and training continues.
"""

import gc
import math
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from data.progress import Progress
from data.titan import build_validation_loader
from data.tokenizer import Tokenizer
from eval.diagnostics.record import LAYERS
from eval.distributed import EvaluationError, RankSafeModel, is_main_rank, run_on_all_ranks
from eval.held_out import HeldOutLoss, held_out_loss
from eval.report.task_records import Record, task_record
from eval.scoring.language_model import Qwen3Model
from eval.task_results import TaskResults, format_table
from models.generation.generate import generate
from models.generation.text_stream import decode_behind
from models.qwen3 import Qwen3
from models.run_folder import RunFolder
from training.average import WeightAverage
from training.diagnostics import Diagnostics
from training.due import is_due
from training.log import logger
from training.metrics import RunMetrics
from training.non_finite import NonFiniteLossError
from training.rank_monitor import RankMonitor
from training.run_config import RunConfig

# of the sampled continuations; our choice
TEMPERATURE = 0.8
TOP_P = 0.95


def log_progress(step: int, name: str) -> Progress:
    """Return a progress that logs lines: one that moves would mix with those of other ranks."""
    progress = Progress(lambda line: logger.info(f"step {step}  {line}"), is_on=is_main_rank())
    progress.start(name)
    return progress


class Evaluator:
    """Evaluates the model at the steps that [eval] names.

    Args:
        config: The run.
        tokenizer: Its tokenizer.
        model: The parallelized model.
        average: The average of the weights that training keeps, whose held-out loss is evaluated too; or
            None.
        metrics: Where results are recorded.
        monitor: Told of each phase.
        device: Device of the model.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        model: nn.Module,
        average: WeightAverage | None,
        metrics: RunMetrics,
        monitor: RankMonitor,
        device: torch.device,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.model = model
        self.average = average
        self.metrics = metrics
        self.monitor = monitor
        self.device = device
        self.diagnostics = Diagnostics(config, tokenizer, model, metrics, device)

    def are_tasks_due(self, step: int) -> bool:
        """Return whether tasks are evaluated after a step; a checkpoint is written before."""
        due = step == self.config.training.last_step or is_due(step, self.config.eval.tasks_every)
        return bool(self.config.eval.tasks) and step > 0 and due

    def is_due(self, step: int) -> bool:
        """Return whether anything is evaluated after a step."""
        return self._is_loss_due(step) or self.are_tasks_due(step) or self.diagnostics.is_due(step)

    def _is_loss_due(self, step: int) -> bool:
        return step in (0, self.config.training.last_step) or is_due(step, self.config.eval.every)

    def evaluate(self, step: int, tokens: int, recorded: Collection[str] = ()) -> HeldOutLoss | None:
        """Run and record the evaluations that are due after a step; a collective call.

        Args:
            step: Completed optimizer steps.
            tokens: Tokens trained on.
            recorded: Names of the metrics already recorded for this step, which are not computed again.

        Returns:
            The held-out loss if it is due and the run has held-out documents.

        Raises:
            NonFiniteLossError: The held-out loss is NaN or Inf.
        """
        due = self._is_loss_due(step)  # and that of samples
        has_loss = due and "validation_loss" not in recorded
        has_samples = due and bool(self.config.eval.sample_prompts) and "samples" not in recorded
        has_tasks = self.are_tasks_due(step) and "task_seconds" not in recorded
        has_diagnostics = self.diagnostics.is_due(step) and LAYERS not in recorded
        if not (has_loss or has_samples or has_tasks or has_diagnostics):
            return None
        progress = self.metrics.progress(tokens)
        result = self._evaluate_held_out(step, progress) if has_loss else None
        if has_diagnostics:
            self.monitor.enter_slow("diagnostics")
            try:
                self.diagnostics.measure(step, progress)
            except EvaluationError as error:
                self._record_failure(step, "diagnostics", str(error), progress)
        if has_tasks or has_samples:
            self._evaluate_unsharded(step, progress, has_samples=has_samples, has_tasks=has_tasks)
        self.metrics.reset_throughput()
        return result

    def _evaluate_held_out(self, step: int, progress: Record) -> HeldOutLoss | None:
        if self.config.data.validation is None:
            return None
        self.monitor.enter_slow("held-out loss")
        result = self._held_out_loss(step)
        names = {
            "loss": "validation_loss",
            "standard_error": "validation_stderr",
            "num_tokens": "validation_tokens",
            "num_documents": "validation_documents",
            "num_cut_documents": "validation_cut_documents",
        }
        record = {names.get(k, k): v for k, v in asdict(result).items()}
        record["validation_perplexity"] = result.perplexity
        lines = [f"step {step}  held-out loss {result} ({result.counts})"]
        if self.average is not None and self.average.has_started(step):
            self.monitor.enter_slow("held-out loss of the average")
            with self.average.swapped_in():
                averaged = self._held_out_loss(step)
            record["average_validation_loss"] = averaged.loss
            record["average_validation_stderr"] = averaged.standard_error
            record["average_validation_perplexity"] = averaged.perplexity
            lines.append(f"step {step}  held-out loss of the average {averaged}")
        self.metrics.record(step, {**record, **progress})
        for line in lines:
            logger.info(line)
        return result

    def _held_out_loss(self, step: int) -> HeldOutLoss:
        """Compute the held-out loss of the model's present weights."""
        training = self.config.training
        loader = build_validation_loader(
            self.config.data,
            tokenizer=self.tokenizer,
            seq_len=training.seq_len,
            local_batch_size=training.local_batch_size,
            max_tokens=self.config.eval.max_tokens,
            kept_in=RunFolder(Path(self.config.run.folder)).held_out,
            dp_rank=dist.get_rank(),
            dp_world_size=dist.get_world_size(),
        )
        self.model.eval()
        result = held_out_loss(
            self.model,
            loader,
            vocab_size=self.config.model.vocab_size,
            max_seqlen=training.seq_len,
            device=self.device,
            progress=log_progress(step, "held-out loss"),
        )
        self.model.train()
        if not math.isfinite(result.loss):
            raise NonFiniteLossError(
                f"step {step}: the held-out loss is {result.loss}; lower the learning rate"
            )
        return result

    def _evaluate_unsharded(self, step: int, progress: Record, *, has_samples: bool, has_tasks: bool) -> None:
        """Generate samples and evaluate tasks; each is attempted if the other fails."""
        work = {"sample_prompts": self._sample} if has_samples else {}
        work |= {"tasks": self._evaluate_tasks} if has_tasks else {}
        self.monitor.enter_slow("gathering the model")
        # evaluation draws and seeds random numbers; training must not depend on it
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                model = self._gather_model()
            except EvaluationError as error:
                for name in work:
                    self._record_failure(
                        step, f"eval.{name}", f"no copy of the whole model: {error}", progress
                    )
                return
            for name, evaluate in work.items():
                self.monitor.enter_slow(f"eval.{name}")
                try:
                    evaluate(model, step, progress)
                except EvaluationError as error:
                    self._record_failure(step, f"eval.{name}", str(error), progress)

    def _record_failure(self, step: int, name: str, error: str, progress: Record) -> None:
        # the traceback may keep the copy of the model alive in a cycle, and training collects garbage rarely
        gc.collect()
        self.metrics.record(step, {"eval_error": f"{name}: {error}", **progress})
        logger.info(f"step {step}  {name} failed; training continues")

    def _gather_model(self) -> Qwen3:
        """Return an unsharded copy of the model, in the run's precision, on every rank."""
        model = run_on_all_ranks(self._allocate_model, self.device)
        weights = self.model.state_dict()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                weight = weights[name].to(parameter.dtype)
                parameter.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)
        return model

    def _allocate_model(self) -> Qwen3:
        with torch.device("meta"):
            model = Qwen3(self.config.model).to(getattr(torch, self.config.training.precision))
        model.materialize(self.device)
        # the buffers for gathering the largest weight: run out of memory here, before the collective calls
        torch.empty(2 * max(p.numel() for p in model.parameters()), dtype=torch.float32, device=self.device)
        return model.eval().requires_grad_(False)

    def _sample(self, model: Qwen3, step: int, progress: Record) -> None:
        """Generate continuations of the prompts, the same on every rank, and record them."""
        settings, end = self.config.eval, self.tokenizer.end_of_document_id

        def sample() -> list[str]:
            prompts = self.tokenizer.encode_prompts(settings.sample_prompts)
            found = generate(
                model,
                prompts,
                max_new_tokens=settings.sample_tokens,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                seed=self.config.run.seed,
                stop_ids=(end,),
            )
            return [
                decode_behind(self.tokenizer.decode, prompt, [t for t in each.tokens if t != end])
                for prompt, each in zip(prompts, found, strict=True)
            ]

        texts = run_on_all_ranks(sample, self.device)
        pairs = zip(settings.sample_prompts, texts, strict=True)
        samples = [{"prompt": prompt, "text": text} for prompt, text in pairs]
        self.metrics.record_samples(step, samples, progress)
        for sampled in samples:
            logger.info(f"step {step}  sample {sampled['prompt']!r} -> {sampled['text'][:200]!r}")

    def _evaluate_tasks(self, model: Qwen3, step: int, progress: Record) -> None:
        from eval.harness import evaluate_tasks  # slow to import, and an optional dependency

        settings = self.config.eval
        rank_safe = RankSafeModel(Qwen3Model(model, max_length=self.config.training.seq_len), self.device)

        def evaluate() -> TaskResults:
            data = None if settings.tasks_data is None else Path(settings.tasks_data)
            results = evaluate_tasks(
                rank_safe,
                self.tokenizer,
                settings.tasks,
                data=data,
                limit=settings.tasks_limit,
                num_fewshot=settings.tasks_num_fewshot,
                progress=log_progress(step, "tasks"),
            )
            rank_safe.finish()
            return results

        results = run_on_all_ranks(evaluate, self.device)
        record = task_record(asdict(results))
        self.metrics.record(step, {**record, "task_seconds": results.seconds, **progress})
        logger.info(f"step {step}  tasks\n{format_table(results)}")
