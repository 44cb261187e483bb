"""The table of `python -m models.size_table`: what every model of the comparison has and costs."""

from typing import get_args

import torch

from models.config import AttentionConfig, ModelConfig, ParallaxConfig
from models.qwen3 import Qwen3
from models.sizes import CONTROLS, SIZES, split_size

SEQ_LEN = 4096
_BF16_BYTES = 2
_QWEN3_VOCABULARY = 151936
_SMALL_VOCABULARIES = {"debug": 4096, "60m": 16384}  # as in configs/base
_COLUMNS = (
    *("size", "attention", "total (M)", "attention (M)", "W_R (M)", "MLP (M)"),
    *(f"GFLOPs/token at {SEQ_LEN}", "cache (bytes/token)", "parameters against what it matches"),
)
_VARIANTS = {
    "parallax, gate per head": ParallaxConfig(gate="head"),
    "parallax, probe per kv head": ParallaxConfig(r_heads="kv"),
}


def build_row(size: str, attention: AttentionConfig) -> Qwen3:
    """A model of the comparison on the meta device, with its size's vocabulary.

    Args:
        size: A row of models/sizes.py.
        attention: What attends.

    Returns:
        The model; its parameters hold no memory.
    """
    vocab_size = _SMALL_VOCABULARIES.get(split_size(size)[0], _QWEN3_VOCABULARY)
    with torch.device("meta"):
        return Qwen3(ModelConfig(size=size, vocab_size=vocab_size, attention=attention))


def deviation(size: str, attention: AttentionConfig) -> float | None:
    """By what part of them a control's parameters exceed those it matches.

    Args:
        size: A row of models/sizes.py.
        attention: What attends.

    Returns:
        0.001 for one in a thousand more; None where the size is no control, or not for that attention.
    """
    plain, name = split_size(size)
    if name is None or CONTROLS[name].attention != attention.kind:
        return None
    reference = build_row(plain, _kinds()[CONTROLS[name].reference])
    return build_row(size, attention).num_parameters()["total"] / reference.num_parameters()["total"] - 1.0


def size_table() -> str:
    """Every size with every attention, and the controls, as a Markdown table.

    Returns:
        Parameters in millions (W_R's are part of the attention's), FLOPs of a training step per token, bytes
        of keys and values (or of a state, spread over the tokens) in bf16 per token of context.
    """
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for size in SIZES:
        control = split_size(size)[1]
        rows = {**_kinds(), **_VARIANTS}
        if control is not None:
            kind = CONTROLS[control].attention
            rows = {kind: rows[kind]}
        for label, attention in rows.items():
            lines.append("| " + " | ".join(_cells(size, label, attention)) + " |")
    return "\n".join(lines)


def _kinds() -> dict[str, AttentionConfig]:
    """Every kind of attention as its defaults have it."""
    return {config().kind: config() for config in get_args(AttentionConfig)}


def _cells(size: str, label: str, attention: AttentionConfig) -> list[str]:
    model = build_row(size, attention)
    counts = model.num_parameters()
    missed = deviation(size, attention)
    cache = _BF16_BYTES * model.num_cache_elements(SEQ_LEN) / SEQ_LEN
    return [
        *(size, label),
        *(f"{counts[part] / 1e6:.2f}" for part in ("total", "attention", "w_r", "mlp")),
        *(f"{model.num_flops_per_token(SEQ_LEN) / 1e9:.3f}", f"{cache:,.0f}"),
        "" if missed is None else f"{missed:+.4%}",
    ]


if __name__ == "__main__":
    print(size_table())
