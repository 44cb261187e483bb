"""Copy many tensors from the device to the host at once: each copy alone would wait for the device."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def to_host(tables: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Copy all tensors of some tables to the host, in one transfer.

    Args:
        tables: Name -> tensor of any shape and dtype; all on one device.

    Returns:
        The same tables, their tensors on the CPU.
    """
    # the widest dtype first: every tensor begins at a multiple of its element's size
    flat = sorted(
        ((i, name, x) for i, table in enumerate(tables) for name, x in table.items()),
        key=lambda each: -each[2].element_size(),
    )
    found: list[dict[str, Tensor]] = [dict.fromkeys(table, torch.empty(0)) for table in tables]
    if not flat:
        return found
    copied = torch.cat([x.reshape(-1).view(torch.uint8) for _, _, x in flat]).cpu()
    start = 0
    for i, name, x in flat:
        stop = start + x.numel() * x.element_size()
        found[i][name] = copied[start:stop].view(x.dtype).reshape(x.shape)
        start = stop
    return found
