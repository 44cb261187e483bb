"""SOAP against a plain fp64 statement of its rule and a kept implementation, on ranks, and resumed."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers import eigenbasis as eigenbasis_module
from optimizers.build import create_missing_state
from optimizers.config import OptimizerConfig, SOAPGroup
from optimizers.eigenbasis import eigenbasis, orthonormalize, refresh_bases
from optimizers.soap import SOAP
from optimizers.titan import ParamGroupOptimizers, build_optimizers
from tests.ranks import run_ranks

OPTIONS: dict[str, Any] = {
    **{"beta1": 0.8, "beta2": 0.7, "factor_beta": 0.6, "eps": 1e-6, "refresh_every": 2, "weight_decay": 0.3},
    **{"max_factor_size": 10},
}
LR = 0.1


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_basis(matrix: torch.Tensor) -> torch.Tensor:
    """Left singular vectors, completed by Gram-Schmidt over e_1, e_2, ..."""
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    columns = [vectors[:, i] for i in range(len(values)) if values[i] > 1e-9 * values[0]]
    for unit in torch.eye(len(matrix), dtype=matrix.dtype)[: len(matrix) - len(columns)]:
        for _ in range(2):
            for column in columns:
                unit = unit - (column @ unit) * column
        columns.append(unit / unit.norm())
    return torch.stack(columns, dim=1)


def plain_orthogonalization(matrix: torch.Tensor) -> torch.Tensor:
    columns: list[torch.Tensor] = []
    for column in matrix.unbind(1):
        for _ in range(2):
            for other in columns:
                column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def plain_soap(p: torch.Tensor, gradients: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """Algorithm 3 of arXiv 2409.11321, with the moments rotated from basis to basis."""
    m, n = p.shape
    rotated = [m <= options["max_factor_size"], n <= options["max_factor_size"]]
    beta1, beta2, b = options["beta1"], options["beta2"], options["factor_beta"]
    left, right = torch.zeros(m, m).double(), torch.zeros(n, n).double()
    q, s = torch.eye(m).double(), torch.eye(n).double()
    mean = second = torch.zeros_like(p)
    for step, g in enumerate(gradients):
        if step > 0:
            inside = q.T @ g @ s
            mean = beta1 * mean + (1 - beta1) * inside
            second = beta2 * second + (1 - beta2) * inside**2
            adam = (mean / (1 - beta1**step)) / ((second / (1 - beta2**step)) ** 0.5 + options["eps"])
            p = p - LR * options["weight_decay"] * p - LR * q @ adam @ s.T
        left = b * left + (1 - b) * g @ g.T
        right = b * right + (1 - b) * g.T @ g
        old_q, old_s, mean = q, s, q @ mean @ s.T
        if step == 0:
            q, s = (plain_basis(x) if r else q0 for x, r, q0 in zip((g, g.T), rotated, (q, s), strict=True))
        elif step % options["refresh_every"] == 0:
            if rotated[0]:
                order = torch.tensor(sorted(range(m), key=lambda i: -(old_q[:, i] @ left @ old_q[:, i])))
                q, second = plain_orthogonalization(left @ old_q[:, order]), second[order]
            if rotated[1]:
                order = torch.tensor(sorted(range(n), key=lambda i: -(old_s[:, i] @ right @ old_s[:, i])))
                s, second = plain_orthogonalization(right @ old_s[:, order]), second[:, order]
        mean = q.T @ mean @ s
    return p


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4), (12, 3), (3, 12), (12, 12), (2, 5), (1, 1)])
def test_equals_a_plain_statement_of_the_rule(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(5):
        start = random(*shape, seed=seed)
        gradients = [random(*shape, seed=100 * (seed + 1) + i) for i in range(7)]
        p = nn.Parameter(start.to(dtype, copy=True))
        optimizer = SOAP([{"params": [p], "name": "all", **OPTIONS}], lr=LR)
        for gradient in gradients:
            p.grad = gradient.to(dtype)
            optimizer.step()
        expected = plain_soap(start, gradients, OPTIONS)
        assert (expected - start).abs().max() > 0.05 * LR
        tolerance = 1e-8 if dtype == torch.float64 else 5e-3
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=tolerance)


def test_equals_a_kept_implementation() -> None:
    peer = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
    for shape in ((6, 6), (9, 9)):
        ours, theirs = (nn.Parameter(random(*shape, seed=0)) for _ in range(2))
        # eps is added before the bias correction there
        options = {**OPTIONS, "weight_decay": 0.0, "eps": 1e-15}
        optimizer = SOAP([{"params": [ours], "name": "all", **options}], lr=LR)
        reference = peer.SOAP(
            [theirs],
            lr=LR,
            betas=(options["beta1"], options["beta2"]),
            shampoo_beta=options["factor_beta"],
            weight_decay=0.0,
            precondition_frequency=options["refresh_every"],
            eps=options["eps"],
        )
        for step in range(9):
            for p in (ours, theirs):
                p.grad = random(*shape, seed=step + 1)
            optimizer.step()
            reference.step()
        # there, QR is in fp32
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-4)
        assert (ours - random(*shape, seed=0)).abs().max() > LR


def test_the_first_step_changes_no_weight_and_a_skipped_one_does_not_count() -> None:
    p = nn.Parameter(random(4, 4, seed=0).float())
    optimizer = SOAP([{"params": [p], "name": "all", **OPTIONS}], lr=LR)
    for found, grad in ((1.0, torch.full((4, 4), float("nan"))), (0.0, random(4, 4, seed=1).float())):
        p.grad, optimizer.found_inf = grad, torch.tensor(found)
        optimizer.step()
        assert torch.equal(p, random(4, 4, seed=0).float())
    assert optimizer.state[p]["step"] == 1
    assert not optimizer.state[p]["momentum"].any()


def test_the_basis_of_eigenvectors_is_definite_where_the_gradient_is_not() -> None:
    for seed in range(20):
        low_rank = random(6, 2, seed=seed) @ random(2, 9, seed=seed + 50)
        # standard vectors in the column space
        few_rows = torch.cat([random(2, 4, seed=seed), torch.zeros(5, 4)]).roll(seed % 7, 0)
        for x in (low_rank, low_rank.T, few_rows, random(5, 5, seed=seed), torch.zeros(4, 3).double()):
            basis = eigenbasis(x)
            torch.testing.assert_close(basis.T @ basis, torch.eye(len(x)).double(), rtol=0, atol=1e-12)
            inside = basis.T @ x @ x.T @ basis
            torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-10)
            assert (inside.diagonal().diff() < 1e-10).all()
            disturbed = eigenbasis((x + 1e-12 * random(*x.shape, seed=1) * x.norm()).float())
            signs = (disturbed * basis).sum(0).sign()
            assert (disturbed * signs - basis).abs().max() < 1e-2


def test_refreshes_converge_to_the_eigenvectors() -> None:
    vectors = torch.linalg.qr(random(6, 6, seed=0))[0]
    factor = vectors @ torch.tensor([32.0, 16.0, 8.0, 4.0, 2.0, 1.0]).double().diag() @ vectors.T
    basis = torch.eye(6).double()
    bases = basis.expand(2, -1, -1)
    for _ in range(60):
        bases, orders = refresh_bases(torch.stack([factor, factor.flip(0, 1)]), bases)
    assert orders.tolist() == [list(range(6))] * 2
    torch.testing.assert_close((bases[1].T @ vectors.flip(0)).abs(), torch.eye(6).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close((bases[0].T @ vectors).abs(), torch.eye(6).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("block", [1, 16, 40, 64])
def test_columns_are_orthonormalized_in_their_order(
    block: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigenbasis_module, "_BLOCK", block)
    # eigenvalues over so many decades, of factors that their bases do not fit: dependent columns
    n, decades = 40, (0, 3, 6, 9, 12)
    vectors = torch.linalg.qr(random(n, n, seed=0))[0]
    basis = torch.linalg.qr(vectors + 0.02 * random(n, n, seed=1))[0]
    products = (
        torch.stack([vectors @ torch.logspace(0, -d, n).double().diag() @ vectors.T for d in decades]) @ basis
    )
    given = products.to(device)
    found = orthonormalize(given).cpu()
    assert torch.equal(given.cpu(), products)
    in_fp32 = orthonormalize(products.to(device, torch.float32)).cpu().double()
    identity = torch.eye(n).double()
    for i, product in enumerate(products):
        torch.testing.assert_close(found[i].T @ found[i], identity, rtol=0, atol=1e-14)
        expected = plain_orthogonalization(product)
        assert (expected.T @ expected - identity).abs().max() < 1e-14
        torch.testing.assert_close(found[i], expected, rtol=0, atol=10.0 ** (decades[i] - 13))
        assert (in_fp32[i].T @ in_fp32[i] - identity).abs().max() < 1e-7


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("block", [2, 128])
def test_columns_that_no_product_orthonormalizes_go_through_qr(
    block: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigenbasis_module, "_BLOCK", block)
    zero, equal, full = (random(7, 7, seed=seed) for seed in range(3))
    zero[:, 3] = 0.0
    equal[:, 5] = equal[:, 2]
    matrices = torch.stack([full, zero, equal, torch.zeros(7, 7).double()])
    columns = orthonormalize(matrices.to(device)).cpu()
    torch.testing.assert_close(
        columns.mT @ columns, torch.eye(7).double().expand(4, -1, -1), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(columns[0], plain_orthogonalization(full), rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_refreshes_on_a_gpu_are_those_of_a_cpu() -> None:
    gradients = random(3, 300, 500, seed=0)
    factors = gradients @ gradients.mT
    bases = torch.linalg.qr(random(3, 300, 300, seed=1))[0]
    on_gpu, on_cpu = (refresh_bases(factors.to(device), bases.to(device)) for device in ("cuda", "cpu"))
    assert torch.equal(on_gpu[1].cpu(), on_cpu[1])
    signs = (on_gpu[0].cpu() * on_cpu[0]).sum(-2, keepdim=True).sign()
    torch.testing.assert_close(on_gpu[0].cpu() * signs, on_cpu[0], rtol=0, atol=1e-6)


class NumOperators(TorchDispatchMode):
    """Number of operators that write tensors of a device's: all but views and the counts of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_matrix = isinstance(result, torch.Tensor) and result.ndim > 0
        self.value += not func.is_view and (is_matrix or "_foreach" in str(func))
        return result


