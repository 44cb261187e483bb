"""Eager decoding against the reference, argument errors of `parallax_decode`, and its operator."""

import math
from typing import Any

import pytest
import torch

from parallax import parallax_decode
from tests.parallax.decode_cases import CASES, DecodeCase, DecodeInputs, make_inputs

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def decode(x: DecodeInputs, with_probe: bool = True, **options: Any) -> torch.Tensor:
    return parallax_decode(
        x.q,
        x.r if with_probe else None,
        x.k_cache,
        x.v_cache,
        cache_seqlens=x.cache_seqlens,
        page_table=x.page_table,
        window_size=x.window_size,
        **options,
    )


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_decode_equals_the_last_rows_of_full_attention(
    case: DecodeCase, dtype: torch.dtype, tolerance: float
) -> None:
    x = make_inputs(case, dtype)
    torch.testing.assert_close(decode(x).double(), x.expected, atol=tolerance, rtol=tolerance)
    softmax = decode(x, with_probe=False)
    torch.testing.assert_close(softmax.double(), x.expected_softmax, atol=tolerance, rtol=tolerance)


def test_sequence_without_keys_gives_zeros() -> None:
    x = make_inputs(DecodeCase("", (5, 9)), torch.float32)
    x.cache_seqlens[0] = 0
    out = decode(x)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    torch.testing.assert_close(out[1].double(), x.expected[1], atol=1e-5, rtol=1e-5)


def test_writes_into_out_and_reads_strided_inputs() -> None:
    x = make_inputs(DecodeCase("", (5, 9), num_new=2), torch.float32)
    out = torch.full_like(x.q, torch.nan)
    strided = x.q.transpose(1, 3).contiguous().transpose(1, 3)
    result = parallax_decode(strided, x.r, x.k_cache, x.v_cache, cache_seqlens=x.cache_seqlens, out=out)
    assert result is out
    assert torch.equal(out, decode(x))


def test_operator_passes_opcheck() -> None:
    x = make_inputs(DecodeCase("", (5, 9), page_size=4), torch.float32)
    arguments = (x.q, x.r, x.k_cache, x.v_cache, x.cache_seqlens, x.page_table, 3, 0.1, torch.empty_like(x.q))
    torch.library.opcheck(torch.ops.parallax.decode.default, (*arguments, False))


def test_wrong_input_raises() -> None:
    x = make_inputs(DecodeCase("", (5, 9), page_size=4), torch.float32)
    good: dict[str, Any] = {"q": x.q, "r": x.r, "k_cache": x.k_cache, "v_cache": x.v_cache}
    index: dict[str, Any] = {"cache_seqlens": x.cache_seqlens, "page_table": x.page_table}

    def check_raises(error: type[Exception], match: str, **changes: Any) -> None:
        arguments = {**good, **index, **changes}
        tensors = [arguments.pop(name) for name in good]
        with pytest.raises(error, match=match):
            parallax_decode(*tensors, **arguments)

    check_raises(
        ValueError, r"cache_seqlens\[1\] is 99, the cache holds 52", cache_seqlens=torch.tensor([5, 99]).int()
    )
    parallax_decode(*good.values(), cache_seqlens=torch.tensor([5, 52]).int(), page_table=x.page_table)
    check_raises(
        ValueError, r"cache_seqlens\[1\] is 53, the cache holds 52", cache_seqlens=torch.tensor([5, 53]).int()
    )
    assert x.page_table is not None
    table = x.page_table.clone()
    table[1, 2] = x.k_cache.shape[0]
    check_raises(ValueError, r"page_table\[1, 2\] is 29, wanted a page from 0 to 28", page_table=table)
    table[1, 2] = 1000
    check_raises(ValueError, r"page_table\[1, 2\] is 1000, wanted a page from 0", page_table=table)
    table[1, 2], table[1, 5] = 0, 1000  # past the last page of the sequence: never read
    parallax_decode(*good.values(), cache_seqlens=x.cache_seqlens, page_table=table)
    check_raises(TypeError, r"k_cache is torch.float16, q torch.float32", k_cache=x.k_cache.half())
    check_raises(
        TypeError, r"cache_seqlens is torch.int64, wanted torch.int32", cache_seqlens=x.cache_seqlens.long()
    )
    check_raises(
        ValueError,
        r"page_table has shape \(1, 13\), wanted \[B, pages\] with B = 2",
        page_table=x.page_table[:1],
    )
    check_raises(
        ValueError, r"k_cache has batch 29, q 2; wanted the same batch, or a page_table", page_table=None
    )
    check_raises(ValueError, r"r has shape \(2, 1, 2, 64\), q", r=x.r[:, :, :2])
    check_raises(ValueError, r"num_heads \(3\) must be a positive multiple", q=x.q[:, :, :3], r=x.r[:, :, :3])
    check_raises(ValueError, r"window_size is 0", window_size=0)
    check_raises(ValueError, r"scale is nan, wanted a finite factor of q.k", scale=math.nan)
    check_raises(
        ValueError,
        r"cache_seqlens\[1\] is -1, wanted at least 0",
        cache_seqlens=torch.tensor([5, -1]).int(),
    )
    check_raises(ValueError, r"impl is 'cute', wanted 'triton', 'eager'", impl="cute")
    check_raises(NotImplementedError, r"impl='triton' needs CUDA, got cpu; use 'eager'", impl="triton")
    check_raises(ValueError, r"out is not contiguous", out=torch.empty(2, 64, 4, 1).transpose(1, 3))


def test_autocast_is_disabled_in_the_operator() -> None:
    x = make_inputs(CASES[1], torch.float32)
    expected = decode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decode(x), expected)
