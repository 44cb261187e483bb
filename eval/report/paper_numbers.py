"""The paper's results, and which run is which of its rows.

Source: "Parallax: Parameterized Local Linear Attention for Language Modeling", arXiv 2605.29157: 0.6B and
1.7B models after pretraining on Ultra-FineWeb at length 4096. Perplexities on LAMBADA and WikiText, mean
accuracy in percent over BoolQ, HellaSwag, PIQA, ARC-easy, ARC-challenge, WinoGrande, OpenBookQA and SciQ.
Under AdamW with a cosine the paper states a difference alone: Parallax loses 0.89 of mean accuracy against
the Transformer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from config import to_table
from models.config import ParallaxConfig
from models.sizes import split_size

SOURCE = "arXiv 2605.29157"


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row of the paper; None where the paper states no number.

    Attributes:
        size: Plain size, as in models/sizes.py.
        attention: Kind of attention.
        variant: "parameter_matched", "compute_matched", "no_rope_on_r", or None for the plain model.
        optimizer: Kind of the optimizer of the hidden matrices.
        schedule: Kind of schedule.
        lambada_perplexity: Perplexity on LAMBADA.
        wikitext_perplexity: Perplexity on WikiText.
        mean_accuracy: Mean accuracy over the eight tasks, percent.
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

# which of the two compute-matched models the paper trained is unknown
_CONTROL_VARIANTS = {"compute_parameter_matched": "compute_matched"}
# the paper states no initial gain, and an implementation computes the same function
_FREE_KEYS = ("impl", "r_gain_init", "r_scale")


def _attention_change(attention: Mapping[str, Any]) -> str | None:
    """What makes an attention other than the paper's; None for nothing."""
    if attention.get("kind") != "parallax":
        return "window_size" if "window_size" in attention else None
    main = {key: value for key, value in to_table(ParallaxConfig()).items() if value != "none"}
    keys = sorted(({*attention} | {*main}) - {*_FREE_KEYS})
    # a key that an older run did not record was not there to be changed
    changed = [key for key in keys if attention.get(key, main.get(key)) != main.get(key)]
    if not changed:
        return None
    return "no_rope_on_r" if changed == ["rope_on_r"] else ", ".join(changed)


def _optimizer(config: Mapping[str, Any]) -> str:
    """Kind of the hidden matrices' optimizer; another word where some of them have another one."""
    kinds = {key: value for key, value in config.items() if re.fullmatch(r"optimizer\.groups\..+\.kind", key)}
    hidden = kinds.pop("optimizer.groups.hidden.kind", "")
    return "mixed" if hidden == "adamw" and "muon" in kinds.values() else hidden


def paper_row(config: Mapping[str, Any]) -> PaperRow | None:
    """The paper's row that a run reproduces, None where there is none.

    Args:
        config: The resolved config, dotted key -> value, without keys that are "none".
    """
    if "checkpoint.initial_weights" in config:
        return None
    size, control = split_size(config.get("model.size", ""))
    prefix = "model.attention."
    attention = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    kind, schedule = attention.get("kind", ""), config.get("schedule.kind", "")
    # a baseline's size has its name, its MLP giving it the softmax model's parameters
    control = None if control is None or control == kind else _CONTROL_VARIANTS.get(control, control)
    annealing = "annealing" if any(key.endswith(".weight_decay_gamma") for key in config) else None
    changes = [change for change in (control, _attention_change(attention), annealing) if change is not None]
    wanted = (size, kind, " ".join(changes) or None, _optimizer(config), schedule)
    rows = {(row.size, row.attention, row.variant, row.optimizer, row.schedule): row for row in PAPER_ROWS}
    return rows.get(wanted)
