"""Run a model over the sampled rows, and measure each attention module on the way.

Compiled blocks and CUDA graphs hide queries, keys and probes, so this is a forward of its own, eager, without
gradients: before each attention module runs, a hook computes its heads once more, while FSDP2 has its weights
gathered. No random generator is used.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from eval.diagnostics.config import DiagnosticsSet
from eval.diagnostics.covariance import covariance_statistics
from eval.diagnostics.record import LAYERS, Record
from eval.diagnostics.row_statistics import row_statistics
from eval.diagnostics.sample import QuerySample
from eval.diagnostics.spectra import head_spectra, weight_spectra
from eval.diagnostics.summary import Values, context_counts, rounded, summarize
from eval.scoring.head_scores import head_input_hook
from models.attention.base import Attention, Rope
from models.attention.key_values import KeyValueAttention
from models.attention.local_linear import LocalLinearAttention
from models.attention.parallax import ParallaxAttention
from models.config import LocalLinearConfig
from models.qwen3 import Qwen3


@dataclass(frozen=True, kw_only=True)
class LayerDiagnostics:
    """What was measured of one layer.

    Attributes:
        layer: Its index, from 0.
        attention: Class of its attention module.
        heads: "<quantity>/<reduction>" -> value of each query head; empty for attention that has no weights
            over keys.
        by_context: Quantity -> "mean" and "stderr" -> value of each context length.
        weights: Name of a weight -> "spectral_norm" and "stable_rank" -> value.
        gains: Name of a norm -> "rms" and "largest" of its gains -> value.
    """

    layer: int
    attention: str
    heads: dict[str, Values]
    by_context: dict[str, dict[str, Values]]
    weights: dict[str, dict[str, float | None]]
    gains: dict[str, dict[str, float | None]]


@torch.no_grad()
def collect(
    model: Qwen3, sample: QuerySample, *, set: DiagnosticsSet, layers: Collection[int] | None = None
) -> list[LayerDiagnostics]:
    """Measure the attention modules of a model; all ranks of a sharded one call it.

    Args:
        model: The model; compiled or not, sharded or not. Sharded weights are sharded again at the end.
        sample: The sampled rows, on the model's device.
        set: Which quantities.
        layers: Indices of the layers; None for all.

    Returns:
        What was measured, by layer.

    Raises:
        Exception: What a measurement raised first, after the forward has ended, whose collectives other ranks
            take part in.
    """
    found: list[LayerDiagnostics] = []
    failures: list[Exception] = []

    def measure(layer: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        if failures:
            return
        try:
            found.append(measure_layer(module, layer, arguments[0], arguments[1], sample, set=set))
        except Exception as error:  # of any kind: raised when no rank waits for this one
            failures.append(error)

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(head_input_hook(model.output, _keep_first_position))
        for layer, module in enumerate(model.attention_modules()):
            if layers is None or layer in layers:
                handle = module.register_forward_pre_hook(partial(measure, layer))
                stack.callback(handle.remove)
        seq_len = sample.tokens_BT.shape[1]
        model(sample.tokens_BT.reshape(1, -1), cu_seqlens=sample.cu_seqlens, max_seqlen=seq_len)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    if failures:
        raise failures[0]
    return found


def _keep_first_position(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let the head compute the logits of one position, which nobody reads, instead of all."""
    x_BTD, *others = arguments
    return (x_BTD[:, :1], *others)


def measure_layer(
    module: Attention, layer: int, x_BTD: Tensor, rope: Rope, sample: QuerySample, *, set: DiagnosticsSet
) -> LayerDiagnostics:
    """Measure an attention module.

    Args:
        module: The module, its weights gathered.
        layer: Its index.
        x_BTD: Its input: the sampled rows, flattened to `[1, B * T, D]`.
        rope: Rotary embedding of their positions.
        sample: The sampled rows.
        set: Which quantities.
    """
    heads: dict[str, Values] = {}
    by_context: dict[str, dict[str, Values]] = {}
    if isinstance(module, KeyValueAttention):
        statistics = _row_quantities(module, x_BTD, rope, sample, set)
        heads, by_context = summarize(statistics, sample, sample.visible_keys(module.window_size))
        if set == "full":
            ranks = head_spectra(module, module.size.head_dim)
            heads |= {f"heads/{name}": [rounded(x) for x in values] for name, values in ranks.items()}
    weights = weight_spectra(module, exact=set == "full")
    return LayerDiagnostics(
        layer=layer,
        attention=type(module).__name__,
        heads=heads,
        by_context=by_context,
        weights=_rounded(weights),
        gains=_rounded(_gains(module)),
    )


def _row_quantities(
    module: KeyValueAttention, x_BTD: Tensor, rope: Rope, sample: QuerySample, set: DiagnosticsSet
) -> dict[str, Tensor]:
    """Compute the quantities of the sampled rows, `[B, N, H]` each."""
    seq_len = sample.tokens_BT.shape[1]

    def rows(x_1THK: Tensor) -> Tensor:
        """Unflatten the rows, `[B, T, H, K]`, in fp32."""
        return x_1THK[0].unflatten(0, (-1, seq_len)).float()

    o_row = torch.arange(len(sample.query_BN), device=x_BTD.device)[:, None]

    def queries(x_1THK: Tensor) -> Tensor:
        return rows(x_1THK)[o_row, sample.query_BN]

    q, k, v = module.project(x_BTD, rope)
    r = module.probe(x_BTD, rope)
    q_BNHK, r_BNHK = queries(q), None if r is None else queries(r)
    k_BTGK, v_BTGK = rows(k), rows(v)
    keys = sample.query_BN, sample.visible_keys(module.window_size).first_BN
    found: dict[str, Tensor] = {}
    if set == "full":
        is_solved = isinstance(module, LocalLinearAttention)
        ridge = module.config.ridge if is_solved else LocalLinearConfig().ridge
        found, solved_BNHK = covariance_statistics(
            q_BNHK.double(),
            None if r_BNHK is None else r_BNHK.double(),
            k_BTGK.double(),
            v_BTGK.double(),
            *keys,
            ridge=ridge,
        )
        r_BNHK = solved_BNHK.float() if is_solved else r_BNHK
    found |= row_statistics(q_BNHK, r_BNHK, k_BTGK, v_BTGK, *keys)
    if isinstance(module, ParallaxAttention) and module.config.gate is not None:
        found["gate"] = queries(module.openness(x_BTD)[..., None])[..., 0]
    return found


def _gains(module: nn.Module) -> dict[str, dict[str, float]]:
    """Return the root mean square and the largest magnitude of the gains of a module's norms."""
    norms = {name: child for name, child in module.named_children() if isinstance(child, nn.RMSNorm)}
    gains = {name: norm.weight.float() for name, norm in norms.items()}
    return {
        name: {"rms": float(gain.square().mean().sqrt()), "largest": float(gain.abs().max())}
        for name, gain in gains.items()
    }


def _rounded(values: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    return {name: {key: rounded(x) for key, x in each.items()} for name, each in values.items()}


def make_record(layers: Sequence[LayerDiagnostics], sample: QuerySample, set: DiagnosticsSet) -> Record:
    """Make the record of a measurement, without its step.

    Args:
        layers: From collect.
        sample: The sampled rows.
        set: Which quantities were measured.
    """
    return {
        "set": set,
        "sample": sample.facts(),
        "context": context_counts(sample),
        LAYERS: [asdict(layer) for layer in layers],
    }
