"""Memory-bound passes of Muon: momentum, normalization and parameter update, for lists of tensors.

On a GPU, one kernel launch processes a list of equally shaped tensors, whose addresses it reads from a table,
and reads and writes each element once; on the CPU, torch computes the same. A step is skipped without a
host-device synchronization: where `found_inf` is not zero, nothing is written.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(table, i_n, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to tensor i_n of a list."""
    p_x = tl.load(table + i_n).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p_x = tl.multiple_of(p_x, 16)
    return p_x


@triton.jit
def _is_skipped(found_inf, MASKED: tl.constexpr):
    is_skipped = False
    if MASKED:
        is_skipped = tl.load(found_inf) != 0.0
    return is_skipped


@triton.jit(do_not_specialize=["weight"])
def _update_momentum_kernel(
    table, out, found_inf, weight, num_tensors, num_elements,
    G: tl.constexpr, M: tl.constexpr, NESTEROV: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Update BLOCK elements of one momentum buffer; the table has all gradients, then all buffers."""
    i_n = tl.program_id(1)
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < num_elements
    p_m = _pointer(table, num_tensors + i_n, M, ALIGNED) + o_x
    b_g = tl.load(_pointer(table, i_n, G, ALIGNED) + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_m = tl.load(p_m, mask=m_x, other=0.0).to(tl.float32)
    b_m += weight * (b_g - b_m)
    if not _is_skipped(found_inf, MASKED):
        tl.store(p_m, b_m.to(M), mask=m_x)
    if NESTEROV:
        b_m += weight * (b_g - b_m)
    p_out = out + tl.cast(i_n, tl.int64) * num_elements + o_x
    tl.store(p_out, b_m.to(out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["decay", "alpha"])
def _apply_update_kernel(
    table, updates, found_inf, decay, alpha, num_elements,
    P: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update BLOCK elements of one parameter."""
    i_n = tl.program_id(1)
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < num_elements
    p_p = _pointer(table, i_n, P, ALIGNED) + o_x
    if not _is_skipped(found_inf, MASKED):
        b_p = tl.load(p_p, mask=m_x, other=0.0).to(tl.float32)
        p_u = updates + tl.cast(i_n, tl.int64) * num_elements + o_x
        b_u = tl.load(p_u, mask=m_x, other=0.0).to(tl.float32)
        tl.store(p_p, (b_p * decay + alpha * b_u).to(P), mask=m_x)


@triton.jit
def _multiply_kernel(x, factors, out, num_elements, BLOCK: tl.constexpr):
    """Multiply BLOCK elements of one matrix by its factor."""
    num_blocks = tl.cdiv(num_elements, BLOCK)
    i_n = tl.program_id(0) // num_blocks
    o_x = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    i_x = tl.cast(i_n, tl.int64) * num_elements
    b_x = tl.load(x + i_x + o_x, mask=o_x < num_elements, other=0.0).to(tl.float32)
    b_x = (b_x * tl.load(factors + i_n)).to(out.dtype.element_ty)
    tl.store(out + i_x + o_x, b_x, mask=o_x < num_elements)


def multiply(x: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply each matrix of a batch by its own factor, in fp32 at least.

    Args:
        x: `[N, rows, cols]`, contiguous, any floating dtype.
        factors: `[N]`, fp32 or fp64.
        dtype: Dtype of the result.

    Returns:
        `[N, rows, cols]` in dtype.
    """
    if x.is_cuda and factors.dtype == torch.float32 and x.numel():
        return launch_multiply(x, factors, dtype)
    return torch.mul(x, factors[:, None, None]).to(dtype)


def launch_multiply(x: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Launch the kernel of `multiply`; same arguments and result."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    num_elements = x[0].numel()
    # one axis: the others of a grid end at 65,535, and blocks of one row may be more
    grid = (-(-num_elements // _BLOCK) * len(x),)
    with torch.cuda.device_of(x):
        _multiply_kernel[grid](x, factors, out, num_elements, BLOCK=_BLOCK)
    return out


def update_momentum(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    weight: float,
    nesterov: bool,
    dtype: torch.dtype,
    found_inf: Tensor | None,
) -> Tensor:
    """Update momentum buffers in place, M <- M + weight (G - M).

    Args:
        gradients: N tensors of equal shape, dtype and device.
        momenta: N momentum buffers of equal shape, dtype and device.
        weight: Weight of the gradient, 1 - beta.
        nesterov: Whether to return M + weight (G - M) with the new M instead of M.
        dtype: Dtype of the result.
        found_inf: fp32 scalar on the device; if it is not zero, the momenta are unchanged. None skips
            nothing.

    Returns:
        The updates before orthogonalization, `[N, *shape]`; undefined if the step is skipped.
    """
    if momenta[0].is_cuda:
        return launch_update_momentum(gradients, momenta, weight, nesterov, dtype, found_inf)
    stacked = torch.stack(list(gradients))
    updated = torch.stack(list(momenta)).lerp(stacked, weight)
    if found_inf is None or not found_inf:
        for momentum, new in zip(momenta, updated, strict=True):
            momentum.copy_(new)
    return (updated.lerp(stacked, weight) if nesterov else updated).to(dtype)


def apply_update(
    params: Sequence[Tensor], updates: Tensor, *, decay: float, alpha: float, found_inf: Tensor | None
) -> None:
    """Update parameters in place, P <- decay P + alpha U.

    Args:
        params: N tensors of equal shape, dtype and device.
        updates: `[N, *shape]`, any floating dtype.
        decay: Factor of the parameters, 1 - lr * weight_decay.
        alpha: Factor of the updates.
        found_inf: fp32 scalar on the device; if it is not zero, the parameters are unchanged. None skips
            nothing.
    """
    if params[0].is_cuda:
        launch_apply_update(params, updates, decay, alpha, found_inf)
    elif found_inf is None or not found_inf:
        for p, update in zip(params, updates.to(params[0].dtype), strict=True):
            p.mul_(decay).add_(update, alpha=alpha)


def launch_update_momentum(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    weight: float,
    nesterov: bool,
    dtype: torch.dtype,
    found_inf: Tensor | None,
) -> Tensor:
    """Launch the kernel of `update_momentum`; same arguments and result."""
    first = momenta[0]
    out = torch.empty(len(momenta), *first.shape, dtype=dtype, device=first.device)
    lists = [x.contiguous() for x in gradients], list(momenta)
    table = _addresses(*lists)
    if out.numel():
        with torch.cuda.device_of(first):
            _update_momentum_kernel[_grid(momenta)](
                table, out, table if found_inf is None else found_inf, weight, len(momenta), first.numel(),
                G=_TRITON_DTYPES[gradients[0].dtype], M=_TRITON_DTYPES[first.dtype], NESTEROV=nesterov,
                MASKED=found_inf is not None, ALIGNED=_are_aligned(*lists), BLOCK=_BLOCK,
            )  # fmt: skip
    return out


def launch_apply_update(
    params: Sequence[Tensor], updates: Tensor, decay: float, alpha: float, found_inf: Tensor | None
) -> None:
    """Launch the kernel of `apply_update`; same arguments."""
    first = params[0]
    updates = updates.contiguous()
    table = _addresses(params)
    if updates.numel():
        with torch.cuda.device_of(first):
            _apply_update_kernel[_grid(params)](
                table, updates, table if found_inf is None else found_inf, decay, alpha, first.numel(),
                P=_TRITON_DTYPES[first.dtype], MASKED=found_inf is not None, ALIGNED=_are_aligned(params),
                BLOCK=_BLOCK,
            )  # fmt: skip


def _grid(tensors: Sequence[Tensor]) -> tuple[int, int]:
    return -(-tensors[0].numel() // _BLOCK), len(tensors)


def _addresses(*lists: Sequence[Tensor]) -> Tensor:
    """Return the addresses of all tensors, int64 on their device, without a host-device synchronization."""
    addresses = torch.tensor([x.data_ptr() for tensors in lists for x in tensors], dtype=torch.int64)
    device = lists[0][0].device
    return addresses.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else addresses


def _are_aligned(*lists: Sequence[Tensor]) -> bool:
    return all(x.data_ptr() % 16 == 0 for tensors in lists for x in tensors)
