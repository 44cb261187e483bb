"""The attention map of a prompt: base softmax, correction and combined weights of one head, as a picture."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.tokenizer import Tokenizer
from errors import UnsupportedError, UserError
from eval.diagnostics.row_statistics import softmax_rows
from eval.scoring.head_scores import head_input_hook
from models.attention.key_values import KeyValueAttention
from models.qwen3 import Qwen3

_SCALED_PART = 0.99  # of the weights, within the scale of colors
MAX_TOKENS = 64
"""Most tokens of a prompt, so that each has a legible label."""


class AttentionMap(NamedTuple):
    """Weights of one head over the tokens of a prompt, row i of query i, fp32 `[T, T]`.

    Attributes:
        softmax_TT: Base softmax p.
        correction_TT: p (tbar - t), whose rows sum to 0; None for attention without a probe.
        combined_TT: w = p (1 + tbar - t); p for attention without a probe.
    """

    softmax_TT: Tensor
    correction_TT: Tensor | None
    combined_TT: Tensor


def map_of(
    q_TK: Tensor, r_TK: Tensor | None, k_TK: Tensor, *, window_size: int | None = None
) -> AttentionMap:
    """Compute the weights (1) and (5) of parallax/reference.py for one head and document.

    Args:
        q_TK: Queries.
        r_TK: Probes, or None.
        k_TK: Keys.
        window_size: Number of newest keys that a query sees, its own included; None for all.
    """
    position_T = torch.arange(len(q_TK), device=q_TK.device)
    age_TT = position_T[:, None] - position_T
    visible_TT = (age_TT >= 0) & (age_TT < (window_size or len(q_TK)))
    _, p_BNMT = softmax_rows(q_TK[None, :, None], k_TK[None], visible_TT[None], None)
    p_TT = p_BNMT[0, :, 0]
    if r_TK is None:
        return AttentionMap(p_TT, None, p_TT)
    t_TT = r_TK @ k_TK.T
    correction_TT = p_TT * ((p_TT * t_TT).sum(-1, keepdim=True) - t_TT)
    return AttentionMap(p_TT, correction_TT, p_TT + correction_TT)


@torch.no_grad()
def prompt_map(model: Qwen3, tokens: list[int], *, layer: int, head: int) -> AttentionMap:
    """Compute the attention map of a prompt.

    Args:
        model: The model, not sharded.
        tokens: Token ids of the prompt, as one document.
        layer: Index of the layer.
        head: Index of the query head.

    Raises:
        UserError: The prompt is empty or too long, or there is no such layer or head.
        UnsupportedError: The layer's attention has no weights over keys.
    """
    modules = list(model.attention_modules())
    size = model.config.dimensions
    for name, value, number in (("layer", layer, len(modules)), ("head", head, size.num_heads)):
        if not 0 <= value < number:
            raise UserError(f"--{name} is {value}, but the model has {name}s 0 to {number - 1}")
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise UserError(f"--prompt has {len(tokens)} tokens, must have 1 to {MAX_TOKENS}")
    module = modules[layer]
    if not isinstance(module, KeyValueAttention):
        raise UnsupportedError(
            f"{type(module).__name__} has no weights over keys to draw; softmax, Parallax and local linear "
            "attention have"
        )
    found: list[AttentionMap] = []

    def capture(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x_BTD, rope = arguments[0], arguments[1]
        assert isinstance(module, KeyValueAttention)
        q, k, _v = module.project(x_BTD, rope)  # pyrefly: ignore [bad-argument-type]
        r = module.probe(x_BTD, rope)  # pyrefly: ignore [bad-argument-type]
        shared = head // (size.num_heads // size.num_kv_heads)
        r_TK = None if r is None else r[0, :, head].float()
        k_TK = k[0, :, shared].float()
        found.append(map_of(q[0, :, head].float(), r_TK, k_TK, window_size=module.window_size))

    handle = module.register_forward_pre_hook(capture)
    try:
        with head_input_hook(model.output, lambda _, arguments: (arguments[0][:, :1], *arguments[1:])):
            model(torch.tensor([tokens], device=model.tok_embeddings.weight.device))
    finally:
        handle.remove()
    return found[0]


def token_labels(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    """Return a short label of each token: its text, with visible spaces."""
    texts = [tokenizer.decode([token]) for token in tokens]
    return [text.replace(" ", "\u00b7").replace("\n", "\\n").replace("$", r"\$")[:12] for text in texts]


def plot_map(found: AttentionMap, labels: list[str], title: str, path: Path) -> None:
    """Draw an attention map, as PNG and PDF: queries downwards, keys to the right.

    Weights beyond the 99th percentile of all panels have the color of the end of the scale: the first queries
    see few keys, and their weights would leave the others pale.

    Args:
        found: From prompt_map.
        labels: Label of each token.
        title: Title of the figure.
        path: The PNG.
    """
    from eval.figure import new_panels, save  # matplotlib is an extra, needed for pictures alone

    panels = [("Base softmax $p$", found.softmax_TT)]
    if found.correction_TT is not None:
        panels.append((r"Correction $p\,(\bar{t} - t)$", found.correction_TT))
        panels.append((r"Combined $p\,(1 + \bar{t} - t)$", found.combined_TT))
    # two panels side by side are legible on a page, three are not
    size = 2 if len(panels) > 1 else 1
    side = 1.2 + 0.17 * len(labels)
    figure, grid = new_panels(
        size, size, size=(side * size + (0.0 if size > 1 else 1.2), (side + 0.3) * size)
    )
    figure.set_layout_engine("compressed")
    figure.suptitle(title, fontsize=11)
    flat = [axes for row in grid for axes in row]
    is_visible = torch.ones_like(found.softmax_TT, dtype=torch.bool).tril()
    weights = torch.stack([weights_TT[is_visible].abs() for _, weights_TT in panels])
    # one scale: the panels add up
    top = float(weights.flatten().quantile(_SCALED_PART))
    for index, (axes, (name, weights_TT)) in enumerate(zip(flat, panels, strict=False)):
        shown = weights_TT.masked_fill(~is_visible, torch.nan).cpu().numpy()
        image = axes.imshow(shown, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="none")
        is_left = index % size == 0
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=90)
        axes.set_yticks(range(len(labels)), labels if is_left else [""] * len(labels), fontsize=7)
        axes.set_xlabel("Key", fontsize=9)
        axes.set_ylabel("Query" if is_left else "", fontsize=9)
        if index == len(panels) - 1:
            _add_scale(figure, image, axes, flat[len(panels) :])
    save(figure, path)


def _add_scale(figure: Any, image: Any, axes: Any, free: list[Any]) -> None:
    """Add the color scale: in the free place of the grid, or beside the only panel."""
    if not free:
        figure.colorbar(image, ax=axes, shrink=0.7, extend="both").ax.tick_params(labelsize=7)
        return
    free[0].set_axis_off()
    scale = free[0].inset_axes((0.15, 0.5, 0.7, 0.05))
    bar = figure.colorbar(image, cax=scale, orientation="horizontal", extend="both")
    bar.set_label("Weight", fontsize=9)
    bar.ax.tick_params(labelsize=8)
