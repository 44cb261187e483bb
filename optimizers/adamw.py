"""AdamW: torch's fused implementation, which also measures its updates."""

from collections.abc import Iterable
from typing import Any

import torch

from optimizers.base import GroupOptimizer, local
from optimizers.update_size import num_replicas


class AdamW(GroupOptimizer, torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        params: Param groups; of "betas", "eps" and "weight_decay" torch's defaults hold where one is missing.
        lr: Learning rate.
    """

    measures_updates = True

    def __init__(self, params: Iterable[torch.Tensor] | Iterable[dict[str, Any]], *, lr: float) -> None:
        # fused on CPU too: the other implementations do not support found_inf
        torch.optim.AdamW.__init__(self, params, lr=lr, fused=True)

    def create_state(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        """See GroupOptimizer.create_state."""
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def local_update_squared_norms(self) -> dict[str, torch.Tensor]:
        """See GroupOptimizer.local_update_squared_norms.

        The update is mhat / (sqrt(vhat) + eps) with mhat = m / (1 - beta1^n), vhat = v / (1 - beta2^n) after
        n steps, computed from the state after the step. Allocates two copies of the largest local shard.
        """
        return {group["name"]: self._squared_norm(group) for group in self.param_groups if group["lr"] != 0.0}

    def _squared_norm(self, group: dict[str, Any]) -> torch.Tensor:
        beta1, beta2 = group["betas"]
        total = torch.zeros((), device=group["params"][0].device)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            mean, mean_square = local(state["exp_avg"]), local(state["exp_avg_sq"])
            num_steps = state["step"]
            denominator = mean_square.sqrt().div_((1.0 - beta2**num_steps).sqrt()).add_(group["eps"])
            squared_norm = mean.div(denominator).square_().sum() / (1.0 - beta1**num_steps).square()
            total += squared_norm / num_replicas(p)
        # 0/0 in a skipped first step
        return total if self.found_inf is None else torch.where(self.found_inf != 0, 0.0, total)
