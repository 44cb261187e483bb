import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run(name: str, **variables: str) -> None:
    """Run a file of tests in a process of its own, without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name(name)),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.parametrize(
    "name", ["interpreted_kernels.py", "interpreted_decode.py", "interpreted_local_linear.py"]
)
def test_kernels_in_the_interpreter(name: str) -> None:
    # the interpreter must be chosen before triton is first imported, which this process may have done
    run(name, TRITON_INTERPRET="1")


def test_hopper_kernels_compile() -> None:
    # the process takes another driver
    run("compiled_hopper.py")
