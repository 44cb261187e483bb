"""The [eval] table of a run."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training; before the first step and after the last it always takes place.

    Attributes:
        every: Steps between two evaluations of the held-out loss; None for the first and the last only.
        max_tokens: Held-out tokens that one evaluation reads; None for all.
    """

    every: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or none; got {value}")
