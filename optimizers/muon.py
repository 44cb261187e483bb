"""Muon, the optimizer with orthogonalized momentum, for plain tensors and sharded DTensors."""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from errors import UnsupportedError, UserError
from optimizers.base import GroupOptimizer, local, local_gradient
from optimizers.buckets import Bucket, plan_buckets
from optimizers.config import DEFAULT_ITERATIONS, MuonDtype, Orthogonalization, UpdateScale
from optimizers.exchange import AsyncResult, check_placements
from optimizers.kernels.elementwise import apply_update, update_momentum
from optimizers.orthogonalize import newton_schulz5, polar_express
from optimizers.update_size import num_replicas

_ORTHOGONALIZERS: dict[str, Callable[..., torch.Tensor]] = {
    "newton_schulz5": newton_schulz5,
    "polar_express": polar_express,
}
_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# momentum can have any magnitude, so it is never communicated in fp16
_EXCHANGE_DTYPES = {
    torch.float16: torch.bfloat16,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
}
_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "unit": lambda rows, cols: 1.0,
}


class Muon(GroupOptimizer):
    """Muon with decoupled weight decay.

    For gradient G, momentum M (initially zero) and parameter P, all of the same shape:

        M <- beta M + (1 - beta) G
        U  = (1 - beta) G + beta M       with Nesterov momentum, else M
        P <- (1 - lr weight_decay) P - lr scale(rows, cols) orthogonalize(U)

    as in torch.optim.Muon. The scale is one of

        match_rms_adamw   0.2 sqrt(max(rows, cols)): the RMS of an AdamW update, so that AdamW's learning rate
                          and weight decay carry over (Liu et al., "Muon is scalable for LLM training",
                          arXiv 2502.16982)
        spectral          sqrt(max(1, rows / cols)), as in Keller Jordan's implementation
        unit              1

    With `block_rows` = h, each block of h rows is orthogonalized and scaled as a matrix of its own: with the
    head width, this is Muon per head for the projections Q, K, R and V.

    With `row_beta2` = b, the rows of the orthogonalized matrix O are normalized (NorMuon, Li et al., arXiv
    2510.05491) by an exponential moving average v (initially zero) of their mean squares, and O keeps its
    Frobenius norm:

        v <- b v + (1 - b) mean_cols(O^2),   O' = O / (sqrt(v) + 1e-8),   O <- O' |O| / |O'|

    Each sharded matrix (FSDP2, HSDP, tensor parallelism) is gathered on one rank, in bf16 unless `dtype` is
    float32, orthogonalized there, and scattered back. Matrices of equal layout form a bucket, and the
    communication of one bucket overlaps the computation of another. State is sharded like the parameter. The
    result is bit-identical from run to run, and depends on the number of ranks only through the rounding of
    batched products. A step skips parameters without a gradient.

    Args:
        params: Matrices, or param groups: dicts of "params" and any of the values from lr to row_beta2.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        momentum: beta, in [0, 1).
        nesterov: Nesterov momentum.
        orthogonalization: "newton_schulz5" or "polar_express".
        num_iterations: Iterations; None for 5 with newton_schulz5 and 8 with polar_express.
        scale: "match_rms_adamw", "spectral" or "unit".
        dtype: "float16", "bfloat16" or "float32", the precision of the iteration.
        block_rows: Rows of a block that is orthogonalized separately; None for whole matrices.
        row_beta2: b of the row normalization, in [0, 1); None for no row normalization.
        max_bucket_elements: Maximum number of elements (not bytes) of a bucket that one rank orthogonalizes;
            bounds the additional memory to about six times that number in dtype. A larger matrix has a bucket
            of its own.

    Raises:
        UserError: A parameter is not a matrix, or a value is out of range.
        UnsupportedError: A parameter has a placement other than Shard and Replicate.
    """

    measures_updates = True

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
        dtype: MuonDtype = "float16",
        block_rows: int | None = None,
        row_beta2: float | None = None,
        max_bucket_elements: int = 2**27,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "orthogonalization": orthogonalization,
            "num_iterations": num_iterations,
            "scale": scale,
            "dtype": dtype,
            "block_rows": block_rows,
            "row_beta2": row_beta2,
        }
        self.max_bucket_elements = max_bucket_elements
        self._squared_norms: dict[str, torch.Tensor] = {}
        self._sampled_blocks: dict[str, torch.Tensor] = {}
        self._plan: tuple[Any, list[Bucket]] = (None, [])
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group.

        Args:
            param_group: "params" and the values that differ from the defaults.

        Raises:
            UserError: A parameter is not a matrix, or a value is out of range.
            UnsupportedError: A parameter has a placement other than Shard and Replicate.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except UserError:
            self.param_groups.pop()
            raise
        if group["num_iterations"] is None:
            group["num_iterations"] = DEFAULT_ITERATIONS[cast(Orthogonalization, group["orthogonalization"])]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore [bad-override]
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes the loss and the gradients.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._squared_norms.clear()
        self._sampled_blocks.clear()
        buckets = self._buckets()
        if not buckets:
            return loss
        # the all-to-alls overlap: matrices arrive during the previous bucket, results during the next one
        next_matrices = self._send_momentum(buckets[0])
        previous: tuple[Bucket, AsyncResult] | None = None
        for bucket, next_bucket in zip(buckets, [*buckets[1:], None], strict=True):
            matrices = next_matrices
            if next_bucket is not None:
                next_matrices = self._send_momentum(next_bucket)
            updates = bucket.exchange.to_shards(self._orthogonalize(bucket, matrices.wait()))
            if previous is not None:
                self._apply(*previous)
            previous = bucket, updates
        assert previous is not None
        self._apply(*previous)
        return loss

    def local_update_squared_norms(self) -> dict[str, torch.Tensor]:
        """See GroupOptimizer.local_update_squared_norms; the update is that with its scale."""
        return dict(self._squared_norms)

    def update_singular_values(self) -> dict[str, tuple[float, float, float]]:
        """See GroupOptimizer.update_singular_values; synchronizes with the device.

        The matrix is the first block of the first one that this rank owned in the last recorded step, before
        scaling; groups without one are left out.
        """
        spread = {}
        for name, block in self._sampled_blocks.items():
            values = torch.linalg.svdvals(block.float())
            spread[name] = (values.min().item(), values.median().item(), values.max().item())
        return spread

    def _buckets(self) -> list[Bucket]:
        """Return the buckets of a step; they change with the parameters that have gradients."""
        key = [[id(p) for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if self._plan[0] != key:
            self._plan = key, plan_buckets(self.param_groups, self.max_bucket_elements)
        return self._plan[1]

    def _send_momentum(self, bucket: Bucket) -> AsyncResult:
        """Update the momentum of a bucket and start the all-to-all to the owners."""
        group = self.param_groups[bucket.group]
        for p in bucket.params:
            if "momentum_buffer" not in self.state[p]:
                self.create_state(p, group)
        shards = update_momentum(
            [local_gradient(p) for p in bucket.params],
            [local(self.state[p]["momentum_buffer"]) for p in bucket.params],
            weight=1.0 - group["momentum"],
            nesterov=group["nesterov"],
            dtype=_EXCHANGE_DTYPES[_DTYPES[group["dtype"]]],
            found_inf=self.found_inf,
        )
        return bucket.exchange.to_owners(shards)

    def create_state(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        """See GroupOptimizer.create_state."""
        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if group["row_beta2"] is not None:
            # sharded by rows, like the parameter
            self.state[p]["row_mean_square"] = torch.zeros_like(p[:, :1])

    def _orthogonalize(self, bucket: Bucket, matrices: torch.Tensor) -> torch.Tensor:
        """Orthogonalize the matrices of a bucket that this rank owns, `[owned, rows, cols]`."""
        group = self.param_groups[bucket.group]
        dtype = _DTYPES[group["dtype"]]
        if group["lr"] == 0.0 or not len(matrices):
            # lr 0 changes no parameter
            return matrices.to(dtype)
        blocks = matrices.view(-1, _block_shape(bucket, group)[0], matrices.shape[2])
        blocks = _ORTHOGONALIZERS[group["orthogonalization"]](blocks, group["num_iterations"], dtype=dtype)
        if self.record_update_stats:
            self._sampled_blocks.setdefault(_name(group), blocks[0].clone())
        return blocks.view(matrices.shape)

    def _apply(self, bucket: Bucket, result: AsyncResult) -> None:
        """Update this rank's shards of the parameters of a bucket."""
        group = self.param_groups[bucket.group]
        updates = result.wait()
        lr = float(group["lr"])
        if lr == 0.0:
            return
        if group["row_beta2"] is not None:
            updates = self._normalize_rows(bucket, updates, group["row_beta2"])
        scale = _SCALES[group["scale"]](*_block_shape(bucket, group))
        if self.record_update_stats:
            squared_norm = (torch.linalg.vector_norm(updates, dtype=torch.float32) * scale).square()
            squared_norm /= num_replicas(bucket.params[0])
            self._squared_norms[_name(group)] = self._squared_norms.get(_name(group), 0.0) + squared_norm
        params = [local(p) for p in bucket.params]
        decay = 1.0 - lr * group["weight_decay"]
        apply_update(params, updates, decay=decay, alpha=-lr * scale, found_inf=self.found_inf)

    def _normalize_rows(self, bucket: Bucket, updates: torch.Tensor, beta2: float) -> torch.Tensor:
        """Normalize the rows of this rank's shards `[matrices, rows, cols]`, as in NorMuon."""
        means = [local(self.state[p]["row_mean_square"]) for p in bucket.params]
        updates = updates.float()
        new_means = torch.stack(means).lerp(updates.square().mean(-1, keepdim=True), 1.0 - beta2)
        if self.found_inf is not None:
            new_means = torch.where(self.found_inf != 0, torch.stack(means), new_means)
        torch._foreach_copy_(means, list(new_means.unbind()))
        normalized = updates / (new_means.sqrt() + 1e-8)
        squared_norms = torch.stack([x.square().sum((1, 2)) for x in (updates, normalized)])
        if bucket.layout.num_ranks > 1:
            # every replica adds the same value to both sums, which cancels in their ratio
            dist.all_reduce(squared_norms, group=bucket.layout.group)
        ratio = (squared_norms[0] / squared_norms[1].clamp(min=1e-30)).sqrt()
        return normalized * ratio[:, None, None]


def _check_group(group: dict[str, Any]) -> None:
    for p in group["params"]:
        if p.ndim != 2:
            raise UserError(
                f"Muon updates matrices only, got a parameter of shape {list(p.shape)}; use AdamW for it"
            )
        check_placements(p)
        _check_rows(p, group["block_rows"], group["row_beta2"])
    for key in ("lr", "weight_decay"):
        if not 0.0 <= group[key] < float("inf"):
            raise UserError(f"{key} ({group[key]}) must be finite and not negative")
    if not 0.0 <= group["momentum"] < 1.0:
        raise UserError(f"momentum ({group['momentum']}) must be in [0, 1)")
    if group["row_beta2"] is not None and not 0.0 <= group["row_beta2"] < 1.0:
        raise UserError(f"row_beta2 ({group['row_beta2']}) must be in [0, 1), or be None")
    if group["num_iterations"] is not None and group["num_iterations"] < 1:
        raise UserError(f"num_iterations ({group['num_iterations']}) must be at least 1, or None")
    for key, table in (("orthogonalization", _ORTHOGONALIZERS), ("scale", _SCALES), ("dtype", _DTYPES)):
        if group[key] not in table:
            raise UserError(f"{key} ({group[key]!r}) must be one of {', '.join(table)}")


def _check_rows(p: torch.Tensor, block_rows: int | None, row_beta2: float | None) -> None:
    if block_rows is not None and (block_rows < 1 or p.shape[0] % block_rows):
        raise UserError(
            f"block_rows ({block_rows}) must divide the number of rows of every matrix of the group, "
            f"got {list(p.shape)}"
        )
    placements = p.placements if isinstance(p, DTensor) else ()
    is_column_sharded = any(getattr(placement, "dim", 0) == 1 for placement in placements)
    if row_beta2 is not None and is_column_sharded:
        raise UnsupportedError('row_beta2 needs whole rows on each rank; shard by rows, or set it to "none"')


def _name(group: dict[str, Any]) -> str:
    return group.get("name", "")


def _block_shape(bucket: Bucket, group: dict[str, Any]) -> tuple[int, int]:
    rows, cols = bucket.layout.shape
    return group["block_rows"] or rows, cols
