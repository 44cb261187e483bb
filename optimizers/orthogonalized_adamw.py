"""AdamW with an orthogonalized update."""

from collections.abc import Iterable
from typing import Any

import torch

from optimizers.base import local, local_gradient
from optimizers.orthogonalized import OrthogonalizedOptimizer


class OrthogonalizedAdamW(OrthogonalizedOptimizer):
    """AdamW whose update is orthogonalized: its singular vectors stay, its spectrum becomes flat.

    For gradient G, moments M and V (initially zero), and the step number n from 1:

        M <- beta1 M + (1 - beta1) G
        V <- beta2 V + (1 - beta2) G^2
        U  = (M / (1 - beta1^n)) / (sqrt(V / (1 - beta2^n)) + eps)
        P <- (1 - lr weight_decay) P - lr scale(rows, cols) orthogonalize(U)

    Between AdamW, which has U itself, and Muon, which orthogonalizes M: whoever compares the three sees what
    the second moment does, and what the flat spectrum. OrthogonalizedOptimizer has the rest.

    Args:
        params: Param groups with "beta1", "beta2", "eps", and the values that OrthogonalizedOptimizer reads.
        lr: Learning rate.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def create_state(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        """See GroupOptimizer.create_state."""
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def matrices_to_orthogonalize(
        self, params: list[torch.Tensor], group: dict[str, Any], dtype: torch.dtype
    ) -> torch.Tensor:
        """See OrthogonalizedOptimizer.matrices_to_orthogonalize."""
        beta1, beta2 = group["beta1"], group["beta2"]
        updates = []
        for p in params:
            gradient, state = local_gradient(p), self.state[p]
            step = state["step"] + 1.0
            mean = local(state["exp_avg"]).lerp(gradient, 1.0 - beta1)
            mean_square = local(state["exp_avg_sq"]).lerp(gradient.square(), 1.0 - beta2)
            denominator = (mean_square / (1.0 - beta2**step)).sqrt() + group["eps"]
            updates.append((mean / (1.0 - beta1**step) / denominator).to(dtype))
            self.assign(state["step"], step)
            self.assign(local(state["exp_avg"]), mean)
            self.assign(local(state["exp_avg_sq"]), mean_square)
        return torch.stack(updates)
