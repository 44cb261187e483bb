"""The training kernels in Triton's interpreter; `test_kernels.py` runs this file with TRITON_INTERPRET=1."""

import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax import ops
from parallax.kernels import backward, forward, tiles
from parallax.kernels.addressing import Mask, document_bounds, heads_per_section
from parallax.kernels.key_norms import largest_key_norms
from parallax.kernels.tiles import Tile
from parallax.reference import parallax_reference, parallax_reference_stats
from parallax.testing import (
    CASES,
    Case,
    Layout,
    assert_attention_within_budget,
    cu_seqlens_of,
    make_inputs,
    output_and_gradients,
    relative_error,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_kernels.py"

DTYPES = [torch.float32, torch.float16]

WIDTHS = [
    Case("width_8", 70, head_dim=8),
    Case("width_32", 70, head_dim=32),
    Case("width_64", 70, head_dim=64),
    Case("width_96", 70, head_dim=96),
    Case("width_128_window", 70, head_dim=128, window_size=20),
    Case("width_256", 35, head_dim=256, num_heads=1),
]

TILES = [
    Tile(16, 16, 4, 1, 0),
    Tile(32, 16, 4, 1, 1),
    Tile(16, 32, 4, 1, 2),
    Tile(64, 16, 4, 1),
    Tile(16, 64, 4, 1, sums=1),
]


def attend(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5
    return ops.triton_attention(q, r, k, v, scale=scale, cu_seqlens=cu_seqlens, window_size=window_size)


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(1 << 30))

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *WIDTHS], ids=lambda case: case.name)
def test_error_is_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    assert_attention_within_budget(attend, case.inputs(dtype), **case.masking())


@pytest.mark.parametrize("layout", ["fused", "heads_first"])
def test_inputs_are_read_in_place(layout: Layout) -> None:
    inputs = make_inputs(2, 40, 4, 2, 16, dtype=torch.float16, layout=layout)
    assert not inputs.q.is_contiguous()
    actual = output_and_gradients(attend, inputs)
    expected = output_and_gradients(attend, make_inputs(2, 40, 4, 2, 16, dtype=torch.float16))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_non_contiguous_rows_are_copied() -> None:
    inputs = make_inputs(1, 40, 2, 1, 16, dtype=torch.float16)
    strided = inputs._replace(r=inputs.r.mT.contiguous().mT, do=inputs.do[..., :1].expand_as(inputs.do))
    plain = strided._replace(r=inputs.r, do=strided.do.contiguous())
    actual, expected = (output_and_gradients(attend, x) for x in (strided, plain))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tile_shape_changes_only_rounding(tile: Tile) -> None:
    inputs = make_inputs(1, 133, 4, 2, 16, dtype=torch.float32)
    cu_seqlens = cu_seqlens_of((1, 5, 64, 63))
    mask = Mask.of(cu_seqlens, 133, 21)
    o, vbar, lse, tbar = forward.forward(*inputs[:4], cu_seqlens, 0.25, 21, save_vbar=True, tile=tile)
    operands = backward.Operands(*inputs)
    dq, dr, rows = backward.query_gradients(operands, o, vbar, lse, tbar, mask, 0.25, tile=tile)
    dk, dv = backward.key_gradients(operands, rows, mask, 0.25, tile=tile)
    actual = {"o": o, "dq": dq, "dr": dr, "dk": dk, "dv": dv}
    expected = output_and_gradients(
        parallax_reference, inputs.to(torch.float64), cu_seqlens=cu_seqlens, window_size=21
    )
    for name in expected:
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-4, atol=2e-5)


def test_window_is_clipped_to_the_number_of_tokens() -> None:
    assert [Mask.of(None, 10, n).window_size for n in (9, 10, 2**40)] == [9, 10, 10]


@pytest.mark.parametrize("shape", [(2, 300, 3, 64), (1, 129, 2, 96), (1, 1, 1, 128)], ids=str)
def test_largest_key_norms(shape: tuple[int, ...]) -> None:
    k = torch.randn(shape).transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(largest_key_norms(k), k.square().sum(3).amax(1))


