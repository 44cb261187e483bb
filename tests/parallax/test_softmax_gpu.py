"""Softmax attention, `parallax_attention(q, None, k, v)`, with the kernels on a GPU."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from parallax import ops, parallax_attention
from parallax.kernels import hopper, tiles
from parallax.reference import parallax_reference
from parallax.testing import (
    Case,
    Layout,
    assert_attention_within_budget,
    cu_seqlens_of,
    make_inputs,
    output_and_gradients,
    relative_error,
)

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
attend = partial(parallax_attention, impl="triton")

LENGTHS = [
    Case(f"length_{n}_width_{width}", n, 4, 2, width, 2 if n < 4096 else 1)
    for n in (1, 63, 127, 1000, 4097)
    for width in (64, 128)
]
WINDOWS = [
    Case(f"window_{window}_length_{n}", n, 4, 2, 128, window_size=window)
    for window, n in ((1, 333), (100, 1000), (128, 1000), (4095, 4200))
] + [Case("window_100_width_64", 1000, 4, 2, 64, window_size=100)]
DOCUMENTS = [
    Case("packed", 847, 4, 2, 128, documents=(1, 5, 64, 777)),
    Case("packed_many_short", 700, 4, 2, 64, documents=(7,) * 100),
    Case("packed_empty_documents", 470, 4, 2, 128, documents=(0, 233, 0, 0, 237, 0)),
    Case("packed_window_200", 847, 4, 2, 128, documents=(1, 5, 64, 777), window_size=200),
    Case("packed_long_width_64", 3300, 4, 2, 64, documents=(3000, 300)),
]
GROUPS = [Case(f"gqa_{8 // g}", 300, 8, g, 128) for g in (8, 4, 1)]
WIDTHS = [Case(f"width_{width}", 400, 4, 2, width) for width in tiles.HEAD_DIMS]


def case_id(case: Case) -> str:
    return case.name


@pytest.fixture
def uninitialized_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*LENGTHS, *WINDOWS, *DOCUMENTS, *GROUPS], ids=case_id)
def test_error_is_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda").without_probes()
    assert_attention_within_budget(attend, inputs, **case.masking("cuda"))


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("short", [0, tiles.SHORT])
@pytest.mark.parametrize("num_programs", [1, 3])
@pytest.mark.parametrize("case", [*LENGTHS[2:], *WINDOWS, *DOCUMENTS, *GROUPS], ids=case_id)
def test_error_is_within_the_budget_with_fewer_programs_than_work_tiles(
    case: Case, num_programs: int, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "SHORT", short)
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda device: num_programs)
    inputs = case.inputs(BF16, "cuda").without_probes()
    assert_attention_within_budget(attend, inputs, **case.masking("cuda"))


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("case", [*LENGTHS, *WINDOWS, *DOCUMENTS, *WIDTHS[:3]], ids=case_id)
def test_error_of_portable_kernels_is_within_the_budget(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("_HOPPER_SHORT", "_HOPPER_SPECIALIZED"):
        monkeypatch.setattr(tiles, table, {})
    inputs = case.inputs(BF16, "cuda").without_probes()
    assert_attention_within_budget(attend, inputs, **case.masking("cuda"))


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*WIDTHS, DOCUMENTS[3]], ids=case_id)
def test_error_is_within_the_budget_at_every_width(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda").without_probes()
    assert_attention_within_budget(attend, inputs, **case.masking("cuda"))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("key_offset", [0.0, 3.0, 8.0])
@pytest.mark.parametrize("num_tokens", [tiles.SHORT, 2 * tiles.SHORT])
def test_bf16_accuracy_bars(num_tokens: int, key_offset: float, head_dim: int) -> None:
    inputs = make_inputs(1, num_tokens, 16, 8, head_dim, dtype=BF16, device="cuda", key_offset=key_offset)
    inputs = inputs.without_probes()
    actual = output_and_gradients(attend, inputs)
    truth = output_and_gradients(parallax_reference, inputs.to(torch.float64))
    errors = {name: relative_error(actual[name], truth[name]) for name in truth}
    print(f"\nT {num_tokens}, width {head_dim}, key offset {key_offset}: {errors}")
    assert errors["o"] <= 0.0026, errors
    assert max(errors.values()) <= 0.0032, errors


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("growth", [5, 30, 60, 100, 1000])
def test_far_larger_scores_of_early_keys(growth: int, head_dim: int, dtype: torch.dtype) -> None:
    # a factor 2^growth in the weights of later queries; key norms bound the scores of some work tiles only
    inputs = make_inputs(1, 1500, 4, 2, head_dim, dtype=dtype, device="cuda").without_probes()
    size = (growth * math.log(2) * head_dim**0.5) ** 0.5
    inputs.k[:, 100:110, :, 0] += size
    inputs.q[:, 700:, :, 0] += size
    assert_attention_within_budget(attend, inputs)


@pytest.mark.parametrize("offset", [8.0, 64.0])
def test_common_part_of_the_values_costs_no_accuracy(offset: float) -> None:
    inputs = make_inputs(1, 1500, 4, 2, 128, dtype=BF16, device="cuda").without_probes()
    inputs.v.add_(offset)
    assert_attention_within_budget(attend, inputs)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_short_last_document_is_corrected_by_its_mean_key(head_dim: int) -> None:
    # its keys share a tile with rows past the end
    inputs = make_inputs(1, 1044, 4, 2, head_dim, dtype=BF16, device="cuda", key_offset=8.0).without_probes()
    masking = {"cu_seqlens": cu_seqlens_of((1024, 20), "cuda")}
    truth = output_and_gradients(parallax_reference, inputs.to(torch.float64), **masking)
    actual = output_and_gradients(attend, inputs, **masking)
    for name in truth:
        assert relative_error(actual[name][:, 1024:], truth[name][:, 1024:]) <= 0.004, name


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_first_row_of_a_document_is_its_value(dtype: torch.dtype) -> None:
    q, _, k, v, _ = make_inputs(1, 300, 4, 2, 128, dtype=dtype, device="cuda", key_offset=8.0)
    o = attend(q, None, k, v, cu_seqlens=cu_seqlens_of((0, 100, 200), "cuda"))
    for row in (0, 100):
        assert torch.equal(o[:, row], v[:, row].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("layout", ["fused", "heads_first"])
def test_inputs_are_read_in_place(layout: Layout) -> None:
    inputs = make_inputs(2, 500, 4, 2, 128, dtype=BF16, device="cuda", layout=layout).without_probes()
    actual = output_and_gradients(attend, inputs)
    contiguous = make_inputs(2, 500, 4, 2, 128, dtype=BF16, device="cuda").without_probes()
    expected = output_and_gradients(attend, contiguous)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_runs_are_bit_identical(head_dim: int) -> None:
    inputs = make_inputs(2, 2000, 8, 2, head_dim, dtype=BF16, device="cuda").without_probes()
    first = output_and_gradients(attend, inputs)
    for _ in range(3):
        again = output_and_gradients(attend, inputs)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_next_work_tile_does_not_overwrite_operands_still_being_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # short documents: the producer warp is ahead of the consumer warpgroups
    inputs = make_inputs(1, 847, 4, 2, 128, dtype=BF16, device="cuda").without_probes()
    run = partial(output_and_gradients, attend, inputs, cu_seqlens=cu_seqlens_of((1, 5, 64, 777), "cuda"))
    expected = run()
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda device: 1)
    for _ in range(20):
        actual = run()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_operators_pass_opcheck(is_packed: bool) -> None:
    q, _, k, v, do = make_inputs(1, 130, 4, 2, 64, dtype=BF16, device="cuda", layout="fused")
    cu_seqlens = cu_seqlens_of((30, 0, 100), "cuda") if is_packed else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.triton_forward, (leaves[0], None, *leaves[1:], cu_seqlens, 0.125, 50, True))
    q, k, v = (x.detach() for x in leaves)
    o, vbar, lse, tbar = ops.triton_forward(q, None, k, v, cu_seqlens, 0.125, 50, True)
    torch.library.opcheck(ops.triton_backward, (do, q, None, k, v, o, vbar, lse, tbar, cu_seqlens, 0.125, 50))


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_compiled_gradients_equal_uncompiled(is_packed: bool) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(1, 300, 4, 2, 64, dtype=BF16, device="cuda").without_probes()
    cu_seqlens = cu_seqlens_of((100, 200), "cuda") if is_packed else None

    def layer(q: Tensor, r: None, k: Tensor, v: Tensor) -> Tensor:
        return 2 * parallax_attention(2 * q, r, k, v, cu_seqlens=cu_seqlens)

    expected = output_and_gradients(layer, inputs)
    actual = output_and_gradients(torch.compile(layer, fullgraph=True), inputs)
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 0.004, name


def test_cuda_graph_replays_forward_and_backward() -> None:
    inputs = make_inputs(1, 500, 4, 2, 128, dtype=BF16, device="cuda").without_probes()
    run = partial(output_and_gradients, attend, inputs)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x, fresh in zip(inputs, make_inputs(1, 500, 4, 2, 128, dtype=BF16, seed=1), strict=True):
        if x is not None:
            x.copy_(fresh)
    graph.replay()
    expected = run()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)
