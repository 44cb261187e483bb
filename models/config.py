"""The [model] table of a run."""

from dataclasses import dataclass, field
from typing import Literal

from models.sizes import SIZES, ModelSize


def _check_window(window_size: int | None) -> None:
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size must be at least 1, or none for no window; got {window_size}")


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig:
    """Softmax attention.

    Attributes:
        kind: "softmax".
        window_size: Keys that a query sees, its own included; None for all of its past.
    """

    kind: Literal["softmax"] = "softmax"
    window_size: int | None = None

    def __post_init__(self) -> None:
        _check_window(self.window_size)


@dataclass(frozen=True, kw_only=True)
class ParallaxConfig:
    """Parallax: softmax attention plus a learned covariance correction.

    Attributes:
        kind: "parallax".
        window_size: Keys that a query sees, its own included; None for all of its past.
        r_norm: RMSNorm on each head of the probe r.
        r_gain_init: Initial gain of that norm; 0 starts as softmax attention.
        rope_on_r: RoPE on the probe, with the query's positions.
        gate: A sigmoid gate on the probe: one per token, one per token and head, or None.
        impl: Implementation of `parallax.parallax_attention`; None picks by device.
    """

    kind: Literal["parallax"] = "parallax"
    window_size: int | None = None
    r_norm: bool = True
    r_gain_init: float = 0.25
    rope_on_r: bool = True
    gate: Literal["token", "head"] | None = None
    impl: Literal["reference", "eager", "triton"] | None = None

    def __post_init__(self) -> None:
        _check_window(self.window_size)


AttentionConfig = SoftmaxConfig | ParallaxConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Qwen3 decoder with a choice of attention.

    Attributes:
        size: A row of models/sizes.py.
        vocab_size: Rows of the embedding, V; at least the tokenizer's.
        attention: What mixes tokens, with its options.
        rope_theta: Base of the rotary embedding.
        norm_eps: Epsilon of every RMSNorm.
        init_std: Standard deviation of the initial matrices; those that write to the residual stream take
            init_std / sqrt(2 num_layers).
    """

    size: str
    vocab_size: int
    attention: AttentionConfig = field(default_factory=SoftmaxConfig)
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {sorted(SIZES)}, got {self.size!r}")
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    @property
    def dimensions(self) -> ModelSize:
        """The size's row."""
        return SIZES[self.size]
