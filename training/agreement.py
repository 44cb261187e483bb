"""A check that all ranks see the same run folder."""

import secrets
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

# as long as an NFS client may go on believing that a folder is not there
SECONDS_TO_APPEAR = 60.0


def check_shared(folder: Path) -> None:
    """Refuse a run folder that not every rank sees. Every rank calls this.

    Args:
        folder: The run folder, which is there on rank 0.

    Raises:
        ValueError: On every rank: it is another folder on some of them.
    """
    names = [f".shared-{secrets.token_hex(8)}"]
    if dist.get_rank() == 0:
        (folder / names[0]).touch()
    dist.broadcast_object_list(names)
    path = folder / names[0]
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, path.exists())
    if dist.get_rank() == 0:
        path.unlink()
    if not all(seen):
        ranks = ", ".join(str(rank) for rank, is_seen in enumerate(seen) if not is_seen)
        raise ValueError(
            f"run.folder ({folder}) must be on a file system that all nodes share, but rank {ranks} does not "
            "see what rank 0 writes there; give a shared folder"
        )
