"""The diagnostics of the arms of a stage: means over layers at the end of finished runs."""

from collections.abc import Sequence
from functools import partial

from eval.diagnostics.families import SHORT_NAMES
from eval.report.diagnostics_arms import by_layer
from eval.report.plan_values import ArmRuns
from eval.report.run_records import RunRecord
from eval.report.table import Cell, Table, noted, plain

DIAGNOSTICS_NOTE = (
    "Diagnostics of finished runs at the last step that has them (docs/diagnostics.md), means over layers, "
    "mean ± standard error over seeds: the correction's norm relative to the softmax output (ratio, its "
    "median over tokens; p95), the norm of the probes |r|, the r-norm's gain (root of its mean square), the "
    "mass on the first visible key (p first; of the combined weights: w first), entropy (nats) and keys of "
    "the base softmax, the share of negative combined weights, the largest logit and probe score |t|, and "
    "the stable rank of the weights."
)


def _mean_over_layers(name: str, run: RunRecord) -> float | None:
    """Return a finished run's mean of a value over the layers that have it; None where none has."""
    layers = by_layer(run.diagnostics[-1]).get(name) if _has_ended(run) else None
    return sum(layers.values()) / len(layers) if layers else None


def _has_ended(run: RunRecord) -> bool:
    """Return whether a run has diagnostics and is finished: one that was cut off trained for fewer steps."""
    return run.is_finished and bool(run.diagnostics)


def diagnostics_table(arms: Sequence[ArmRuns]) -> Table | None:
    """Make the table of the main diagnostics of arms; None where no finished run has any.

    Args:
        arms: The arms of a stage.
    """
    found = [arm for arm in arms if any(map(_has_ended, arm.runs.values()))]
    if not found:
        return None
    values: dict[str, list[Cell]] = {
        heading: [
            noted(arm.over_seeds(partial(_mean_over_layers, name)), ",.3g", len(arm.runs)) for arm in found
        ]
        for name, heading in SHORT_NAMES.items()
    }
    return Table({
        "Arm": [arm.name for arm in found],
        "Seeds": [plain(len(arm.runs), "d") for arm in found],
        **values,
    })  # fmt: skip
