"""Local linear attention with the Triton kernels, whose fp32 products are three TF32 ones each."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parallax import eager, local_linear, local_linear_attention
from parallax.testing import Case, cu_seqlens_of, make_inputs, relative_error

pytestmark = pytest.mark.gpu

CASES = [
    Case("rows_64", 300, 4, 2, 64, 2),
    Case("rows_128", 300, 4, 2, 128, 2),
    Case("packed_64", 847, 4, 2, 64, documents=(1, 5, 64, 0, 777)),
    Case("packed_128", 470, 4, 2, 128, documents=(233, 237)),
    Case("window_64", 1000, 4, 2, 64, window_size=100),
    Case("packed_window_128", 470, 4, 2, 128, documents=(233, 237), window_size=70),
]
NAMES = ("o", "dq", "dk", "dv")


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    attend: Callable[..., Tensor] = local_linear_attention,
    **options,
) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attend(*leaves, **options)
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, do)), strict=True))


@pytest.fixture
def eager_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("eager ran where the kernels serve")

    monkeypatch.setattr(eager, "forward", refuse)
    monkeypatch.setattr(eager, "backward", refuse)


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("key_offset", [0.0, 3.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_is_close_to_that_of_eager_fp32(
    case: Case, key_offset: float, dtype: torch.dtype, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, _, k, v, do = case.inputs(dtype, "cuda", key_offset=key_offset)
    options = case.masking("cuda")
    # fp64 runs eagerly
    truth = run(q.double(), k.double(), v.double(), do.double(), num_iterations=200, **options)
    actual = run(q, k, v, do, solver=solver, **options)
    with monkeypatch.context() as patch:
        patch.setattr(local_linear, "_kernels_serve", lambda q, scale: False)
        yardstick = run(q.float(), k.float(), v.float(), do.float(), solver=solver, **options)
    errors = {
        name: (relative_error(actual[name], truth[name]), relative_error(yardstick[name], truth[name]))
        for name in NAMES
    }
    print(f"\n{case.name}, {dtype}, {solver}, key offset {key_offset}: {errors}")
    # a few roundings in fp32, and in bf16 that of the result
    band = 4 * torch.finfo(torch.float32).eps + (
        torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0
    )
    for name, (error, of_eager) in errors.items():
        assert actual[name].dtype == dtype
        assert error < 4 * of_eager + band, (name, errors)


@pytest.mark.usefixtures("eager_raises")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_all_products_run_in_the_kernels(head_dim: int, dtype: torch.dtype) -> None:
    q, _, k, v, do = make_inputs(1, 200, 4, 2, head_dim, dtype=dtype, device="cuda")
    for value in run(q, k, v, do).values():
        assert value.isfinite().all()


def test_unsupported_inputs_run_eagerly() -> None:
    for head_dim, dtype, scale in (
        (64, torch.float32, 0.0),
        (80, torch.float32, None),
        (64, torch.float64, None),
    ):
        q, _, k, v, do = make_inputs(1, 100, 2, 1, head_dim, dtype=dtype, device="cuda")
        cpu = run(q.cpu(), k.cpu(), v.cpu(), do.cpu(), scale=scale)
        for name, value in run(q, k, v, do, scale=scale).items():
            assert relative_error(value.cpu(), cpu[name]) < 1e-5, (name, head_dim, dtype, scale)


def test_runs_are_bit_identical_and_close_to_compiled_ones() -> None:
    q, _, k, v, do = make_inputs(1, 600, 4, 2, 64, dtype=torch.float32, device="cuda")
    options = {"cu_seqlens": cu_seqlens_of((250, 350), "cuda")}
    first, second = run(q, k, v, do, **options), run(q, k, v, do, **options)
    compiled = run(q, k, v, do, torch.compile(local_linear_attention, fullgraph=True), **options)
    for name in NAMES:
        assert torch.equal(second[name], first[name]), name
        torch.testing.assert_close(compiled[name], first[name])


def test_a_layer_of_8_rows_of_1024_tokens_takes_milliseconds() -> None:
    q, _, k, v, do = make_inputs(8, 1024, 8, 4, 64, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):
        run(q, k, v, do)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(q, k, v, do)
    stop.record()
    torch.cuda.synchronize()
    milliseconds = start.elapsed_time(stop)
    print(f"\nlocal linear attention, forward and backward: {milliseconds:.1f} ms")
    assert milliseconds < 300
