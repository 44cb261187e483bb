import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from parallax import ops, parallax_attention
from parallax.kernels import hopper, tiles
from parallax.reference import parallax_reference
from parallax.testing import (
    Case,
    Inputs,
    Layout,
    assert_attention_within_budget,
    cu_seqlens_of,
    make_inputs,
    output_and_gradients,
    relative_error,
)

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
NAMES = ("o", "dq", "dr", "dk", "dv")
attend = partial(parallax_attention, impl="triton")

LENGTHS = [
    Case(f"length_{n}_width_{width}", n, 4, 2, width, 2 if n < 4096 else 1)
    for n in (1, 63, 127, 1000, 4096, 4097)
    for width in (64, 128)
]
WINDOWS = [
    Case(f"window_{window}_length_{n}", n, 4, 2, 128, window_size=window)
    for window, n in ((1, 333), (100, 1000), (128, 1000), (200, 1000), (4095, 4200), (5000, 1000))
] + [Case("window_100_width_64", 1000, 4, 2, 64, window_size=100)]
DOCUMENTS = [
    Case("packed", 847, 4, 2, 128, documents=(1, 5, 64, 777)),
    Case("packed_many_short", 700, 4, 2, 64, documents=(7,) * 100),
    Case("packed_empty_documents", 470, 4, 2, 128, documents=(0, 233, 0, 0, 237, 0)),
    Case("packed_window_200", 847, 4, 2, 128, documents=(1, 5, 64, 777), window_size=200),
    Case("packed_window_200_width_64", 847, 4, 2, 64, documents=(1, 5, 64, 777), window_size=200),
]
GROUPS = [Case(f"gqa_{8 // g}", 300, 8, g, 128) for g in (8, 4, 2, 1)]
WIDTHS = [Case(f"width_{width}", 400, 4, 2, width) for width in tiles.HEAD_DIMS]


def case_id(case: Case) -> str:
    return case.name


def disable_specialized_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("_HOPPER_SHORT", "_HOPPER_SPECIALIZED"):
        monkeypatch.setattr(tiles, table, {})


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
    assert_attention_within_budget(attend, case.inputs(dtype, "cuda"), **case.masking("cuda"))


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*LENGTHS, *WINDOWS, *DOCUMENTS, *GROUPS, *WIDTHS[:3]], ids=case_id)
def test_error_of_portable_kernels_is_within_the_budget(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    disable_specialized_kernels(monkeypatch)
    assert_attention_within_budget(attend, case.inputs(dtype, "cuda"), **case.masking("cuda"))


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("num_programs", [1, 3])
@pytest.mark.parametrize("case", [*LENGTHS[2:], *WINDOWS, *DOCUMENTS, *GROUPS, *WIDTHS[:3]], ids=case_id)
def test_error_is_within_the_budget_with_fewer_programs_than_work_tiles(
    case: Case, num_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda device: num_programs)
    assert_attention_within_budget(attend, case.inputs(BF16, "cuda"), **case.masking("cuda"))


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*LENGTHS, *WINDOWS, *DOCUMENTS], ids=case_id)
def test_error_with_the_tiles_of_long_rows_is_within_the_budget(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "SHORT", 0)
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda device: 3)
    assert_attention_within_budget(attend, case.inputs(dtype, "cuda"), **case.masking("cuda"))


def test_last_document_extends_to_the_end_if_bounds_end_early() -> None:
    # bounds on the GPU are not checked: the call must return, though its result is meaningless
    inputs = make_inputs(1, 500, 4, 2, 128, dtype=BF16, device="cuda")
    short, whole = (cu_seqlens_of(lengths, "cuda") for lengths in ((100, 150), (100, 400)))
    actual, expected = (output_and_gradients(attend, inputs, cu_seqlens=x) for x in (short, whole))
    for name in NAMES:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", WIDTHS, ids=case_id)
def test_error_is_within_the_budget_at_every_width(case: Case, dtype: torch.dtype) -> None:
    assert_attention_within_budget(attend, case.inputs(dtype, "cuda"))


