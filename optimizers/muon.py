"""Muon: orthogonalised momentum as the update of matrices, on plain tensors and on sharded DTensors."""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from optimizers.buckets import Bucket, plan
from optimizers.config import DEFAULT_ITERATIONS, MuonDtype, Orthogonalization, UpdateScale
from optimizers.exchange import Pending, check_placements
from optimizers.kernels.elementwise import advance_momentum, apply_update
from optimizers.orthogonalize import newton_schulz5, polar_express

_ORTHOGONALIZERS: dict[str, Callable[..., torch.Tensor]] = {
    "newton_schulz5": newton_schulz5,
    "polar_express": polar_express,
}
_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# Momentum can have any magnitude, so that it never travels in fp16.
_TRAVEL_DTYPES = {torch.float16: torch.bfloat16, torch.bfloat16: torch.bfloat16, torch.float32: torch.float32}
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

    With `block_rows` = h every h rows are a matrix of their own: with the head width, Muon per head of the
    projections Q, K, R and V. The scale is then that of the blocks.

    With `row_beta2` = b the rows of the orthogonalised matrix O are brought to equal strength (NorMuon, Li et
    al., arXiv 2510.05491), by a running mean v (from zero) of their mean squares, at the same Frobenius norm:

        v <- b v + (1 - b) mean_cols(O^2),   O' = O / (sqrt(v) + 1e-8),   O <- O' |O| / |O'|

    Sharded matrices (FSDP2, HSDP, tensor parallelism) go whole to one rank each, in bf16 unless `dtype` is
    float32, which orthogonalises them and returns the shards; equal ones go together, and one bucket travels
    while another is computed. State is sharded as the parameter is. The result is the same bits from run to
    run, and depends on the number of ranks only by the rounding of batched products. Parameters without a
    gradient stay as they are.

    Attributes:
        found_inf: fp32 scalar on the device, or None. While it is not zero a step changes nothing.
        record_updates: Whether a step keeps what `update_square_sums` and `update_spectra` tell.
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
        max_stacked_elements: int = 2**27,
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
            dtype: "float16", "bfloat16" or "float32", the precision of the iteration.
            block_rows: Rows of a block that is orthogonalised by itself, or None for whole matrices.
            row_beta2: b of the row normalisation, in [0, 1), or None for none.
            max_stacked_elements: Most elements (not bytes) of equal matrices that a rank stacks at once;
                bounds the extra memory to about six such stacks in dtype. A larger matrix goes alone.

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
            "block_rows": block_rows,
            "row_beta2": row_beta2,
        }
        self.max_stacked_elements = max_stacked_elements
        self.found_inf: torch.Tensor | None = None
        self.record_updates = False
        self._square_sums: dict[str, torch.Tensor] = {}
        self._own_updates: dict[str, torch.Tensor] = {}
        self._plan: tuple[Any, list[Bucket]] = (None, [])
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
        self._square_sums.clear()
        self._own_updates.clear()
        buckets = self._buckets()
        if not buckets:
            return loss
        # a bucket's shards travel while the one before it is orthogonalised, its results during the one after
        incoming = self._send(buckets[0])
        last: tuple[Bucket, Pending] | None = None
        for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
            arriving = incoming
            if following is not None:
                incoming = self._send(following)
            results = bucket.exchange.to_shards(self._orthogonalize(bucket, arriving.wait()))
            if last is not None:
                self._apply(*last)
            last = bucket, results
        assert last is not None
        self._apply(*last)
        return loss

    def update_square_sums(self) -> dict[str, torch.Tensor]:
        """Return the sum of squares of this rank's shards of the last recorded updates, by group name.

        Returns:
            fp32 scalars on the device; the learning rate is left out, the scale is not.
        """
        return dict(self._square_sums)

    def update_spectra(self) -> dict[str, tuple[float, float, float]]:
        """Return the spread of an orthogonalised matrix, by group name; waits for the device.

        Returns:
            Least, median and largest singular value of the first block of the first matrix that this rank
            owned in the last recorded step; nothing for groups of which it owned none.
        """
        spectra = {}
        for name, matrix in self._own_updates.items():
            values = torch.linalg.svdvals(matrix.float())
            spectra[name] = (values.min().item(), values.median().item(), values.max().item())
        return spectra

    def _buckets(self) -> list[Bucket]:
        """Plan the step, or take over the last plan where the same parameters have gradients."""
        key = [[id(p) for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if self._plan[0] != key:
            self._plan = key, plan(self.param_groups, self.max_stacked_elements)
        return self._plan[1]

    def _send(self, bucket: Bucket) -> Pending:
        """Advance the momentum of a bucket, and start to send what is to be orthogonalised."""
        group = self.param_groups[bucket.group]
        for p in bucket.params:
            if "momentum_buffer" not in self.state[p]:
                self.create_state(p, group)
        shards = advance_momentum(
            [_local_gradient(p) for p in bucket.params],
            [_local(self.state[p]["momentum_buffer"]) for p in bucket.params],
            weight=1.0 - group["momentum"],
            nesterov=group["nesterov"],
            dtype=_TRAVEL_DTYPES[_DTYPES[group["dtype"]]],
            found_inf=self.found_inf,
        )
        return bucket.exchange.to_owners(shards)

    def create_state(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        """Give a parameter the state that it has before its first step.

        Args:
            p: The parameter.
            group: Its param group.
        """
        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if group["row_beta2"] is not None:
            # sharded by rows as the parameter is
            self.state[p]["row_mean_square"] = torch.zeros_like(p[:, :1])

    def _orthogonalize(self, bucket: Bucket, matrices: torch.Tensor) -> torch.Tensor:
        """Orthogonalise the matrices of a bucket that this rank owns, `[owned, rows, cols]`."""
        group = self.param_groups[bucket.group]
        dtype = _DTYPES[group["dtype"]]
        if group["lr"] == 0.0 or not len(matrices):
            # No parameter changes at lr 0: nothing to compute.
            return matrices.to(dtype)
        blocks = matrices.view(-1, _block_shape(bucket, group)[0], matrices.shape[2])
        blocks = _ORTHOGONALIZERS[group["orthogonalization"]](blocks, group["num_iterations"], dtype=dtype)
        if self.record_updates:
            self._own_updates.setdefault(_name(group), blocks[0].clone())
        return blocks.view(matrices.shape)

    def _apply(self, bucket: Bucket, results: Pending) -> None:
        """Change the parameters of a bucket by their shards of the results."""
        group = self.param_groups[bucket.group]
        updates = results.wait()
        lr = float(group["lr"])
        if lr == 0.0:
            return
        if group["row_beta2"] is not None:
            updates = self._normalize_rows(bucket, updates, group["row_beta2"])
        scale = _SCALES[group["scale"]](*_block_shape(bucket, group))
        if self.record_updates:
            square_sum = (torch.linalg.vector_norm(updates, dtype=torch.float32) * scale).square()
            self._square_sums[_name(group)] = self._square_sums.get(_name(group), 0.0) + square_sum
        params = [_local(p) for p in bucket.params]
        keep = 1.0 - lr * group["weight_decay"]
        apply_update(params, updates, keep=keep, alpha=-lr * scale, found_inf=self.found_inf)

    def _normalize_rows(self, bucket: Bucket, updates: torch.Tensor, beta2: float) -> torch.Tensor:
        """Bring the rows of this rank's shards `[matrices, rows, cols]` to equal strength."""
        means = [_local(self.state[p]["row_mean_square"]) for p in bucket.params]
        updates = updates.float()
        moved = torch.stack(means).lerp(updates.square().mean(-1, keepdim=True), 1.0 - beta2)
        if self.found_inf is not None:
            moved = torch.where(self.found_inf != 0, torch.stack(means), moved)
        torch._foreach_copy_(means, list(moved.unbind()))
        normalized = updates / (moved.sqrt() + 1e-8)
        squares = torch.stack([x.square().sum((1, 2)) for x in (updates, normalized)])
        if bucket.layout.num_ranks > 1:
            # replicas add their equal shares to both
            dist.all_reduce(squares, group=bucket.layout.group)
        ratio = (squares[0] / squares[1].clamp(min=1e-30)).sqrt()
        return normalized * ratio[:, None, None]


def _check_group(group: dict[str, Any]) -> None:
    for p in group["params"]:
        if p.ndim != 2:
            raise ValueError(
                f"Muon updates matrices only, got a parameter of shape {list(p.shape)}; use AdamW for it"
            )
        check_placements(p)
        _check_rows(p, group["block_rows"], group["row_beta2"])
    for key in ("lr", "weight_decay"):
        if not 0.0 <= group[key] < float("inf"):
            raise ValueError(f"{key} ({group[key]}) must be finite and not negative")
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"momentum ({group['momentum']}) must lie in [0, 1)")
    if group["row_beta2"] is not None and not 0.0 <= group["row_beta2"] < 1.0:
        raise ValueError(f"row_beta2 ({group['row_beta2']}) must lie in [0, 1), or be None")
    if group["num_iterations"] is not None and group["num_iterations"] < 1:
        raise ValueError(f"num_iterations ({group['num_iterations']}) must be at least 1, or None")
    for key, table in (("orthogonalization", _ORTHOGONALIZERS), ("scale", _SCALES), ("dtype", _DTYPES)):
        if group[key] not in table:
            raise ValueError(f"{key} ({group[key]!r}) must be one of {', '.join(table)}")


def _check_rows(p: torch.Tensor, block_rows: int | None, row_beta2: float | None) -> None:
    if block_rows is not None and (block_rows < 1 or p.shape[0] % block_rows):
        raise ValueError(
            f"block_rows ({block_rows}) must divide the rows of each matrix of the group, got {list(p.shape)}"
        )
    placements = p.placements if isinstance(p, DTensor) else ()
    columns_are_cut = any(getattr(placement, "dim", 0) == 1 for placement in placements)
    if row_beta2 is not None and columns_are_cut:
        raise NotImplementedError("row_beta2 needs whole rows on each rank: shard by rows, or leave it out")


def _name(group: dict[str, Any]) -> str:
    return group.get("name", "")


def _block_shape(bucket: Bucket, group: dict[str, Any]) -> tuple[int, int]:
    rows, cols = bucket.layout.shape
    return group["block_rows"] or rows, cols


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_gradient(p: torch.Tensor) -> torch.Tensor:
    gradient = p.grad
    assert gradient is not None
    if isinstance(p, DTensor) and isinstance(gradient, DTensor) and gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return _local(gradient)
