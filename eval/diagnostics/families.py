"""Which values of layers are shown together, in the plots and on the command line."""

from collections.abc import Collection
from dataclasses import dataclass

_WEIGHTS = ("wq", "wk", "wv", "wo", "wr")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Values that are drawn in one figure.

    Attributes:
        file: Name of the figure's file, without its ending.
        title: Its title.
        names: Names of the values, as record.layer_values has them.
    """

    file: str
    title: str
    names: tuple[str, ...]


FAMILIES = (
    Family(
        file="diagnostics_correction",
        title="The correction",
        names=(
            "correction_ratio/median",
            "correction_ratio/p95",
            "probe_norm/mean",
            "gains/r_norm/rms",
            "gate/mean",
            "correction_alignment/mean",
            "probe_alignment/mean",
            "covariance_alignment/mean",
        ),
    ),
    Family(
        file="diagnostics_sink",
        title="Attention sink and spread",
        names=("first_mass/mean", "combined_first_mass/mean", "entropy/mean", "participation/mean"),
    ),
    Family(
        file="diagnostics_extremes",
        title="Logits, probe scores and combined weights",
        names=(
            "largest_logit/max",
            "largest_probe_score/max",
            "negative_share/mean",
            "smallest_weight/min",
            "largest_weight/max",
            "key_condition_number/median",
        ),
    ),
    Family(
        file="diagnostics_stable_rank",
        title="Stable rank of the weights",
        names=(
            *(f"weights/{name}/stable_rank" for name in _WEIGHTS),
            *(f"heads/{name}_stable_rank" for name in ("qk", "rk", "ov")),
        ),
    ),
    Family(
        file="diagnostics_norms",
        title="Norms of the weights and gains",
        names=(
            *(f"weights/{name}/spectral_norm" for name in _WEIGHTS),
            *(f"gains/{name}/rms" for name in ("q_norm", "k_norm")),
        ),
    ),
)

SHORT_NAMES = {
    "correction_ratio/median": "ratio",
    "correction_ratio/p95": "p95",
    "probe_norm/mean": "|r|",
    "gains/r_norm/rms": "gain R",
    "first_mass/mean": "p first",
    "combined_first_mass/mean": "w first",
    "entropy/mean": "entropy",
    "participation/mean": "keys",
    "negative_share/mean": "negative",
    "largest_logit/max": "logit",
    "largest_probe_score/max": "|t|",
    "weights/wq/stable_rank": "rank Q",
    "weights/wk/stable_rank": "rank K",
    "weights/wv/stable_rank": "rank V",
    "weights/wo/stable_rank": "rank O",
    "weights/wr/stable_rank": "rank R",
}
"""Headings of the main values in tables."""


def shown_names(family: Family, recorded: Collection[str]) -> list[str]:
    """Return the names of a family that were recorded, in its order."""
    return [name for name in family.names if name in recorded]


def format_layers(layers: dict[int, dict[str, float]]) -> str:
    """Format the main values of layers as a table of text.

    Args:
        layers: Index of a layer -> record.layer_values.
    """
    recorded = {name for values in layers.values() for name in values}
    names = [name for name in SHORT_NAMES if name in recorded]
    lines = ["layer" + "".join(f"{SHORT_NAMES[name]:>10}" for name in names)]
    for layer, values in layers.items():
        cells = (f"{values[name]:10.4g}" if name in values else f"{'-':>10}" for name in names)
        lines.append(f"{layer:5}" + "".join(cells))
    return "\n".join(lines)
