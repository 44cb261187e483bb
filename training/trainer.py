"""torchtitan's Trainer with our parts.

The loss is inside the model, every step is on record, a checkpoint comes before an evaluation of tasks, and a
signal ends the run with a checkpoint.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.train
from torch.distributed.tensor import DTensor
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols import train_spec
from torchtitan.tools.profiling import maybe_enable_profiling
from torchtitan.train import Trainer as TitanTrainer

from data.titan import TitanLoader
from data.tokenizer import Tokenizer
from eval.held_out import HeldOutLoss
from models.checkpoint import load_weights
from models.run_folder import RunFolder, find_checkpoint
from models.run_tokenizer import copy_tokenizer
from optimizers.titan import ParamGroupOptimizers, ParamGroupScheduler
from tokens import IGNORE_INDEX
from training.agreement import check_shared
from training.branch import branch_warnings, checkpoint_step, resume_warnings
from training.checkpoints import RunCheckpoints
from training.evaluation import Evaluator, NonFiniteLossError
from training.job import MODEL_NAME, to_job_config
from training.log import logger
from training.metrics import RunMetrics
from training.resume import other_tokenizer, remove_partial_checkpoints
from training.run_config import RunConfig
from training.signals import StopRequest
from training.titan import build_train_spec

MicroBatch = tuple[dict[str, torch.Tensor], torch.Tensor]


class Trainer(TitanTrainer):
    """Trains one run. torchtitan sets up processes, meshes, the model and checkpoints; the loop is here."""

    def __init__(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        """Build everything that the run names.

        Args:
            run: The run; RANK, WORLD_SIZE and LOCAL_RANK are in the environment, as torchrun sets them.
            tokenizer: From training.titan.check_run.
        """
        self.run = run
        world_size = int(os.environ["WORLD_SIZE"])
        train_spec._extra_train_specs[MODEL_NAME] = build_train_spec(run, tokenizer)
        torchtitan.train.CheckpointManager = RunCheckpoints  # which it makes itself
        super().__init__(to_job_config(run, world_size))
        # FSDP2's policy sets the precision on any number of ranks; torchtitan would use autocast on one
        self.model = self.model_parts[0]
        self.folder = RunFolder(Path(run.run.folder))
        self.run_tokenizer = tokenizer
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self.stop = StopRequest()
        self.tokens = 0
        assert isinstance(self.metrics_processor, RunMetrics)
        assert isinstance(self.lr_schedulers, ParamGroupScheduler)
        assert isinstance(self.optimizers, ParamGroupOptimizers)
        assert isinstance(self.dataloader, TitanLoader)
        assert isinstance(self.checkpointer, RunCheckpoints)
        self.metrics, self.schedule, self.loader = self.metrics_processor, self.lr_schedulers, self.dataloader
        self.updater, self.checkpoints = self.optimizers, self.checkpointer
        self.evaluate = Evaluator(
            run, tokenizer=tokenizer, model=self.model, metrics=self.metrics, device=self.device
        )

    def state_dict(self) -> dict[str, Any]:
        """Step, tokens and generators; ranks draw the same numbers, so one copy serves any number."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        return {"step": self.step, "tokens": self.tokens, "rng": rng}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what state_dict gave."""
        self.step, self.tokens = state_dict["step"], state_dict["tokens"]
        torch.set_rng_state(state_dict["rng"]["cpu"])
        if "cuda" in state_dict["rng"]:
            torch.cuda.set_rng_state(state_dict["rng"]["cuda"])

    def _loss_sum(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        cu_seqlens = inputs.get("cu_seqlens")
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(self.device, non_blocking=True)
            # its length changes from batch to batch; compile once for all
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        return self.model(
            inputs["input"].to(self.device, non_blocking=True),
            cu_seqlens=cu_seqlens,
            max_seqlen=self.run.training.seq_len,
            labels_BT=labels.to(self.device, non_blocking=True),
        )

    def optimizer_step(self, data_iterator: Iterator[MicroBatch]) -> dict[str, Any]:
        """One optimizer step.

        Args:
            data_iterator: This rank's micro-batches.

        Returns:
            The step's metrics: loss in nats/token over the global batch, gradient norm before clipping,
            learning rates, weight decays and now and then the updates' size by group, tokens predicted,
            whether any rank was asked to stop, and whether all have ended a background write.

        Raises:
            NonFiniteLossError: The loss or the gradient norm is no number. Nothing is saved; the last
                checkpoint is the last good state. A gradient that is no number has changed neither weights
                nor optimizer state.
        """
        self.optimizers.zero_grad()
        rates, decays = self.schedule.lr_by_group(), self.schedule.weight_decay_by_group()
        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        num_predicted = sum((labels != IGNORE_INDEX).sum() for _, labels in microbatches)
        num_predicted = torch.as_tensor(num_predicted, device=self.device)
        dist.all_reduce(num_predicted)
        loss = torch.zeros((), device=self.device)
        for inputs, labels in microbatches:
            part = self._loss_sum(inputs, labels) / num_predicted
            part.backward()
            loss += part.detach()
        grad_norm = dist_utils.clip_grad_norm_(
            self.model.parameters(), self.run.training.max_grad_norm, foreach=True
        )
        self.checkpoints.maybe_wait_for_staging()
        squares = self._update(grad_norm)
        self.schedule.step()
        # the only wait for the device in a step
        stop, write = loss.new_tensor([self.stop.requested, self.checkpoints.is_background_done])
        sums = torch.stack([value.double() for value in (loss, stop, write, *squares.values())])
        dist.all_reduce(sums)
        global_loss, num_stops, num_writes, *mean_squares = sums.tolist()
        norm = float(grad_norm)
        if not (torch.tensor([global_loss, norm]).isfinite().all()):
            folder = self.folder.checkpoints
            raise NonFiniteLossError(
                f"step {self.step}: loss {global_loss}, gradient norm {norm}; stopped without saving. The "
                f"newest checkpoint in {folder} is the last good state; continue from it with a lower "
                "learning rate or a lower training.max_grad_norm. If it stops at the same step again, delete "
                "that checkpoint and continue from the one before"
            )
        return {
            "loss": global_loss,
            "grad_norm": norm,
            **{f"lr/{name}": rate for name, rate in rates.items()},
            **{f"weight_decay/{name}": decay for name, decay in decays.items()},
            **{f"update_rms/{name}": math.sqrt(x) for name, x in zip(squares, mean_squares, strict=True)},
            **self._spectra(),
            "predicted_tokens": int(num_predicted),
            "stop": num_stops > 0,
            "write": num_writes == dist.get_world_size(),
        }

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _update(self, grad_norm: torch.Tensor) -> dict[str, torch.Tensor]:
        """Step unless the gradient is no number; gives this rank's shares of the updates' mean squares."""
        has_mean_squares = self._is_due(self.run.metrics.update_every)
        self.updater.record_update_stats(has_mean_squares or self._is_due(self.run.metrics.spectrum_every))
        self.updater.step(found_inf=(~grad_norm.isfinite()).float())
        return self.updater.local_update_mean_squares() if has_mean_squares else {}

    def _spectra(self) -> dict[str, float]:
        # rank 0 keeps the record, and speaks of the matrices that it orthogonalises
        if dist.get_rank() != 0 or not self._is_due(self.run.metrics.spectrum_every):
            return {}
        return {
            f"update_sv_{name}/{group}": value
            for group, spread in self.updater.update_singular_values().items()
            for name, value in zip(("min", "median", "max"), spread, strict=True)
        }

    def _load(self) -> bool:
        """Continue from the newest checkpoint here, else start from another's state, or from its weights.

        Returns:
            Whether there was one here.
        """
        source, weights = self.run.checkpoint.start_from, self.run.checkpoint.initial_weights
        step = self.checkpoints.newest_step()
        if step is not None:
            return self.checkpoints.load(step)
        if weights is not None:
            checkpoint = find_checkpoint(Path(weights))
            load_weights(self.model, checkpoint)
            logger.info(f"starting with the weights of {checkpoint}")
            warning = other_tokenizer(checkpoint, self.tokenizer_fingerprint)
            if warning is not None:
                logger.warning(warning)
        if source is None:
            return False
        # torchtitan's initial_load_path does nothing where a checkpoint folder exists, even one without any
        states = self.checkpoints._states_to_load(model_only=False)
        self.checkpoints.dcp_load(states, checkpoint_id=source, from_hf=False, from_quantized=False)
        if self.step != checkpoint_step(Path(source)):
            raise ValueError(
                f"checkpoint.start_from is {source!r}, but it was written after step {self.step}; give the "
                "folder its name back, or start from another checkpoint"
            )
        if dist.get_rank() == 0:
            for warning in branch_warnings(self.run):
                logger.warning(warning)
        logger.info(f"starting from {source}")
        return False

    def train(self) -> None:
        """Train from the newest checkpoint in the run folder, or from the start, to the end or a signal.

        Raises:
            ValueError: Ranks do not share the run folder.
        """
        self.stop.install()
        check_shared(Path(self.run.run.folder))
        is_resumed = self._load()
        goes_on = self.step < self.run.training.last_step
        if dist.get_rank() == 0:
            remove_partial_checkpoints(self.run)
            if is_resumed and goes_on:
                for warning in resume_warnings(self.run, self.step):
                    logger.warning(warning)
            if goes_on:
                self.folder.write_config(self.run)
                self._keep_tokenizer(is_resumed)
        if self.step > 0:
            self.metrics.resume(self.step)
        if is_resumed:
            # a launch that ended between a checkpoint and its evaluation left that to this one
            self.evaluate(self.step, self.tokens, self.metrics.names_at(self.step))
        if not goes_on:
            logger.info(
                f"{self.run.run.folder} has finished at step {self.step}; raise training.steps or "
                "training.stop_at_step to go on, or give another run.folder"
            )
            return
        if self.step == 0:
            self.metrics.resume(-1)  # an evaluation at step 0 is made again
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.metrics.record_launch(
            self.step, num_parameters=num_parameters, tokenizer_fingerprint=self.tokenizer_fingerprint
        )
        before = self.evaluate(0, 0) if self.step == 0 else None
        after: HeldOutLoss | None = None
        logger.info(f"training from step {self.step + 1} to {self.run.training.last_step}")
        metrics: dict[str, Any] = {}
        with maybe_enable_profiling(
            self.job_config.profiling, global_step=self.step, base_folder=self.job_config.job.dump_folder
        ) as profiler:
            batches = self.batch_generator(self.loader)
            self.metrics.restart_clock()
            stopped = False
            last_step = self.run.training.last_step
            while self.step < last_step and not stopped:
                self.step += 1
                self.gc_handler.run(self.step)
                metrics = self.optimizer_step(batches)
                stopped, has_written = metrics.pop("stop"), metrics.pop("write")
                self._record_step(metrics)
                # what a failed background write did not save is saved now
                is_missing = has_written and not self.checkpoints.settle()
                self._save(is_last=stopped or self.step == last_step, is_missing=is_missing)
                after = None if stopped else self.evaluate(self.step, self.tokens)
                if profiler:
                    profiler.step()
        self._summarize(metrics, before, after, stopped)

    def _keep_tokenizer(self, is_resumed: bool) -> None:
        """Copy the tokenizer into the run folder; a resumed run keeps the one it has."""
        if self.run_tokenizer.file is not None and not (is_resumed and self.folder.tokenizer.is_dir()):
            copy_tokenizer(self.run_tokenizer.file, self.folder.tokenizer)

    def _check_weights(self) -> None:
        """Refuse to save weights that the last update made non-finite.

        Raises:
            NonFiniteLossError: They are; the checkpoint before stays the newest.
        """
        norm = torch.nn.utils.get_total_norm(self.model.parameters(), foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not norm.isfinite():
            raise NonFiniteLossError(
                f"step {self.step}: the weights' norm is {float(norm)}; stopped without saving. The "
                "checkpoint before it stays; continue from it with a lower learning rate"
            )

    def _record_step(self, metrics: dict[str, Any]) -> None:
        self.tokens += self.run.training.global_batch_size * self.run.training.seq_len
        skipped = {"skipped_documents": sum(self.loader.loader.skipped.values())}
        record = {**metrics, **self.metrics.progress(self.tokens), **skipped, **self.metrics.throughput()}
        self.metrics.record(self.step, record)
        if self.step == 1 or self.step % self.run.metrics.console_every == 0:
            self.metrics.console(self.step, record, self.run.training.last_step)

    def _save(self, is_last: bool, is_missing: bool) -> None:
        # one that torchtitan takes for the last is whole when the tasks begin, even with async_save
        is_whole = is_last or is_missing or self.evaluate.tasks_are_due(self.step)
        if self.checkpoints._should_save(self.step, is_whole):
            self._check_weights()
            self.checkpoints.save(self.step, last_step=is_whole)
            self.metrics.restart_clock()

    def _summarize(
        self,
        metrics: dict[str, Any],
        before: HeldOutLoss | None,
        after: HeldOutLoss | None,
        stopped: bool,
    ) -> None:
        num_steps = self.run.training.steps
        if stopped:
            end = f"stopped by a signal after step {self.step}"
        elif self.step < num_steps:
            end = f"stopped after step {self.step} of {num_steps} (training.stop_at_step)"
        else:
            end = f"finished after step {self.step}"
        lines = [end]
        if metrics:
            lines.append(f"training loss        {metrics['loss']:.4f} nats/token")
        for name, result in (("before training", before), ("after training", after)):
            if result is not None:
                loss = f"{result.loss:.4f} nats/token, perplexity {result.perplexity:.2f}"
                lines.append(f"held-out loss        {loss} ({name})")
        if after is not None:
            entropy, gain = after.unigram_entropy, after.unigram_entropy - after.loss
            side = f"{gain:.4f} below" if gain >= 0 else f"{-gain:.4f} above"
            lines.append(f"unigram entropy      {entropy:.4f} nats/token; the model is {side} it")
        skipped = {reason: count for reason, count in self.loader.loader.skipped.items() if count}
        if skipped:
            counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            lines.append(f"documents skipped    {counts}")
        lines += [
            f"checkpoint           {self.folder.checkpoint(self.step)}",
            f"metrics, config      {self.folder.metrics_file}, {self.folder.config_file}",
        ]
        logger.info("\n  ".join(lines))

    def close(self) -> None:
        """Finish background saves, stop the loader's thread and close the sinks."""
        self.loader.close()
        super().close()
