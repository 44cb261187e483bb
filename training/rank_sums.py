"""Sums over all ranks of what a training step measures: one all-reduce per step, which is read later."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy numbers to a device, `[N]`, without waiting for what the device has to do before."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class PendingSums:
    """Sums that the device may still be computing; see RankSums.begin.

    Attributes:
        values: On the host once `copied` has happened: the sums, and what is the same on all ranks.
        copied: The end of the copy, or None where the host has computed the values.
        names: Of the sums, "" for whether a rank has logged a scalar of a new name.
        logged: Scalars whose means are among the sums.
        new: Sum and number of the values of each scalar that was logged under a new name, `[2]`.
    """

    values: torch.Tensor
    copied: torch.cuda.Event | None
    names: Sequence[str]
    logged: Sequence[str]
    new: Mapping[str, torch.Tensor]


class RankSums:
    """Sums values over ranks; reading them is the only synchronization with the device in most steps.

    A second all-reduce is taken where a rank has logged a scalar of a new name: in the first steps.

    Args:
        device: Device of the sums.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._names: list[str] = []  # of logged scalars, on all ranks

    def begin(
        self,
        values: Mapping[str, torch.Tensor | float],
        logged: Mapping[str, torch.Tensor],
        same: torch.Tensor,
    ) -> PendingSums:
        """Start to sum values over all ranks, without waiting for the device; a collective call.

        Args:
            values: Numbers and scalars on the device; the same names on all ranks.
            logged: Sum and number of the values of each logged scalar, `[2]`; a rank may lack any of them.
            same: Values `[N]` on the device that are the same on all ranks, and are only read.
        """
        from_host = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        on_device = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        known = [*self._names]
        new = {name: row.clone() for name, row in logged.items() if name not in known}
        host = to_device([*from_host.values(), bool(new)], torch.float64, self.device)
        scalars = [value.double().reshape(1) for value in on_device.values()]
        packed = torch.cat([host, *scalars, self._rows(known, logged)])
        dist.all_reduce(packed)
        packed, copied = torch.cat([packed, same.double()]), None
        if packed.is_cuda:
            packed = torch.empty_like(packed, device="cpu", pin_memory=True).copy_(packed, non_blocking=True)
            copied = torch.cuda.Event(enable_timing=True)
            copied.record()
        return PendingSums(
            values=packed, copied=copied, names=[*from_host, "", *on_device], logged=known, new=new
        )

    def read(self, pending: PendingSums) -> tuple[dict[str, float], dict[str, float], list[float]]:
        """Wait for sums; a collective call.

        Returns:
            The sums; the means of the logged scalars, of those that a rank has logged in this step; what is
            the same on all ranks.
        """
        if pending.copied is not None:
            pending.copied.synchronize()
        values, num_sums = pending.values.tolist(), len(pending.names)
        end = num_sums + 2 * len(pending.logged)
        sums = dict(zip(pending.names, values[:num_sums], strict=True))
        means = _means(pending.logged, values[num_sums:end])
        if sums.pop(""):
            means |= self._means_of_new_names(pending.new)
        return sums, means, values[end:]

    def _rows(self, names: Sequence[str], logged: Mapping[str, torch.Tensor]) -> torch.Tensor:
        nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
        return torch.cat([nothing[:0], *(logged.get(name, nothing).double() for name in names)])

    def _means_of_new_names(self, logged: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Agree with all ranks on the names of the scalars, and return the means of the new ones."""
        by_rank: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(by_rank, [*logged])
        names = sorted({name for each in by_rank for name in each})
        rows = self._rows(names, logged)
        dist.all_reduce(rows)
        self._names += [name for name in names if name not in self._names]
        return _means(names, rows.tolist())


def _means(names: Sequence[str], rows: Sequence[float]) -> dict[str, float]:
    pairs = zip(names, rows[::2], rows[1::2], strict=True)
    return {name: total / number for name, total, number in pairs if number}
