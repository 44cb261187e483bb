"""The optimizers of a stack: learning rates of each member, as values on the device.

A CUDA graph of a step keeps the addresses of its inputs, not their values: what changes from epoch to epoch
has to be a tensor. Letters: N members.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eval.mad.runs import Run
from eval.mad.stack import named_stacked_parameters, split_members
from optimizers.base import GroupOptimizer
from optimizers.build import build_group_optimizers, create_missing_state
from optimizers.config import DEFAULT_ITERATIONS, AdamWGroup, MuonGroup, ParameterGroup
from optimizers.orthogonalize import newton_schulz5
from optimizers.orthogonalized import DTYPES, EXCHANGE_DTYPES, SCALES
from optimizers.param_groups import assign_parameters

_BETA2 = 0.999
# of what Muon does not update: the largest of AdamW's
_RATE_BESIDE_MUON = 1e-3
_HIDDEN = r"encoder\.layers\.\d+\.(attention\.w([qkvorz]|r_in|r_out)|mlp\.(gate|up|down))\.weight"


def parameter_groups(run: Run) -> dict[str, ParameterGroup]:
    """Return the parameter groups of a run; MAD's weight decay holds for gains, biases and embeddings too."""
    if run.recipe.optimizer == "adamw":
        return {"all": AdamWGroup(parameters=[".*"], lr=run.lr, weight_decay=run.weight_decay, beta2=_BETA2)}
    return {
        "hidden": MuonGroup(parameters=[_HIDDEN], lr=run.lr, weight_decay=run.weight_decay, scale="spectral"),
        "others": AdamWGroup(
            parameters=[f"(?!{_HIDDEN}$).*"],
            lr=_RATE_BESIDE_MUON,
            weight_decay=run.weight_decay,
            beta2=_BETA2,
        ),
    }