@pytest.mark.parametrize("case", [*DOCUMENTS, WINDOWS[3]], ids=case_id)
def test_fp32_error_is_within_the_budget(case: Case) -> None:
    assert_attention_within_budget(attend, case.inputs(torch.float32, "cuda"), **case.masking("cuda"))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("key_offset", [0.0, 3.0, 8.0])
@pytest.mark.parametrize("num_tokens", [tiles.SHORT, 2 * tiles.SHORT])
def test_bf16_accuracy_bars(num_tokens: int, key_offset: float, head_dim: int) -> None:
    inputs = make_inputs(1, num_tokens, 16, 8, head_dim, dtype=BF16, device="cuda", key_offset=key_offset)
    actual = output_and_gradients(attend, inputs)
    truth = output_and_gradients(parallax_reference, inputs.to(torch.float64))
    errors = {name: relative_error(actual[name], truth[name]) for name in NAMES}
    print(f"\nT {num_tokens}, width {head_dim}, key offset {key_offset}: {errors}")
    assert errors["o"] <= 0.0026, errors
    assert max(errors.values()) <= 0.0032, errors


@pytest.mark.parametrize("head_dim", [64, 128])
def test_short_last_document_is_as_accurate_as_with_portable_kernels(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # its keys share a tile with rows past the end
    inputs = make_inputs(1, 1044, 4, 2, head_dim, dtype=BF16, device="cuda", key_offset=8.0)
    cu_seqlens = cu_seqlens_of((1024, 20), "cuda")
    truth = output_and_gradients(parallax_reference, inputs.to(torch.float64), cu_seqlens=cu_seqlens)
    actual = output_and_gradients(attend, inputs, cu_seqlens=cu_seqlens)
    disable_specialized_kernels(monkeypatch)
    plain = output_and_gradients(attend, inputs, cu_seqlens=cu_seqlens)
    for name in NAMES:
        error, usual = (relative_error(x[name][:, 1024:], truth[name][:, 1024:]) for x in (actual, plain))
        assert error <= 1.25 * usual, (name, error, usual)


def test_packed_documents_equal_separate_calls() -> None:
    lengths = (1, 5, 64, 777)
    inputs = make_inputs(1, sum(lengths), 4, 2, 128, dtype=BF16, device="cuda")
    packed = output_and_gradients(attend, inputs, cu_seqlens=cu_seqlens_of(lengths, "cuda"))
    parts = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    separate = [output_and_gradients(attend, Inputs(*part)) for part in parts]
    for name in NAMES:
        assert relative_error(packed[name], torch.cat([part[name] for part in separate], dim=1)) < 0.004, name


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_first_row_of_a_document_is_its_value(dtype: torch.dtype) -> None:
    q, r, k, v, _ = make_inputs(1, 300, 4, 2, 128, dtype=dtype, device="cuda", key_offset=8.0, r_scale=10.0)
    o = attend(q, r, k, v, cu_seqlens=cu_seqlens_of((0, 100, 200), "cuda"))
    for row in (0, 100):
        assert torch.equal(o[:, row], v[:, row].repeat_interleave(2, dim=1))


def test_zero_probe_gives_softmax_attention() -> None:
    inputs = make_inputs(2, 777, 4, 2, 128, dtype=BF16, device="cuda", r_scale=0.0)

    def softmax(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2) + 0 * r

    actual, expected = (output_and_gradients(f, inputs) for f in (attend, softmax))
    for name in ("o", "dq", "dk", "dv"):
        assert relative_error(actual[name], expected[name]) < 0.006, name


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_error_is_within_the_budget_for_large_probes(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 500, 4, 2, 128, dtype=dtype, device="cuda", r_scale=40.0)
    assert_attention_within_budget(attend, inputs)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("growth", [5, 30, 60, 100, 1000])
def test_far_larger_scores_of_early_keys(growth: int, head_dim: int, dtype: torch.dtype) -> None:
    # a factor 2^growth in the weights of later queries; key norms bound the scores of some work tiles only
    inputs = make_inputs(1, 1500, 4, 2, head_dim, dtype=dtype, device="cuda")
    size = (growth * math.log(2) * head_dim**0.5) ** 0.5
    inputs.k[:, 100:110, :, 0] += size
    inputs.q[:, 700:, :, 0] += size
    assert_attention_within_budget(attend, inputs)


@pytest.mark.parametrize("layout", ["fused", "heads_first"])
def test_inputs_are_read_in_place(layout: Layout) -> None:
    inputs = make_inputs(2, 500, 4, 2, 128, dtype=BF16, device="cuda", layout=layout)
    assert not inputs.q.is_contiguous()
    actual = output_and_gradients(attend, inputs)
    expected = output_and_gradients(attend, Inputs(*(x.contiguous() for x in inputs)))
    for name in NAMES:
        assert torch.equal(actual[name], expected[name]), name


def test_inputs_that_descriptors_cannot_read() -> None:
    inputs = make_inputs(1, 300, 4, 2, 128, dtype=BF16, device="cuda")
    expected = output_and_gradients(attend, inputs)

    def misaligned(x: Tensor) -> Tensor:
        wide = torch.zeros(*x.shape[:3], 129, dtype=x.dtype, device=x.device)
        wide[..., 1:] = x
        return wide[..., 1:]

    variants = {
        "misaligned": Inputs(*(misaligned(x) for x in inputs)),
        "rows_not_contiguous": Inputs(*(x.mT.contiguous().mT for x in inputs)),
    }
    for variant in variants.values():
        actual = output_and_gradients(attend, variant)
        for name in NAMES:
            assert relative_error(actual[name], expected[name]) < 0.004, name
    expanded = inputs._replace(do=inputs.do[:, :, :1, :1].expand_as(inputs.do))
    actual = output_and_gradients(attend, expanded)
    expected = output_and_gradients(attend, expanded._replace(do=expanded.do.contiguous()))
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


def test_two_runs_are_bit_identical() -> None:
    inputs = make_inputs(2, 2000, 8, 2, 128, dtype=BF16, device="cuda")
    first = output_and_gradients(attend, inputs)
    for _ in range(3):
        again = output_and_gradients(attend, inputs)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    num_tokens, num_heads, window_size, tail = 131_328, 128, 64, 256
    assert num_tokens * num_heads * 128 > 2**31
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, num_tokens, heads, 128, generator=generator, device="cuda", dtype=BF16)

    inputs = Inputs(normal(num_heads), normal(num_heads), normal(1), normal(1), normal(num_heads))
    actual = output_and_gradients(attend, inputs, window_size=window_size)
    # rows at least a window after the cut see the same keys in both
    last = Inputs(*(x[:, -tail:].clone() for x in inputs))
    expected = output_and_gradients(attend, last, window_size=window_size)
    for name in NAMES:
        pair = (x[name][:, -(tail - window_size) :] for x in (actual, expected))
        assert relative_error(*pair) < 1e-3, name
    del actual, inputs
    torch.cuda.empty_cache()


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_operators_pass_opcheck(is_packed: bool) -> None:
    q, r, k, v, do = make_inputs(1, 130, 4, 2, 64, dtype=BF16, device="cuda", layout="fused")
    cu_seqlens = cu_seqlens_of((30, 0, 100), "cuda") if is_packed else None
    leaves = [x.requires_grad_() for x in (q, r, k, v)]
    torch.library.opcheck(ops.triton_forward, (*leaves, cu_seqlens, 0.125, 50, True))
    plain = [x.detach() for x in leaves]
    o, vbar, lse, tbar = ops.triton_forward(*plain, cu_seqlens, 0.125, 50, True)
    torch.library.opcheck(ops.triton_backward, (do, *plain, o, vbar, lse, tbar, cu_seqlens, 0.125, 50))


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_compiled_gradients_equal_uncompiled(is_packed: bool) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(1, 300, 4, 2, 64, dtype=BF16, device="cuda")
    cu_seqlens = cu_seqlens_of((100, 200), "cuda") if is_packed else None

    def layer(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * parallax_attention(2 * q, r * r, k, v, cu_seqlens=cu_seqlens)

    expected = output_and_gradients(layer, inputs)
    actual = output_and_gradients(torch.compile(layer, fullgraph=True), inputs)
    for name in NAMES:
        assert actual[name].isfinite().all(), name
        assert relative_error(actual[name], expected[name]) < 0.004, name


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_cuda_graph_replays_forward_and_backward(is_packed: bool) -> None:
    inputs = make_inputs(1, 500, 4, 2, 128, dtype=BF16, device="cuda")
    cu_seqlens = cu_seqlens_of((100, 400), "cuda")
    run: Callable[[], dict[str, Tensor]] = partial(
        output_and_gradients, attend, inputs, **({"cu_seqlens": cu_seqlens} if is_packed else {})
    )
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x, fresh in zip(inputs, make_inputs(1, 500, 4, 2, 128, dtype=BF16, seed=1), strict=True):
        x.copy_(fresh)
    cu_seqlens.copy_(cu_seqlens_of((333, 167)))
    graph.replay()
    expected = run()
    assert all(torch.equal(captured[name], expected[name]) for name in NAMES)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("width", [64, 128])
def test_kernels_run_on_the_gpu_of_their_tensors(width: int) -> None:
    expected = output_and_gradients(attend, make_inputs(1, 500, 4, 2, width, dtype=BF16, device="cuda:0"))
    actual = output_and_gradients(attend, make_inputs(1, 500, 4, 2, width, dtype=BF16, device="cuda:1"))
    assert all(torch.equal(actual[name].cpu(), expected[name].cpu()) for name in NAMES)


def test_autocast_casts_the_inputs() -> None:
    inputs = make_inputs(1, 200, 4, 2, 64, dtype=torch.float32, device="cuda")
    expected = output_and_gradients(attend, inputs.to(BF16))
    with torch.autocast("cuda", dtype=BF16):
        actual = output_and_gradients(attend, inputs._replace(do=inputs.do.to(BF16)))
    assert all(torch.equal(actual[name].to(BF16), expected[name]) for name in NAMES)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_leaves_gradients_bit_identical(use_reentrant: bool) -> None:
    inputs = make_inputs(1, 200, 4, 2, 64, dtype=BF16, device="cuda")
    expected = output_and_gradients(attend, inputs)
    *leaves, do = (x.detach().requires_grad_() for x in inputs)
    checkpoint(attend, *leaves, use_reentrant=use_reentrant).backward(do.detach())
    for name, leaf in zip(("dq", "dr", "dk", "dv"), leaves, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, expected[name]), name


def test_new_lengths_do_not_recompile() -> None:
    from parallax.kernels import backward, forward, hopper_dkdv, hopper_dqdr, hopper_forward, key_norms

    kernels = (
        forward._parallax_fwd_kernel,
        backward._parallax_bwd_dqdr_kernel,
        backward._parallax_bwd_dkdv_kernel,
        hopper_forward._parallax_fwd_hopper_kernel,
        key_norms._largest_key_norms_kernel,
        hopper_dqdr._parallax_bwd_dqdr_hopper_kernel,
        hopper_dkdv._parallax_bwd_dkdv_hopper_kernel,
    )

    def num_compiled() -> int:
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    def run(batch_size: int, num_tokens: int) -> None:
        output_and_gradients(attend, make_inputs(batch_size, num_tokens, 4, 2, 64, dtype=BF16, device="cuda"))

    # short rows have separate tiles
    run(2, 64)
    run(2, 2 * tiles.SHORT)
    before = num_compiled()
    for batch_size, num_tokens in ((2, 1), (1, 1), (1, 17), (3, 128), (2, 1000), (1, 4096)):
        run(batch_size, num_tokens)
    assert num_compiled() == before


def test_triton_is_the_default_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    q, r, k, v, _ = make_inputs(1, 64, 4, 2, 64, dtype=BF16, device="cuda")
    assert torch.equal(parallax_attention(q, r, k, v), attend(q, r, k, v))
    with pytest.raises(NotImplementedError, match="64, 96, 128, 256, got 80"):
        attend(*make_inputs(1, 64, 4, 2, 80, dtype=BF16, device="cuda")[:4])
