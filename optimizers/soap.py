"""SOAP: Adam in the eigenbasis of Shampoo's factors, for plain tensors and sharded DTensors."""

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import zeros as distributed_zeros

from errors import UnsupportedError
from optimizers.base import GroupOptimizer, local, local_gradient
from optimizers.buckets import Bucket, plan_buckets
from optimizers.eigenbasis import eigenbasis, refresh_bases
from optimizers.exchange import Exchange, Layout

# of the gradients that a rank updates at a time; with copies of its state and work in fp64 up to 3 GiB
_MAX_BUCKET_ELEMENTS = 2**24
_FACTORS = {"left": False, "right": True}
"""Side -> whether its factor is that of G^T."""


class SOAP(GroupOptimizer):
    """SOAP (Vyas et al., arXiv 2409.11321) with decoupled weight decay.

    For gradient G, momentum M, second moment V, factors L and R, and bases Q and S, the first step of a
    matrix only makes factors and bases; it changes no weight and no moment:

        L = (1 - b) G G^T,   R = (1 - b) G^T G,   Q, S = eigenvectors of L, R, largest eigenvalue first

    Each later step n = 1, 2, ... is Adam between the bases of the step before, and then updates those:

        M <- beta1 M + (1 - beta1) G
        V <- beta2 V + (1 - beta2) (Q^T G S)^2
        U  = Q [(Q^T M S / (1 - beta1^n)) / (sqrt(V / (1 - beta2^n)) + eps)] S^T
        P <- (1 - lr weight_decay) P - lr U
        L <- b L + (1 - b) G G^T,   R <- b R + (1 - b) G^T G
        every refresh_every steps: columns of Q in the order of diag(Q^T L Q), Q <- QR(L Q); S with R; and V
        in the same order

    b is factor_beta, or beta2. A side longer than max_factor_size has no factor: its basis is the identity.
    State is fp32 at least, and sharded like the parameter: with FSDP2 by rows, also the square factors and
    bases, so that a checkpoint resumes on any number of ranks. One rank gathers each matrix with its
    gradient and all of its state, updates it, and scatters the state and U back; nothing overlaps.

    The number of steps decides what a step does, and a skipped step does not count: unlike other optimizers,
    a step waits for the device to read found_inf.

    Args:
        params: Param groups of matrices with the options of SOAPGroup and "weight_decay".
        lr: Learning rate.

    Raises:
        UnsupportedError: A parameter is sharded otherwise than by FSDP2 or HSDP.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float) -> None:
        self._plan: tuple[Any, list[Bucket]] = (None, [])
        super().__init__(params, {"lr": lr})

    def create_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """See GroupOptimizer.create_state."""
        state: dict[str, Tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device="meta" if p.is_meta else "cpu"),
            "momentum": _zeros(p, *p.shape),
            "second_moment": _zeros(p, *p.shape),
        }
        for dim, side in enumerate(_FACTORS):
            if p.shape[dim] <= group["max_factor_size"]:
                state[f"{side}_factor"] = _zeros(p, p.shape[dim], p.shape[dim])
                state[f"{side}_basis"] = _zeros(p, p.shape[dim], p.shape[dim])
        self.state[p] = state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore [bad-override]
        """Update every parameter that has a gradient."""
        if self.found_inf is not None and self.found_inf.item() != 0.0:
            return
        for bucket in self._buckets():
            group = self.param_groups[bucket.group]
            for p in bucket.params:
                if not self.state[p]:
                    self.create_state(p, group)
            updates = self._update_state(bucket, group)
            for p in bucket.params:
                self.state[p]["step"] += 1
            is_moved = [int(self.state[p]["step"]) > 1 for p in bucket.params]
            weights = [local(p) for p in compress(bucket.params, is_moved)]
            if weights:
                moved = torch._foreach_mul(weights, 1.0 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(moved, torch._foreach_mul(list(compress(updates, is_moved)), group["lr"]))
                torch._foreach_copy_(weights, moved)

    def _buckets(self) -> list[Bucket]:
        """Return the buckets of a step; they change with the parameters that have gradients."""
        key = [[id(p) for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if self._plan[0] != key:
            self._plan = key, plan_buckets(self.param_groups, _MAX_BUCKET_ELEMENTS)
        return self._plan[1]

    def _update_state(self, bucket: Bucket, group: dict[str, Any]) -> list[Tensor]:
        """Update the state of a bucket's parameters, and return this rank's shards of U."""
        states = [self.state[p] for p in bucket.params]
        names = [name for name in states[0] if name != "step"]
        steps = [int(state["step"]) for state in states]
        gradients = [local_gradient(p).to(states[0]["momentum"].dtype) for p in bucket.params]
        num_owned, rank = bucket.exchange.num_owned, bucket.layout.rank
        exchanges = {name: Exchange(Layout.of(states[0][name]), num_owned) for name in names}
        sent = [bucket.exchange.to_owners(torch.stack(gradients))]
        sent += [exchanges[name].to_owners(_stack(states, name)) for name in names]
        whole, *values = (result.wait() for result in sent)
        first = sum(num_owned[:rank])
        owned = dict(zip(names, values, strict=True))
        updates = _update_all(whole, owned, steps[first : first + len(whole)], group)
        has_new_bases = any(_is_refresh(step, group) for step in steps)
        returned = {
            name: exchanges[name].to_shards(value)
            for name, value in owned.items()
            if has_new_bases or not name.endswith("_basis")
        }
        shards = bucket.exchange.to_shards(updates).wait()
        for name, result in returned.items():
            torch._foreach_copy_([local(state[name]) for state in states], result.wait().unbind())
        return list(shards.unbind())


def _is_refresh(num_steps: int, group: dict[str, Any]) -> bool:
    """Return whether a step makes bases, the first one included."""
    return num_steps % group["refresh_every"] == 0


def _update_all(
    gradients: Tensor, states: dict[str, Tensor], steps: Sequence[int], group: dict[str, Any]
) -> Tensor:
    """Take a step of whole matrices `[N, rows, cols]`: update their states `[N, ...]` in place; return U."""
    if len(set(steps)) == 1:
        return _update(gradients, states, steps[0], group)
    updates = torch.empty_like(gradients)
    for num_steps in sorted(set(steps)):
        chosen = [i for i, each in enumerate(steps) if each == num_steps]
        state = {name: value[chosen] for name, value in states.items()}
        updates[chosen] = _update(gradients[chosen], state, num_steps, group)
        for name, value in state.items():
            states[name][chosen] = value
    return updates


def _update(gradients: Tensor, state: dict[str, Tensor], num_steps: int, group: dict[str, Any]) -> Tensor:
    """Take the same step of all matrices: replace their state; return U, undefined in the first step."""
    beta1, beta2 = group["beta1"], group["beta2"]
    factor_beta = beta2 if group["factor_beta"] is None else group["factor_beta"]
    updates = gradients
    if num_steps > 0:
        momentum, second_moment = state["momentum"], state["second_moment"]
        momentum.lerp_(gradients, 1.0 - beta1)
        second_moment.lerp_(_rotate(gradients, state).square(), 1.0 - beta2)
        denominator = (second_moment / (1.0 - beta2**num_steps)).sqrt_().add_(group["eps"])
        updates = _rotate(momentum, state) / (1.0 - beta1**num_steps) / denominator
        updates = _rotate_back(updates, state)
    for side, transposed in _FACTORS.items():
        if f"{side}_factor" not in state:
            continue
        sides = gradients.mT if transposed else gradients
        factors = state[f"{side}_factor"].lerp_(sides @ sides.mT, 1.0 - factor_beta)
        if num_steps == 0:
            state[f"{side}_basis"] = torch.stack([eigenbasis(each) for each in sides])
        elif _is_refresh(num_steps, group):
            state[f"{side}_basis"], orders = refresh_bases(factors, state[f"{side}_basis"])
            order = orders.unsqueeze(-2 if transposed else -1)
            state["second_moment"] = state["second_moment"].take_along_dim(order, -1 if transposed else -2)
    return updates


def _rotate(matrices: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return Q^T X S."""
    if "left_basis" in state:
        matrices = state["left_basis"].mT @ matrices
    return matrices @ state["right_basis"] if "right_basis" in state else matrices


def _rotate_back(matrices: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return Q X S^T."""
    if "left_basis" in state:
        matrices = state["left_basis"] @ matrices
    return matrices @ state["right_basis"].mT if "right_basis" in state else matrices


def _stack(states: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([local(state[name]) for state in states])


def _zeros(p: Tensor, *shape: int) -> Tensor:
    """Return zeros that are sharded like a parameter, in fp32 at least."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    if not isinstance(p, DTensor):
        return torch.zeros(shape, dtype=dtype, device=p.device)
    for placement in p.placements:
        # a strided shard, of tensor parallelism below FSDP2, is no Shard, or of another kind
        if type(placement) not in (Shard, Replicate):
            raise UnsupportedError(
                f"SOAP supports the placements of FSDP2 and HSDP, Shard and Replicate, got {placement}"
            )
    return distributed_zeros(*shape, dtype=dtype, device_mesh=p.device_mesh, placements=p.placements)
