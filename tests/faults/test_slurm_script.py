"""The SLURM script of docs/training.md, with stand-ins for srun and scontrol, stops, saves and requeues."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Tally
from tests.faults.processes import CONFIG, LONG, check_history, num_steps
from tests.training.launch import ROOT, arguments, environment, losses

SRUN = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" > "$REQUEUED"; fi\n'


def script(words: str) -> str:
    """Return the script, for one node of two processes."""
    text = (ROOT / "docs" / "training.md").read_text()
    (block,) = re.findall(r"^    #!/bin/bash\n(?:    .*\n)+", text, flags=re.MULTILINE)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for old, new in (
        ("--nproc-per-node 8", "--nproc-per-node 2"),
        (":29500", f":{port}"),
        ("train.py --config configs/0.6b_parallax_muon.toml", words),
    ):
        assert block.count(old) == 1, old
        block = block.replace(old, new)
    return re.sub(r"^    ", "", block, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_script_stops_with_a_checkpoint_and_requeues(corpus: Path, tmp_path: Path, tally: Tally) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    folder, requeued = tmp_path / "run", tmp_path / "requeued"
    words = " ".join(f"'{word}'" for word in arguments(CONFIG, corpus, folder, *LONG))
    (tmp_path / "job.sh").write_text(script(words))
    variables = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "1",
        "REQUEUED": str(requeued),
    }
    for launch in (1, 2):
        num_before = num_steps(folder)
        with (tmp_path / "printed.txt").open("w") as output:
            job = subprocess.Popen(
                ["bash", str(tmp_path / "job.sh")],
                cwd=ROOT,
                env={**environment(), **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 240
        while num_steps(folder) < num_before + 2:
            assert job.poll() is None, (tmp_path / "printed.txt").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=240) == 128 + signal.SIGUSR1, launch
        assert requeued.read_text() == "requeue 77\n"
        requeued.unlink()
        check_history(folder)
        assert (folder / "checkpoint" / f"step-{losses(folder)[-1][0]}" / ".metadata").exists()
        tally(
            "SIGUSR1 before the time limit, by the SLURM script", "stops with a checkpoint, requeues, resumes"
        )
