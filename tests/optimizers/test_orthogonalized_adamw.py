"""Orthogonalized AdamW against a plain fp64 statement of its rule; test_every_optimizer.py has the rest."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from errors import UserError
from optimizers.config import OptimizerConfig, OrthogonalizedAdamWGroup
from optimizers.orthogonalize import newton_schulz5
from optimizers.orthogonalized_adamw import OrthogonalizedAdamW
from optimizers.titan import build_optimizers

OPTIONS: dict[str, Any] = {"beta1": 0.8, "beta2": 0.7, "eps": 1e-6, "weight_decay": 0.3}
LR = 0.1


@pytest.mark.parametrize("block_rows", [None, 3])
@pytest.mark.parametrize("shape", [(6, 6), (6, 4), (3, 8)])
def test_equals_a_plain_statement_of_the_rule(shape: tuple[int, int], block_rows: int | None) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        layer = nn.Linear(shape[1], shape[0], bias=False)
        w = layer.weight.detach().double()
        group = OrthogonalizedAdamWGroup(
            parameters=["weight"],
            lr=LR,
            scale="spectral",
            dtype="float32",
            block_rows=block_rows,
            **OPTIONS,
        )
        optimizers = build_optimizers([layer], OptimizerConfig(groups={"all": group}))
        m = v = torch.zeros(shape, dtype=torch.float64)
        for n in range(1, 6):
            layer.weight.grad = torch.randn(shape, generator=generator)
            g = layer.weight.grad.double()
            m = OPTIONS["beta1"] * m + (1 - OPTIONS["beta1"]) * g
            v = OPTIONS["beta2"] * v + (1 - OPTIONS["beta2"]) * g**2
            u = m / (1 - OPTIONS["beta1"] ** n)
            u = u / ((v / (1 - OPTIONS["beta2"] ** n)) ** 0.5 + OPTIONS["eps"])
            rows = block_rows or shape[0]
            # the first U, of signs, may be singular: by the iteration itself, which is tested elsewhere
            u = torch.cat([newton_schulz5(block) for block in u.split(rows)])
            w = (1 - LR * OPTIONS["weight_decay"]) * w - LR * math.sqrt(max(1.0, rows / shape[1])) * u
            optimizers.step()
        torch.testing.assert_close(layer.weight.detach().double(), w, rtol=0, atol=1e-4)


def test_its_spectrum_is_flat() -> None:
    layer = nn.Linear(16, 8, bias=False)
    group = OrthogonalizedAdamWGroup(parameters=["weight"], lr=LR, orthogonalization="polar_express")
    optimizers = build_optimizers([layer], OptimizerConfig(groups={"all": group}))
    optimizers.record_update_stats(True)
    layer.weight.grad = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    optimizers.step()
    low, _, high = optimizers.update_singular_values()["all"]
    assert 0.9 < low <= high < 1.1


def test_vectors_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(7))
    group = {"orthogonalization": "newton_schulz5", "num_iterations": None, "scale": "unit"}
    with pytest.raises(UserError, match="OrthogonalizedAdamW updates matrices only"):
        OrthogonalizedAdamW([{"params": [parameter], **group, **OPTIONS}], lr=LR)
