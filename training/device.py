"""Make torchtitan importable on machines without an accelerator, and reach torch's process groups.

torchtitan 0.2.2 looks up the device type while it is imported, and falls back to "cuda". `prepare` is called
before that import: it replaces torch's look-up by one that returns "cpu", with a device module that has the
functions torchtitan calls. tests/training/test_titan.py checks the private names of torch.
"""

import os
import platform
from datetime import timedelta
from types import ModuleType, SimpleNamespace

import torch
import torch._utils
import torch.distributed as dist
from torch.distributed import distributed_c10d

from errors import UserError


def _cpu_module() -> ModuleType:
    """Return torch.cpu with the functions of an accelerator's module that torchtitan calls."""
    module = ModuleType("torch.cpu for torchtitan")
    module.__dict__.update(torch.cpu.__dict__)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    module.__dict__.update(
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_name=lambda device=None: platform.processor() or "cpu",
        get_device_properties=lambda device=None: SimpleNamespace(total_memory=memory),
        memory_stats=lambda device=None: {},
        reset_peak_memory_stats=lambda device=None: None,
        empty_cache=lambda: None,
        set_device=lambda device: None,
    )
    return module


def prepare() -> str:
    """Set the device type that torchtitan finds; call it before the first import of torchtitan.

    Returns:
        "cuda" or "cpu", the type of the devices that training uses.

    Raises:
        UserError: This host has GPUs, but none for this process.
    """
    if torch.cuda.is_available():
        local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise UserError(
                f"LOCAL_RANK is {local_rank}, but this host shows {num_gpus} GPUs: start at most {num_gpus} "
                "processes per node (--nproc-per-node), or look at CUDA_VISIBLE_DEVICES"
            )
        return "cuda"
    module = _cpu_module()
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device_type: module  # pyrefly: ignore [bad-assignment]
    return "cpu"


def process_group_store() -> dist.Store:
    """Return a client of its own of the store that the ranks met at, for another thread."""
    return distributed_c10d._get_default_store().clone()  # pyrefly: ignore [missing-attribute]


def set_collective_timeouts(timeout: timedelta) -> None:
    """Set how long a collective may take before its backend raises (gloo) or aborts (NCCL), in all groups."""
    for group, (backend, _) in distributed_c10d._world.pg_map.items():
        if backend != "fake":  # torchtitan's, of mesh axes of one rank
            distributed_c10d._set_pg_timeout(timeout, group)
