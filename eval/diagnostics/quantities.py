"""The quantities of query rows: how they are reduced to heads, and how plots name them."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Reduction: TypeAlias = Literal["mean", "median", "p95", "max", "min"]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A quantity of query rows.

    Attributes:
        label: Label of an axis, in sentence case.
        reductions: How the rows of a head are reduced; "mean" comes with its standard error, "stderr".
        by_context: Whether it is also given by context length.
        needs_start: Whether rows that do not see the first token of their document are counted apart.
    """

    label: str
    reductions: tuple[Reduction, ...] = ("mean",)
    by_context: bool = False
    needs_start: bool = False


QUANTITIES: dict[str, Quantity] = {
    "correction_ratio": Quantity(
        label="Correction / softmax output", reductions=("mean", "median", "p95"), by_context=True
    ),
    "probe_norm": Quantity(label="Norm of the probe"),
    "first_mass": Quantity(label="Softmax weight of the first token", by_context=True, needs_start=True),
    "combined_first_mass": Quantity(
        label="Combined weight of the first token", by_context=True, needs_start=True
    ),
    "entropy": Quantity(label="Entropy of the softmax (nats)", by_context=True),
    "participation": Quantity(label="Participation of the softmax (keys)", by_context=True),
    "negative_share": Quantity(label="Share of negative weights", by_context=True),
    "smallest_weight": Quantity(label="Smallest combined weight", reductions=("min",)),
    "largest_weight": Quantity(label="Largest combined weight", reductions=("max",)),
    "largest_logit": Quantity(label="Largest logit", reductions=("max",)),
    "largest_probe_score": Quantity(label="Largest probe score |t|", reductions=("max",)),
    "gate": Quantity(label="Openness of the gate"),
    "correction_alignment": Quantity(label="Cosine of correction and softmax output"),
    "probe_alignment": Quantity(label="Cosine of the probe and the solved probe"),
    "covariance_alignment": Quantity(label="Covariance-probe alignment"),
    "key_condition_number": Quantity(label="Condition number of Cov(k, k) + ridge", reductions=("median",)),
}

_WEIGHT_QUANTITIES = {
    "stable_rank": "Stable rank",
    "spectral_norm": "Spectral norm",
    "condition_number": "Condition number",
    "rms": "Root mean square",
    "largest": "Largest",
}
_REDUCED = {"median": "median", "p95": "95th percentile", "middle_mean": "rows begun in the middle"}


def label_of(name: str) -> str:
    """Return the label of a value of a layer, whose name is that of record.layer_values.

    Args:
        name: Such as "correction_ratio/p95", "weights/wr/stable_rank", "gains/r_norm/rms" or
            "heads/qk_stable_rank".
    """
    first, *others = name.split("/")
    if first in QUANTITIES:
        reduced = _REDUCED.get(others[0])
        return QUANTITIES[first].label + ("" if reduced is None else f", {reduced}")
    if first == "heads":
        product, _, quantity = others[0].partition("_")
        return f"{_WEIGHT_QUANTITIES[quantity]} of $W_{{{product.upper()}}}$, mean over heads"
    owner = f"$W_{{{others[0][1:].upper()}}}$" if first == "weights" else f"the gain of {others[0]}"
    return f"{_WEIGHT_QUANTITIES[others[1]]} of {owner}"
