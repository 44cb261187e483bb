"""Evaluation during training: held-out loss, sampled continuations, downstream tasks.

The held-out loss goes through the sharded model as training does. Samples and tasks get a plain copy of the
whole model on every rank, in the run's precision, which is freed afterwards. Where they fail, on whichever
rank, every rank gives them up, the failure goes on record, and training goes on.
"""

import contextlib
import gc
import math
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from data.titan import build_validation_loader
from data.tokenizer import Tokenizer
from eval.distributed import EvaluationError, RankSafeModel, run_on_all_ranks
from eval.held_out import HeldOutLoss, held_out_loss
from eval.report.task_records import Record, task_record
from eval.scoring.language_model import Qwen3Model
from eval.task_results import TaskResults, format_table
from models.generation.generate import generate
from models.qwen3 import Qwen3
from training.log import logger
from training.metrics import RunMetrics
from training.run_config import RunConfig

# of sampled continuations; our choice
TEMPERATURE = 0.8
TOP_P = 0.95


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm is no number."""


def check_tasks(run: RunConfig) -> None:
    """Find what is wrong with [eval]'s tasks before anything is trained.

    Args:
        run: The run; without tasks nothing is imported.

    Raises:
        ValueError: lm-evaluation-harness is missing, a task is unknown, or its documents are missing or
            malformed.
    """
    if not run.eval.tasks:
        return
    try:
        from eval.harness import load_tasks
    except ModuleNotFoundError as error:
        raise ValueError(
            f"eval.tasks names tasks, which need lm-evaluation-harness ({error}): "
            "pip install 'parallax-pretraining[eval]', or empty eval.tasks"
        ) from error
    folder = run.eval.tasks_data
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"eval.tasks_data is {folder!r}, but there is no such folder")
    try:
        load_tasks(run.eval.tasks, None if folder is None else Path(folder))
    except OSError as error:  # requests' errors are OSErrors, too
        raise ValueError(
            f"the documents of eval.tasks could not be fetched ({error}); give a folder with them as "
            "eval.tasks_data"
        ) from error


class Evaluator:
    """Evaluates the model of a run at the steps that [eval] names."""

    def __init__(
        self,
        run: RunConfig,
        *,
        tokenizer: Tokenizer,
        model: nn.Module,
        metrics: RunMetrics,
        device: torch.device,
    ) -> None:
        """Take the parts.

        Args:
            run: The run.
            tokenizer: Its tokenizer.
            model: The parallelized model.
            metrics: Where results go.
            device: Where the model lies.
        """
        self.run = run
        self.tokenizer = tokenizer
        self.model = model
        self.metrics = metrics
        self.device = device

    def tasks_are_due(self, step: int) -> bool:
        """Whether tasks are evaluated after a step; a checkpoint comes first."""
        every = self.run.eval.tasks_every
        is_due = step == self.run.training.last_step or (every is not None and step % every == 0)
        return bool(self.run.eval.tasks) and step > 0 and is_due

    def __call__(self, step: int, tokens: int, on_record: Collection[str] = ()) -> HeldOutLoss | None:
        """Evaluate what is due after a step; every result goes on record.

        Args:
            step: Optimizer steps taken.
            tokens: Tokens trained on.
            on_record: Names of what the record of this step holds already, which is not made again.

        Returns:
            The held-out loss if it was due and the run has held-out text.

        Raises:
            NonFiniteLossError: The held-out loss is no number.
        """
        every, ends = self.run.eval.every, (0, self.run.training.last_step)
        is_due = step in ends or (every is not None and step % every == 0)
        has_loss = is_due and "validation_loss" not in on_record
        has_samples = is_due and bool(self.run.eval.sample_prompts) and "samples" not in on_record
        has_tasks = self.tasks_are_due(step) and "task_seconds" not in on_record
        if not (has_loss or has_samples or has_tasks):
            return None
        progress = self.metrics.progress(tokens)
        result = self._held_out(step, progress) if has_loss else None
        if has_tasks or has_samples:
            self._evaluate_copy(step, progress, has_samples=has_samples, has_tasks=has_tasks)
        self.metrics.restart_clock()
        return result

    def _held_out(self, step: int, progress: Record) -> HeldOutLoss | None:
        if self.run.data.validation is None:
            return None
        settings = self.run.training
        loader = build_validation_loader(
            self.run.data,
            tokenizer=self.tokenizer,
            seq_len=settings.seq_len,
            local_batch_size=settings.local_batch_size,
            max_tokens=self.run.eval.max_tokens,
            dp_rank=dist.get_rank(),
            dp_world_size=dist.get_world_size(),
        )
        self.model.eval()
        with contextlib.closing(loader):
            result = held_out_loss(
                self.model,
                loader,
                vocab_size=self.run.model.vocab_size,
                max_seqlen=settings.seq_len,
                device=self.device,
            )
        self.model.train()
        if not math.isfinite(result.loss):
            raise NonFiniteLossError(
                f"step {step}: the held-out loss is {result.loss}; lower the learning rate"
            )
        names = {"loss": "validation_loss", "num_tokens": "validation_tokens"}
        record = {names.get(k, k): v for k, v in asdict(result).items()}
        self.metrics.record(step, {**record, "validation_perplexity": result.perplexity, **progress})
        loss = f"{result.loss:.4f} nats/token  perplexity {result.perplexity:.2f}"
        logger.info(f"step {step}  held-out loss {loss}  ({result.num_tokens:,} tokens)")
        return result

    def _evaluate_copy(self, step: int, progress: Record, *, has_samples: bool, has_tasks: bool) -> None:
        """Sample and evaluate tasks; a failure of one leaves the other."""
        work = {"sample_prompts": self._sample} if has_samples else {}
        work |= {"tasks": self._evaluate_tasks} if has_tasks else {}
        # training must not see that somebody drew or seeded random numbers
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                model = self._whole_model()
            except EvaluationError as error:
                self._record_failure(step, "a copy of the whole model", error, progress)
                return
            for name, evaluate in work.items():
                try:
                    evaluate(model, step, progress)
                except EvaluationError as error:
                    self._record_failure(step, f"eval.{name}", error, progress)

    def _record_failure(self, step: int, name: str, error: EvaluationError, progress: Record) -> None:
        # a traceback may hold the model's copy in a cycle, and in training the collector runs rarely
        gc.collect()
        self.metrics.record(step, {"eval_error": f"{name}: {error}", **progress})
        logger.info(f"step {step}  {name} failed; training goes on")

    def _whole_model(self) -> Qwen3:
        """A copy of the model without shards, in the run's precision, on every rank."""
        model = run_on_all_ranks(self._allocate, self.device)
        weights = self.model.state_dict()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                weight = weights[name].to(parameter.dtype)
                parameter.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)
        return model

    def _allocate(self) -> Qwen3:
        with torch.device("meta"):
            model = Qwen3(self.run.model).to(getattr(torch, self.run.training.precision))
        model.materialize(self.device)
        # what gathering the largest weight takes besides: ranks must know before they gather that it is there
        torch.empty(2 * max(p.numel() for p in model.parameters()), dtype=torch.float32, device=self.device)
        return model.eval().requires_grad_(False)

    def _sample(self, model: Qwen3, step: int, progress: Record) -> None:
        """Continue the prompts, on every rank alike, so that none waits for another."""
        settings, end = self.run.eval, self.tokenizer.end_of_document_id

        def sample() -> list[str]:
            found = generate(
                model,
                self.tokenizer.encode_batch(settings.sample_prompts),
                max_new_tokens=settings.sample_tokens,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                seed=self.run.run.seed,
                stop_ids=(end,),
            )
            return [self.tokenizer.decode([t for t in each.tokens if t != end]) for each in found]

        texts = run_on_all_ranks(sample, self.device)
        pairs = zip(settings.sample_prompts, texts, strict=True)
        samples = [{"prompt": prompt, "text": text} for prompt, text in pairs]
        self.metrics.record_samples(step, samples, progress)
        for sampled in samples:
            logger.info(f"step {step}  sample {sampled['prompt']!r} -> {sampled['text'][:200]!r}")

    def _evaluate_tasks(self, model: Qwen3, step: int, progress: Record) -> None:
        from eval.harness import evaluate_tasks  # slow to import, and an extra

        settings = self.run.eval
        rank_safe = RankSafeModel(Qwen3Model(model, max_length=self.run.training.seq_len), self.device)

        def evaluate() -> TaskResults:
            data = None if settings.tasks_data is None else Path(settings.tasks_data)
            limit = settings.tasks_limit
            results = evaluate_tasks(rank_safe, self.tokenizer, settings.tasks, data=data, limit=limit)
            rank_safe.finish()
            return results

        results = run_on_all_ranks(evaluate, self.device)
        record = task_record(asdict(results))
        self.metrics.record(step, {**record, "task_seconds": results.seconds, **progress})
        logger.info(f"step {step}  tasks\n{format_table(results)}")
