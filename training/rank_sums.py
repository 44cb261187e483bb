"""Sums over all ranks of what a training step measures, by one all-reduce per step."""

from collections.abc import Mapping

import torch
import torch.distributed as dist


class RankSums:
    """Sums values over ranks; the only synchronization with the device in most steps.

    A second all-reduce is taken where a rank has logged a scalar of a new name: in the first step.

    Args:
        device: Device of the sums.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._names: list[str] = []  # of logged scalars, on all ranks

    def sum(
        self, values: Mapping[str, torch.Tensor | float], logged: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Sum values over all ranks; a collective call.

        Args:
            values: Numbers and scalars on the device; the same names on all ranks.
            logged: Sum and number of the values of each logged scalar, `[2]`; a rank may lack any of them.

        Returns:
            The sums of `values`, and the means of the logged scalars: those that a rank has logged in this
            step.
        """
        from_host = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        on_device = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        has_new_names = not logged.keys() <= {*self._names}
        host = torch.tensor([*from_host.values(), has_new_names], dtype=torch.float64, device=self.device)
        scalars = [value.double() for value in on_device.values()]
        packed = torch.cat([host, *(each.reshape(1) for each in scalars), self._rows(self._names, logged)])
        dist.all_reduce(packed)
        summed = packed.tolist()
        names = [*from_host, "", *on_device]
        sums = dict(zip(names, summed, strict=False))
        means = _means(self._names, summed[len(names) :])
        if sums.pop(""):
            means |= self._means_of_new_names(logged)
        return {name: sums[name] for name in values}, means

    def _rows(self, names: list[str], logged: Mapping[str, torch.Tensor]) -> torch.Tensor:
        nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
        return torch.cat([nothing[:0], *(logged.get(name, nothing).double() for name in names)])

    def _means_of_new_names(self, logged: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Agree with all ranks on the names of the scalars, and return the means of the new ones."""
        by_rank: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(by_rank, [name for name in logged if name not in self._names])
        names = sorted({name for each in by_rank for name in each})
        rows = self._rows(names, logged)
        dist.all_reduce(rows)
        self._names += names
        return _means(names, rows.tolist())


def _means(names: list[str], rows: list[float]) -> dict[str, float]:
    pairs = zip(names, rows[::2], rows[1::2], strict=True)
    return {name: total / number for name, total, number in pairs if number}
