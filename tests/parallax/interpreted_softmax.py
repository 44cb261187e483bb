"""Softmax attention with the portable Triton kernels in the interpreter; `test_kernels.py` runs this file."""

import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax import ops
from parallax.kernels import backward, forward
from parallax.kernels.addressing import Mask
from parallax.kernels.tiles import Tile
from parallax.reference import parallax_reference, parallax_reference_stats
from parallax.testing import (
    CASES,
    Case,
    assert_attention_within_budget,
    cu_seqlens_of,
    make_inputs,
    output_and_gradients,
    relative_error,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_kernels.py"

DTYPES = [torch.float32, torch.float16]
WIDTHS = [
    Case("width_96", 70, head_dim=96),
    Case("width_128_window", 70, head_dim=128, window_size=20),
    Case("width_256", 35, head_dim=256, num_heads=1),
]
TILES = [Tile(32, 16, 4, 1, 1), Tile(16, 32, 4, 1, 2), Tile(64, 16, 4, 1, sums=1)]


def attend(q: Tensor, r: Tensor | None, k: Tensor, v: Tensor, **masking: Any) -> Tensor:
    return ops.triton_attention(q, r, k, v, scale=q.shape[-1] ** -0.5, **masking)


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
    assert_attention_within_budget(attend, case.inputs(dtype).without_probes(), **case.masking())


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tile_shape_changes_only_rounding(tile: Tile) -> None:
    inputs = make_inputs(1, 133, 4, 2, 16, dtype=torch.float32, layout="fused").without_probes()
    cu_seqlens = cu_seqlens_of((1, 5, 64, 63))
    mask = Mask.of(cu_seqlens, 133, 21)
    o, vbar, lse, tbar = forward.forward(*inputs[:4], cu_seqlens, 0.25, 21, save_vbar=True, tile=tile)
    operands = backward.Operands(*inputs)
    dq, dr, rows = backward.query_gradients(operands, o, vbar, lse, tbar, mask, 0.25, tile=tile)
    dk, dv = backward.key_gradients(operands, rows, mask, 0.25, tile=tile)
    assert [x.numel() for x in (vbar, tbar, dr)] == [0, 0, 0]
    actual = {"o": o, "dq": dq, "dk": dk, "dv": dv}
    masking = {"cu_seqlens": cu_seqlens, "window_size": 21}
    expected = output_and_gradients(parallax_reference, inputs.to(torch.float64), **masking)
    for name in expected:
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-4, atol=2e-5)
    stats = parallax_reference_stats(*inputs[:4], **masking)
    torch.testing.assert_close(lse, stats.lse.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_offset", [3.0, 8.0])
def test_common_part_of_the_keys_costs_no_accuracy(key_offset: float) -> None:
    errors = []
    for offset in (0.0, key_offset):
        inputs = make_inputs(1, 192, 2, 1, 32, dtype=torch.float16, key_offset=offset).without_probes()
        actual = output_and_gradients(attend, inputs)
        truth = output_and_gradients(parallax_reference, inputs.to(torch.float64))
        errors.append({name: relative_error(actual[name], truth[name]) for name in truth})
    for name in errors[0]:
        assert errors[1][name] < 1.5 * errors[0][name], (name, errors)


def test_first_row_of_a_document_is_its_value() -> None:
    q, _, k, v, _ = make_inputs(1, 90, 2, 1, 32, dtype=torch.float16, key_offset=8.0)
    o = attend(q, None, k, v, cu_seqlens=cu_seqlens_of((40, 50)))
    for row in (0, 40):
        assert torch.equal(o[:, row], v[:, row].expand_as(o[:, row]))


@pytest.mark.parametrize("shape", [(1, 0), (0, 8)], ids=["no_tokens", "no_batch"])
def test_empty_inputs_give_empty_results(shape: tuple[int, int]) -> None:
    inputs = make_inputs(*shape, 4, 2, 16, dtype=torch.float16).without_probes()
    for name, x in output_and_gradients(attend, inputs).items():
        assert x.numel() == 0, name


@pytest.mark.parametrize("masking", [(None, None), (cu_seqlens_of((3, 0, 6)), 2)], ids=["rows", "packed"])
def test_operators_pass_opcheck(masking: tuple) -> None:
    q, _, k, v, do = make_inputs(1, 9, 4, 2, 16, dtype=torch.float32, layout="fused")
    cu_seqlens, window_size = masking
    leaves = [x.requires_grad_() for x in (q, k, v)]
    check = partial(
        torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    check(ops.triton_forward, (leaves[0], None, *leaves[1:], cu_seqlens, 0.25, window_size, True))
    q, k, v = (x.detach() for x in leaves)
    o, vbar, lse, tbar = ops.triton_forward(q, None, k, v, cu_seqlens, 0.25, window_size, True)
    check(ops.triton_backward, (do, q, None, k, v, o, vbar, lse, tbar, cu_seqlens, 0.25, window_size))
