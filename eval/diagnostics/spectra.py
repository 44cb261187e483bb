"""Spectral norm and stable rank of weights, and of the products of weights that a head acts by."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NUM_SQUARINGS = 10


def spectral_norm(w_MN: Tensor, num_squarings: int = NUM_SQUARINGS) -> Tensor:
    """Estimate the largest singular value by power iteration, all powers of two at a time.

    With the Gram matrix A of the shorter side, n x n, and B = A^p, p = 2^num_squarings by as many products,
    tr(A B) / tr(B) is the mean of A's eigenvalues weighted by their p-th powers. By the power mean inequality
    it lies between n^(-1 / (p + 1)) times the largest and the largest; so the norm is too small by at most
    0.34% for n = 1024 and p = 1024, and exact where all singular values are equal or zero. On a GPU, fp32
    powers are rounded to fp16 before each squaring, whose sums are in fp32: a B that is the square of any
    symmetric matrix gives a mean of Rayleigh quotients of A, which is not above its largest eigenvalue.

    Args:
        w_MN: The matrix, fp32 or fp64.
        num_squarings: Binary logarithm of the power.

    Returns:
        The norm, a scalar; 0 for a matrix of zeros.
    """
    return _norms_and_ranks([_gram(w_MN)], num_squarings)[0][0]


def stable_rank(w_MN: Tensor) -> Tensor:
    """Compute |W|_F^2 / |W|_2^2 with the norm of spectral_norm; NaN for a matrix of zeros."""
    return _norms_and_ranks([_gram(w_MN)])[1][0]


def _gram(w_MN: Tensor) -> Tensor:
    """Compute the Gram matrix of the shorter side."""
    return w_MN @ w_MN.T if w_MN.shape[0] <= w_MN.shape[1] else w_MN.T @ w_MN


def _norms_and_ranks(
    grams: Sequence[Tensor], num_squarings: int = NUM_SQUARINGS
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute spectral norms and stable ranks from Gram matrices of one size, all at once."""
    gram_ANN = torch.stack(tuple(grams))
    tiny = torch.finfo(gram_ANN.dtype).tiny
    trace_A = _diagonal(gram_ANN).sum(-1)
    power_ANN = gram_ANN
    for _ in range(num_squarings):
        # the largest element of a Gram matrix is on its diagonal
        power_ANN = _square(power_ANN / _diagonal(power_ANN).amax(-1).clamp_min(tiny)[:, None, None])
    power_ANN = power_ANN / _diagonal(power_ANN).amax(-1).clamp_min(tiny)[:, None, None]
    sum_A = (gram_ANN / trace_A.clamp_min(tiny)[:, None, None] * power_ANN).sum((-2, -1))
    # the square of the norm, in units of the trace, |W|_F^2
    mean_A = sum_A / _diagonal(power_ANN).sum(-1).clamp_min(tiny)
    norm_A = (mean_A * trace_A).sqrt()
    return norm_A.unbind(), (trace_A / norm_A.square()).unbind()


def _diagonal(x_ANN: Tensor) -> Tensor:
    return x_ANN.diagonal(dim1=-2, dim2=-1)


def _square(power_ANN: Tensor) -> Tensor:
    """Square symmetric matrices whose elements are at most 1."""
    if power_ANN.is_cuda and power_ANN.dtype == torch.float32:
        half_ANN = power_ANN.half()
        return torch.bmm(half_ANN, half_ANN, out_dtype=torch.float32)
    return power_ANN @ power_ANN


def product_singular_values(a_KM: Tensor, b_KN: Tensor) -> Tensor:
    """Compute the singular values of A^T B, at most K of them not zero, without forming it.

    Args:
        a_KM: A, K <= M.
        b_KN: B, K <= N.

    Returns:
        `[K]`, descending.
    """
    triangles = (torch.linalg.qr(x.T, mode="r").R for x in (a_KM, b_KN))
    a_KK, b_KK = triangles
    return torch.linalg.svdvals(a_KK @ b_KK.T)


def stable_rank_of(singular_values: Tensor) -> Tensor:
    """Compute sum of squares / largest square of singular values."""
    return singular_values.square().sum() / singular_values.max().square()


def weight_matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of an attention module's linear maps, by name; one of low rank also as a product.

    Args:
        module: The module; if sharded, with its weights gathered.
    """
    found = {name: child.weight for name, child in module.named_children() if isinstance(child, nn.Linear)}
    for name in [name for name in found if name.endswith("_out") and f"{name[:-4]}_in" in found]:
        found[name[:-4]] = found[name] @ found[f"{name[:-4]}_in"]
    return found


def weight_spectra(module: nn.Module, *, exact: bool = False) -> dict[str, dict[str, Tensor]]:
    """Compute spectral norm and stable rank of the weights of an attention module, without synchronizing.

    Args:
        module: The module; if sharded, with its weights gathered.
        exact: By a decomposition, which also gives the condition number, and synchronizes.

    Returns:
        Name of the weight -> quantity -> value, a scalar on the module's device.
    """
    matrices = {name: weight.detach() for name, weight in weight_matrices(module).items()}
    if exact:
        return {name: _decomposed(torch.linalg.svdvals(x.double())) for name, x in matrices.items()}
    grams = {name: _gram(x.float()) for name, x in matrices.items()}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in matrices}
    for size in dict.fromkeys(len(gram) for gram in grams.values()):
        names = [name for name, gram in grams.items() if len(gram) == size]
        norms, ranks = _norms_and_ranks([grams[name] for name in names])
        for name, norm, rank in zip(names, norms, ranks, strict=True):
            found[name] = {"spectral_norm": norm, "stable_rank": rank}
    return found


def _decomposed(singular_values: Tensor) -> dict[str, Tensor]:
    norm = singular_values.max()
    return {
        "condition_number": norm / singular_values.min(),
        "spectral_norm": norm,
        "stable_rank": stable_rank_of(singular_values),
    }


def head_spectra(module: nn.Module, head_dim: int) -> dict[str, Tensor]:
    """Compute the stable ranks of W_QK, W_RK and W_OV of every query head.

    W_QK = W_Q^T W_K, W_RK = W_R^T W_K and W_OV = W_O W_V, of the rows, or columns of W_O, of one query head
    and the key/value head that it reads; norms and their gains, RoPE and gates are left out.

    Args:
        module: An attention with wq, wk, wv, wo, and possibly wr, with a probe per query or key/value head.
        head_dim: Head width K.

    Returns:
        "qk_stable_rank", "rk_stable_rank" and "ov_stable_rank" -> value of each query head, `[H]` fp64.
    """
    weights = {name: weight.detach().double() for name, weight in weight_matrices(module).items()}
    by_head = {name: weights[name].split(head_dim) for name in ("wq", "wk", "wv", "wr") if name in weights}
    by_head["wo"] = weights["wo"].T.split(head_dim)
    num_heads = len(by_head["wq"])
    found = {}
    for name, a, b in (("qk", "wq", "wk"), ("rk", "wr", "wk"), ("ov", "wo", "wv")):
        if a in by_head and b in by_head:
            sizes = [num_heads // len(by_head[each]) for each in (a, b)]
            values = (
                product_singular_values(by_head[a][head // sizes[0]], by_head[b][head // sizes[1]])
                for head in range(num_heads)
            )
            found[f"{name}_stable_rank"] = torch.stack([stable_rank_of(each) for each in values])
    return found
