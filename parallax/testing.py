"""Inputs, cases and the error budget for tests and benchmarks of every implementation.

The measuring stick: low-precision inputs are made once; the reference on their `.double()` is the truth; a
plain computation in the same low precision is the yardstick; an implementation's error may be at most twice
that of the yardstick plus a rounding band. No hand-set tolerances.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from parallax.reference import parallax_reference

Layout = Literal["contiguous", "fused", "heads_first"]
"""Memory layouts of inputs: contiguous, slices of one fused projection, transposed from heads-first."""


class Inputs(NamedTuple):
    """Inputs of an attention and the gradient of its output.

    Attributes:
        q: Queries `[B, T, H, K]`.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        do: Gradient of the output `[B, T, H, K]`.
    """

    q: Tensor
    r: Any  # Tensor | None: most tests have probes
    k: Tensor
    v: Tensor
    do: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Return the same values in another dtype (`torch.float64` for the truth)."""
        r = None if self.r is None else self.r.to(dtype)
        return Inputs(self.q.to(dtype), r, *(x.to(dtype) for x in (self.k, self.v, self.do)))

    def without_probes(self) -> "Inputs":
        """Return the same inputs for softmax attention."""
        return self._replace(r=None)


class Masking(TypedDict):
    """Keyword arguments that restrict which keys a query sees.

    Attributes:
        cu_seqlens: Document bounds `[N + 1]` int32, or None.
        window_size: Keys that a query sees, or None.
    """

    cu_seqlens: Tensor | None
    window_size: int | None


@dataclass(frozen=True)
class Case:
    """Sizes and masking of one test.

    Attributes:
        name: Test id.
        num_tokens: T; with `documents` their sum.
        num_heads: H.
        num_kv_heads: G.
        head_dim: K.
        batch_size: B; 1 with `documents`.
        window_size: Keys that a query sees, or None.
        documents: Lengths of packed documents in tokens, or None.
    """

    name: str
    num_tokens: int
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 16
    batch_size: int = 1
    window_size: int | None = None
    documents: tuple[int, ...] | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", **options: Any) -> Inputs:
        """Return `make_inputs` for the sizes of this case; `options` go to it."""
        return make_inputs(
            self.batch_size,
            self.num_tokens,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            dtype=dtype,
            device=device,
            **options,
        )

    def masking(self, device: torch.device | str = "cpu") -> Masking:
        """Return the masking of this case, for an attention's keyword arguments."""
        cu_seqlens = None if self.documents is None else cu_seqlens_of(self.documents, device)
        return Masking(cu_seqlens=cu_seqlens, window_size=self.window_size)


CASES = [
    Case("one_token", 1),
    Case("odd_63_gqa_1", 63, num_heads=2, num_kv_heads=2, batch_size=2),
    Case("odd_111_gqa_2", 111, num_heads=4, num_kv_heads=2, batch_size=2),
    Case("odd_127_gqa_4", 127, num_heads=4, num_kv_heads=1),
    Case("window_1", 63, window_size=1),
    Case("window_7", 111, window_size=7, num_heads=4, num_kv_heads=2, batch_size=2),
    Case("window_100", 150, window_size=100),
    Case("window_longer_than_input", 63, window_size=64),
    Case("packed", 133, documents=(1, 5, 64, 63), num_heads=4, num_kv_heads=2),
    Case("packed_empty_documents", 70, documents=(0, 33, 0, 0, 37, 0)),
    Case("packed_window", 133, documents=(1, 5, 64, 63), window_size=9),
]
"""Small shapes of every path: odd lengths, GQA, windows, packed documents."""


