"""Sizes of the optimizers' updates and singular values of them, at the steps that [metrics] names."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from optimizers.titan import ParamGroupOptimizers
from training.due import is_due
from training.run_config import MetricsConfig


class UpdateStats:
    """Records updates.

    Args:
        optimizers: The optimizers of the run.
        config: The [metrics] table.

    Attributes:
        has_spectrum: Whether the last step has recorded singular values.
    """

    def __init__(self, optimizers: ParamGroupOptimizers, config: MetricsConfig) -> None:
        self._optimizers, self._config = optimizers, config
        self._has_sizes = self.has_spectrum = False

    def begin_step(self, step: int) -> None:
        """Make the optimizers record what is due at a step."""
        self._has_sizes = is_due(step, self._config.update_every)
        self.has_spectrum = is_due(step, self._config.spectrum_every)
        self._optimizers.record_update_stats(self._has_sizes or self.has_spectrum)

    def local_mean_squares(self) -> dict[str, torch.Tensor]:
        """Return this rank's parts of each group's mean square, to be summed over ranks; {} unless due."""
        if not self._has_sizes:
            return {}
        parts = self._optimizers.local_update_mean_squares()
        return {f"update_rms/{group}": part for group, part in parts.items()}

    def metrics(self, sums: Mapping[str, float], *, has_spectrum: bool) -> dict[str, float]:
        """Return what is due, for metrics.jsonl.

        Args:
            sums: Those of local_mean_squares, among others.
            has_spectrum: Whether the step is the last one, and has recorded singular values.
        """
        sizes = {name: math.sqrt(x) for name, x in sums.items() if name.startswith("update_rms/")}
        # the main rank writes metrics.jsonl: the values are those of the matrices that it orthogonalizes
        if dist.get_rank() != 0 or not has_spectrum:
            return sizes
        return sizes | {
            f"update_sv_{name}/{group}": value
            for group, values in self._optimizers.update_singular_values().items()
            for name, value in zip(("min", "median", "max"), values, strict=True)
        }
