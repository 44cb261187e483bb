"""The optimizer's part of a run's configuration: parameter groups and the learning-rate schedule."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

Orthogonalization = Literal["newton_schulz5", "polar_express"]
UpdateScale = Literal["match_rms_adamw", "spectral", "unit"]
MuonDtype = Literal["float16", "bfloat16", "float32"]

DEFAULT_DECAY_RATIO = 0.2
KEYS_OF_ALL_GROUPS = ("parameters", "weight_decay", "weight_decay_gamma")
"""What survives a change of a group's kind; a learning rate of one optimizer means nothing to another."""
DEFAULT_ITERATIONS: dict[Orthogonalization, int] = {"newton_schulz5": 5, "polar_express": 8}


@dataclass(frozen=True, kw_only=True)
class MuonGroup:
    """Matrices that Muon updates: every parameter of the group must be two-dimensional."""

    KEYS_OF_ALL_KINDS: ClassVar[tuple[str, ...]] = KEYS_OF_ALL_GROUPS

    kind: Literal["muon"] = "muon"

    parameters: list[str]
    """Regular expressions; a parameter belongs here when one of them matches its whole name."""

    lr: float
    """Peak learning rate; the schedule multiplies it."""

    weight_decay: float = 0.0
    """Decoupled: each step multiplies the parameter by 1 - lr * weight_decay."""

    weight_decay_gamma: float | None = None
    """gamma of weight_decay (1 - t)^gamma over the decay phase (schedule.py); None: constant."""

    momentum: float = 0.95
    """Weight of the past in the running mean of gradients, in [0, 1)."""

    nesterov: bool = True
    """Orthogonalise the gradient blended with the momentum instead of the momentum alone."""

    orthogonalization: Orthogonalization = "newton_schulz5"
    """Iteration that replaces the momentum's singular values by ones."""

    num_iterations: int | None = None
    """Steps of that iteration; "none" means 5 for newton_schulz5 and 8 for polar_express."""

    scale: UpdateScale = "match_rms_adamw"
    """match_rms_adamw: 0.2 sqrt(max(rows, cols)); spectral: sqrt(max(1, rows / cols)); unit: 1."""

    dtype: MuonDtype = "float16"
    """Precision of the iteration; momentum and parameters keep the parameter's own. Matrices are normalised
    before it, so that float16 is more exact than bfloat16, and on a GPU it is faster."""

    block_rows: int | None = None
    """Orthogonalise every so many rows alone, as the head width for Muon per head; "none": all together."""

    row_beta2: float | None = None
    """NorMuon's normalisation of rows: weight of the past in their mean square, as 0.95; "none": without."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of its range, or a pattern is no regular expression.
        """
        _check_patterns(self.parameters)
        _check_rates(self.lr, self.weight_decay, self.weight_decay_gamma)
        _check_range("momentum", self.momentum)
        if self.row_beta2 is not None:
            _check_range("row_beta2", self.row_beta2)
        if self.block_rows is not None and self.block_rows < 1:
            raise ValueError(f'block_rows ({self.block_rows}) must be at least 1, or "none"')
        if self.num_iterations is not None and self.num_iterations < 1:
            raise ValueError(f'num_iterations ({self.num_iterations}) must be at least 1, or "none"')


