"""The decode kernels in Triton's interpreter; `test_kernels.py` runs this file with TRITON_INTERPRET=1."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallax import eager_decode
from parallax.kernels.decode import decode
from parallax.kernels.decode_tiles import DecodeTile
from parallax.testing import relative_error
from tests.parallax.decode_cases import CASES, DecodeCase, DecodeInputs, make_inputs

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_kernels.py"


def run(x: DecodeInputs, num_splits: int, block_s: int, with_probe: bool = True) -> Tensor:
    out = torch.full_like(x.q, torch.nan)
    scale = x.q.shape[-1] ** -0.5
    arguments = (x.k_cache, x.v_cache, x.cache_seqlens, x.page_table, x.window_size, scale, out)
    decode(x.q, x.r if with_probe else None, *arguments, tile=DecodeTile(num_splits, block_s, 4, 1))
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode(case: DecodeCase, num_splits: int) -> None:
    x = make_inputs(case, torch.float16)
    yardstick = torch.empty_like(x.q)
    scale = x.q.shape[-1] ** -0.5
    eager_decode.decode(
        x.q, x.r, x.k_cache, x.v_cache, x.cache_seqlens, x.page_table, x.window_size, scale, yardstick
    )
    # the yardstick rounds only the output, the kernels also their 16-bit weights
    budget = 2 * float(relative_error(yardstick, x.expected)) + 2 * torch.finfo(torch.float16).eps
    assert relative_error(run(x, num_splits, 32), x.expected) < budget
    assert relative_error(run(x, num_splits, 16, with_probe=False), x.expected_softmax) < budget


def test_sequence_without_keys_gives_zeros() -> None:
    x = make_inputs(DecodeCase("", (5, 9)), torch.float16)
    x.cache_seqlens[0] = 0
    for num_splits in (1, 4):
        out = run(x, num_splits, 16)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert relative_error(out[1], x.expected[1]) < 2e-3


def test_windows_near_2_to_the_31_hide_nothing() -> None:
    x = make_inputs(DecodeCase("", (8, 40), num_new=8), torch.float16)
    # of the eight queries five see no key
    x.cache_seqlens[0] = 3
    expected = run(x, 1, 16)
    assert expected[0, 5:].any()
    assert torch.equal(run(replace(x, window_size=2**31 - 1), 1, 16), expected)


def test_head_strides_over_2_to_the_31_elements() -> None:
    x = make_inputs(DecodeCase("", (40,), num_heads=3, num_kv_heads=3), torch.float16, spare=0)
    expected = run(x, 1, 32)

    def spread(cache: Tensor) -> Tensor:
        # the pages between the heads are never touched
        wide = torch.empty(2 * 2**30 + cache[:, :, 0].numel(), dtype=cache.dtype)
        return wide.as_strided(cache.shape, (cache[0, :, 0].numel(), 64, 2**30, 1)).copy_(cache)

    far = replace(x, k_cache=spread(x.k_cache), v_cache=spread(x.v_cache))
    assert torch.equal(run(far, 1, 32), expected)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_probes_in_the_tile_of_queries_or_in_a_separate_one(num_splits: int) -> None:
    # eight rows share a tile with their probes, nine do not
    for num_heads in (8, 9):
        case = DecodeCase("", (75, 40), num_heads=num_heads, num_kv_heads=1, key_offset=3.0)
        x = make_inputs(case, torch.float16)
        assert relative_error(run(x, num_splits, 32), x.expected) < 2e-3
        # rows do not depend on one another
        first = replace(x, q=x.q[:, :, :1], r=x.r[:, :, :1])
        torch.testing.assert_close(run(first, num_splits, 32), run(x, num_splits, 32)[:, :, :1])


def test_splits_without_keys_add_nothing() -> None:
    x = make_inputs(DecodeCase("", (3, 70)), torch.float16)
    expected = run(x, 1, 16)
    for num_splits in (5, 16):
        torch.testing.assert_close(run(x, num_splits, 16), expected, atol=2e-3, rtol=2e-3)
