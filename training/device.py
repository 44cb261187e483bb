"""Lets torchtitan run where there is no accelerator.

torchtitan 0.2.2 asks torch for the accelerator while it is imported and takes "cuda" where there is none.
`prepare` comes before that import and answers "cpu", with a device module that has the few functions
torchtitan calls.
"""

import os
import platform
from types import ModuleType, SimpleNamespace

import torch
import torch._utils


def _cpu_module() -> ModuleType:
    module = ModuleType("torch.cpu with what torchtitan asks of an accelerator")
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
    """Make torchtitan importable on this machine; call it before the first torchtitan import.

    Returns:
        "cuda" or "cpu", the type of the devices that training uses.
    """
    if torch.cuda.is_available():
        return "cuda"
    module = _cpu_module()
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device_type: module  # pyrefly: ignore [bad-assignment]
    return "cpu"
