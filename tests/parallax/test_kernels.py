import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

# the interpreter must be selected before triton is first imported, which this process may have done
INTERPRETED = {"TRITON_INTERPRET": "1"}
# file and further arguments of pytest -> environment
PROCESSES = {
    "interpreted_kernels.py": INTERPRETED,
    "interpreted_decode.py": INTERPRETED,
    "interpreted_local_linear.py": INTERPRETED,
    "interpreted_softmax.py": INTERPRETED,
    "compiled_hopper.py -k causal": {},
    "compiled_hopper.py -k bounded": {},
    "compiled_decode.py": {},
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    """Start each test file in a separate process without a GPU; all at once, as each takes one core."""
    folder = tmp_path_factory.mktemp("output")
    running = {}
    for name, variables in PROCESSES.items():
        file, *arguments = name.split()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
        with open(folder / name, "w", encoding="utf-8") as output:
            running[name] = (
                subprocess.Popen(
                    [*command, str(Path(__file__).with_name(file)), *arguments],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                ),
                folder / name,
            )
    yield running
    for process, _ in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", PROCESSES)
def test_kernels_without_a_gpu(name: str, processes: dict[str, tuple[subprocess.Popen, Path]]) -> None:
    process, output = processes[name]
    assert process.wait() == 0, output.read_text(encoding="utf-8")[-8000:]
