"""Run a test file with Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(path: Path) -> None:
    """Run the tests of a file in the interpreter, which must be chosen before triton is first imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
