"""Quantities of query rows against dense fp64 computations, and known answers."""

import math

import pytest
import torch
from torch import Tensor

from eval.diagnostics import row_statistics as module
from eval.diagnostics.row_statistics import row_statistics
from parallax.reference import parallax_reference_stats, visible_keys

B, T, H, G, K = 2, 24, 4, 2, 8


def draw(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, r `[B, T, H, K]` and k, v `[B, T, G, K]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, G, K), (B, T, G, K)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)  # pyrefly: ignore


def bounds(window: int | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Every query, the first key that it sees, and the mask `[T, T]`."""
    visible = visible_keys(T, cu_seqlens=cu_seqlens, window_size=window)
    query = torch.arange(T).expand(B, T)
    return query, visible.to(torch.int64).argmax(-1).expand(B, T), visible


def dense(q: Tensor, r: Tensor, k: Tensor, v: Tensor, visible: Tensor, first: Tensor) -> dict[str, Tensor]:
    """The definitions, written out for one row and head after the other."""
    found: dict[str, list[float]] = {}
    for b, i, h in ((b, i, h) for b in range(B) for i in range(T) for h in range(H)):
        keys = visible[i].nonzero().flatten()
        kk, vv = k[b, keys, h // (H // G)], v[b, keys, h // (H // G)]
        s = kk @ q[b, i, h] / math.sqrt(K)
        p, t = s.softmax(0), kk @ r[b, i, h]
        tbar = p @ t
        w = p * (1 + tbar - t)
        vbar, kbar = p @ vv, p @ kk
        sigma = torch.einsum("s,sk,sl->kl", p, vv - vbar, kk - kbar)
        o_first = int((keys == first[b, i]).nonzero())
        one = {
            "first_mass": p[o_first],
            "entropy": -(p * p.log()).sum(),
            "participation": 1 / (p**2).sum(),
            "largest_logit": s.max(),
            "correction_ratio": (sigma @ r[b, i, h]).norm() / vbar.norm(),
            "probe_norm": r[b, i, h].norm(),
            "combined_first_mass": w[o_first],
            "negative_share": (w < 0).double().mean(),
            "smallest_weight": w.min(),
            "largest_weight": w.max(),
            "largest_probe_score": t.abs().max(),
        }
        for name, value in one.items():
            found.setdefault(name, []).append(float(value))
    return {name: torch.tensor(x, dtype=torch.float64).reshape(B, T, H) for name, x in found.items()}


@pytest.mark.parametrize(
    ("window", "cu_seqlens"), [(None, None), (5, None), (None, [0, 3, 17, 24]), (4, [0, 3, 17, 24])]
)
@pytest.mark.parametrize("piece", [1, 1 << 23])
def test_every_quantity_is_that_of_a_dense_computation(
    window: int | None, cu_seqlens: list[int] | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", piece)
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    query, first, visible = bounds(window, cu)
    for seed in range(2):
        inputs = draw(seed)
        wanted = dense(*inputs, visible, first)
        found = row_statistics(*inputs, query, first)
        q, r, k, v = (x.float() for x in inputs)
        single = row_statistics(q, r, k, v, query, first)
        assert found.keys() == single.keys() == wanted.keys()
        for name, values in wanted.items():
            torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12, msg=name)
            torch.testing.assert_close(single[name].double(), values, rtol=2e-5, atol=2e-6, msg=name)


def test_ratio_is_that_of_the_reference() -> None:
    q, r, k, v = draw(3)
    query, first, _ = bounds(None, None)
    result = parallax_reference_stats(q, r, k, v)
    wanted = (result.vbar - result.o).norm(dim=-1) / result.vbar.norm(dim=-1)
    torch.testing.assert_close(row_statistics(q, r, k, v, query, first)["correction_ratio"], wanted)


def test_a_few_rows_have_the_values_that_they_have_among_all() -> None:
    inputs = draw(4)
    query, first, _ = bounds(7, None)
    everything = row_statistics(*inputs, query, first)
    some = torch.tensor([[0, 5, 23], [2, 2, 11]])
    o_row = torch.arange(B)[:, None]
    q, r, k, v = inputs
    few = row_statistics(q[o_row, some], r[o_row, some], k, v, some, first[o_row, some])
    for name, values in few.items():
        torch.testing.assert_close(values, everything[name][o_row, some], msg=name)


def test_without_probe_there_is_no_correction_and_a_probe_of_zero_corrects_nothing() -> None:
    q, r, k, v = draw(5, torch.float32)
    query, first, _ = bounds(None, None)
    softmax = row_statistics(q, None, k, v, query, first)
    zero = row_statistics(q, torch.zeros_like(r), k, v, query, first)
    assert {*softmax} == {"first_mass", "entropy", "participation", "largest_logit"}
    for name, values in softmax.items():
        assert torch.equal(values, zero[name])
    for name in ("correction_ratio", "probe_norm", "negative_share", "largest_probe_score"):
        assert (zero[name] == 0).all(), name
    assert torch.equal(zero["combined_first_mass"], zero["first_mass"])


def test_one_vector_added_to_all_keys_changes_no_weight() -> None:
    # (14) of the reference, at an offset that costs fp32 digits
    q, r, k, v = draw(6, torch.float32)
    query, first, _ = bounds(None, None)
    there, here = (row_statistics(q, r, k + offset, v, query, first) for offset in (3.0, 0.0))
    for name in ("correction_ratio", "combined_first_mass", "smallest_weight", "entropy"):
        torch.testing.assert_close(there[name], here[name], rtol=1e-3, atol=1e-4, msg=name)


def test_equal_keys_are_attended_uniformly() -> None:
    q, r, k, v = draw(7)
    query, first, _ = bounds(None, None)
    found = row_statistics(q, r, k[:, :1].expand_as(k), v, query, first)
    num_keys = torch.arange(1, T + 1, dtype=torch.float64)[None, :, None].expand(B, T, H)
    torch.testing.assert_close(found["entropy"], num_keys.log())
    torch.testing.assert_close(found["participation"], num_keys)
    torch.testing.assert_close(found["first_mass"], 1 / num_keys)
    # keys without variance: no correction
    torch.testing.assert_close(found["correction_ratio"], torch.zeros_like(num_keys), atol=1e-12, rtol=0)


def test_a_sink_made_by_hand_takes_all_the_mass() -> None:
    _, _, k, v = draw(8)
    k = 0.01 * k
    k[:, 0] = 0.0
    k[:, 0, :, 0] = 100.0
    q = torch.zeros(B, T, H, K, dtype=torch.float64)
    q[..., 0] = 10.0
    query, first, _ = bounds(None, None)
    found = row_statistics(q, None, k, v, query, first)
    assert (found["first_mass"] > 1 - 1e-9).all()
    assert (found["entropy"] < 1e-6).all()
    torch.testing.assert_close(found["largest_logit"], torch.full((B, T, H), 1000 / math.sqrt(K)).double())
    # a window hides the sink from later queries
    query, first, _ = bounds(4, None)
    windowed = row_statistics(q, None, k, v, query, first)
    assert (windowed["first_mass"][:, 4:] < 0.5).all()


def test_packed_documents_have_the_values_that_they_have_alone() -> None:
    inputs = draw(9)
    cu = torch.tensor([0, 10, 24], dtype=torch.int32)
    query, first, _ = bounds(None, cu)
    packed = row_statistics(*inputs, query, first)
    q, r, k, v = (x[:, 10:] for x in inputs)
    alone = row_statistics(q, r, k, v, query[:, :14], torch.zeros(B, 14, dtype=torch.int64))
    for name, values in alone.items():
        torch.testing.assert_close(packed[name][:, 10:], values, msg=name)


def test_no_matrix_of_all_queries_and_keys_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = B * T * (H // G) * 2
    monkeypatch.setattr(module, "PIECE_ELEMENTS", limit)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyrefly: ignore
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    query, first, _ = bounds(None, None)
    with Watch():
        row_statistics(*draw(10), query, first)
    assert largest <= max(limit, B * T * H * K)
