"""The device that a command line names by --device."""

import re

import torch

from errors import UserError


def check_device(name: str) -> None:
    """Raise unless a device is one of this machine's that models run on.

    Args:
        name: "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: It is none of them, or the machine has no such GPU.
    """
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name)
    if match is None:
        raise UserError(f'--device is "{name}", want cuda, cuda:N or cpu')
    if name == "cpu":
        return
    if not torch.cuda.is_available():
        raise UserError(f"--device is {name}, but no CUDA device is available; give cpu")
    num_devices = torch.cuda.device_count()
    if match[1] is not None and int(match[1]) >= num_devices:
        raise UserError(f"--device is {name}, but there are {num_devices} GPUs, counted from 0")
