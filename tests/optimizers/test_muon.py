import math
from typing import Any

import pytest
import torch

from errors import UnsupportedError, UserError
from optimizers.muon import Muon
from optimizers.orthogonalize import newton_schulz5, polar_express

SHAPES = [(16, 16), (24, 8), (8, 24), (24, 8), (24, 8)]


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        # a nonzero mean, so that successive gradients correlate and momentum matters
        p.grad = (torch.randn(p.shape, generator=generator) + 0.5).to(p.device, p.dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("scale", "torch_scale"), [("match_rms_adamw", "match_rms_adamw"), ("spectral", "original")]
)
def test_equals_torch_muon(device: str, nesterov: bool, scale: Any, torch_scale: str) -> None:
    values = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9, "nesterov": nesterov}
    ours, reference, start = (parameters(device=device) for _ in range(3))
    muon = Muon(ours, **values, scale=scale)
    torch_muon = torch.optim.Muon(reference, **values, adjust_lr_fn=torch_scale)
    for step in range(6):
        for params, optimizer in ((ours, muon), (reference, torch_muon)):
            set_gradients(params, step)
            optimizer.step()
    for p, q, p0 in zip(ours, reference, start, strict=True):
        assert relative_error(p - p0, q - p0) < 1e-2
        actual, expected = (o.state[x]["momentum_buffer"] for o, x in ((muon, p), (torch_muon, q)))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_fp32_steps_equal_the_formula() -> None:
    lr, decay, beta = 0.1, 0.2, 0.8
    ours = parameters()
    expected = [p.detach().clone() for p in ours]
    momenta = [torch.zeros_like(p) for p in expected]
    muon = Muon(
        ours,
        lr=lr,
        weight_decay=decay,
        momentum=beta,
        orthogonalization="polar_express",
        scale="unit",
        dtype="float32",
    )
    for step in range(4):
        set_gradients(ours, step)
        for i, p in enumerate(ours):
            assert p.grad is not None
            momenta[i] = beta * momenta[i] + (1 - beta) * p.grad
            update = polar_express((1 - beta) * p.grad + beta * momenta[i], 8)
            expected[i] = (1 - lr * decay) * expected[i] - lr * update
        muon.step()
    torch.testing.assert_close([p.detach() for p in ours], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("scale", "factor"),
    [("match_rms_adamw", 0.2 * math.sqrt(24)), ("spectral", math.sqrt(3)), ("unit", 1.0)],
)
@pytest.mark.parametrize("num_iterations", [None, 3])
def test_scale_and_num_iterations(scale: Any, factor: float, num_iterations: int | None) -> None:
    p = torch.nn.Parameter(torch.zeros(24, 8))
    gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    p.grad = gradient.clone()
    Muon([p], lr=0.5, scale=scale, num_iterations=num_iterations, dtype="float32").step()
    expected = -0.5 * factor * newton_schulz5(gradient, num_iterations or 5)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


def test_match_rms_adamw_has_the_rms_of_an_adamw_update() -> None:
    p = torch.nn.Parameter(torch.zeros(64, 256))
    p.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    Muon([p], lr=1.0, orthogonalization="polar_express").step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.01)


def test_zero_gradients_only_decay_the_weights() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    Muon(params, lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close([p.detach() for p in params], [0.95 * p for p in before])


def test_a_parameter_without_gradient_is_unchanged() -> None:
    params = parameters()
    set_gradients(params, 0)
    params[1].grad = None
    before = [p.detach().clone() for p in params]
    Muon(params, lr=0.1, weight_decay=0.5).step()
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("max_bucket_elements", [1, 400, 2**26])
def test_bucket_size_does_not_change_the_result(max_bucket_elements: int) -> None:
    reference, bounded = parameters(), parameters()
    for params, bound in ((reference, 2**26), (bounded, max_bucket_elements)):
        muon = Muon(params, lr=0.1, dtype="float32", max_bucket_elements=bound)
        for step in range(3):
            set_gradients(params, step)
            muon.step()
    torch.testing.assert_close(bounded, reference, rtol=0, atol=1e-5)


def test_bfloat16_parameters_keep_their_dtype() -> None:
    params, masters = parameters(torch.bfloat16), parameters()
    for group in (params, masters):
        set_gradients(group, 0)
        Muon(group, lr=0.5).step()
    for p, master in zip(params, masters, strict=True):
        assert p.dtype == torch.bfloat16
        assert relative_error(p.detach().float(), master.detach()) < 1e-2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, r"lr \(-1.0\)"),
        ({"weight_decay": -1.0}, r"weight_decay \(-1.0\)"),
        ({"momentum": 1.0}, r"momentum \(1.0\)"),
        ({"num_iterations": 0}, r"num_iterations \(0\)"),
        ({"scale": "none"}, r"scale \('none'\) must be one of match_rms_adamw, spectral, unit"),
        ({"dtype": "float64"}, r"dtype \('float64'\)"),
        ({"block_rows": 5}, r"block_rows \(5\) must divide the number of rows .* \[16, 16\]"),
        ({"row_beta2": 1.0}, r"row_beta2 \(1.0\)"),
        ({"orthogonalization": "svd"}, r"orthogonalization \('svd'\)"),
    ],
)
def test_errors_name_the_value_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Muon([{"params": parameters(), **values}], lr=0.1)


