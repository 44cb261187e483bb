"""The [model] table of a config."""

from dataclasses import dataclass, field, fields
from typing import Literal

from errors import UserError, check_range, check_unread
from models.sizes import SIZES, ModelSize

FREE_KEYS = ("impl", "init_std", "r_gain_init")
"""Keys of [model] that change neither the weights' shapes nor the function that they compute."""
_MAX_DIMENSION = 1_000_000
_MAX_WINDOW = 2**31 - 1
_MAX_ITERATIONS = 10_000
# below it the default number of iterations is off by more than some percent, for inputs of unit variance;
# decoding has no other solver than conjugate gradients
MIN_RIDGE = 0.03
# beyond it there is no correction: softmax attention, or the value average
_MAX_RIDGE = 1e8


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig:
    """Softmax attention, that of Qwen3.

    Attributes:
        kind: "softmax".
        window_size: Sliding window: number of keys that a query sees, its own included; None for no window.
        impl: Implementation of `parallax.parallax_attention`, or "torch" for torch's own kernels; None for
            "triton" on a GPU whose kernels serve the head width (docs/attention.md), else "eager".
    """

    kind: Literal["softmax"] = "softmax"
    window_size: int | None = None
    impl: Literal["reference", "eager", "triton", "torch"] | None = None

    def __post_init__(self) -> None:
        check_range(self, 1, _MAX_WINDOW, "window_size")


@dataclass(frozen=True, kw_only=True)
class ParallaxConfig:
    """Parallax: softmax attention plus a learned covariance correction.

    Attributes:
        kind: "parallax".
        window_size: Sliding window: number of keys that a query sees, its own included; None for no window.
        r_heads: "query" for a probe r per query head, "kv" for one per key/value head, shared by its query
            heads.
        r_rank: Rank of W_R as the product of two matrices, wr_in and wr_out, which an optimizer group
            must match; None for one matrix of full rank.
        r_norm: Whether an RMSNorm normalizes each head of r.
        r_gain_init: Initial gain of that norm; 0 starts as softmax attention.
        r_scale: Constant factor of r after the norm; it scales the effect of the gain's learning rate.
        rope_on_r: Whether RoPE rotates r, by the query's position.
        gate: Sigmoid gate of r: "token" for one per token, "head" for one per token and query head, or None.
        num_plain_layers: Number of first layers without correction and W_R, that is, with softmax attention.
        impl: Implementation of `parallax.parallax_attention`; None for "triton" on a GPU whose kernels serve
            the head width (docs/attention.md), else "eager".
    """

    kind: Literal["parallax"] = "parallax"
    window_size: int | None = None
    r_heads: Literal["query", "kv"] = "query"
    r_rank: int | None = None
    r_norm: bool = True
    r_gain_init: float = 0.25
    r_scale: float = 1.0
    rope_on_r: bool = True
    gate: Literal["token", "head"] | None = None
    num_plain_layers: int = 0
    impl: Literal["reference", "eager", "triton"] | None = None

    def __post_init__(self) -> None:
        check_range(self, 1, _MAX_WINDOW, "window_size")
        check_range(self, 1, _MAX_DIMENSION, "r_rank")
        check_range(self, -1e4, 1e4, "r_gain_init", "r_scale")
        check_range(self, 0, _MAX_DIMENSION, "num_plain_layers")
        if not self.r_norm:
            check_unread(self, "a probe without r_norm", "r_norm to true", "r_gain_init")


def _check_probe(config: ParallaxConfig, size: ModelSize) -> None:
    if config.num_plain_layers >= size.num_layers:
        raise UserError(
            f"attention.num_plain_layers must be below the {size.num_layers} layers of the size, got "
            f'{config.num_plain_layers}; for no correction in any layer set attention.kind to "softmax"'
        )
    num_rows = size.head_dim * (size.num_kv_heads if config.r_heads == "kv" else size.num_heads)
    if config.r_rank is not None and config.r_rank >= min(size.width, num_rows):
        raise UserError(
            f"attention.r_rank must be below {min(size.width, num_rows)}, the full rank of W_R, got "
            f'{config.r_rank}; set "none" for full rank'
        )


@dataclass(frozen=True, kw_only=True)
class LocalLinearConfig:
    """Exact local linear attention: Parallax's correction with the probe as the solution of a linear system.

    Attributes:
        kind: "lla".
        window_size: Sliding window: number of keys that a query sees, its own included; None for no window.
        ridge: Ridge per unit of kernel mass, at least 0.03.
        solver: "cg" for conjugate gradients, "direct" to factorize the matrix of every query.
        num_iterations: Maximum number of iterations of conjugate gradients.
    """

    kind: Literal["lla"] = "lla"
    window_size: int | None = None
    ridge: float = 10.0
    solver: Literal["cg", "direct"] = "cg"
    num_iterations: int = 32

    def __post_init__(self) -> None:
        check_range(self, 1, _MAX_WINDOW, "window_size")
        check_range(self, MIN_RIDGE, _MAX_RIDGE, "ridge")
        check_range(self, 1, _MAX_ITERATIONS, "num_iterations")


