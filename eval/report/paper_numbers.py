"""The paper's results, and the row of the paper that a run reproduces.

Source: "Parallax: Parameterized Local Linear Attention for Language Modeling", arXiv 2605.29157: 0.6B and
1.7B models after pretraining on Ultra-FineWeb at length 4096. Perplexities on LAMBADA and WikiText, mean
accuracy in percent over BoolQ, HellaSwag, PIQA, ARC-easy, ARC-challenge, WinoGrande, OpenBookQA and SciQ.
For AdamW with a cosine schedule the paper states only a difference: Parallax has 0.89 points less mean
accuracy than the Transformer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from config import to_table
from eval.report.choices import hidden_optimizer
from models.config import ParallaxConfig
from models.sizes import split_size

SOURCE = "arXiv 2605.29157"


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row of the paper's results; None for a number that the paper does not report.

    Attributes:
        size: Size, as in models/sizes.py.
        attention: Kind of attention.
        variant: "parameter_matched", "compute_matched", "no_rope_on_r", or None for the unchanged model.
        optimizer: Kind of the optimizer of the hidden matrices.
        schedule: Kind of schedule.
        lambada_perplexity: Perplexity on LAMBADA.
        wikitext_perplexity: Perplexity on WikiText.
        mean_accuracy: Mean accuracy over the eight tasks, in percent.
    """

    size: str
    attention: str
    variant: str | None = None
    optimizer: str = "muon"
    schedule: str = "wsd"
    lambada_perplexity: float | None = None
    wikitext_perplexity: float | None = None
    mean_accuracy: float | None = None


def _row(
    size: str,
    attention: str,
    variant: str | None,
    lambada: float | None,
    wikitext: float | None,
    accuracy: float,
    optimizer: str = "muon",
) -> PaperRow:
    return PaperRow(
        size=size,
        attention=attention,
        variant=variant,
        optimizer=optimizer,
        lambada_perplexity=lambada,
        wikitext_perplexity=wikitext,
        mean_accuracy=accuracy,
    )


PAPER_ROWS: tuple[PaperRow, ...] = (
    _row("0.6b", "softmax", None, 22.15, 23.43, 54.54),
    _row("0.6b", "softmax", "parameter_matched", 22.35, 23.36, 54.90),
    _row("0.6b", "kda", None, 25.16, None, 52.73),
    _row("0.6b", "gated-deltanet", None, 24.63, None, 53.67),
    _row("0.6b", "parallax", "compute_matched", 20.29, 22.49, 55.79),
    _row("0.6b", "parallax", "no_rope_on_r", 19.77, None, 55.54),
    _row("0.6b", "parallax", None, 18.56, 22.25, 55.99),
    _row("1.7b", "softmax", None, 13.07, None, 61.43),
    _row("1.7b", "parallax", None, 10.80, None, 62.45),
    _row("0.6b", "parallax", None, None, None, 52.68, optimizer="adamw"),
    _row("0.6b", "softmax", None, None, None, 52.61, optimizer="adamw"),
)

MAD_SCORES: dict[str, dict[str, float]] = {
    "softmax": {
        "in-context-recall": 0.803,
        "noisy-in-context-recall": 0.861,
        "selective-copying": 0.950,
        "mean": 0.672,
    },
    "parallax": {
        "in-context-recall": 0.951,
        "noisy-in-context-recall": 0.937,
        "selective-copying": 0.988,
        "mean": 0.716,
    },
}
"""Attention -> task of MAD, or "mean" for that of all six -> score; for the other tasks it gives none."""

# the paper does not state which of the two compute-matched models it trained
_CONTROL_VARIANTS = {"compute_parameter_matched": "compute_matched"}
# the paper states no initial gain, and every implementation computes the same function
_FREE_KEYS = ("impl", "r_gain_init", "r_scale")


def _attention_change(attention: Mapping[str, Any]) -> str | None:
    """Name the keys in which an attention differs from the paper's; None if none."""
    if attention.get("kind") != "parallax":
        return "window_size" if "window_size" in attention else None
    main = {key: value for key, value in to_table(ParallaxConfig()).items() if value != "none"}
    keys = sorted(({*attention} | {*main}) - {*_FREE_KEYS})
    # an older run did not record keys that were added since: they have their defaults
    changed = [key for key in keys if attention.get(key, main.get(key)) != main.get(key)]
    if not changed:
        return None
    return "no_rope_on_r" if changed == ["rope_on_r"] else ", ".join(changed)


def _has_other_updates(config: Mapping[str, Any]) -> bool:
    """Return whether a group has NorMuon, fixed norms or a schedule of its own, which the paper has not."""
    other = re.compile(r"optimizer\.groups\..+\.(row_beta2|fixed_norm|schedule\..+)")
    return any(other.fullmatch(key) and value is not False for key, value in config.items())


def paper_row(config: Mapping[str, Any]) -> PaperRow | None:
    """Return the row of the paper that a run reproduces; None without one.

    Args:
        config: The resolved config, dotted key -> value, without keys that are "none".
    """
    if "checkpoint.initial_weights" in config or _has_other_updates(config):
        return None
    size, control = split_size(config.get("model.size", ""))
    prefix = "model.attention."
    attention = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    kind, schedule = attention.get("kind", ""), config.get("schedule.kind", "")
    # the size of a baseline is named after it: its MLP is sized to match the softmax model's parameters
    control = None if control is None or control == kind else _CONTROL_VARIANTS.get(control, control)
    annealing = "annealing" if any(key.endswith(".weight_decay_gamma") for key in config) else None
    changes = [change for change in (control, _attention_change(attention), annealing) if change is not None]
    wanted = (size, kind, " ".join(changes) or None, hidden_optimizer(config), schedule)
    rows = {(row.size, row.attention, row.variant, row.optimizer, row.schedule): row for row in PAPER_ROWS}
    return rows.get(wanted)