class StackedMuon:
    """Muon with Nesterov momentum and Newton-Schulz 5, as optimizers/muon.py, for matrices of all members.

    Matrices of one shape are orthogonalized in one batch, over parameters and members.

    Args:
        parameters: Stacked matrices `[N, rows, cols]`, which have a gradient.
        groups: The group of each member, which differ in learning rate and weight decay alone.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Sequence[MuonGroup]) -> None:
        self.group = groups[0]
        assert self.group.nesterov, "only Nesterov momentum is implemented"
        assert self.group.orthogonalization == "newton_schulz5", "only Newton-Schulz is implemented"
        # batches have to be of one shape
        self.parameters = sorted(parameters, key=lambda p: p.shape)
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        device = self.parameters[0].device
        self.lr_N11 = torch.zeros(len(groups), 1, 1, device=device)
        self.weight_decay_N11 = torch.tensor([each.weight_decay for each in groups], device=device)
        self.weight_decay_N11 = self.weight_decay_N11[:, None, None]

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        weight, dtype = 1.0 - self.group.momentum, DTYPES[self.group.dtype]
        num_iterations = self.group.num_iterations or DEFAULT_ITERATIONS[self.group.orthogonalization]
        torch._foreach_lerp_(self.momenta, gradients, weight)
        updates = [x.to(EXCHANGE_DTYPES[dtype]) for x in torch._foreach_lerp(self.momenta, gradients, weight)]
        start = 0
        while start < len(updates):
            shape = updates[start].shape
            stop = start + sum(x.shape == shape for x in updates)
            batch = torch.stack(updates[start:stop])
            self._apply(start, newton_schulz5(batch, num_iterations, dtype=dtype))
            start = stop

    def _apply(self, start: int, updates: Tensor) -> None:
        """Apply the orthogonalized updates of equally shaped parameters, from the one at `start`."""
        factor = self.lr_N11 * SCALES[self.group.scale](*updates.shape[-2:])
        for p, update in zip(self.parameters[start:], updates, strict=False):
            p.mul_(1.0 - self.lr_N11 * self.weight_decay_N11).sub_(factor * update)


class MemberOptimizers:
    """The optimizers of all members of a stack.

    AdamW is the project's own, one for each member, over parameters and gradients that share memory with the
    stack's. Muon is StackedMuon.

    Args:
        model: The stack.
        runs: What each member trains by; they differ in learning rate, weight decay and seed alone.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.stacked = dict(named_stacked_parameters(model))
        for parameter in self.stacked.values():
            parameter.grad = torch.zeros_like(parameter)
        groups = [parameter_groups(run) for run in runs]
        self.adamw = [self._adamw(member, each) for member, each in enumerate(groups)]
        self.muon = self._muon(groups)

    def _adamw(self, member: int, groups: dict[str, ParameterGroup]) -> GroupOptimizer:
        own: dict[str, nn.Parameter] = {}
        for name, stacked in self.stacked.items():
            assert stacked.grad is not None
            own[name] = nn.Parameter(split_members(stacked, len(self.runs))[member])
            own[name].grad = split_members(stacked.grad, len(self.runs))[member]
        assigned = assign_parameters(own.items(), groups)
        kept = {name: group for name, group in groups.items() if isinstance(group, AdamWGroup)}
        (optimizer,) = build_group_optimizers(assigned, kept)
        for group in optimizer.param_groups:
            device = group["params"][0].device
            group["lr"] = torch.tensor(group["lr"], device=device)
            group["capturable"] = device.type == "cuda"
        create_missing_state(optimizer)
        return optimizer

    def _muon(self, groups: Sequence[dict[str, ParameterGroup]]) -> StackedMuon | None:
        hidden = [each for own in groups for each in own.values() if isinstance(each, MuonGroup)]
        if not hidden:
            return None
        # by their shapes in a member: a pattern may take matrices alone
        shapes = {name: nn.Parameter(split_members(p, len(self.runs))[0]) for name, p in self.stacked.items()}
        chosen = {id(p) for p in assign_parameters(shapes.items(), groups[0])["hidden"]}
        return StackedMuon([self.stacked[name] for name, p in shapes.items() if id(p) in chosen], hidden)

    def set_rates(self, epoch: int, is_active: Sequence[bool]) -> None:
        """Set the learning rates of an epoch, counted from 0; 0 for a member that is not active."""
        for member, (run, optimizer, active) in enumerate(zip(self.runs, self.adamw, is_active, strict=True)):
            for group in optimizer.param_groups:
                group["lr"].fill_(run.recipe.epoch_rate(group["base_lr"], epoch) if active else 0.0)
            if self.muon is not None:
                self.muon.lr_N11[member] = run.recipe.epoch_rate(run.lr, epoch) if active else 0.0

    def zero_gradients(self) -> None:
        """Set all gradients to zero where they are."""
        torch._foreach_zero_([p.grad for p in self.stacked.values() if p.grad is not None])

    def step(self) -> None:
        """Update all members."""
        for optimizer in self.adamw:
            optimizer.step()
        if self.muon is not None:
            self.muon.step()

    @torch.no_grad()
    def take_over(self, other: "MemberOptimizers", members: Sequence[int]) -> None:
        """Copy weights and state of some members of another stack, in their order."""
        for name, parameter in self.stacked.items():
            old = split_members(other.stacked[name], len(other.runs))
            for new, member in zip(split_members(parameter, len(self.runs)), members, strict=True):
                new.copy_(old[member])
        for optimizer, member in zip(self.adamw, members, strict=True):
            old_optimizer = other.adamw[member]
            for group, old_group in zip(optimizer.param_groups, old_optimizer.param_groups, strict=True):
                for p, old_p in zip(group["params"], old_group["params"], strict=True):
                    for key, value in optimizer.state[p].items():
                        value.copy_(old_optimizer.state[old_p][key])
        if self.muon is not None and other.muon is not None:
            for momentum, old_momentum in zip(self.muon.momenta, other.muon.momenta, strict=True):
                momentum.copy_(old_momentum[list(members)])
