"""The decode kernels on a GPU: error budgets, one CUDA graph for all lengths, large caches."""

import pytest
import torch
from torch import Tensor

from parallax import eager_decode, parallax_decode
from parallax.kernels.decode import decode as decode_by_kernels
from parallax.kernels.decode_tiles import DecodeDevice, DecodeTile, tile_of
from parallax.testing import relative_error
from tests.parallax.decode_cases import CASES, DecodeCase, DecodeInputs, make_inputs

pytestmark = pytest.mark.gpu

MORE = [
    DecodeCase("long", (2048, 1000, 1501), num_heads=16, num_kv_heads=8, head_dim=128),
    DecodeCase("long_offset", (2048, 1000), num_heads=16, num_kv_heads=8, head_dim=128, key_offset=8.0),
    DecodeCase("widest", (700, 8), num_new=8, num_heads=32, num_kv_heads=2, head_dim=128, page_size=64),
    DecodeCase("pages_of_one", (300, 2), num_heads=16, num_kv_heads=8, head_dim=128, page_size=1),
]


def decode(x: DecodeInputs, with_probe: bool = True, impl: str | None = None) -> Tensor:
    return parallax_decode(
        x.q,
        x.r if with_probe else None,
        x.k_cache,
        x.v_cache,
        cache_seqlens=x.cache_seqlens,
        page_table=x.page_table,
        window_size=x.window_size,
        impl=impl,
        check_values=True,
    )


@pytest.mark.parametrize("case", CASES + MORE, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_decode(case: DecodeCase, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype, device="cuda")
    eps = torch.finfo(dtype).eps
    for with_probe, truth in ((True, x.expected), (False, x.expected_softmax)):
        # eager rounds only the output, the kernels also their 16-bit weights
        budget = 2 * float(relative_error(decode(x, with_probe, "eager"), truth)) + eps
        assert relative_error(decode(x, with_probe, "triton"), truth) < budget


@pytest.mark.parametrize("num_splits", [1, 2, 5, 17, 64])
def test_number_of_splits_changes_only_rounding(num_splits: int) -> None:
    x = make_inputs(MORE[0], torch.bfloat16, device="cuda")
    out = torch.full_like(x.q, torch.nan)
    tile = DecodeTile(num_splits, 64, 4, 3)
    scale = x.q.shape[-1] ** -0.5
    decode_by_kernels(x.q, x.r, x.k_cache, x.v_cache, x.cache_seqlens, None, None, scale, out, tile=tile)
    assert relative_error(out, x.expected) < 0.0026


@pytest.mark.parametrize("has_fast_memory", [False, True])
@pytest.mark.parametrize("shape", [(1, 512), (1, 1024), (2, 4096), (16, 1024), (150, 600), (300, 130)])
def test_every_tile_of_the_tables(shape: tuple[int, int], has_fast_memory: bool) -> None:
    batch, num_keys = shape
    torch.manual_seed(0)
    query, keys = (batch, 1, 16, 128), (batch, num_keys, 8, 128)
    q, r, k, v = (torch.randn(s, dtype=torch.bfloat16, device="cuda") for s in (query, query, keys, keys))
    k += 3 * torch.randn_like(k[:1, :1])
    lengths = torch.randint(1, num_keys + 1, (batch,), device="cuda", dtype=torch.int32)
    lengths[0] = num_keys
    tile = tile_of(8 * batch, num_keys, 2, 128, DecodeDevice(132, has_fast_memory))
    for probe in (r, None):
        out, truth = torch.full_like(q, torch.nan), torch.empty_like(q, dtype=torch.float64)
        decode_by_kernels(q, probe, k, v, lengths, None, None, 128**-0.5, out, tile=tile)
        doubles = (q.double(), probe if probe is None else probe.double(), k.double(), v.double())
        eager_decode.decode(*doubles, lengths, None, None, 128**-0.5, truth)
        assert relative_error(out, truth) < 0.0027


def test_chained_calls_read_the_output_of_the_previous_call() -> None:
    # programs start before their inputs are ready: the queries of each call are the previous output
    x = make_inputs(
        DecodeCase("", (512,), num_heads=16, num_kv_heads=8, head_dim=128), torch.bfloat16, "cuda"
    )

    def chain(q: Tensor) -> Tensor:
        for _ in range(20):
            q = parallax_decode(q, q, x.k_cache, x.v_cache, cache_seqlens=x.cache_seqlens, impl="triton")
        return q

    expected = x.q
    for _ in range(20):
        expected = parallax_decode(
            expected, expected, x.k_cache, x.v_cache, cache_seqlens=x.cache_seqlens, impl="triton"
        )
        torch.cuda.synchronize()
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(x.q)
    with torch.cuda.graph(graph):
        out.copy_(chain(x.q))
    for _ in range(50):
        graph.replay()
        assert torch.equal(out, expected)


def test_one_graph_serves_all_lengths() -> None:
    x = make_inputs(
        DecodeCase("", (600, 600), num_heads=16, num_kv_heads=8, head_dim=128), torch.bfloat16, "cuda"
    )
    decode(x)
    lengths, out = x.cache_seqlens.clone(), torch.empty_like(x.q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parallax_decode(x.q, x.r, x.k_cache, x.v_cache, cache_seqlens=lengths, out=out)
    for pair in ((1, 600), (64, 65), (333, 0)):
        lengths.copy_(torch.tensor(pair))
        graph.replay()
        expected = parallax_decode(x.q, x.r, x.k_cache, x.v_cache, cache_seqlens=lengths, impl="eager")
        torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)


def test_compiled_call_equals_uncompiled() -> None:
    x = make_inputs(MORE[0], torch.bfloat16, device="cuda")

    def call(q: Tensor, r: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return parallax_decode(q, r, k, v, cache_seqlens=lengths)

    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(x.q, x.r, x.k_cache, x.v_cache, x.cache_seqlens), decode(x))


def test_cache_of_more_than_2_to_the_31_elements() -> None:
    shape = (600, 4096, 8, 128)
    k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").fill_(torch.nan) for _ in range(2))
    q, r = (torch.randn(600, 1, 16, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for x in (k, v):
        x[-1, :50] = torch.randn(50, 8, 128, device="cuda")
    lengths = torch.zeros(600, dtype=torch.int32, device="cuda")
    lengths[-1] = 50
    out = parallax_decode(q, r, k, v, cache_seqlens=lengths)
    last = parallax_decode(q[-1:], r[-1:], k[-1:, :50], v[-1:, :50], cache_seqlens=lengths[-1:], impl="eager")
    torch.testing.assert_close(out[-1:], last, atol=0.02, rtol=0.02)
    assert not out[:-1].any()


def test_unsupported_inputs_run_eagerly_or_raise() -> None:
    x = make_inputs(DecodeCase("", (20,), head_dim=96), torch.bfloat16, device="cuda")
    assert relative_error(decode(x), x.expected) < 0.01
    with pytest.raises(NotImplementedError, match="serves the head widths 64, 128, got 96; use 'eager'"):
        decode(x, impl="triton")
