"""Alignments and condition numbers against dense computations, and known answers."""

import math

import pytest
import torch
from torch import Tensor

from eval.diagnostics import covariance as module
from eval.diagnostics.covariance import covariance_statistics
from parallax.reference import local_linear_reference, parallax_reference

B, T, H, G, K = 2, 14, 4, 2, 6
RIDGE = 0.7
QUERY, FIRST = torch.arange(T).expand(B, T), torch.zeros(B, T, dtype=torch.int64)


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, G, K), (B, T, G, K)]
    q, r, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q, r, k + 5.0, v - 2.0


@pytest.mark.parametrize("piece", [1, 1 << 23])
def test_every_quantity_is_that_of_a_dense_computation(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", piece)
    q, r, k, v = draw(0)
    found, _ = covariance_statistics(q, r, k, v, QUERY, FIRST, ridge=RIDGE)
    for b, i, h in ((b, i, h) for b in range(B) for i in range(1, T) for h in range(H)):
        kk, vv = k[b, : i + 1, h // 2], v[b, : i + 1, h // 2]
        p = (kk @ q[b, i, h] / math.sqrt(K)).softmax(0)
        dk, dv = kk - p @ kk, vv - p @ vv
        cov, sigma = dk.T @ (p[:, None] * dk), dv.T @ (p[:, None] * dk)
        a = cov + RIDGE * torch.eye(K).double()
        solved, correction = torch.linalg.solve(a, p @ kk - q[b, i, h]), sigma @ r[b, i, h]
        values = torch.linalg.eigvalsh(a)
        wanted = {
            "key_condition_number": values[-1] / values[0],
            "correction_alignment": torch.cosine_similarity(correction, p @ vv, dim=0),
            "probe_alignment": torch.cosine_similarity(r[b, i, h], solved, dim=0),
            "covariance_alignment": correction.norm() / (sigma.norm() * r[b, i, h].norm()),
        }
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert float(found[name][b, i, h]) == pytest.approx(float(value), rel=1e-7), name


def test_the_solved_probe_gives_local_linear_attention() -> None:
    q, _, k, v = draw(1)
    _, solved = covariance_statistics(q, None, k, v, QUERY, FIRST, ridge=RIDGE)
    wanted = local_linear_reference(q, k, v, ridge=RIDGE)
    torch.testing.assert_close(parallax_reference(q, solved, k, v), wanted)


def test_the_solved_probe_as_probe_is_aligned_with_itself() -> None:
    q, _, k, v = draw(2)
    _, solved = covariance_statistics(q, None, k, v, QUERY, FIRST, ridge=RIDGE)
    found, _ = covariance_statistics(q, -2 * solved, k, v, QUERY, FIRST, ridge=RIDGE)
    torch.testing.assert_close(found["probe_alignment"][:, 1:], torch.full((B, T - 1, H), -1.0).double())


def test_a_covariance_of_rank_one_along_the_probe_is_fully_aligned() -> None:
    q, r, k, v = draw(3)
    k = torch.zeros_like(k)
    k[..., 0] = torch.arange(T).double()[:, None] ** 2 / T
    r = torch.zeros_like(r)
    r[..., 0] = 0.3
    found, _ = covariance_statistics(q, r, k, v, QUERY, FIRST, ridge=RIDGE)
    torch.testing.assert_close(found["covariance_alignment"][:, 1:], torch.ones(B, T - 1, H).double())


def test_a_random_probe_has_the_alignment_of_chance() -> None:
    q, _, k, v = (x.repeat_interleave(40, 0) for x in draw(4))
    r = torch.randn(q.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    query, first = QUERY[:1].expand(80, T), FIRST[:1].expand(80, T)
    found, _ = covariance_statistics(q, r, k, v, query, first, ridge=RIDGE)
    mean = float(found["covariance_alignment"][:, 1:].square().mean())
    assert mean == pytest.approx(1 / K, rel=0.05)


def test_one_key_has_no_covariance() -> None:
    found, _ = covariance_statistics(*draw(6), QUERY, FIRST, ridge=RIDGE)
    for values in found.values():
        assert values[:, 0].isnan().all()
        assert values[:, 1:].isfinite().all()
