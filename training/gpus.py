"""The GPUs that a dry run plans for: peak bf16 FLOP/s and memory, from the vendor's data sheets."""

from dataclasses import dataclass

from errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: Its name, as printed.
        peak_flops: Dense bf16 FLOP/s with fp32 accumulation, which MFU is relative to; the same that
            torchtitan takes for the MFU of a run.
        memory_gib: The data sheet's GB as GiB; CUDA reports 1% less (139.8 GiB for an H200, measured).
    """

    name: str
    peak_flops: float
    memory_gib: float


# NVIDIA's data sheets (nvidia.com/en-us/data-center/ a100, h100, h200; Blackwell data sheet 3384703), SXM
# modules unless named otherwise; sparse rates are halved
GPUS: dict[str, Gpu] = {
    "a100": Gpu("A100", 312e12, 80),
    "h100": Gpu("H100", 989e12, 80),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 80),
    "h200": Gpu("H200", 989e12, 141),
    "b200": Gpu("B200", 2250e12, 180),
}

MEASURED = "h200"
"""The GPU whose rates training/step_time.py has."""


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its key, in upper or lower case.

    Raises:
        UserError: It is not in the table.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu is {name!r}, want one of {', '.join(GPUS)}, or add it to training/gpus.py")
    return GPUS[name.lower()]
