"""Muon: orthogonalised momentum as the update of matrices, on plain tensors and on sharded DTensors."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from optimizers.config import DEFAULT_ITERATIONS, MuonDtype, Orthogonalization, UpdateScale
from optimizers.orthogonalize import newton_schulz5, polar_express

_ORTHOGONALIZERS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "newton_schulz5": newton_schulz5,
    "polar_express": polar_express,
}
_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "unit": lambda rows, cols: 1.0,
}


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay.

    For gradient G, momentum M (from zero) and parameter P, all of one matrix's shape:

        M <- beta M + (1 - beta) G
        U  = (1 - beta) G + beta M       with Nesterov, else M
        P <- (1 - lr weight_decay) P - lr scale(rows, cols) orthogonalize(U)

    as in torch.optim.Muon. The scale is one of

        match_rms_adamw   0.2 sqrt(max(rows, cols)): the root mean square of an AdamW update, whose learning
                          rate and decay carry over (Liu et al., "Muon is scalable for LLM training",
                          arXiv 2502.16982)
        spectral          sqrt(max(1, rows / cols)): Keller Jordan's implementation
        unit              1

    Matrices of equal shape are orthogonalised together. A sharded matrix (FSDP2, HSDP) is gathered whole in
    the iteration's precision, every rank orthogonalises it, and each keeps its own shard. Momentum is
    sharded as the parameter is. The result does not depend on the number of ranks. Parameters without a
    gradient stay as they are.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        orthogonalization: Orthogonalization = "newton_schulz5",
        num_iterations: int | None = None,
        scale: UpdateScale = "match_rms_adamw",
        dtype: MuonDtype = "bfloat16",
        max_stacked_elements: int = 2**26,
    ) -> None:
        """Take parameters and the values of groups that do not state their own.

        Args:
            params: Matrices, or dicts of "params" and any of the values from lr to dtype.
            lr: Learning rate.
            weight_decay: Decoupled weight decay.
            momentum: beta, in [0, 1).
            nesterov: Whether to blend the gradient in once more.
            orthogonalization: "newton_schulz5" or "polar_express".
            num_iterations: Steps of the iteration; None means 5 for newton_schulz5 and 8 for polar_express.
            scale: "match_rms_adamw", "spectral" or "unit".
            dtype: "bfloat16" or "float32", the precision of gathering and iteration.
            max_stacked_elements: Most elements (not bytes) of equal matrices that are stacked at once; bounds
                the extra memory to about six such stacks in dtype. A larger matrix goes alone.

        Raises:
            ValueError: A parameter is no matrix, or a value is out of its range.
            NotImplementedError: A parameter is placed otherwise than by Shard and Replicate.
        """
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "orthogonalization": orthogonalization,
            "num_iterations": num_iterations,
            "scale": scale,
            "dtype": dtype,
        }
        self.max_stacked_elements = max_stacked_elements
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its values.

        Args:
            param_group: "params" and values that differ from the defaults.

        Raises:
            ValueError: A parameter is no matrix, or a value is out of its range.
            NotImplementedError: A parameter is placed otherwise than by Shard and Replicate.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except (ValueError, NotImplementedError):
            self.param_groups.pop()
            raise
        if group["num_iterations"] is None:
            group["num_iterations"] = DEFAULT_ITERATIONS[cast(Orthogonalization, group["orthogonalization"])]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore [bad-override]
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the loss again; rarely of use.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for bucket in _buckets(params, self.max_stacked_elements):
                self._step_bucket(bucket, group)
        return loss

    def _step_bucket(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape, dtype and sharding."""
        update = self._advance_momentum(params, group)
        lr = float(group["lr"])
        if lr == 0.0:
            # The checkpointer makes the state exist by a step at lr 0: nothing to compute.
            return
        update = _gather(update, params[0])
        update = _ORTHOGONALIZERS[group["orthogonalization"]](update, group["num_iterations"])
        update = _own_shard(update, params[0])
        local_params = [_local(p) for p in params]
        rows, cols = params[0].shape
        torch._foreach_mul_(local_params, 1.0 - lr * group["weight_decay"])
        torch._foreach_add_(
            local_params, list(update.unbind(0)), alpha=-lr * _SCALES[group["scale"]](rows, cols)
        )

    def _advance_momentum(self, params: list[torch.Tensor], group: dict[str, Any]) -> torch.Tensor:
        """Return the stacked local parts `[matrices, rows, cols]` of what is to be orthogonalised."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [_local_gradient(p) for p in params]
        buffers = [_local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers
        return torch.stack([update.to(_DTYPES[group["dtype"]]) for update in updates])


def _check_group(group: dict[str, Any]) -> None:
    for p in group["params"]:
        if p.ndim != 2:
            raise ValueError(
                f"Muon updates matrices only, got a parameter of shape {list(p.shape)}; use AdamW for it"
            )
        for placement in _placements(p):
            if not isinstance(placement, Shard | Replicate):
                raise NotImplementedError(
                    f"Muon serves placements of FSDP2 and HSDP, Shard and Replicate, got {placement}"
                )
    for key in ("lr", "weight_decay"):
        if not 0.0 <= group[key] < float("inf"):
            raise ValueError(f"{key} ({group[key]}) must be finite and not negative")
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"momentum ({group['momentum']}) must lie in [0, 1)")
    if group["num_iterations"] is not None and group["num_iterations"] < 1:
        raise ValueError(f"num_iterations ({group['num_iterations']}) must be at least 1, or None")
    for key, table in (("orthogonalization", _ORTHOGONALIZERS), ("scale", _SCALES), ("dtype", _DTYPES)):
        if group[key] not in table:
            raise ValueError(f"{key} ({group[key]!r}) must be one of {', '.join(table)}")


def _buckets(params: list[torch.Tensor], max_elements: int) -> Iterator[list[torch.Tensor]]:
    """Yield the parameters by shape, dtype and sharding, in bounded lists, in the same order on all ranks."""
    by_layout: dict[Hashable, list[torch.Tensor]] = {}
    for p in params:
        mesh = p.device_mesh if isinstance(p, DTensor) else None
        by_layout.setdefault((p.shape, p.dtype, p.device, mesh, _placements(p)), []).append(p)
    for equal in by_layout.values():
        size = max(1, max_elements // max(1, equal[0].numel()))
        for start in range(0, len(equal), size):
            yield equal[start : start + size]


def _placements(p: torch.Tensor) -> tuple[Placement, ...]:
    return p.placements if isinstance(p, DTensor) else ()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_gradient(p: torch.Tensor) -> torch.Tensor:
    gradient = p.grad
    assert gradient is not None
    if isinstance(p, DTensor) and isinstance(gradient, DTensor):
        gradient = gradient.redistribute(placements=p.placements)
    return _local(gradient)


def _stacked_placements(p: DTensor) -> list[Placement]:
    """Return the placements of a stack `[matrices, rows, cols]` whose matrices are placed as p is."""
    return [Shard(place.dim + 1) if isinstance(place, Shard) else place for place in p.placements]


def _gather(stack: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return whole matrices from the local parts of matrices placed as p is."""
    if not isinstance(p, DTensor):
        return stack
    rows, cols = p.shape
    # Shape and stride are given since shards may be uneven: they do not follow from the local part.
    return DTensor.from_local(
        stack,
        p.device_mesh,
        _stacked_placements(p),
        run_check=False,
        shape=torch.Size((stack.shape[0], rows, cols)),
        stride=(rows * cols, cols, 1),
    ).full_tensor()


def _own_shard(stack: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return the local parts of whole matrices that every rank holds; communicates nothing."""
    if not isinstance(p, DTensor):
        return stack
    whole = DTensor.from_local(stack, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return whole.redistribute(placements=_stacked_placements(p)).to_local()
