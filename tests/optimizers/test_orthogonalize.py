from collections.abc import Callable

import pytest
import torch

from optimizers.orthogonalize import newton_schulz5, polar_express

Method = Callable[..., torch.Tensor]
SHAPES = [(48, 48), (96, 40), (40, 96), (200, 136), (1, 17), (17, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# fraction of the Frobenius norm below which singular values are too small to reach one
SMALL = 0.003
BOUNDS = [
    pytest.param(newton_schulz5, 0.65, 1.25, id="newton_schulz5"),
    pytest.param(polar_express, 0.95, 1.05, id="polar_express"),
]
METHODS = [pytest.param(m, id=m.__name__) for m in (newton_schulz5, polar_express)]


def gaussian(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, dtype=torch.float64)


def low_rank(rows: int, cols: int) -> torch.Tensor:
    return gaussian(rows, 3) @ gaussian(3, cols)


def ill_conditioned(rows: int, cols: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(gaussian(rows, cols), full_matrices=False)
    return u @ torch.diag(torch.logspace(0, -6, s.numel(), dtype=torch.float64)) @ vh


def barely_large(rows: int, cols: int) -> torch.Tensor:
    """All singular values but one are at the threshold, where rounding errors of the Gram form matter."""
    u, s, vh = torch.linalg.svd(gaussian(rows, cols), full_matrices=False)
    values = torch.full_like(s, 1.02 * SMALL)
    values[0] = 1.0
    return u @ torch.diag(values) @ vh


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("method", "low", "high"), BOUNDS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("make", [gaussian, low_rank, ill_conditioned, barely_large])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_singular_vectors_are_kept_and_singular_values_are_near_one(
    device: str,
    method: Method,
    low: float,
    high: float,
    dtype: torch.dtype,
    make: Callable[[int, int], torch.Tensor],
    rows: int,
    cols: int,
) -> None:
    # the dtype in which momentum is exchanged
    matrix = make(rows, cols).to(torch.float32 if dtype == torch.float32 else torch.bfloat16)
    out = method(matrix.to(device), dtype=dtype).cpu()
    assert out.dtype == dtype
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    is_large = s > SMALL * s.norm()
    projected = u[:, is_large].mT @ out.double() @ vh[is_large].mT
    singular_values = torch.linalg.svdvals(projected)
    assert singular_values.min() > low
    assert singular_values.max() < high
    assert torch.linalg.svdvals(out.double()).max() < high
    assert projected.diagonal().min() > low - 0.02


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_polar_express_converges_to_the_polar_factor(rows: int, cols: int) -> None:
    u, s, vh = torch.linalg.svd(gaussian(rows, cols), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(0.2, 3.0, s.numel(), dtype=torch.float64)) @ vh
    torch.testing.assert_close(polar_express(matrix, 9), u @ vh, rtol=0, atol=1e-9)


def test_newton_schulz5_applies_its_polynomial_to_the_singular_values() -> None:
    u, s, vh = torch.linalg.svd(gaussian(30, 20), full_matrices=False)
    expected = s / s.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(newton_schulz5(u @ torch.diag(s) @ vh), u @ torch.diag(expected) @ vh)


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_separate_matrices(method: Method) -> None:
    batch = torch.randn(2, 3, 12, 7, dtype=torch.float64)
    batch[0, 1] *= 1e4
    batch[1, 2] = 0
    separate = torch.stack([torch.stack([method(matrix) for matrix in row]) for row in batch])
    torch.testing.assert_close(method(batch), separate)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zero_is_kept_and_the_norm_does_not_matter(method: Method, dtype: torch.dtype) -> None:
    assert torch.equal(method(torch.zeros(4, 9, dtype=dtype)), torch.zeros(4, 9, dtype=dtype))
    matrix = torch.randn(9, 4).to(dtype)
    # scaling by a power of two is exact
    for factor in (2.0**-20, 2.0**40):
        assert torch.equal(method(matrix * factor), method(matrix))


@pytest.mark.parametrize("method", METHODS)
def test_input_is_not_modified(method: Method) -> None:
    matrix = torch.randn(5, 8)
    before = matrix.clone()
    method(matrix)
    assert torch.equal(matrix, before)


# of arXiv 2505.16932 for singular values of 1e-3 to 1, divided by the safety factor: a, b, c of each step
POLAR_STEPS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    *[(15 / 8, -10 / 8, 3 / 8)] * 2,
]


@pytest.mark.parametrize("num_iterations", range(1, 8))
def test_polar_express_applies_one_polynomial_after_another(num_iterations: int) -> None:
    u, s, vh = torch.linalg.svd(gaussian(30, 20), full_matrices=False)
    expected = s / (1.02 * s.norm())
    for a, b, c in POLAR_STEPS[:num_iterations]:
        expected = a * expected + b * expected**3 + c * expected**5
    actual = polar_express(u @ torch.diag(s) @ vh, num_iterations)
    torch.testing.assert_close(actual, u @ torch.diag(expected) @ vh, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_a_frobenius_norm_beyond_the_range_of_fp16_does_not_matter(method: Method) -> None:
    # each element is below 65504, the norm is not
    matrix = (3000 * torch.randn(96, 40)).clamp(-6e4, 6e4).half()
    assert matrix.double().norm() > 65504
    torch.testing.assert_close(method(matrix).float(), method(matrix.float()), rtol=0, atol=0.02)