def test_heads_per_section_follow_the_mean_document_or_the_window() -> None:
    cu_seqlens = cu_seqlens_of((1, 5, 64, 63))
    masks = (Mask.of(None, 133, None), Mask.of(cu_seqlens, 133, None), Mask.of(cu_seqlens, 133, 21))
    assert [mask.reach(133) for mask in masks] == [133, 34, 21]
    # 16 kv heads with two query heads each: nearly equal sections of whole groups, at least one
    assert [heads_per_section(32, 2, n, 100) for n in (10**6, 100, 30, 7, 1)] == [2, 2, 6, 16, 32]


@pytest.mark.parametrize("width", [64, 128])
def test_tile_depends_on_gpu_width_and_document_length(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x: Any = SimpleNamespace(shape=(1, 4096, 8, width), dtype=torch.bfloat16, device=torch.device("cuda", 0))

    def tile(capability: tuple[int, int], reach: int, use_descriptors: bool = True) -> Tile:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return tiles.tile_of("forward", x, use_descriptors, reach)

    key: tuple[tiles.KernelName, int] = ("forward", width)
    assert tile((9, 0), tiles.SHORT) == tiles._HOPPER_SHORT[key]
    assert tile((9, 0), tiles.SHORT + 1) == tiles._HOPPER_SPECIALIZED[key]
    assert tile((9, 0), tiles.SHORT, use_descriptors=False) == tiles._HOPPER[key]
    assert tile((8, 0), tiles.SHORT) == tiles._AMPERE[key]


@pytest.mark.parametrize("width", [8, 16, 32])
def test_narrow_heads_have_tiles_of_the_plain_kernels(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x: Any = SimpleNamespace(shape=(1, 127, 16, width), dtype=torch.bfloat16, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for kernel, plain in (("forward", "forward"), ("softmax_dq", "dqdr"), ("dkdv", "dkdv")):
        assert tiles.tile_of(kernel, x, True, 127) == tiles._HOPPER_NARROW[plain]
        assert not tiles._HOPPER_NARROW[plain].is_specialized


def test_a_tile_has_the_next_power_of_two_of_columns_but_at_least_those_of_a_product() -> None:
    assert [tiles.num_columns(width) for width in tiles.HEAD_DIMS] == [16, 16, 32, 64, 128, 128, 256]


def test_document_bounds_are_written_for_every_row_even_if_they_end_early() -> None:
    for bounds in ([0, 3, 3, 7, 10], [0, 3, 3, 7, 8], [1, 3, 3, 7, 9]):
        first, end = document_bounds(torch.tensor(bounds, dtype=torch.int32), 10)
        assert first is not None
        assert end is not None
        assert first.tolist() == [0, 0, 0, 3, 3, 3, 3, 7, 7, 7]
        assert end.tolist() == [3, 3, 3, 7, 7, 7, 7, 10, 10, 10]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_row_statistics_equal_the_reference(case: Case) -> None:
    q, r, k, v, _ = case.inputs(torch.float32)
    masking = case.masking()
    o, vbar, lse, tbar = forward.forward(
        q, r, k, v, masking["cu_seqlens"], case.head_dim**-0.5, masking["window_size"], save_vbar=True
    )
    expected = parallax_reference_stats(q, r, k, v, **masking)
    torch.testing.assert_close(lse, expected.lse.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tbar, expected.tbar.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vbar, expected.vbar, rtol=1e-5, atol=1e-5)
    assert torch.equal(o, attend(q, r, k, v, **masking))


@pytest.mark.parametrize("key_offset", [3.0, 8.0])
def test_common_part_of_the_keys_costs_no_accuracy(key_offset: float) -> None:
    errors = []
    for offset in (0.0, key_offset):
        inputs = make_inputs(1, 192, 2, 1, 32, dtype=torch.float16, key_offset=offset)
        actual = output_and_gradients(attend, inputs)
        truth = output_and_gradients(parallax_reference, inputs.to(torch.float64))
        errors.append({name: relative_error(actual[name], truth[name]) for name in truth})
    for name in errors[0]:
        assert errors[1][name] < 1.5 * errors[0][name], (name, errors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_within_the_budget_for_large_probes(dtype: torch.dtype) -> None:
    assert_attention_within_budget(attend, make_inputs(1, 100, 2, 1, 32, dtype=dtype, r_scale=40.0))


def test_first_row_of_a_document_is_its_value() -> None:
    q, r, k, v, _ = make_inputs(1, 90, 2, 1, 32, dtype=torch.float16, key_offset=8.0, r_scale=10.0)
    o = attend(q, r, k, v, cu_seqlens=cu_seqlens_of((40, 50)))
    for row in (0, 40):
        assert torch.equal(o[:, row], v[:, row].expand_as(o[:, row]))


def test_non_contiguous_document_bounds() -> None:
    q, r, k, v, _ = make_inputs(1, 50, 2, 1, 32, dtype=torch.float16)
    cu_seqlens = cu_seqlens_of((20, 30))
    strided = torch.stack((cu_seqlens, cu_seqlens + 7), 1)[:, 0]
    assert torch.equal(attend(q, r, k, v, strided), attend(q, r, k, v, cu_seqlens))


def test_zero_probe_gives_softmax_attention() -> None:
    q, r, k, v, _ = make_inputs(1, 100, 2, 1, 32, dtype=torch.float32)
    o = attend(q, torch.zeros_like(r), k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(o.transpose(1, 2), expected)


def test_later_tokens_leave_earlier_outputs_bit_identical() -> None:
    inputs = make_inputs(1, 100, 2, 1, 16, dtype=torch.float16)
    order = torch.cat([torch.arange(50), 50 + torch.randperm(50, generator=torch.Generator().manual_seed(1))])
    o = attend(*inputs[:4])
    q, r, k, v, _ = (x[:, order] for x in inputs)
    assert torch.equal(attend(q, r, k, v)[:, :50], o[:, :50])


def test_packed_documents_equal_separate_calls() -> None:
    lengths = (1, 5, 64, 77)
    inputs = make_inputs(1, sum(lengths), 4, 2, 16, dtype=torch.float32)
    packed = output_and_gradients(attend, inputs, cu_seqlens=cu_seqlens_of(lengths))
    parts = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    separate = [output_and_gradients(attend, type(inputs)(*part)) for part in parts]
    for name in packed:
        expected = torch.cat([part[name] for part in separate], dim=1)
        torch.testing.assert_close(packed[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 0), (0, 8)], ids=["no_tokens", "no_batch"])
def test_empty_inputs_give_empty_results(shape: tuple[int, int]) -> None:
    inputs = make_inputs(*shape, 4, 2, 16, dtype=torch.float16)
    for name, x in output_and_gradients(attend, inputs).items():
        assert x.numel() == 0, name


def test_vbar_is_not_saved_without_a_gradient() -> None:
    q, r, k, v, _ = make_inputs(1, 20, 2, 1, 16, dtype=torch.float16)
    o, vbar, _, _ = ops.triton_forward(q, r, k, v, None, 0.25, None, False)
    assert vbar.numel() == 0
    assert torch.equal(o, attend(q, r, k, v.clone().requires_grad_()))
    o = ops.triton_forward(q.requires_grad_(), r, k, v, None, 0.25, None, False)[0]
    with pytest.raises(RuntimeError, match="save_vbar=True"):
        o.sum().backward()


@pytest.mark.parametrize("masking", [(None, None), (cu_seqlens_of((3, 0, 6)), 2)], ids=["rows", "packed"])
def test_operators_pass_opcheck(masking: tuple) -> None:
    q, r, k, v, do = make_inputs(1, 9, 4, 2, 16, dtype=torch.float32, layout="fused")
    leaves = [x.requires_grad_() for x in (q, r, k, v)]
    check = partial(
        torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    cu_seqlens, window_size = masking
    check(ops.triton_forward, (*leaves, cu_seqlens, 0.25, window_size, True))
    plain = [x.detach() for x in leaves]
    o, vbar, lse, tbar = ops.triton_forward(*plain, cu_seqlens, 0.25, window_size, True)
    check(ops.triton_backward, (do, *plain, o, vbar, lse, tbar, cu_seqlens, 0.25, window_size))
