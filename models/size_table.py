"""Prints parameters, FLOPs and cache of every model of the comparison: `python -m models.size_table`."""

import argparse
import sys
from typing import get_args

import torch

from errors import run_command
from models.config import AttentionConfig, ModelConfig, ParallaxConfig
from models.qwen3 import Qwen3
from models.sizes import CONTROLS, SIZES, split_size

SEQ_LEN = 4096
_QWEN3_VOCABULARY = 151936
_SMALL_VOCABULARIES = {"debug": 4096, "60m": 16384}  # as in configs/base
_COLUMNS = (
    *("size", "attention", "total (M)", "attention (M)", "W_R (M)", "MLP (M)"),
    *(f"GFLOPs/token at {SEQ_LEN}", "cache (bytes/token)", "parameter mismatch"),
)
_VARIANTS = {
    "parallax, gate per head": ParallaxConfig(gate="head"),
    "parallax, probe per kv head": ParallaxConfig(r_heads="kv"),
}


def build_row(size: str, attention: AttentionConfig) -> Qwen3:
    """Build a model of the comparison on the meta device, with its size's vocabulary.

    Args:
        size: A row of models/sizes.py.
        attention: The attention and its options.
    """
    vocab_size = _SMALL_VOCABULARIES.get(split_size(size)[0], _QWEN3_VOCABULARY)
    with torch.device("meta"):
        return Qwen3(ModelConfig(size=size, vocab_size=vocab_size, attention=attention))


def parameter_mismatch(size: str, attention: AttentionConfig) -> float | None:
    """Compute the relative difference of a control's parameters to those that it matches.

    Args:
        size: A row of models/sizes.py.
        attention: The attention and its options.

    Returns:
        0.001 for 0.1% more parameters; None if the size is not a control of that attention.
    """
    plain, name = split_size(size)
    if name is None or CONTROLS[name].attention != attention.kind:
        return None
    reference = build_row(plain, _kinds()[CONTROLS[name].reference])
    return build_row(size, attention).num_parameters()["total"] / reference.num_parameters()["total"] - 1.0


def size_table() -> str:
    """Format every size with every attention, and the controls, as a Markdown table.

    Returns:
        Parameters in millions (those of W_R are part of the attention's), training FLOPs per token, and bytes
        of the decoding cache per token of context: keys and values in bf16, sums over the past in fp32.
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
    """Return the default config of every attention by its kind."""
    return {config().kind: config() for config in get_args(AttentionConfig)}


def _cells(size: str, label: str, attention: AttentionConfig) -> list[str]:
    model = build_row(size, attention)
    counts = model.num_parameters()
    mismatch = parameter_mismatch(size, attention)
    return [
        *(size, label),
        *(f"{counts[part] / 1e6:.2f}" for part in ("total", "attention", "w_r", "mlp")),
        *(f"{model.num_flops_per_token(SEQ_LEN) / 1e9:.3f}", f"{_cache_bytes(model) / SEQ_LEN:,.0f}"),
        "" if mismatch is None else f"{mismatch:+.4%}",
    ]


def _cache_bytes(model: Qwen3) -> int:
    """Return the bytes of one sequence's decoding cache at SEQ_LEN tokens, of bf16 weights."""
    states = [
        module.new_state(1, SEQ_LEN, device=torch.device("meta"), dtype=torch.bfloat16)
        for module in model.attention_modules()
    ]
    return sum(tensor.nbytes for state in states for tensor in state.values())


def main() -> None:
    """Run the command line."""
    argparse.ArgumentParser(
        prog="python -m models.size_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    ).parse_args()
    print(size_table())


if __name__ == "__main__":
    sys.exit(run_command(main))