@dataclass(frozen=True, kw_only=True)
class AdamWGroup:
    """Parameters of any shape that AdamW updates."""

    KEYS_OF_ALL_KINDS: ClassVar[tuple[str, ...]] = KEYS_OF_ALL_GROUPS

    kind: Literal["adamw"] = "adamw"

    parameters: list[str]
    """Regular expressions; a parameter belongs here when one of them matches its whole name."""

    lr: float
    """Peak learning rate; the schedule multiplies it."""

    beta1: float = 0.9
    """Decay of the mean of gradients, in [0, 1)."""

    beta2: float = 0.95
    """Decay of the mean of squared gradients, in [0, 1)."""

    eps: float = 1e-8
    """Added to the root of the mean square."""

    weight_decay: float = 0.0
    """Decoupled: each step multiplies the parameter by 1 - lr * weight_decay."""

    weight_decay_gamma: float | None = None
    """gamma of weight_decay (1 - t)^gamma over the decay phase (schedule.py); None: constant."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of its range, or a pattern is no regular expression.
        """
        _check_patterns(self.parameters)
        _check_rates(self.lr, self.weight_decay, self.weight_decay_gamma)
        _check_range("beta1", self.beta1)
        _check_range("beta2", self.beta2)
        if not self.eps > 0.0:
            raise ValueError(f"eps ({self.eps}) must be positive")


ParameterGroup = MuonGroup | AdamWGroup


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Who updates what: named groups that must cover every trainable parameter exactly once."""

    groups: dict[str, ParameterGroup]
    """Groups by name; the name appears in errors and in the logged learning rates."""

    def __post_init__(self) -> None:
        """Check that there is a group.

        Raises:
            ValueError: There is none.
        """
        if not self.groups:
            raise ValueError("groups is empty; name at least one parameter group")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps of a run, as a factor of each group's peak; see schedule.lr_factor."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm up, hold, decay; cosine: warm up, then one half cosine; constant: warm up, then hold."""

    warmup_steps: int = 0
    """Steps of linear warm-up; the last of them is the first at the peak."""

    decay_ratio: float | None = None
    """wsd only: part of all steps that the decay takes, in [0, 1]; "none": decay_steps, or 0.2 without it."""

    decay_steps: int | None = None
    """wsd only: steps that the decay takes, instead of decay_ratio, which must then be "none"."""

    decay_shape: Literal["linear", "one_minus_sqrt", "cosine"] = "linear"
    """wsd only: 1 - t, 1 - sqrt(t) or (1 + cos(pi t)) / 2 over the decay, t from 0 to 1."""

    min_lr_ratio: float = 0.0
    """What the decay tends to, as a part of the peak, in [0, 1]."""

    KEYS_OF_ALL_KINDS: ClassVar[tuple[str, ...]] = ("warmup_steps", "min_lr_ratio")

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of its range, or is one that the kind does not read.
        """
        wsd_keys = (f.name for f in fields(self) if f.name not in ("kind", *self.KEYS_OF_ALL_KINDS))
        for key in wsd_keys if self.kind != "wsd" else ():
            value = getattr(self, key)
            if value != getattr(ScheduleConfig, key):
                raise ValueError(
                    f"{key} is {value!r}, which a {self.kind} schedule does not read; leave it out, or set "
                    'kind to "wsd"'
                )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must not be negative")
        for name, value in (("decay_ratio", self.decay_ratio), ("min_lr_ratio", self.min_lr_ratio)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} ({value}) must lie in [0, 1]")
        if self.decay_steps is not None and self.decay_steps < 0:
            raise ValueError(f"decay_steps ({self.decay_steps}) must not be negative")
        if self.decay_ratio is not None and self.decay_steps is not None:
            raise ValueError(
                f"decay_ratio ({self.decay_ratio}) and decay_steps ({self.decay_steps}) are both given; "
                'set one of them to "none"'
            )


def _check_patterns(patterns: Sequence[str]) -> None:
    if not patterns:
        raise ValueError("parameters is empty; give at least one regular expression of parameter names")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"parameters: {pattern!r} is not a regular expression: {error}") from error


def _check_rates(lr: float, weight_decay: float, weight_decay_gamma: float | None) -> None:
    for field, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{field} ({value}) must be finite and not negative")
    if weight_decay_gamma is not None and not 0.0 <= weight_decay_gamma < float("inf"):
        raise ValueError(
            f'weight_decay_gamma ({weight_decay_gamma}) must be finite and not negative, or "none"'
        )


def _check_range(field: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{field} ({value}) must lie in [0, 1)")
