"""Configuration of the optimizers: parameter groups and the learning-rate schedule."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from errors import UserError, check_range, check_unread

Orthogonalization = Literal["newton_schulz5", "polar_express"]
UpdateScale = Literal["match_rms_adamw", "spectral", "unit"]
MuonDtype = Literal["float16", "bfloat16", "float32"]

ScheduleKind = Literal["wsd", "cosine", "constant"]
DecayShape = Literal["linear", "one_minus_sqrt", "cosine"]

_WSD_KEYS = ("decay_ratio", "decay_steps", "decay_shape")
UNREAD_KEYS: dict[ScheduleKind, tuple[str, ...]] = {
    "wsd": (),
    "cosine": _WSD_KEYS,
    "constant": (*_WSD_KEYS, "min_lr_ratio"),
}
"""Keys of a schedule that its kind does not read."""

DEFAULT_DECAY_RATIO = 0.2
DEFAULT_ITERATIONS: dict[Orthogonalization, int] = {"newton_schulz5": 5, "polar_express": 8}


class Misfit(NamedTuple):
    """Why a parameter cannot be in a group.

    Attributes:
        problem: What is wrong; the names of the parameters follow.
        remedy: What to do.
        detail: What the name of the parameter is followed by.
    """

    problem: str
    remedy: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class GroupSchedule:
    """Where the learning-rate schedule of a group differs from [schedule]; warm-up is the same.

    Attributes:
        kind: As schedule.kind; None for the run's. With another kind, the run's decay is not taken over.
        decay_ratio: As schedule.decay_ratio; None for the run's decay.
        decay_steps: As schedule.decay_steps, instead of decay_ratio; None for the run's decay.
        decay_shape: As schedule.decay_shape; None for the run's.
        min_lr_ratio: As schedule.min_lr_ratio; None for the run's.
    """

    # every key is None by default: a change of kind drops nothing
    KEYS_OF_ALL_KINDS: ClassVar[tuple[str, ...]] = (
        *("decay_ratio", "decay_steps", "decay_shape", "min_lr_ratio"),
    )

    kind: ScheduleKind | None = None
    decay_ratio: float | None = None
    decay_steps: int | None = None
    decay_shape: DecayShape | None = None
    min_lr_ratio: float | None = None

    def __post_init__(self) -> None:
        # what is wrong in itself; the rest shows with the run's schedule (optimizers/schedule.py)
        _check_decay(self)


@dataclass(frozen=True, kw_only=True)
class Group:
    """What parameter groups of every kind have.

    Attributes:
        parameters: Regular expressions; the group contains the parameters whose full name matches one of
            them.
        lr: Peak learning rate; the schedule multiplies it by a factor in [0, 1].
        weight_decay: Decoupled weight decay: every step multiplies the parameters by 1 - lr * weight_decay.
        weight_decay_gamma: Exponent of weight-decay annealing: weight_decay (1 - t)^gamma over the decay
            phase (optimizers/schedule.py); None for a constant weight decay.
        fixed_norm: Keep the Frobenius norm of every matrix (optimizers/hyperball.py): the update of any kind
            is scaled to lr times this norm, and the result back to the norm. Weight decay must be 0.
        schedule: A schedule of its own; None for [schedule].
    """

    # learning rates of different optimizers are not comparable
    KEYS_OF_ALL_KINDS: ClassVar[tuple[str, ...]] = (
        *("parameters", "weight_decay", "weight_decay_gamma", "fixed_norm", "schedule"),
    )
    # name of an optimizer that takes nothing but matrices
    MATRICES_ONLY: ClassVar[str | None] = None

    parameters: list[str]
    lr: float
    weight_decay: float = 0.0
    weight_decay_gamma: float | None = None
    fixed_norm: bool = False
    schedule: GroupSchedule | None = None

    def __post_init__(self) -> None:
        _check_patterns(self.parameters)
        _check_rates(self)

    def misfit(self, shape: Sequence[int]) -> Misfit | None:
        """Return why a parameter of this shape cannot be in the group; None where it can."""
        if len(shape) != 2 and (self.MATRICES_ONLY or self.fixed_norm):
            kind = self.MATRICES_ONLY or "fixed_norm"
            problem = f"{kind} groups match parameters that are not matrices"
            return Misfit(problem, "move them to an adamw group")
        return None


@dataclass(frozen=True, kw_only=True)
class OrthogonalizedGroup(Group):
    """Parameter group of matrices whose update is orthogonalized.

    Attributes:
        orthogonalization: Iteration that orthogonalizes.
        num_iterations: Iterations; None for 5 with newton_schulz5 and 8 with polar_express.
        scale: Factor of the update: match_rms_adamw is 0.2 sqrt(max(rows, cols)), spectral is
            sqrt(max(1, rows / cols)), unit is 1.
        dtype: Precision of the iteration; state and parameters keep the parameter's dtype. Matrices are
            normalized first, so that float16 is more accurate than bfloat16; on a GPU it is also faster.
        block_rows: Orthogonalize blocks of this many rows separately, for example the head width for one
            orthogonalization per head; None for whole matrices.
    """

    orthogonalization: Orthogonalization = "newton_schulz5"
    num_iterations: int | None = None
    scale: UpdateScale = "match_rms_adamw"
    dtype: MuonDtype = "float16"
    block_rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, 1_000_000, "block_rows")
        check_range(self, 1, 100, "num_iterations")

    def misfit(self, shape: Sequence[int]) -> Misfit | None:
        """See Group.misfit: block_rows must divide the rows, too."""
        if len(shape) == 2 and shape[0] % (self.block_rows or 1):
            return Misfit(
                "block_rows does not divide the number of rows",
                'set it to a divisor, such as the head width, or to "none"',
                f", block_rows = {self.block_rows}",
            )
        return super().misfit(shape)


@dataclass(frozen=True, kw_only=True)
class MuonGroup(OrthogonalizedGroup):
    """Parameter group of matrices that Muon updates; all its parameters must be two-dimensional.

    Attributes:
        kind: "muon".
        momentum: Coefficient beta of the exponential moving average of gradients, in [0, 1).
        nesterov: Nesterov momentum.
        row_beta2: NorMuon: coefficient of the moving average of the rows' mean squares, by which the rows of
            the orthogonalized matrix are normalized, for example 0.95; None for Muon.
    """

    MATRICES_ONLY: ClassVar[str | None] = "Muon"

    kind: Literal["muon"] = "muon"
    momentum: float = 0.95
    nesterov: bool = True
    row_beta2: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficients(self, "momentum", "row_beta2")


@dataclass(frozen=True, kw_only=True)
class OrthogonalizedAdamWGroup(OrthogonalizedGroup):
    """Parameter group of matrices with AdamW's update, orthogonalized: its singular values become 1.

    Attributes:
        kind: "orthogonalized-adamw".
        beta1: Coefficient of the exponential moving average of gradients, in [0, 1).
        beta2: Coefficient of the exponential moving average of squared gradients, in [0, 1).
        eps: Added to the square root of the second moment.
    """

    MATRICES_ONLY: ClassVar[str | None] = "orthogonalized AdamW"

    kind: Literal["orthogonalized-adamw"] = "orthogonalized-adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficients(self, "beta1", "beta2")
        check_range(self, 1e-30, 1.0, "eps")


@dataclass(frozen=True, kw_only=True)
class SOAPGroup(Group):
    """Parameter group of matrices that SOAP updates: Adam in the eigenbasis of Shampoo's factors.

    Attributes:
        kind: "soap".
        beta1: Coefficient of the exponential moving average of gradients, in [0, 1).
        beta2: Coefficient of the exponential moving average of the squares of rotated gradients, in [0, 1).
        factor_beta: Coefficient of the exponential moving averages of the factors G G^T and G^T G, in [0, 1);
            None for beta2.
        eps: Added to the square root of the second moment.
        refresh_every: Steps between two refreshes of the eigenbases, by one power iteration and QR.
        max_factor_size: Largest side of a matrix that has a factor and a basis; a longer side is not rotated.
            They take 2 (rows^2 + cols^2) fp32 values of memory, beside 2 rows cols for the moments.
    """

    MATRICES_ONLY: ClassVar[str | None] = "SOAP"

    kind: Literal["soap"] = "soap"
    beta1: float = 0.95
    beta2: float = 0.95
    factor_beta: float | None = None
    eps: float = 1e-8
    refresh_every: int = 10
    max_factor_size: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficients(self, "beta1", "beta2", "factor_beta")
        check_range(self, 1e-30, 1.0, "eps")
        check_range(self, 1, 1_000_000, "refresh_every", "max_factor_size")


@dataclass(frozen=True, kw_only=True)
class AdamWGroup(Group):
    """Parameter group that AdamW updates; parameters can have any shape.

    Attributes:
        kind: "adamw".
        beta1: Coefficient of the exponential moving average of gradients, in [0, 1).
        beta2: Coefficient of the exponential moving average of squared gradients, in [0, 1).
        eps: Added to the square root of the second moment.
    """

    kind: Literal["adamw"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficients(self, "beta1", "beta2")
        check_range(self, 1e-30, 1.0, "eps")


ParameterGroup = MuonGroup | AdamWGroup | SOAPGroup | OrthogonalizedAdamWGroup


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Parameter groups, each with its optimizer.

    Attributes:
        groups: Groups by name; every trainable parameter must be in exactly one. Errors and metrics show the
            name.
    """

    groups: dict[str, ParameterGroup]

    def __post_init__(self) -> None:
        if not self.groups:
            raise UserError("groups is empty; give at least one parameter group")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule, as a factor of each group's peak; see optimizers/schedule.py.

    Attributes:
        kind: wsd: warm-up, stable phase, decay; cosine: warm-up, then cosine decay; constant: warm-up, then
            constant.
        warmup_steps: Steps of linear warm-up; the last of them reaches the peak.
        decay_ratio: wsd only: fraction of all steps that the decay takes, in [0, 1]; None for decay_steps, or
            for 0.2 if that is None too.
        decay_steps: wsd only: steps of the decay, instead of decay_ratio, which must then be None.
        decay_shape: wsd only: 1 - t (linear), 1 - sqrt(t) (one_minus_sqrt) or (1 + cos(pi t)) / 2 (cosine),
            with t from 0 to 1 over the decay.
        min_lr_ratio: wsd and cosine: factor at the end of the decay, in [0, 1].
    """

    KEYS_OF_ALL_KINDS: ClassVar[tuple[str, ...]] = ("warmup_steps", "min_lr_ratio")

    kind: ScheduleKind = "wsd"
    warmup_steps: int = 0
    decay_ratio: float | None = None
    decay_steps: int | None = None
    decay_shape: DecayShape = "linear"
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_unread(self, f"a {self.kind} schedule", 'kind to "wsd"', *UNREAD_KEYS[self.kind])
        check_range(self, 0, 10**9, "warmup_steps")
        _check_decay(self)


def _check_decay(schedule: ScheduleConfig | GroupSchedule) -> None:
    check_range(schedule, 0, 10**9, "decay_steps")
    check_range(schedule, 0.0, 1.0, "decay_ratio", "min_lr_ratio")
    if schedule.decay_ratio is not None and schedule.decay_steps is not None:
        raise UserError(
            f"decay_ratio ({schedule.decay_ratio}) and decay_steps ({schedule.decay_steps}) are both given; "
            'set one of them to "none"'
        )


def _check_patterns(patterns: Sequence[str]) -> None:
    if not patterns:
        raise UserError("parameters is empty; give at least one regular expression of parameter names")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"parameters: {pattern!r} is not a regular expression: {error}") from error


def _check_rates(group: Group) -> None:
    check_range(group, 0.0, 10.0, "lr")
    check_range(group, 0.0, 10_000.0, "weight_decay")
    check_range(group, 0.0, 100.0, "weight_decay_gamma")
    if group.weight_decay == 0.0:
        check_unread(group, "a weight_decay of 0", "weight_decay above 0", "weight_decay_gamma")
    if group.lr * group.weight_decay > 1.0:
        raise UserError(
            f"lr ({group.lr}) times weight_decay ({group.weight_decay}) must be at most 1: every step "
            "multiplies the parameters by 1 - lr * weight_decay"
        )
    if group.fixed_norm and group.weight_decay != 0.0:
        raise UserError(
            f"weight_decay ({group.weight_decay}) changes norms, which fixed_norm keeps; set it to 0"
        )
    if group.fixed_norm and group.lr >= 1.0:
        raise UserError(
            f"lr ({group.lr}) must be less than 1 with fixed_norm: an update is lr times its matrix's norm"
        )


def check_coefficients(group: Group, *names: str) -> None:
    """Raise unless coefficients of moving averages are in [0, 1); None passes.

    Raises:
        UserError: Names the first field that is outside.
    """
    for name in names:
        value = getattr(group, name)
        if value is not None and not 0.0 <= value < 1.0:
            raise UserError(f"{name} ({value}) must be in [0, 1)")
