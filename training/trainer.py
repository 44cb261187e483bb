"""The training loop: torchtitan's Trainer with our loss, checkpoints, evaluation and metrics.

The model computes the loss, metrics.jsonl has every step, a checkpoint is written before downstream tasks are
evaluated, and a signal stops the run with a checkpoint.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.distributed import ParallelDims
from torchtitan.tools.profiling import maybe_enable_profiling
from torchtitan.train import Trainer as TitanTrainer

from data.titan import TitanLoader
from data.tokenizer import Tokenizer
from errors import RunError
from eval.distributed import run_on_main_rank
from eval.held_out import HeldOutLoss
from models.checkpoint.load import load_weights
from models.qwen3 import Qwen3
from models.run_folder import RunFolder
from optimizers.titan import ParamGroupOptimizers, ParamGroupScheduler
from scalars import ScalarRecorder
from tokens import IGNORE_INDEX
from training import titan
from training.average import WeightAverage
from training.branch_step import branch_step
from training.checkpoints import RunCheckpoints
from training.due import is_due
from training.evaluation import Evaluator
from training.failures import describe_missing_ranks
from training.fall_back import load_or_fall_back
from training.flops import FlopCounter
from training.gradient_norm import GradientNorm
from training.launch_record import command_line, launch_facts
from training.launched_step import LaunchedStep, reads_late
from training.log import logger
from training.memory import checkpoint_bytes
from training.metrics import RunMetrics, check_scalar_names
from training.micro_batches import MicroBatches
from training.non_finite import check_step, check_weights
from training.preflight import build_meta_model, check_shared
from training.rank_monitor import DATA_SECONDS, RankMonitor
from training.rank_sums import RankSums, to_device
from training.resume import (
    StartPoint,
    describe_finished,
    find_start,
    prepare_folder,
    remove_partial_checkpoints,
)
from training.run_config import RunConfig
from training.run_lock import RunLock
from training.signals import StopRequest
from training.summary import format_summary
from training.token_stop import check_tokens
from training.update_stats import UpdateStats

MicroBatch = tuple[dict[str, torch.Tensor], torch.Tensor]


class Trainer(TitanTrainer):
    """Trains one run. torchtitan's constructor sets up processes, meshes, model and optimizers.

    Args:
        config: The run; RANK, WORLD_SIZE and LOCAL_RANK are in the environment (training/launcher.py).
        tokenizer: From training.preflight.check_run.
        stop: Asks the run to stop with a checkpoint.
        monitor: Told of each step and phase; started here.
    """

    # what the TrainSpec's builders return
    metrics_processor: RunMetrics  # pyrefly: ignore [bad-override-mutable-attribute]
    lr_schedulers: ParamGroupScheduler  # pyrefly: ignore [bad-override-mutable-attribute]
    optimizers: ParamGroupOptimizers  # pyrefly: ignore [bad-override-mutable-attribute]
    dataloader: TitanLoader  # pyrefly: ignore [bad-override-mutable-attribute]
    checkpointer: RunCheckpoints  # pyrefly: ignore [bad-override-mutable-attribute]

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, stop: StopRequest, monitor: RankMonitor
    ) -> None:
        self.config = config
        self.stop = stop
        self.folder = RunFolder(Path(config.run.folder))
        self.run_tokenizer = tokenizer  # self.tokenizer is torchtitan's
        world_size = int(os.environ["WORLD_SIZE"])
        titan.register_run(config, tokenizer)
        titan.set_checkpoint_manager(RunCheckpoints)
        super().__init__(titan.to_job_config(config, world_size))
        self.monitor = monitor
        monitor.start()
        self.model = self.model_parts[0]
        self.num_micro_batches = config.gradient_accumulation_steps(world_size)
        self.tokens = 0
        assert isinstance(self.model, Qwen3)
        self.average: WeightAverage | None = None
        if config.average.decay is not None:
            self.average = WeightAverage(self.model, config.average, config.average.decay)
            titan.add_state(self.checkpointer, "average", self.average)
        self.gradient_norm = GradientNorm(config.training, self.device)
        titan.add_state(self.checkpointer, "gradient_norm", self.gradient_norm)
        self.update_stats = UpdateStats(self.optimizers, config.metrics)
        self.evaluator = Evaluator(
            config, tokenizer, self.model, self.average, self.metrics_processor, monitor, self.device
        )
        self.checkpointer.checkpoint_bytes = checkpoint_bytes(config, build_meta_model(config), world_size)
        self.micro_batches = MicroBatches(self.model, config.training, self.device)
        self._write_failed = False  # in the background: another checkpoint is due at once
        self._step_seconds, self._reads_late = 0.0, reads_late(self.device, 0.0)
        self.scalars, self.rank_sums = ScalarRecorder(self.device), RankSums(self.device)
        self.flop_counter = FlopCounter(self.model, config.training.seq_len)

    def init_distributed(self) -> ParallelDims:
        """Connect the ranks, and take the run folder's lock before anything is written there.

        Raises:
            RunError: Not all ranks have started, or the main rank's address does not answer.
            UserError: Another launch uses the run folder.
        """
        try:
            dims = super().init_distributed()
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise RunError(describe_missing_ranks(error)) from error
        self.lock = RunLock(self.folder)
        return dims

    def state_dict(self) -> dict[str, Any]:
        """Return step, tokens and random generators, which are equal on all ranks."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        return {"step": self.step, "tokens": self.tokens, "rng": rng}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state from state_dict."""
        self.step, self.tokens = state_dict["step"], state_dict["tokens"]
        torch.set_rng_state(state_dict["rng"]["cpu"])
        if "cuda" in state_dict["rng"]:
            torch.cuda.set_rng_state(state_dict["rng"]["cuda"])

    def train(self) -> None:
        """Train to the last step of this launch, or until a signal.

        Raises:
            UserError: See start.
            NonFiniteLossError: See read and save.
        """
        before = self.start()
        last_step = self.config.training.last_step
        if self.step >= last_step:
            return
        logger.info(f"training from step {self.step + 1} to {last_step}")
        loss, stopped = math.nan, False
        held_out = {} if before is None else {0: before}
        launched: deque[LaunchedStep] = deque()
        with maybe_enable_profiling(
            self.job_config.profiling, global_step=self.step, base_folder=self.job_config.job.dump_folder
        ) as profiler:
            data = self.batch_generator(self.dataloader)
            self.metrics_processor.reset_throughput()
            # should a launch fail, the step before it is not on record: a resume repeats both
            while self.step < last_step and not stopped:
                self.step += 1
                self.monitor.begin_step(self.step)
                titan.collect_garbage(self, self.step)
                launched.append(self.optimizer_step(data))
                # a step is read while the device computes the next one, unless something is due after it
                while launched and (len(launched) > 1 or stopped or self._is_read_at_once()):
                    loss, stop_requested = self.read(launched.popleft())
                    stopped = stopped or stop_requested
                if not launched:
                    self.save(is_last=stopped or self.step == last_step)
                    found = None if stopped else self.evaluator.evaluate(self.step, self.tokens)
                    held_out |= {} if found is None else {self.step: found}
                if profiler:
                    self.monitor.enter_slow("profile")
                    profiler.step()
        skipped = self.dataloader.loader.skipped
        cause = self.stop.cause if stopped else None
        logger.info(format_summary(self.config, self.step, loss, held_out, stopped=cause, skipped=skipped))

    def start(self) -> HeldOutLoss | None:
        """Load what the launch starts from, and write config, tokenizer and a record of the launch.

        Returns:
            The held-out loss before training, for a launch that starts at step 0.

        Raises:
            UserError: The ranks do not share the run folder, another launch has taken it, or
                training.stop_at_tokens is set after steps of other tokens.
        """
        self.stop.install()
        check_shared(self.folder.path)
        start = self._load_start()
        self.lock.confirm()
        is_finished = self.step >= self.config.training.last_step
        run_on_main_rank(lambda: remove_partial_checkpoints(self.folder))
        facts = start.facts
        if not is_finished:
            facts |= run_on_main_rank(lambda: self._prepare_folder(start))
        if self.step > 0:
            first_step = branch_step(self.config) + 1
            self.metrics_processor.start_recording(self.step, first_step)
        if start.kind == "resume":
            # the launch before may have been killed between a checkpoint and its evaluation
            recorded = self.metrics_processor.names_at(self.step)
            self.evaluator.evaluate(self.step, self.tokens, recorded)
        if is_finished:
            logger.info(describe_finished(self.config, self.step))
            return None
        if self.step == 0:
            self.metrics_processor.start_recording(None)
        self.metrics_processor.record_launch(
            self.step,
            start=facts,
            num_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            tokenizer_fingerprint=self.run_tokenizer.fingerprint,
        )
        return self.evaluator.evaluate(0, 0) if self.step == 0 else None

    def _prepare_folder(self, start: StartPoint) -> dict[str, Any]:
        """Prepare the run folder; return the facts of this launch."""
        facts = launch_facts(self.config, command_line())  # before the config is replaced
        prepare_folder(self.config, start, self.run_tokenizer)
        return facts

    def _load_start(self) -> StartPoint:
        """Load the checkpoint or the weights that the main rank finds."""
        self.monitor.enter_slow("loading")
        start = run_on_main_rank(lambda: find_start(self.config))
        if start.kind == "weights":
            assert start.checkpoint is not None
            load_weights(self.model, start.checkpoint)
            logger.info(f"starting with the weights of {start.checkpoint}")
        elif start.checkpoint is not None:
            start = load_or_fall_back(self.checkpointer, self.config, start)
        check_tokens(self.config, self.step, self.tokens, start.checkpoint)
        if start.kind == "branch":
            data = ", with data.train from its beginning" if start.restarts_data else ""
            logger.info(f"starting from {start.checkpoint}{data}")
        if self.average is not None:
            is_loaded = self.average.begin(self.step)
            if not is_loaded and self.average.has_started(self.step):
                logger.info(f"the average starts with the weights of step {self.step}: no other is saved")
        return start

    def _is_read_at_once(self) -> bool:
        """Return whether the step just launched is read before the next one is launched."""
        return (
            not self._reads_late
            or self.step == self.config.training.last_step
            or is_due(self.step, self.config.checkpoint.every)
            or self._write_failed
            or self.evaluator.is_due(self.step)
            or self.update_stats.has_spectrum
            # the second of two traced steps, launched as without a trace
            or is_due(self.step, self.config.metrics.profile_every)
        )

    def optimizer_step(self, micro_batches: Iterator[MicroBatch]) -> LaunchedStep:
        """Launch one optimizer step, without waiting for the device.

        A gradient norm of NaN or Inf leaves weights and optimizer state unchanged.

        Args:
            micro_batches: This rank's micro-batches; num_micro_batches of them are used.
        """
        rates, decays = self.lr_schedulers.lr_by_group(), self.lr_schedulers.weight_decay_by_group()
        self.monitor.enter("data", limit=DATA_SECONDS)
        batch = [next(micro_batches) for _ in range(self.num_micro_batches)]
        num_predicted = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in batch)
        with self.scalars.step():
            self._accumulate_gradients(batch, num_predicted)
            mean_squares = self._update()
        self.lr_schedulers.step()
        self.tokens += self.config.tokens_per_step
        self.monitor.enter("sum over ranks")
        sums = self.rank_sums.begin(
            {
                "loss": self.micro_batches.loss(),
                "z loss": self.micro_batches.z_loss(),
                "predicted tokens": num_predicted,
                "step seconds": self._step_seconds,
                "flops": sum(self.flop_counter.count(inputs) for inputs, _ in batch),
                "stop requests": self.stop.requested,
                "finished writes": self.checkpointer.has_finished_write,
                **mean_squares,
            },
            self.scalars.totals(),
            self.gradient_norm.last,
        )
        data_seconds, memory = self.metrics_processor.launch_measures(self.micro_batches.graph_bytes)
        record = {
            **memory,
            **{f"lr/{name}": rate for name, rate in rates.items()},
            **{f"weight_decay/{name}": decay for name, decay in decays.items()},
            **self.metrics_processor.progress(self.tokens),
            "skipped_documents": sum(self.dataloader.loader.skipped.values()),
        }
        return LaunchedStep(self.step, sums, self.update_stats.has_spectrum, data_seconds, record)

    def _accumulate_gradients(self, batch: Sequence[MicroBatch], num_predicted: int) -> None:
        """Run forward and backward of all micro-batches, which have num_predicted targets on this rank."""
        self.monitor.enter("token count")
        over_ranks = to_device([num_predicted], torch.int64, self.device)[0]
        dist.all_reduce(over_ranks)
        self.micro_batches.begin_step(over_ranks)
        for index, (inputs, labels) in enumerate(batch, start=1):
            self.monitor.enter(f"micro-batch {index} of {len(batch)}")
            self.micro_batches.add(inputs, labels)

    def _update(self) -> dict[str, torch.Tensor]:
        """Clip the gradients and update the weights; return the parts of the updates' mean squares."""
        self.monitor.enter("update")
        self.checkpointer.maybe_wait_for_staging()
        is_skipped = self.gradient_norm.clip(self.model.parameters())
        self.update_stats.begin_step(self.step)
        self.optimizers.step(found_inf=is_skipped)
        if self.average is not None:
            self.average.update(self.step, is_skipped=is_skipped)
        return self.update_stats.local_mean_squares()

    def read(self, launched: LaunchedStep) -> tuple[float, bool]:
        """Wait for a step, check and record it.

        The record has the loss in nats/token over the global batch, the gradient norm before clipping and
        whether it is a spike, learning rate and weight decay of each group, predicted tokens, FLOPs by the
        lengths of the documents, and at some steps the size of each group's update.

        Returns:
            The loss, and whether any rank has received a signal.

        Raises:
            NonFiniteLossError: The loss or the gradient norm is NaN or Inf. Nothing is saved.
            UserError: log_scalar was given a name of the run's own metrics.
        """
        self.monitor.enter("sum over ranks")
        step = launched.step
        sums, scalars, last_norm = self.rank_sums.read(launched.sums)
        self.monitor.enter("metrics")
        norm = self.gradient_norm.describe(last_norm)
        update_stats = self.update_stats.metrics(sums, has_spectrum=launched.has_spectrum)
        check_step(step, sums["loss"], norm.norm, self.folder)
        if norm.is_spike:
            logger.info(f"step {step}  {norm.describe_spike()}")
        check_scalar_names(scalars)
        throughput = self.metrics_processor.throughput(
            self.config.tokens_per_step, sums["flops"], launched.data_seconds, launched.sums.copied
        )
        self._step_seconds = throughput["step_seconds"] or 0.0
        self._reads_late = reads_late(self.device, sums["step seconds"] / dist.get_world_size())
        record = {
            "loss": sums["loss"],
            **({"z_loss": sums["z loss"]} if self.config.training.z_loss else {}),
            **norm.metrics(),
            **({} if norm.is_skipped else update_stats),
            "predicted_tokens": int(sums["predicted tokens"]),
            "step_flops": sums["flops"],
            **launched.record,
            **throughput,
        }
        self.metrics_processor.record(step, {**record, **scalars})
        if step == 1 or is_due(step, self.config.metrics.console_every):
            self.metrics_processor.log_step(step, record, self.config.training.last_step)
        if sums["finished writes"] == dist.get_world_size():
            self._write_failed |= not self.checkpointer.finish_background_write()
        return sums["loss"], sums["stop requests"] > 0

    def save(self, *, is_last: bool) -> None:
        """Write a checkpoint if one is due after a step, which has been read.

        Args:
            is_last: Whether the launch ends with this step.

        Raises:
            NonFiniteLossError: A weight is NaN or Inf. The previous checkpoint remains the newest.
        """
        self.monitor.enter_slow("checkpoint")
        # not in the background: the checkpoint is on disk before the tasks are evaluated
        blocking = is_last or self._write_failed or self.evaluator.are_tasks_due(self.step)
        if blocking or is_due(self.step, self.config.checkpoint.every):
            check_weights(self.step, self.model)
            self.checkpointer.save(self.step, last_step=blocking)
            self._write_failed = False
            self.metrics_processor.reset_throughput()

    def close(self) -> None:
        """Wait for background writes, stop threads, close the metrics' sinks, release the run folder."""
        self.monitor.lift_limit()
        self.dataloader.close()
        self.micro_batches.close()
        super().close()
        self.monitor.close()
        self.lock.release()
