"""The eager implementation against the reference: values, all gradients, accuracy in 16 bits, memory."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallax import eager
from parallax.ops import eager_attention
from parallax.reference import parallax_reference, parallax_reference_stats
from parallax.testing import (
    CASES,
    Case,
    Inputs,
    Layout,
    assert_attention_within_budget,
    cu_seqlens_of,
    make_inputs,
    output_and_gradients,
    relative_error,
)

GRADCHECK_CASES = [
    Case("causal", 7, num_heads=2, num_kv_heads=2, head_dim=3, batch_size=2),
    Case("gqa", 7, num_heads=4, num_kv_heads=2, head_dim=2),
    Case("window", 8, head_dim=3, window_size=2),
    Case("window_longer_than_tile", 8, head_dim=3, window_size=5),
    Case("packed", 9, head_dim=3, documents=(1, 0, 5, 3)),
    Case("packed_window", 9, head_dim=3, documents=(7, 2), window_size=4),
]

# bounds for 16-bit kernels; the published ones have o 0.0075, dq 0.0273, dr 0.0091 at offset 3
BF16_BOUNDS = {"o": 0.0026, "dq": 0.0032, "dr": 0.0032, "dk": 0.0032, "dv": 0.0032}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def case_id(case: Case) -> str:
    return case.name


def attend_in_tiles(block_size: int, q: Tensor, r: Tensor, k: Tensor, v: Tensor, **arguments) -> Tensor:
    arguments.setdefault("scale", q.shape[-1] ** -0.5)
    return eager_attention(q, r, k, v, block_size=block_size, **arguments)


def attend_default(q: Tensor, r: Tensor, k: Tensor, v: Tensor, **arguments) -> Tensor:
    return attend_in_tiles(48, q, r, k, v, **arguments)


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Fill every torch.empty with NaN, so that unwritten elements are detected."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=case_id)
def test_gradients_equal_finite_differences(case: Case) -> None:
    leaves = [x.requires_grad_() for x in case.inputs(torch.float64)[:4]]
    attend = partial(attend_in_tiles, 3, **case.masking())
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("layout", ["contiguous", "fused", "heads_first"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_output_and_gradients_equal_the_reference(case: Case, layout: Layout) -> None:
    inputs = case.inputs(torch.float64, layout=layout)
    assert layout == "contiguous" or case.num_tokens == 1 or not inputs.q.is_contiguous()
    actual = output_and_gradients(partial(attend_in_tiles, 32), inputs, **case.masking())
    expected = output_and_gradients(parallax_reference, inputs, **case.masking())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_row_statistics_equal_the_reference(case: Case) -> None:
    q, r, k, v, _ = case.inputs(torch.float64)
    masking = case.masking()
    _, lse, tbar = eager.forward(
        q, r, k, v, masking["cu_seqlens"], case.head_dim**-0.5, masking["window_size"], 16
    )
    expected = parallax_reference_stats(q, r, k, v, **masking)
    torch.testing.assert_close(lse, expected.lse)
    torch.testing.assert_close(tbar, expected.tbar)


@pytest.mark.parametrize("block_size", [1, 7, 63, 64, 1000])
def test_tile_size_changes_only_rounding(block_size: int) -> None:
    inputs = make_inputs(1, 64, 4, 2, 8, dtype=torch.float64)
    masking = {"cu_seqlens": cu_seqlens_of((3, 0, 50, 11)), "window_size": 20}
    actual = output_and_gradients(partial(attend_in_tiles, block_size), inputs, **masking)
    expected = output_and_gradients(partial(attend_in_tiles, 16), inputs, **masking)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12)


def test_default_tile_does_not_grow_with_the_batch_on_an_accelerator() -> None:
    sizes = {batch: eager.default_block_size(batch, torch.device("cuda")) for batch in (0, 1, 4, 5000)}
    assert sizes == {0: 1024, 1: 1024, 4: 256, 5000: 1}


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scale_multiplies_the_logits_alone(scale: float) -> None:
    inputs = make_inputs(1, 20, 2, 1, 8, dtype=torch.float64)
    actual = output_and_gradients(partial(attend_in_tiles, 8), inputs, scale=scale)
    expected = output_and_gradients(parallax_reference, inputs, scale=scale)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error_is_within_the_budget(case: Case, dtype: torch.dtype, device: str) -> None:
    assert_attention_within_budget(attend_default, case.inputs(dtype, device), **case.masking(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_within_the_budget_for_large_probes(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 130, 4, 2, 64, dtype=dtype, r_scale=40.0)
    assert_attention_within_budget(attend_default, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key_offset", [0.0, 3.0, 8.0])
def test_bf16_error_does_not_grow_with_a_common_part_of_the_keys(key_offset: float, device: str) -> None:
    inputs = make_inputs(1, 256, 4, 2, 128, dtype=torch.bfloat16, key_offset=key_offset, device=device)
    actual = output_and_gradients(partial(attend_in_tiles, 64), inputs)
    truth = output_and_gradients(parallax_reference, inputs.to(torch.float64))
    errors = {name: relative_error(actual[name], truth[name]) for name in truth}
    assert all(errors[name] <= bound for name, bound in BF16_BOUNDS.items()), errors


def test_zero_probe_gives_softmax_attention() -> None:
    q, r, k, v, _ = make_inputs(2, 111, 4, 2, 16, dtype=torch.float64, r_scale=0.0)
    heads_q, heads_k, heads_v = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(heads_q, heads_k, heads_v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend_default(q, r, k, v), expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_row_with_one_visible_key_returns_its_value_exactly(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 70, 4, 2, 16, dtype=dtype, r_scale=50.0)
    values = inputs.v.repeat_interleave(2, dim=2)
    first_rows = [0, 1, 40]
    packed = attend_default(*inputs[:4], cu_seqlens=cu_seqlens_of((1, 39, 30)))
    assert torch.equal(packed[:, first_rows], values[:, first_rows])
    windowed = output_and_gradients(attend_default, inputs, window_size=1)
    assert torch.equal(windowed["o"], values)


def test_packed_documents_equal_separate_calls() -> None:
    lengths = (1, 5, 0, 64, 77)
    inputs = make_inputs(1, sum(lengths), 4, 2, 8, dtype=torch.float64)
    packed = output_and_gradients(attend_default, inputs, cu_seqlens=cu_seqlens_of(lengths), window_size=50)
    pieces = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    separate = [output_and_gradients(attend_default, Inputs(*piece), window_size=50) for piece in pieces]
    for name in packed:
        torch.testing.assert_close(packed[name], torch.cat([piece[name] for piece in separate], dim=1))


def test_later_tokens_leave_earlier_outputs_bit_identical() -> None:
    inputs = make_inputs(1, 60, 2, 1, 8, dtype=torch.float32)
    expected = attend_default(*inputs[:4])
    later = make_inputs(1, 60, 2, 1, 8, dtype=torch.float32, seed=1)
    mixed = [torch.cat([x[:, :37], y[:, 37:]], dim=1) for x, y in zip(inputs, later, strict=True)]
    actual = attend_default(*mixed[:4])
    assert torch.equal(actual[:, :37], expected[:, :37])
    assert not torch.allclose(actual[:, 37:], expected[:, 37:])


def test_overflow_of_a_masked_probe_score_has_no_effect() -> None:
    q, r, k, v, _ = make_inputs(1, 12, 2, 1, 8, dtype=torch.float32)
    k[:, 7] = 1e38
    r[:, 3] = 1e5
    leaves = [x.requires_grad_() for x in (q, r, k, v)]
    o = attend_default(*leaves)
    assert bool(o[:, :7].isfinite().all())
    dq, dr, *_ = torch.autograd.grad(o[:, :7].sum(), leaves)
    assert bool(dq[:, :7].isfinite().all())
    assert bool(dr[:, :7].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bit_identical(dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 100, 4, 2, 16, dtype=dtype)
    first, second = (output_and_gradients(attend_default, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class LargestTensor(TorchDispatchMode):
    """Records the largest storage that any operation returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.num_bytes = max(self.num_bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("masking", "num_keys"),
    [
        ({}, 512),
        ({"window_size": 20}, 32 + 20 - 1),
        ({"cu_seqlens": cu_seqlens_of((160, 160, 192))}, 192),
    ],
    ids=["causal", "window", "packed"],
)
def test_largest_buffer_is_a_tile_of_scores(masking, num_keys: int) -> None:
    num_tokens, num_heads, block_size = 512, 4, 32
    q, r, k, v, do = make_inputs(1, num_tokens, num_heads, 2, 2, dtype=torch.float32)
    arguments = (masking.get("cu_seqlens"), 0.5, masking.get("window_size"), block_size)
    with LargestTensor() as largest:
        o, lse, tbar = eager.forward(q, r, k, v, *arguments)
        eager.backward(do, q, r, k, v, lse, tbar, *arguments)
    tile_bytes = 4 * num_heads * block_size * num_keys
    assert o.nbytes < tile_bytes, "the tile must be larger than the output"
    assert largest.num_bytes == tile_bytes


def test_wrong_document_bounds_raise() -> None:
    q, r, k, v, _ = make_inputs(1, 12, 2, 1, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="ends at 11, wanted the number of tokens 12"):
        eager.forward(q, r, k, v, cu_seqlens_of((4, 7)), 1.0, None)


def test_autocast_is_disabled_in_forward_and_backward() -> None:
    q, r, k, v, do = make_inputs(1, 9, 4, 2, 16, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, r, k, v)]

    def run() -> tuple[Tensor, ...]:
        o = eager_attention(q, r, k, v, scale=0.25)
        return o, *torch.autograd.grad(o, leaves, do)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