def test_transposed_parameters_are_refused() -> None:
    # the GPU's kernels would add updates to other elements, without an error
    muon = Muon([torch.nn.Parameter(torch.zeros(4, 4))], lr=0.1)
    with pytest.raises(UnsupportedError, match=r"contiguous matrices, got .* \[5, 3\] and strides \[1, 5\]"):
        muon.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3, 5).T)]})
    assert len(muon.param_groups) == 1


@pytest.mark.parametrize("rows", [4, 8])
def test_blocks_of_rows_are_orthogonalized_separately(rows: int) -> None:
    p = torch.nn.Parameter(torch.zeros(16, 12))
    p.grad = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    Muon([p], lr=0.5, scale="match_rms_adamw", dtype="float32", block_rows=rows, nesterov=False).step()
    heads = torch.stack([newton_schulz5(head) for head in p.grad.view(-1, rows, 12)])
    torch.testing.assert_close(p.detach(), (-0.5 * 0.2 * math.sqrt(12) * heads).view(16, 12))


def test_row_normalization_equals_the_formula() -> None:
    beta2, p = 0.9, torch.nn.Parameter(torch.zeros(24, 8))
    mean, expected, momentum = torch.zeros(24, 1), torch.zeros(24, 8), torch.zeros(24, 8)
    muon = Muon([p], lr=0.5, scale="unit", dtype="float32", row_beta2=beta2, nesterov=False)
    for step in range(3):
        gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(step))
        gradient *= torch.linspace(0.1, 3.0, 24)[:, None]
        p.grad = gradient.clone()
        muon.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        o = newton_schulz5(momentum)
        mean = beta2 * mean + (1 - beta2) * o.square().mean(1, keepdim=True)
        normalized = o / (mean.sqrt() + 1e-8)
        expected -= 0.5 * normalized * o.norm() / normalized.norm()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-4)
    assert muon.state[p]["row_mean_square"].shape == (24, 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("row_beta2", [None, 0.9])
def test_a_skipped_step_changes_nothing(device: str, row_beta2: float | None) -> None:
    params = parameters(device=device)
    muon = Muon(params, lr=0.1, weight_decay=0.5, row_beta2=row_beta2)
    set_gradients(params, 0)
    muon.step()
    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in muon.state[p].items()} for p in params]
    set_gradients(params, 1)
    assert params[2].grad is not None
    params[2].grad[0, 0] = float("nan")
    muon.found_inf = torch.ones((), device=device)
    muon.step()
    for p, value, state in zip(params, before, states, strict=True):
        assert torch.equal(p, value)
        assert all(torch.equal(muon.state[p][k], v) for k, v in state.items())
    set_gradients(params, 2)
    muon.found_inf = torch.zeros((), device=device)
    muon.step()
    assert not any(torch.equal(p, value) for p, value in zip(params, before, strict=True))


def test_update_stats_are_those_of_the_step() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    groups = [{"params": params[:2], "name": "a"}, {"params": params[2:], "name": "b"}]
    muon = Muon(groups, lr=0.5, dtype="float32", orthogonalization="polar_express")
    muon.record_update_stats = True
    muon.step()
    expected = [((p.detach() - q) / 0.5).square().sum() for p, q in zip(params, before, strict=True)]
    squared_norms = muon.local_update_squared_norms()
    torch.testing.assert_close(squared_norms, {"a": sum(expected[:2]), "b": sum(expected[2:])})
    for minimum, median, maximum in muon.update_singular_values().values():
        assert 0.95 < minimum <= median <= maximum < 1.05
    muon.record_update_stats = False
    muon.step()
    assert muon.local_update_squared_norms() == {}
    assert muon.update_singular_values() == {}


def test_a_vector_is_an_error() -> None:
    with pytest.raises(UserError, match=r"shape \[7\]; use AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(7))], lr=0.1)


def test_a_refused_group_is_not_added() -> None:
    muon = Muon([torch.nn.Parameter(torch.zeros(4, 4))], lr=0.1)
    vector = torch.nn.Parameter(torch.zeros(7))
    with pytest.raises(UserError, match="Muon updates matrices only"):
        muon.add_param_group({"params": [vector]})
    assert len(muon.param_groups) == 1
