"""Run a model over the sampled rows, and measure each attention module on the way.

Compiled blocks and CUDA graphs hide queries, keys and probes, so this is a forward of its own, eager, without
gradients: before each attention module runs, a hook computes its heads once more, while FSDP2 has its weights
gathered or, on one rank, they are cast. No random generator is used. With the cheap set nothing waits for the
device until the end, when all results are copied to the host at once and reduced there: a run measures itself
every 100 steps.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from eval.diagnostics.transfer import to_host
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


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """What was measured of one layer, not yet reduced.

    Attributes:
        layer: Its index, from 0.
        attention: Class of its attention module.
        window_size: Number of newest keys that a query sees; None for all.
        values: "rows/<quantity>" -> `[B, N, H]`; "heads/<quantity>" -> `[H]`; "weights/<name>/<quantity>" and
            "gains/<name>/<quantity>" -> scalar.
    """

    layer: int
    attention: str
    window_size: int | None
    values: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the values whose names begin with a part's, without it."""
        return {
            key.removeprefix(f"{name}/"): x for key, x in self.values.items() if key.startswith(f"{name}/")
        }


@torch.no_grad()
def collect(
    model: Qwen3, sample: QuerySample, *, set: DiagnosticsSet, layers: Collection[int] | None = None
) -> list[LayerDiagnostics]:
    """Measure the attention modules of a model; all ranks of a sharded one call it.

    Args:
        model: The model; compiled or not, sharded or not. Sharded weights are sharded again at the end.
        sample: The sampled rows, on the host.
        set: Which quantities.
        layers: Indices of the layers; None for all.

    Returns:
        What was measured, by layer.

    Raises:
        Exception: What a measurement raised first, after the forward has ended, whose collectives other ranks
            take part in.
    """
    found: list[LayerTensors] = []
    failures: list[Exception] = []
    there = sample.to(model.tok_embeddings.weight.device)

    def measure(layer: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        if failures:
            return
        try:
            found.append(measure_layer(module, layer, arguments[0], arguments[1], there, set=set))
        except Exception as error:  # of any kind: raised when no rank waits for this one
            failures.append(error)

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(head_input_hook(model.output, _keep_first_position))
        for layer, module in enumerate(model.attention_modules()):
            if layers is None or layer in layers:
                handle = module.register_forward_pre_hook(partial(measure, layer))
                stack.callback(handle.remove)
        seq_len = there.tokens_BT.shape[1]
        model(there.tokens_BT.reshape(1, -1), cu_seqlens=there.cu_seqlens, max_seqlen=seq_len)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    if failures:
        raise failures[0]
    values = to_host([layer.values for layer in found])
    here = [replace(layer, values=each) for layer, each in zip(found, values, strict=True)]
    return _summarize(here, sample)


def _keep_first_position(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let the head compute the logits of one position, which nobody reads, instead of all."""
    x_BTD, *others = arguments
    return (x_BTD[:, :1], *others)


def measure_layer(
    module: Attention, layer: int, x_BTD: Tensor, rope: Rope, sample: QuerySample, *, set: DiagnosticsSet
) -> LayerTensors:
    """Measure an attention module; with the cheap set, without synchronizing with the device.

    Args:
        module: The module, its weights gathered.
        layer: Its index.
        x_BTD: Its input: the sampled rows, flattened to `[1, B * T, D]`.
        rope: Rotary embedding of their positions.
        sample: The sampled rows, on the module's device.
        set: Which quantities.
    """
    values: dict[str, Tensor] = {}
    if isinstance(module, KeyValueAttention):
        rows = _row_quantities(module, x_BTD, rope, sample, set)
        values |= {f"rows/{name}": x_BNH for name, x_BNH in rows.items()}
        if set == "full":
            ranks = head_spectra(module, module.size.head_dim)
            values |= {f"heads/{name}": x_H for name, x_H in ranks.items()}
    weights = weight_spectra(module, exact=set == "full")
    for part, tables in (("weights", weights), ("gains", _gains(module))):
        values |= {f"{part}/{name}/{key}": x for name, table in tables.items() for key, x in table.items()}
    return LayerTensors(
        layer=layer,
        attention=type(module).__name__,
        window_size=module.window_size if isinstance(module, KeyValueAttention) else None,
        values=values,
    )


def _summarize(layers: Sequence[LayerTensors], sample: QuerySample) -> list[LayerDiagnostics]:
    """Reduce the rows of layers, on the host; those with the same quantities and window at once."""
    parts = {name: [layer.part(name) for layer in layers] for name in ("rows", "heads", "weights", "gains")}
    reduced: dict[int, tuple[dict[str, Values], dict[str, dict[str, Values]]]] = {}
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, (layer, quantities) in enumerate(zip(layers, parts["rows"], strict=True)):
        kinds.setdefault((layer.window_size, *quantities), []).append(i)
    for (window_size, *names), members in kinds.items():
        statistics = {name: torch.stack([parts["rows"][i][name] for i in members]) for name in names}
        visible = sample.visible_keys(window_size)
        results = summarize(statistics, sample, visible) if names else [({}, {})] * len(members)
        reduced |= zip(members, results, strict=True)
    found = []
    for i, layer in enumerate(layers):
        heads, by_context = reduced[i]
        spectra = parts["heads"][i].items()
        found.append(
            LayerDiagnostics(
                layer=layer.layer,
                attention=layer.attention,
                heads=heads | {f"heads/{name}": [rounded(x) for x in x_H.tolist()] for name, x_H in spectra},
                by_context=by_context,
                weights=_by_name(parts["weights"][i]),
                gains=_by_name(parts["gains"][i]),
            )
        )
    return found


def _by_name(values: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Return name -> quantity -> value, of "<name>/<quantity>" -> scalar."""
    found: dict[str, dict[str, float | None]] = {}
    for key, x in values.items():
        name, quantity = key.split("/")
        found.setdefault(name, {})[quantity] = rounded(float(x))
    return found


def _row_quantities(
    module: KeyValueAttention, x_BTD: Tensor, rope: Rope, sample: QuerySample, set: DiagnosticsSet
) -> dict[str, Tensor]:
    """Compute the quantities of the sampled rows, `[B, N, H]` each."""
    seq_len = sample.tokens_BT.shape[1]

    def rows(x_1THK: Tensor) -> Tensor:
        """Unflatten the rows, `[B, T, H, K]`."""
        return x_1THK[0].unflatten(0, (-1, seq_len))

    o_row = torch.arange(len(sample.query_BN), device=x_BTD.device)[:, None]

    def queries(x_1THK: Tensor) -> Tensor:
        return rows(x_1THK)[o_row, sample.query_BN].float()

    q, k, v = module.project(x_BTD, rope)
    r = module.probe(x_BTD, rope)
    q_BNHK, r_BNHK = queries(q), None if r is None else queries(r)
    k_BTGK, v_BTGK = rows(k).float(), rows(v).float()
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


def _gains(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the root mean square and the largest magnitude of the gains of a module's norms, scalars."""
    norms = {name: child for name, child in module.named_children() if isinstance(child, nn.RMSNorm)}
    gains = {name: norm.weight.float() for name, norm in norms.items()}
    return {
        name: {"rms": gain.square().mean().sqrt(), "largest": gain.abs().max()}
        for name, gain in gains.items()
    }


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
        LAYERS: [{**vars(layer)} for layer in layers],
    }
