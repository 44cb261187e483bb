"""The [diagnostics] table of a run."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from errors import UserError, check_range

DiagnosticsSet: TypeAlias = Literal["cheap", "full"]
"""Which quantities: "full" adds those that need a covariance matrix per row, or a decomposition."""


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """Diagnostics of the attention during training, on rows of data.validation; see docs/diagnostics.md.

    Attributes:
        every: Steps between two records in <run.folder>/diagnostics.jsonl, the first of them before training;
            also after the last step. None for no diagnostics.
        layers: Indices of the layers, from 0; None for all.
        set: "cheap" for what costs less than a micro-batch; "full" adds alignments, condition numbers and
            spectra of single heads, which take minutes at 0.6B.
    """

    every: int | None = 100
    layers: list[int] | None = None
    set: DiagnosticsSet = "cheap"

    def __post_init__(self) -> None:
        check_range(self, 1, 10**9, "every")
        if self.layers is not None and (not self.layers or len({*self.layers}) < len(self.layers)):
            raise UserError(
                f'layers must name at least one layer, and each once, got {self.layers}; "none" for all'
            )

    def check_layers(self, num_layers: int) -> None:
        """Raise unless the model has the layers.

        Raises:
            UserError: Names the first layer that it lacks.
        """
        for layer in self.layers or ():
            if not 0 <= layer < num_layers:
                raise UserError(
                    f"diagnostics.layers has {layer}, but the model's layers are 0 to {num_layers - 1}"
                )