@pytest.mark.parametrize("num_steps", [2, 3])  # the next one refreshes the bases, and does not
def test_as_many_operators_update_many_matrices_as_few(num_steps: int) -> None:
    counts = []
    for num_matrices in (2, 6):
        matrices = [nn.Parameter(random(4, 6, seed=i)) for i in range(num_matrices)]
        optimizer = SOAP([{"params": matrices, **OPTIONS}], lr=LR)
        for step in range(num_steps + 1):
            for i, p in enumerate(matrices):
                p.grad = random(4, 6, seed=10 * step + i)
            with NumOperators() as count:
                optimizer.step()
        counts.append(count.value)
    assert 0 < counts[0] == counts[1]


class Model(nn.Module):
    """Matrices with rows that 2 and 4 ranks hold evenly, unevenly and not at all."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(8, 8), (8, 8), (5, 6), (6, 5), (1, 4), (12, 4), (4, 12)]
        self.matrices = nn.ParameterList(
            nn.Parameter(random(*shape, seed=i).float()) for i, shape in enumerate(shapes)
        )


CONFIG = OptimizerConfig(
    groups={
        "all": SOAPGroup(parameters=[r"matrices\..*"], lr=LR, refresh_every=2, weight_decay=0.1, eps=1e-4)
    }
)


def sharded(model: Model, shape: tuple[int, ...]) -> Model:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    placements = (Replicate(), Shard(0))[-len(shape) :]
    for i, p in enumerate(model.matrices):
        model.matrices[i] = nn.Parameter(distribute_tensor(p.detach(), mesh, placements))
    return model


def train(model: Model, optimizers: ParamGroupOptimizers, steps: range) -> None:
    """Take steps whose gradients are the same on any number of ranks; one matrix misses the second."""
    for step in steps:
        for i, p in enumerate(model.matrices):
            if (step, i) == (1, 1):
                p.grad = None
                continue
            gradient = random(*p.shape, seed=1000 * step + i).float()
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        optimizers.step()


def whole(model: Model) -> list[torch.Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in model.matrices]


def build(model: Model) -> ParamGroupOptimizers:
    optimizers = build_optimizers([model], CONFIG)
    for optimizer in optimizers:
        create_missing_state(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = LR
    return optimizers


def worker(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=num_ranks)
    expected, of_one_rank = torch.load(f"{folder}/weights.pt"), f"{folder}/one"
    for shape in ((2,),) if num_ranks == 2 else ((4,), (2, 2)):
        model = sharded(Model(), shape)
        optimizers = build(model)
        train(model, optimizers, range(4))
        path = f"{folder}/{num_ranks}-{len(shape)}"
        dcp.save({"model": model.state_dict(), "optimizer": optimizers}, checkpoint_id=path)
        train(model, optimizers, range(4, 8))
        torch.testing.assert_close(whole(model), expected, rtol=0, atol=2e-5)
        for source in (path, of_one_rank):
            resumed = sharded(Model(), shape)
            states = build(resumed)
            dcp.load({"model": resumed.state_dict(), "optimizer": states}, checkpoint_id=source)
            train(resumed, states, range(4, 8))
            tolerance = 0.0 if source == path else 2e-5
            torch.testing.assert_close(whole(resumed), whole(model), rtol=0, atol=tolerance)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_number_of_ranks_trains_and_resumes_through_refreshes(num_ranks: int, tmp_path: Path) -> None:
    model = Model()
    optimizers = build(model)
    train(model, optimizers, range(4))
    states = {"model": model.state_dict(), "optimizer": optimizers}
    dcp.save(states, checkpoint_id=tmp_path / "one", no_dist=True)
    train(model, optimizers, range(4, 8))
    torch.save(whole(model), tmp_path / "weights.pt")
    run_ranks(worker, num_ranks, num_ranks, str(tmp_path))
    sources = [tmp_path / "one", *tmp_path.glob(f"{num_ranks}-*")]
    assert len(sources) == 2 + (num_ranks == 4)
    for source in sources:
        resumed = Model()
        resumed_optimizers = build(resumed)
        states = {"model": resumed.state_dict(), "optimizer": resumed_optimizers}
        dcp.load(states, checkpoint_id=source, no_dist=True)
        train(resumed, resumed_optimizers, range(4, 8))
        tolerance = 0.0 if source.name == "one" else 2e-5
        torch.testing.assert_close(whole(resumed), whole(model), rtol=0, atol=tolerance)
