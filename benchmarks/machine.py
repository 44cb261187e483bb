"""Hardware and software versions of a benchmark, and the file of its result."""

import json
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def versions(*packages: str) -> dict[str, str | None]:
    """Return the installed version of each package, None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def describe() -> dict[str, Any]:
    """Return device, versions, time and commit, with "-dirty" if the working tree differed from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "num_devices": torch.cuda.device_count() if on_gpu else 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **versions("triton", "torchtitan"),
        "commit": git.stdout.strip() or None,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result to JSON, with the description of the machine.

    Args:
        name: File name without extension.
        result: The measurements and the command that made them.
        folder: Folder of the file.

    Returns:
        Path of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **result}, indent=1) + "\n", encoding="utf-8")
    return path
