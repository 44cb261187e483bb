"""Muon, the optimizer with orthogonalized momentum, for plain tensors and sharded DTensors."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from errors import UnsupportedError, UserError
from optimizers.base import local, local_gradient
from optimizers.buckets import Bucket
from optimizers.config import MuonDtype, Orthogonalization, UpdateScale
from optimizers.kernels.elementwise import update_momentum
from optimizers.orthogonalized import OrthogonalizedOptimizer


class Muon(OrthogonalizedOptimizer):
    """Muon with decoupled weight decay.

    For gradient G, momentum M (initially zero) and parameter P, all of the same shape:

        M <- beta M + (1 - beta) G
        U  = (1 - beta) G + beta M       with Nesterov momentum, else M
        P <- (1 - lr weight_decay) P - lr scale(rows, cols) orthogonalize(U)

    as in torch.optim.Muon; OrthogonalizedOptimizer has the scales, blocks and the exchange between ranks.

    With `row_beta2` = b, the rows of the orthogonalized matrix O are normalized (NorMuon, Li et al., arXiv
    2510.05491) by an exponential moving average v (initially zero) of their mean squares, and O keeps its
    Frobenius norm:

        v <- b v + (1 - b) mean_cols(O^2),   O' = O / (sqrt(v) + 1e-8),   O <- O' |O| / |O'|

    A step skips parameters without a gradient.

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
        UnsupportedError: A parameter has a placement other than Shard and Replicate, or is not contiguous.
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
        super().__init__(params, defaults, max_bucket_elements)

    def check_group(self, group: dict[str, Any]) -> None:
        """See OrthogonalizedOptimizer.check_group."""
        super().check_group(group)
        if not 0.0 <= group["momentum"] < 1.0:
            raise UserError(f"momentum ({group['momentum']}) must be in [0, 1)")
        if group["row_beta2"] is None:
            return
        if not 0.0 <= group["row_beta2"] < 1.0:
            raise UserError(f"row_beta2 ({group['row_beta2']}) must be in [0, 1), or be None")
        for p in group["params"]:
            placements = p.placements if isinstance(p, DTensor) else ()
            if any(getattr(placement, "dim", 0) == 1 for placement in placements):
                raise UnsupportedError(
                    'row_beta2 needs whole rows on each rank; shard by rows, or set it to "none"'
                )

    def create_state(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        """See GroupOptimizer.create_state."""
        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if group["row_beta2"] is not None:
            # sharded by rows, like the parameter
            self.state[p]["row_mean_square"] = torch.zeros_like(p[:, :1])

    def matrices_to_orthogonalize(
        self, params: list[torch.Tensor], group: dict[str, Any], dtype: torch.dtype
    ) -> torch.Tensor:
        """See OrthogonalizedOptimizer.matrices_to_orthogonalize."""
        return update_momentum(
            [local_gradient(p) for p in params],
            [local(self.state[p]["momentum_buffer"]) for p in params],
            weight=1.0 - group["momentum"],
            nesterov=group["nesterov"],
            dtype=dtype,
            found_inf=self.found_inf,
        )

    def finish_updates(self, updates: torch.Tensor, bucket: Bucket, group: dict[str, Any]) -> torch.Tensor:
        """See OrthogonalizedOptimizer.finish_updates: NorMuon's normalization."""
        if group["row_beta2"] is None:
            return updates
        return self._normalize_rows(bucket, updates, group["row_beta2"])

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
