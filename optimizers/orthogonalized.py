"""What optimizers share that orthogonalize: matrices are exchanged, orthogonalized, and sent back."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from errors import UnsupportedError, UserError
from optimizers.base import GroupOptimizer, local
from optimizers.buckets import Bucket, plan_buckets
from optimizers.config import DEFAULT_ITERATIONS, Orthogonalization
from optimizers.exchange import AsyncResult, check_placements
from optimizers.kernels.elementwise import apply_update
from optimizers.orthogonalize import newton_schulz5, polar_express
from optimizers.update_size import num_replicas

_ORTHOGONALIZERS: dict[str, Callable[..., torch.Tensor]] = {
    "newton_schulz5": newton_schulz5,
    "polar_express": polar_express,
}
DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# what is orthogonalized can have any magnitude, so it is never communicated in fp16
EXCHANGE_DTYPES = {
    torch.float16: torch.bfloat16,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
}
SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "unit": lambda rows, cols: 1.0,
}


class OrthogonalizedOptimizer(GroupOptimizer):
    """An optimizer of matrices that orthogonalizes what its subclass makes of gradient and state, U.

        P <- (1 - lr weight_decay) P - lr scale(rows, cols) orthogonalize(U)

    The scale is one of

        match_rms_adamw   0.2 sqrt(max(rows, cols)): the RMS of an AdamW update, so that AdamW's learning rate
                          and weight decay carry over (Liu et al., "Muon is scalable for LLM training",
                          arXiv 2502.16982)
        spectral          sqrt(max(1, rows / cols)), as in Keller Jordan's implementation
        unit              1

    With `block_rows` = h, each block of h rows is orthogonalized and scaled as a matrix of its own: with the
    head width, this is done per head for the projections Q, K, R and V.

    Each sharded matrix (FSDP2, HSDP, tensor parallelism) is gathered on one rank, in bf16 unless `dtype` is
    float32, orthogonalized there, and scattered back. Matrices of equal layout form a bucket, and the
    communication of one bucket overlaps the computation of another. State is sharded like the parameter. The
    result is bit-identical from run to run, and depends on the number of ranks only through the rounding of
    batched products.

    Args:
        params: Matrices, or param groups.
        defaults: Values that a param group need not have; with "lr", "weight_decay", "orthogonalization",
            "num_iterations", "scale", "dtype" and "block_rows" as Muon's.
        max_bucket_elements: Maximum number of elements (not bytes) of a bucket that one rank orthogonalizes;
            bounds the additional memory to about six times that number in dtype. A larger matrix has a bucket
            of its own.

    Raises:
        UserError: A parameter is not a matrix, or a value is out of range.
        UnsupportedError: A parameter has a placement other than Shard and Replicate, or is not contiguous.
    """

    measures_updates = True

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        max_bucket_elements: int = 2**27,
    ) -> None:
        self.max_bucket_elements = max_bucket_elements
        self._squared_norms: dict[str, torch.Tensor] = {}
        self._sampled_blocks: dict[str, torch.Tensor] = {}
        self._plan: tuple[Any, list[Bucket]] = (None, [])
        super().__init__(params, defaults)

    @abstractmethod
    def matrices_to_orthogonalize(
        self, params: list[torch.Tensor], group: dict[str, Any], dtype: torch.dtype
    ) -> torch.Tensor:
        """Update the state of equally shaped parameters, unless the step is skipped, and return U.

        Args:
            params: N parameters that have a gradient and state.
            group: Their param group.
            dtype: Dtype of the result.

        Returns:
            This rank's shards of U, `[N, *slice]`; undefined if the step is skipped.
        """

    def finish_updates(self, updates: torch.Tensor, bucket: Bucket, group: dict[str, Any]) -> torch.Tensor:
        """Return what becomes of the orthogonalized shards `[N, *slice]` before they are scaled."""
        return updates

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise UserError or UnsupportedError where a param group cannot be updated."""
        for p in group["params"]:
            if p.ndim != 2:
                raise UserError(
                    f"{type(self).__name__} updates matrices only, got a parameter of shape {list(p.shape)}; "
                    "use AdamW for it"
                )
            check_placements(p)
            if not local(p).is_contiguous():
                # the kernels, which address elements in order, would mix them up
                raise UnsupportedError(
                    f"{type(self).__name__} updates contiguous matrices, got one of shape {list(p.shape)} "
                    f"and strides {list(local(p).stride())}; make the parameter of a contiguous tensor"
                )
            block_rows = group["block_rows"]
            if block_rows is not None and (block_rows < 1 or p.shape[0] % block_rows):
                raise UserError(
                    f"block_rows ({block_rows}) must divide the number of rows of every matrix of the group, "
                    f"got {list(p.shape)}"
                )
        for key in ("lr", "weight_decay"):
            if not 0.0 <= group[key] < float("inf"):
                raise UserError(f"{key} ({group[key]}) must be finite and not negative")
        if group["num_iterations"] is not None and group["num_iterations"] < 1:
            raise UserError(f"num_iterations ({group['num_iterations']}) must be at least 1, or None")
        for key, table in (("orthogonalization", _ORTHOGONALIZERS), ("scale", SCALES), ("dtype", DTYPES)):
            if group[key] not in table:
                raise UserError(f"{key} ({group[key]!r}) must be one of {', '.join(table)}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group.

        Args:
            param_group: "params" and the values that differ from the defaults.

        Raises:
            UserError: A parameter is not a matrix, or a value is out of range.
            UnsupportedError: A parameter has a placement other than Shard and Replicate, or is not
                contiguous.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
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
        next_matrices = self._send(buckets[0])
        previous: tuple[Bucket, AsyncResult] | None = None
        for bucket, next_bucket in zip(buckets, [*buckets[1:], None], strict=True):
            matrices = next_matrices
            if next_bucket is not None:
                next_matrices = self._send(next_bucket)
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

    def _send(self, bucket: Bucket) -> AsyncResult:
        """Make the matrices of a bucket and start the all-to-all to the owners."""
        group = self.param_groups[bucket.group]
        for p in bucket.params:
            if not self.state[p]:
                self.create_state(p, group)
        dtype = EXCHANGE_DTYPES[DTYPES[group["dtype"]]]
        return bucket.exchange.to_owners(self.matrices_to_orthogonalize(bucket.params, group, dtype))

    def _orthogonalize(self, bucket: Bucket, matrices: torch.Tensor) -> torch.Tensor:
        """Orthogonalize the matrices of a bucket that this rank owns, `[owned, rows, cols]`."""
        group = self.param_groups[bucket.group]
        dtype = DTYPES[group["dtype"]]
        if group["lr"] == 0.0 or not len(matrices):
            # lr 0 changes no parameter
            return matrices.to(dtype)
        blocks = matrices.view(-1, _block_shape(bucket, group)[0], matrices.shape[2])
        blocks = _ORTHOGONALIZERS[group["orthogonalization"]](blocks, group["num_iterations"], dtype=dtype)
        if self.record_update_stats:
            self._sampled_blocks.setdefault(_name(group), self._unless_skipped(blocks[0].clone()))
        return blocks.view(matrices.shape)

    def _apply(self, bucket: Bucket, result: AsyncResult) -> None:
        """Update this rank's shards of the parameters of a bucket."""
        group = self.param_groups[bucket.group]
        updates = result.wait()
        lr = float(group["lr"])
        if lr == 0.0:
            return
        updates = self.finish_updates(updates, bucket, group)
        scale = SCALES[group["scale"]](*_block_shape(bucket, group))
        if self.record_update_stats:
            squared_norm = (torch.linalg.vector_norm(updates, dtype=torch.float32) * scale).square()
            squared_norm /= num_replicas(bucket.params[0])
            squared_norm = self._unless_skipped(squared_norm)
            self._squared_norms[_name(group)] = self._squared_norms.get(_name(group), 0.0) + squared_norm
        params = [local(p) for p in bucket.params]
        decay = 1.0 - lr * group["weight_decay"]
        apply_update(params, updates, decay=decay, alpha=-lr * scale, found_inf=self.found_inf)

    def _unless_skipped(self, value: torch.Tensor) -> torch.Tensor:
        """Return what is recorded of a step: zeros if it is skipped, for which the update is undefined."""
        return value if self.found_inf is None else torch.where(self.found_inf != 0, 0.0, value)


def _name(group: dict[str, Any]) -> str:
    return group.get("name", "")


def _block_shape(bucket: Bucket, group: dict[str, Any]) -> tuple[int, int]:
    rows, cols = bucket.layout.shape
    return group["block_rows"] or rows, cols