@dataclass(frozen=True, kw_only=True)
class ValueAverageConfig:
    """The mean of the past values.

    Attributes:
        kind: "value-average".
    """

    kind: Literal["value-average"] = "value-average"


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Linear attention: uniform weights, no intercept.

    Attributes:
        kind: "linear".
    """

    kind: Literal["linear"] = "linear"


@dataclass(frozen=True, kw_only=True)
class AffineLinearConfig:
    """Affine linear attention: Parallax with uniform weights.

    Attributes:
        kind: "affine-linear".
    """

    kind: Literal["affine-linear"] = "affine-linear"


@dataclass(frozen=True, kw_only=True)
class AffineMesaNetConfig:
    """Affine MesaNet: local linear attention with uniform weights.

    Attributes:
        kind: "affine-mesanet".
        ridge: Ridge per key, at least 0.03.
        num_iterations: Maximum number of iterations of conjugate gradients.
    """

    kind: Literal["affine-mesanet"] = "affine-mesanet"
    ridge: float = 10.0
    num_iterations: int = 32

    def __post_init__(self) -> None:
        check_range(self, MIN_RIDGE, _MAX_RIDGE, "ridge")
        check_range(self, 1, _MAX_ITERATIONS, "num_iterations")


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """Gated DeltaNet; head_dim of the size is the width of a head's keys.

    Attributes:
        kind: "gated-deltanet".
        expand_v: Width of a head's values as a multiple of that of its keys.
    """

    kind: Literal["gated-deltanet"] = "gated-deltanet"
    expand_v: int = 2

    def __post_init__(self) -> None:
        check_range(self, 1, 64, "expand_v")


@dataclass(frozen=True, kw_only=True)
class KimiDeltaConfig:
    """Kimi Delta Attention: the gated delta rule with a decay per key channel.

    Attributes:
        kind: "kda".
    """

    kind: Literal["kda"] = "kda"


@dataclass(frozen=True, kw_only=True)
class MesaNetConfig:
    """MesaNet: ridge regression of the past values on their keys.

    Attributes:
        kind: "mesanet".
        num_iterations: Number of iterations of conjugate gradients.
    """

    kind: Literal["mesanet"] = "mesanet"
    num_iterations: int = 30

    def __post_init__(self) -> None:
        check_range(self, 1, _MAX_ITERATIONS, "num_iterations")


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Mamba-2; head_dim of the size is the width of a head's values, num_heads * head_dim the inner width.

    Attributes:
        kind: "mamba2".
        state_size: Width of a head's keys: its state is state_size x head_dim.
    """

    kind: Literal["mamba2"] = "mamba2"
    state_size: int = 128

    def __post_init__(self) -> None:
        check_range(self, 1, _MAX_DIMENSION, "state_size")


AttentionConfig = (
    SoftmaxConfig
    | ParallaxConfig
    | LocalLinearConfig
    | ValueAverageConfig
    | LinearConfig
    | AffineLinearConfig
    | AffineMesaNetConfig
    | GatedDeltaNetConfig
    | KimiDeltaConfig
    | MesaNetConfig
    | Mamba2Config
)


def _check_size(size: str, custom_size: ModelSize | None) -> None:
    if size != "custom" and size not in SIZES:
        raise UserError(f'size must be "custom" or one of {sorted(SIZES)}, got {size!r}')
    if size == "custom" and custom_size is None:
        raise UserError('size is "custom", so custom_size must be a table of width, num_layers and so on')
    if size != "custom" and custom_size is not None:
        raise UserError(f'custom_size requires size = "custom", got size {size!r}; set custom_size to "none"')
    for dimension in () if custom_size is None else fields(custom_size):
        value = getattr(custom_size, dimension.name)
        if not 1 <= value <= _MAX_DIMENSION:
            raise UserError(
                f"custom_size.{dimension.name} must be at least 1 and at most {_MAX_DIMENSION}; got {value}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Qwen3 decoder with any of the attention modules.

    Attributes:
        size: A row of models/sizes.py, or "custom".
        custom_size: The dimensions of size "custom"; None otherwise.
        vocab_size: Rows V of the embedding; at least the tokenizer's number of ids.
        tie_embeddings: Whether the head shares the embedding's weight; Qwen3-8B and larger are untied.
        attention: The attention module, chosen by its kind, and its options.
        rope_theta: Base of RoPE.
        norm_eps: Epsilon of every RMSNorm.
        init_std: Standard deviation of the initial matrices; that of matrices whose outputs are added to the
            residual stream is init_std / sqrt(2 num_layers).
    """

    size: str
    custom_size: ModelSize | None = None
    vocab_size: int
    tie_embeddings: bool = True
    attention: AttentionConfig = field(default_factory=SoftmaxConfig)
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _check_size(self.size, self.custom_size)
        check_range(self, 1, 100_000_000, "vocab_size")
        check_range(self, 1.0, 1e15, "rope_theta")
        check_range(self, 1e-20, 1.0, "norm_eps")
        check_range(self, 1e-8, 10.0, "init_std")
        if isinstance(self.attention, ParallaxConfig):
            _check_probe(self.attention, self.dimensions)

    @property
    def dimensions(self) -> ModelSize:
        """The dimensions of the model, of either a row or a custom size."""
        return SIZES[self.size] if self.custom_size is None else self.custom_size
