"""Spectral norms and stable ranks: known answers, and decompositions."""

import math

import pytest
import torch
from torch import nn

from eval.diagnostics import spectra
from eval.diagnostics.spectra import (
    head_spectra,
    product_singular_values,
    spectral_norm,
    stable_rank,
    stable_rank_of,
    weight_spectra,
)


def with_spectrum(values: list[float], rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def test_identity_and_rank_one() -> None:
    assert float(spectral_norm(3 * torch.eye(40))) == pytest.approx(3)
    assert float(stable_rank(3 * torch.eye(40))) == pytest.approx(40)
    # a sum of zero: orthogonal to a start of ones
    a, b = torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([3.0, 0.0, -3.0])
    assert float(spectral_norm(torch.outer(a, b))) == pytest.approx(float(a.norm() * b.norm()))
    assert float(stable_rank(torch.outer(a, b))) == pytest.approx(1)


def test_a_matrix_of_zeros_has_norm_zero_and_no_rank() -> None:
    assert float(spectral_norm(torch.zeros(4, 6))) == 0
    assert math.isnan(float(stable_rank(torch.zeros(4, 6))))


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_norm_lies_within_its_bound(shape: tuple[int, int], scale: float) -> None:
    n = min(shape)
    spectra = [
        [1.0] * n,
        [1.0 - 0.002 * i for i in range(n)],  # no gap
        [0.8**i for i in range(n)],
        [1.0] + [0.999] * (n - 1),
    ]
    for seed, values in enumerate(spectra):
        w = scale * with_spectrum(values, *shape, seed)
        for matrix, slack in ((w, 1e-9), (w.float(), 2e-5)):
            norm = float(spectral_norm(matrix)) / scale
            assert n ** (-0.5 / 1025) - slack <= norm <= 1 + slack
        exact = stable_rank_of(torch.linalg.svdvals(w))
        assert float(stable_rank(w.float())) == pytest.approx(float(exact), rel=0.008)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_powers_rounded_to_fp16_as_on_a_gpu_keep_the_norm_within_its_bound(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def square(power: torch.Tensor) -> torch.Tensor:
        assert float(power.abs().max()) <= 1 + 1e-6
        half = power.half()
        return half.float() @ half.float()

    monkeypatch.setattr(spectra, "_square", square)
    n = 256
    for seed, values in enumerate(
        [
            [1.0] * n,
            [1.0 - 0.0005 * i for i in range(n)],
            [0.9**i for i in range(n)],
            [1.0] + [0.999] * (n - 1),
            [1.0] + [0.97] * (n - 1),
            [1.0, 0.9995] + [0.01] * (n - 2),
        ]
    ):
        norm = float(spectral_norm(scale * with_spectrum(values, n, 300, seed).float())) / scale
        assert n ** (-0.5 / 1025) - 1e-4 <= norm <= 1 + 2e-5, (seed, norm)
    assert float(spectral_norm(torch.zeros(4, 6))) == 0


def test_few_squarings_are_below_the_norm_by_no_more_than_their_bound() -> None:
    w = with_spectrum([1.0 - 0.01 * i for i in range(32)], 32, 50, 0)
    for num in (0, 2, 4):
        assert 32 ** (-0.5 / (2**num + 1)) <= float(spectral_norm(w, num)) <= 1


def test_singular_values_of_a_product_of_narrow_matrices() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(6, size, generator=generator, dtype=torch.float64) for size in (20, 30))
    torch.testing.assert_close(product_singular_values(a, b), torch.linalg.svdvals(a.T @ b)[:6])


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = nn.Linear(20, 16), nn.Linear(20, 8), nn.Linear(20, 8)
        self.wo, self.wr_in, self.wr_out = nn.Linear(16, 20), nn.Linear(20, 3), nn.Linear(3, 8)


def test_spectra_of_heads_are_those_of_the_products() -> None:
    torch.manual_seed(2)
    maps = Maps().double()
    found = head_spectra(maps, 4)
    wr = maps.wr_out.weight @ maps.wr_in.weight
    for head in range(4):
        own, shared = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        wanted = {
            "qk_stable_rank": maps.wq.weight[own].T @ maps.wk.weight[shared],
            "rk_stable_rank": wr[shared].T @ maps.wk.weight[shared],  # a probe per key/value head
            "ov_stable_rank": maps.wo.weight[:, own] @ maps.wv.weight[shared],
        }
        for name, product in wanted.items():
            wanted_rank = stable_rank_of(torch.linalg.svdvals(product.detach()))
            assert float(found[name][head]) == pytest.approx(float(wanted_rank))


def test_weights_of_a_module_and_the_product_of_those_of_low_rank() -> None:
    torch.manual_seed(3)
    maps = Maps()
    cheap, exact = weight_spectra(maps), weight_spectra(maps, exact=True)
    assert cheap.keys() == exact.keys() == {"wq", "wk", "wv", "wo", "wr_in", "wr_out", "wr"}
    assert cheap["wr"]["stable_rank"] <= 3
    for name, values in cheap.items():
        for quantity, value in values.items():
            assert float(value) == pytest.approx(float(exact[name][quantity]), rel=0.008)
    assert float(exact["wq"]["condition_number"]) >= 1
