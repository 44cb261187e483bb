"""Fixed weight norms: a matrix keeps its Frobenius norm, and its update has a size relative to it."""

import torch
import torch.distributed as dist
from torch import Tensor

from optimizers.base import GroupOptimizer, local
from optimizers.exchange import Layout


class FixedNorms:
    """Takes an optimizer's step on the spheres of its groups with fixed_norm; copies this rank's shards.

    Of any optimizer's step W -> W - lr U of a matrix with Frobenius norm R, it makes

        W <- R V / |V|,   V = W - lr R U / |U|

    (Wen et al., "Hyperball", arXiv 2606.16899). R is the initial norm, since every step keeps it: nothing is
    saved, and a run that switches fixed_norm on keeps the norms that it finds. A matrix that the optimizer
    did not change, as in a skipped step, stays bit-identical; one of zeros stays zero.

    U is taken from the change of the weights: in fp32 it is off by about 1e-7 of a weight over its update.
    Everything is computed in fp64, so that norms do not drift.

    Args:
        optimizer: The optimizer, before its step.
    """

    def __init__(self, optimizer: GroupOptimizer) -> None:
        self._before: list[tuple[float, list[Tensor], list[Tensor]]] = []
        for group in optimizer.param_groups:
            by_mesh: dict[object, list[Tensor]] = {}
            for p in group["params"] if group.get("fixed_norm") else ():
                by_mesh.setdefault(Layout.of(p).mesh, []).append(p)
            for params in by_mesh.values():
                copies = [local(p).detach().clone() for p in params]
                self._before.append((group["lr"], params, copies))

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the optimizer's step, which has been taken, by that on the spheres."""
        for lr, params, before in self._before:
            weight, change, product = _inner_products(params, before).unbind(1)
            # replicas multiply all three by their number, which cancels in both quotients
            length = lr * (weight / change).sqrt()
            ratio = (weight / (weight - 2.0 * length * product + length.square() * change)).sqrt()
            # where either is 0, a quotient is 0/0; NaN is no such case and spreads
            stays = (weight == 0.0) | (change == 0.0)
            for i, (p, old) in enumerate(zip(params, before, strict=True)):
                moved = (old.double() - length[i] * _change(p, old)) * ratio[i]
                local(p).copy_(torch.where(stays[i], old, moved))


def _change(p: Tensor, old: Tensor) -> Tensor:
    return old.double() - local(p)


def _inner_products(params: list[Tensor], before: list[Tensor]) -> Tensor:
    """Return <W, W>, <D, D> and <W, D> of weights W and changes D, `[matrices, 3]` fp64, over all ranks."""
    sums = []
    for p, old in zip(params, before, strict=True):
        weight, change = old.double(), _change(p, old)
        sums += [(weight * weight).sum(), (change * change).sum(), (weight * change).sum()]
    products = torch.stack(sums).view(len(params), 3)
    layout = Layout.of(params[0])
    if layout.num_ranks > 1:
        dist.all_reduce(products, group=layout.group)
    return products
