"""The schema of a run's TOML file: RunConfig and its tables, for config.load."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.config import DataConfig
from data.loading.global_batch import gradient_accumulation_steps
from errors import MAX_SEED, UserError, check_not_empty, check_range
from eval.config import EvalConfig
from eval.diagnostics.config import DiagnosticsConfig
from models.config import ModelConfig
from optimizers.config import OptimizerConfig, ScheduleConfig
from training.other_names import OTHER_NAMES

_MAX_STEPS = 10**9
_MAX_TOKENS = 2**31 - 1  # of a row, or rows of a batch
_MAX_NAME_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Name, folder and seed of the run.

    Attributes:
        name: Name of the run, in logs and at Weights & Biases; by default the stem of the config file.
        folder: Run folder: checkpoints, metrics and the resolved config; by default runs/<name>. All nodes
            must share it.
        seed: Seed of the initial weights, of torch's generators and of sampling.
        deterministic: Use deterministic algorithms in torch (slower on GPUs).
    """

    name: str
    folder: str
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        is_path = "/" in self.name or "\0" in self.name or self.name in ("", ".", "..")
        if is_path or len(self.name.encode()) > _MAX_NAME_BYTES:
            raise UserError(
                f"name must be the name of one folder in runs/, of 1 to {_MAX_NAME_BYTES} bytes without a "
                f"slash, got {self.name!r}; for a folder elsewhere set run.folder"
            )
        if not self.folder or "\0" in self.folder:
            raise UserError(f"folder must be the path of a folder, got {self.folder!r}")
        check_range(self, 0, MAX_SEED, "seed")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch size and precision of training.

    Attributes:
        steps: Optimizer steps of the whole run; the learning-rate schedule spans them.
        stop_at_step: Stop after this step, with a checkpoint from which the run can be resumed; None to train
            for all steps.
        stop_at_tokens: Stop likewise after the first step with which the run has trained on this many tokens
            or more, by this run's tokens per step; None for no such stop. Given both, the earlier one counts.
        seq_len: Sequence length in tokens.
        global_batch_size: Sequences per optimizer step, over all ranks.
        local_batch_size: Sequences per micro-batch on each rank; gradient accumulation makes up the rest of
            the global batch.
        max_grad_norm: Gradients are clipped to this global norm; None for no clipping.
        spike_ratio: A step whose gradient norm is more than this many times the running norm, a moving
            average over some 50 steps, is on record as a spike.
        skip_spikes: Whether such a step is skipped: weights, optimizer state and average stay as they were.
        z_loss: Coefficient of the z-loss, z_loss (log sum_v exp logit_v)^2 per token, which keeps the logits
            from drifting; 0 for none. It is on record beside the loss, which does not include it.
        precision: Dtype of weights and activations in forward and backward. Master weights, gradient
            reduction and optimizer state are fp32.
        compile: Compile each block with torch.compile.
        cuda_graphs: On a GPU, replay forward and backward as CUDA graphs where the attention allows it, which
            saves the host's work per kernel and changes no bit (docs/performance/training.md, "CUDA graphs").
        activation_checkpointing: What the backward recomputes: "selective" all but matrix products and
            attention, "full" all but the inputs of the blocks, None nothing.
    """

    steps: int
    stop_at_step: int | None = None
    stop_at_tokens: int | None = None
    seq_len: int
    global_batch_size: int
    local_batch_size: int
    max_grad_norm: float | None = 1.0
    spike_ratio: float = 10.0
    skip_spikes: bool = False
    z_loss: float = 0.0
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = True
    cuda_graphs: bool = True
    activation_checkpointing: Literal["selective", "full"] | None = None

    def __post_init__(self) -> None:
        check_range(self, 1, _MAX_STEPS, "steps", "stop_at_step")
        check_range(self, 1, _MAX_TOKENS, "seq_len", "global_batch_size", "local_batch_size")
        check_range(self, 1, _MAX_STEPS * _MAX_TOKENS, "stop_at_tokens")
        check_range(self, 1e-6, 1e12, "max_grad_norm")
        check_range(self, 1.0, 1e12, "spike_ratio")
        check_range(self, 0.0, 1.0, "z_loss")
        if self.global_batch_size % self.local_batch_size:
            raise UserError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of local_batch_size "
                f"({self.local_batch_size})"
            )

    @property
    def last_step(self) -> int:
        """Last step of this launch."""
        return self._stop()[0]

    @property
    def last_step_key(self) -> str:
        """The key that decides on last_step."""
        return f"training.{self._stop()[1]}"

    def _stop(self) -> tuple[int, str]:
        stops = [(self.steps, "steps")]
        if self.stop_at_step is not None:
            stops.append((self.stop_at_step, "stop_at_step"))
        if self.stop_at_tokens is not None:
            tokens_per_step = self.global_batch_size * self.seq_len
            stops.append((-(-self.stop_at_tokens // tokens_per_step), "stop_at_tokens"))
        # the first of equal ones
        return min(stops, key=lambda stop: stop[0])


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """An exponential moving average of the weights, beside the weights that are trained.

    Checkpoints hold it, the held-out loss is evaluated with it too, and `--average` of the command lines that
    open checkpoints takes it.

    Attributes:
        decay: After each step the average is decay * average + (1 - decay) * weights, for example 0.999 for
            the last 1000 steps or so; None for no average. A resume or a branch from a checkpoint without one
            starts it with that checkpoint's weights.
        start_step: Up to this step the average equals the weights.
    """

    decay: float | None = None
    start_step: int = 0

    def __post_init__(self) -> None:
        check_range(self, 0.0, 1.0 - 1e-7, "decay")
        check_range(self, 0, _MAX_STEPS, "start_step")


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """Data parallelism: FSDP2 over all ranks, or HSDP; one rank shards nothing.

    Attributes:
        replicate: Number of replicas of the sharded model (HSDP); 1 for FSDP.
        shard: Number of ranks that shard one replica; None for all ranks / replicate.
        reshard_after_forward: Free the gathered weights of a block between its forward and its backward; on
            one rank, which gathers none, its 16-bit casts of them.
        timeout_seconds: How long ranks wait in a step for one that hangs or is gone, before the run ends and
            names it; three mean steps where these are longer. Loading, the first three steps of a launch,
            checkpoints and evaluations may take 30 minutes, data 15.
    """

    replicate: int = 1
    shard: int | None = None
    reshard_after_forward: bool = True
    timeout_seconds: int = 120

    def __post_init__(self) -> None:
        check_range(self, 1, 1_000_000, "replicate", "shard")
        check_range(self, 1, 7 * 86400, "timeout_seconds")

    def degrees(self, world_size: int) -> tuple[int, int]:
        """Return (replicate, shard) for a number of ranks.

        Raises:
            UserError: Their product is not the number of ranks.
        """
        shard = self.shard if self.shard is not None else max(1, world_size // self.replicate)
        if self.replicate * shard != world_size:
            raise UserError(
                f"parallelism.replicate ({self.replicate}) * parallelism.shard ({shard}) must equal the "
                f"number of ranks ({world_size}); set them, or start another number of processes"
            )
        return self.replicate, shard


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints in <run.folder>/checkpoint; one is always written at the last step and on a signal.

    Attributes:
        every: Steps between two checkpoints; None for the last step only.
        keep: Number of newest checkpoints to keep, at least 2; None for all.
        fall_back: Whether a resume whose newest checkpoint is damaged takes the newest good one, with a
            warning, and renames the damaged ones to step-N.damaged; if not, it ends there and names both.
        async_save: Write checkpoints in the background while training continues (one more copy of the state
            in host memory).
        start_from: Checkpoint of another run, runs/<name>/checkpoint/step-N, to start a branch from: loads
            model, optimizer state, step, data position and random generators; the schedule is this run's own.
            Not loaded once the run folder has a checkpoint. None for no branch.
        restart_data: Whether a branch reads its own `data.train` from the beginning instead of continuing at
            the checkpoint's data position: for a branch on other data, another mixture or longer rows.
        initial_weights: Checkpoint (a folder step-N, or a run folder for its newest) whose weights alone are
            loaded: the run starts at step 0 with a new optimizer state, for example from the weights that
            `python -m models.convert from-hf` writes. Not loaded once the run folder has a checkpoint. None
            to initialize the weights from the seed.
    """

    every: int | None = None
    keep: int | None = 3
    fall_back: bool = False
    async_save: bool = False
    start_from: str | None = None
    restart_data: bool = False
    initial_weights: str | None = None

    def __post_init__(self) -> None:
        check_range(self, 1, _MAX_STEPS, "every")
        check_range(self, 2, _MAX_STEPS, "keep")
        check_not_empty(self, "start_from", "initial_weights")
        if self.start_from is not None and self.initial_weights is not None:
            raise UserError(
                "start_from loads the whole state of a run and initial_weights the weights alone; set one of "
                "them to none"
            )
        if self.restart_data and self.start_from is None:
            raise UserError(
                "restart_data is true, but start_from is none: a run that is no branch starts its data from "
                "the beginning anyway; set start_from to a checkpoint, or restart_data to false"
            )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Metrics besides <run.folder>/metrics.jsonl, which has every step.

    Attributes:
        console_every: Steps between two progress lines on the console.
        tensorboard: Write TensorBoard files to <run.folder>/tensorboard.
        wandb: Log to Weights & Biases (WANDB_MODE=offline and WANDB_PROJECT are supported).
        profile_every: Steps between two torch profiler traces in <run.folder>/profile, at least 10; 10 traces
            steps 9 and 10, 19 and 20 and so on; None for no traces.
        update_every: Steps between two records of update_rms, the root mean square of each group's update
            before learning rate and weight decay; None for no records.
        spectrum_every: Steps between two records of update_sv_min, update_sv_median and update_sv_max,
            singular values of one matrix of each group that orthogonalizes (synchronizes with the device);
            None for no records.
    """

    console_every: int = 10
    tensorboard: bool = True
    wandb: bool = False
    profile_every: int | None = None
    update_every: int | None = 10
    spectrum_every: int | None = None

    def __post_init__(self) -> None:
        check_range(self, 1, _MAX_STEPS, "console_every", "update_every", "spectrum_every")
        check_range(self, 10, _MAX_STEPS, "profile_every")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The config of a run, and the batch arithmetic that follows from it.

    Attributes:
        run: Name, folder and seed.
        model: Architecture.
        optimizer: Parameter groups and their optimizers.
        schedule: Learning-rate schedule.
        training: Length, batch size and precision.
        average: Moving average of the weights.
        data: Tokenizer, documents and packing.
        eval: Evaluation during training.
        diagnostics: Diagnostics of the attention during training.
        parallelism: FSDP2 or HSDP.
        checkpoint: Checkpoints, and what the run starts from.
        metrics: Metrics and profiles.
    """

    OTHER_NAMES: ClassVar[dict[str, str]] = OTHER_NAMES

    run: RunSection
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    data: DataConfig
    average: AverageConfig = field(default_factory=AverageConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        self.diagnostics.check_layers(self.model.dimensions.num_layers)

    @staticmethod
    def name_after_file(table: dict[str, Any], path: Path) -> None:
        """Set the defaults of run.name and run.folder, in place: the stem of the config file, runs/<name>.

        Raises:
            UserError: The file is a plan, which has stages.
        """
        if "stages" in table:
            raise UserError(f"{path} is a plan, not a run's config: python -m training.sweep {path} runs it")
        run = table.setdefault("run", {})
        if isinstance(run, dict):
            run.setdefault("name", path.stem)
            run.setdefault("folder", f"runs/{run['name']}")

    def unread_keys(self) -> list[str]:
        """Return a sentence about each key that is set and that this run does not read."""
        told = []
        if self.average.start_step and self.average.decay is None:
            told.append(
                f"average.start_step is {self.average.start_step}, but average.decay is none: it has no "
                "effect"
            )
        has_loss, has_tasks = self.data.validation is not None, bool(self.eval.tasks)
        for name, is_read, reason in (
            ("every", has_loss or bool(self.eval.sample_prompts), "data.validation is none"),
            ("max_tokens", has_loss, "data.validation is none"),
            ("tasks_every", has_tasks, "eval.tasks is empty"),
            ("tasks_limit", has_tasks, "eval.tasks is empty"),
            ("tasks_num_fewshot", has_tasks, "eval.tasks is empty"),
            ("tasks_data", has_tasks, "eval.tasks is empty"),
        ):
            value = getattr(self.eval, name)
            if value is not None and not is_read:
                told.append(f"eval.{name} is {value}, but {reason}: it has no effect")
        if self.diagnostics.every is not None and not self.has_diagnostics:
            told.append("diagnostics need data.validation, which is none: there will be none")
        return told

    @property
    def has_diagnostics(self) -> bool:
        """Whether the attention is measured during training, on held-out rows."""
        return self.diagnostics.every is not None and self.data.validation is not None

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all ranks."""
        return self.training.global_batch_size * self.training.seq_len

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens per micro-batch of one rank."""
        return self.training.local_batch_size * self.training.seq_len

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Return the number of micro-batches per optimizer step on each rank.

        Args:
            world_size: Number of ranks.

        Raises:
            UserError: The global batch size is not a multiple of local batch size and ranks.
        """
        return gradient_accumulation_steps(
            global_batch_size=self.training.global_batch_size,
            local_batch_size=self.training.local_batch_size,
            num_ranks=world_size,
        )
