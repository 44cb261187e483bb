"""The GPUs that this process may give to others; without importing torch."""

import os
import subprocess

VISIBLE = "CUDA_VISIBLE_DEVICES"
_SECONDS = 60.0


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES has, or where it is not set, all that nvidia-smi lists."""
    if VISIBLE in os.environ:
        return [gpu.strip() for gpu in os.environ[VISIBLE].split(",") if gpu.strip()]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()
