"""A run as typed tables: what a TOML file in configs/ may say, for config.load."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.config import DataConfig
from eval.config import EvalConfig
from models.config import ModelConfig
from optimizers.config import OptimizerConfig, ScheduleConfig


def _check_at_least(config: object, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where a run lies and what it draws from.

    Attributes:
        name: Name of the run; the config file's stem unless given.
        folder: Folder of its logs and checkpoints; runs/<name> unless given.
        seed: Seed of the initial weights and of torch's generators.
        deterministic: Ask torch for deterministic algorithms (slower on GPUs).
    """

    name: str
    folder: str
    seed: int = 0
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop.

    Attributes:
        steps: Optimizer steps of the whole run; the schedule spans them.
        stop_at_step: Stop, with a checkpoint, after this step; None for steps. The run can be continued.
        seq_len: Tokens of a row.
        global_batch_size: Rows of an optimizer step over all ranks.
        local_batch_size: Rows that a rank takes at a time; the rest is gradient accumulation.
        max_grad_norm: Global gradient norm above which gradients are scaled down to it.
        precision: Dtype of weights and activations in forward and backward; masters, reductions, optimizer
            are fp32.
        compile: torch.compile for each block.
        activation_checkpointing: Recompute in the backward: "selective" keeps matrix products and attention,
            "full" keeps block inputs only, None keeps all.
    """

    steps: int
    stop_at_step: int | None = None
    seq_len: int
    global_batch_size: int
    local_batch_size: int
    max_grad_norm: float = 1.0
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = True
    activation_checkpointing: Literal["selective", "full"] | None = None

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "steps", "stop_at_step", "seq_len", "global_batch_size", "local_batch_size")
        if self.global_batch_size % self.local_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of local_batch_size "
                f"({self.local_batch_size})"
            )
        if not 0.0 < self.max_grad_norm < float("inf"):
            raise ValueError(f"max_grad_norm must be positive and finite, got {self.max_grad_norm}")

    @property
    def last_step(self) -> int:
        """The step after which this launch ends."""
        return self.steps if self.stop_at_step is None else min(self.stop_at_step, self.steps)


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """FSDP2 over all ranks, or HSDP.

    Attributes:
        replicate: Copies of the sharded model (HSDP); 1 for FSDP.
        shard: Ranks that share a copy; None for all that replicate leaves.
        reshard_after_forward: Free a block's gathered weights between forward and backward.
    """

    replicate: int = 1
    shard: int | None = None
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "replicate", "shard")

    def degrees(self, world_size: int) -> tuple[int, int]:
        """(replicate, shard) for a number of ranks.

        Raises:
            ValueError: The degrees do not make up the number of ranks.
        """
        shard = self.shard if self.shard is not None else max(1, world_size // self.replicate)
        if self.replicate * shard != world_size:
            raise ValueError(
                f"parallelism.replicate ({self.replicate}) * parallelism.shard ({shard}) must equal the "
                f"number of ranks ({world_size}); set them, or start another number of processes"
            )
        return self.replicate, shard


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints in <run.folder>/checkpoint; the last step and a signal always write one.

    Attributes:
        every: Steps between two checkpoints; None for the end only.
        keep: Newest checkpoints to keep, at least 2; None for all.
        async_save: Write in the background while training goes on (one more copy in host memory).
        start_from: A checkpoint of another run, runs/<name>/checkpoint/step-N: a run without checkpoints of
            its own takes over model, optimizer state, step, data position and generators, and goes on by its
            own schedule. None to start from the seed.
        initial_weights: A run folder, or a checkpoint in one, whose weights alone are taken over, at step 0
            with a fresh optimizer; what `python -m models.convert from-hf` writes, for one.
    """

    every: int | None = None
    keep: int | None = 3
    async_save: bool = False
    start_from: str | None = None
    initial_weights: str | None = None

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "every")
        _check_at_least(self, 2, "keep")
        if self.start_from is not None and self.initial_weights is not None:
            raise ValueError(
                "start_from takes over a whole run and initial_weights weights alone; set one of them to none"
            )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go besides <run.folder>/metrics.jsonl, which holds every step.

    Attributes:
        console_every: Steps between two console lines.
        tensorboard: Write TensorBoard files to <run.folder>/tensorboard.
        wandb: Log to Weights & Biases (WANDB_MODE=offline works; WANDB_PROJECT and the like are honoured).
        profile_every: Steps between two torch profiler traces in <run.folder>/profile; None for none.
        update_every: Steps between two records of each group's update_rms, the root mean square of the update
            before learning rate and weight decay; None for none.
        spectrum_every: Steps between two records of update_sv_min, _median and _max, singular values of one
            orthogonalised matrix of each Muon group (waits for the device); None for none.
    """

    console_every: int = 10
    tensorboard: bool = True
    wandb: bool = False
    profile_every: int | None = None
    update_every: int | None = 10
    spectrum_every: int | None = None

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "console_every", "update_every", "spectrum_every")
        _check_at_least(self, 10, "profile_every")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is."""

    run: RunSection
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    data: DataConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    @staticmethod
    def name_after_file(table: dict[str, Any], path: Path) -> None:
        """Name a run that has no name after its config file, and its folder after its name; in place."""
        run = table.setdefault("run", {})
        if isinstance(run, dict):
            run.setdefault("name", path.stem)
            run.setdefault("folder", f"runs/{run['name']}")

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of a step on each of world_size ranks.

        Raises:
            ValueError: The global batch does not divide among the ranks.
        """
        rows = self.training.local_batch_size * world_size
        if self.training.global_batch_size % rows:
            raise ValueError(
                f"training.global_batch_size ({self.training.global_batch_size}) must be a multiple of "
                f"training.local_batch_size ({self.training.local_batch_size}) * ranks ({world_size}) = "
                f"{rows}; change one of the three"
            )
        return self.training.global_batch_size // rows