def cu_seqlens_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return document bounds.

    Args:
        lengths: Document lengths in tokens; zero is allowed.
        device: Where to put them.

    Returns:
        `[N + 1]` int32, rising from 0 to the number of tokens.
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def make_inputs(
    batch_size: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    key_offset: float = 0.0,
    r_scale: float = 1.0,
    layout: Layout = "contiguous",
) -> Inputs:
    """Draw standard normal inputs, the same on every device, rounded once to `dtype`.

    Args:
        batch_size: B.
        num_tokens: T.
        num_heads: H.
        num_kv_heads: G.
        head_dim: K.
        dtype: Dtype of all five.
        device: Device of all five.
        seed: Seed of the random numbers.
        key_offset: c in k + c n, with n one standard normal vector per kv head; keys of trained models
            have such a common part.
        r_scale: Factor of r.
        layout: Memory layout; the values do not depend on it.

    Returns:
        q, r, do `[B, T, H, K]` and k, v `[B, T, G, K]`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, r, do = (normal(batch_size, num_tokens, num_heads, head_dim) for _ in range(3))
    k, v = (normal(batch_size, num_tokens, num_kv_heads, head_dim) for _ in range(2))
    k = k + key_offset * normal(num_kv_heads, head_dim)
    tensors = (x.to(device=device, dtype=dtype) for x in (q, r * r_scale, k, v, do))
    return Inputs(*(_lay_out(x, layout) for x in tensors))


def _lay_out(x: Tensor, layout: Layout) -> Tensor:
    """Return the same values as a view of a larger or transposed buffer."""
    if layout == "fused":
        # NaN beside the slice: reading it must show
        return torch.stack([torch.full_like(x, float("nan")), x], dim=2).flatten(2, 3)[:, :, x.shape[2] :]
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def output_and_gradients(
    attend: Callable[..., Tensor], inputs: Inputs, **arguments: object
) -> dict[str, Tensor]:
    """Run an attention forward and backward.

    Args:
        attend: Called as attend(q, r, k, v, **arguments).
        inputs: The inputs; their memory layout is kept.
        arguments: Passed to `attend`, such as `window_size`.

    Returns:
        `o`, `dq`, `dr` (absent without probes), `dk`, `dv`, detached.
    """
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in zip(("q", "r", "k", "v"), inputs[:4], strict=True)
        if x is not None
    }
    o = attend(leaves["q"], leaves.get("r"), leaves["k"], leaves["v"], **arguments)
    gradients = torch.autograd.grad(o, list(leaves.values()), inputs.do)
    return {"o": o.detach()} | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of the truth, in fp64.

    Args:
        actual: Any shape and dtype.
        truth: Same shape.

    Returns:
        The relative error; for a truth of zeros the norm of `actual`.
    """
    truth = truth.double()
    norm = truth.norm().item()
    return (actual.double() - truth).norm().item() / (norm if norm > 0 else 1.0)


def error_budget(truth: Tensor, yardstick: Tensor, dtype: torch.dtype) -> float:
    """Return the largest permitted norm of the error.

    Twice the yardstick's error, plus the rounding band: the error of the truth itself rounded to `dtype`, and
    32 eps of the accumulation dtype (fp32, for fp64 inputs fp64) per element, which is what remains of a sum
    of terms of size one that cancels exactly in the truth.

    Args:
        truth: fp64 result.
        yardstick: The plain computation in `dtype`.
        dtype: Dtype of the inputs.

    Returns:
        Frobenius norm, absolute.
    """
    truth = truth.double()
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    floor = 32 * torch.finfo(accumulation).eps * truth.numel() ** 0.5
    rounding = (truth.to(dtype).double() - truth).norm().item()
    return 2 * (yardstick.double() - truth).norm().item() + rounding + floor


def assert_within_budget(
    name: str, actual: Tensor, truth: Tensor, yardstick: Tensor, dtype: torch.dtype
) -> None:
    """Assert that a result is finite and its error within `error_budget`.

    Args:
        name: Name in the message, such as "dq".
        actual: Result to judge; its dtype must be `dtype`.
        truth: fp64 result for the same inputs.
        yardstick: The plain computation in `dtype`.
        dtype: Dtype of the inputs.

    Raises:
        AssertionError: Not finite, wrong dtype or shape, or over the budget.
    """
    assert actual.dtype == dtype, f"{name} is {actual.dtype}, wanted {dtype}"
    assert actual.shape == truth.shape, f"{name} has shape {tuple(actual.shape)}, wanted {tuple(truth.shape)}"
    num_bad = int((~actual.isfinite()).sum())
    assert num_bad == 0, f"{name}: {num_bad} of {actual.numel()} elements are not finite"
    error = (actual.double() - truth.double()).norm().item()
    budget = error_budget(truth, yardstick, dtype)
    assert error <= budget, (
        f"{name}: error norm {error:.3e} exceeds the budget {budget:.3e} (relative error "
        f"{relative_error(actual, truth):.2e}, yardstick {relative_error(yardstick, truth):.2e})"
    )


def assert_attention_within_budget(
    attend: Callable[..., Tensor],
    inputs: Inputs,
    yardstick: Callable[..., Tensor] = parallax_reference,
    **arguments: object,
) -> None:
    """Assert that an attention's output and all its gradients are within `error_budget`.

    Args:
        attend: Called as attend(q, r, k, v, **arguments).
        inputs: Inputs in the dtype to test.
        yardstick: Called likewise; by default the reference in the same low precision.
        arguments: Passed to the attention, its yardstick and the fp64 reference.

    Raises:
        AssertionError: The output or a gradient is not finite or over its budget.
    """
    dtype = inputs.q.dtype
    actual = output_and_gradients(attend, inputs, **arguments)
    truth = output_and_gradients(parallax_reference, inputs.to(torch.float64), **arguments)
    plain = output_and_gradients(yardstick, inputs, **arguments)
    for name in actual:
        assert_within_budget(name, actual[name], truth[name], plain[name], dtype)
