"""Starts train.py in forks of a process that has imported it: a start costs 6 s of CPU time, a fork none.

    python -m tests.training.warm

A request is a line of JSON on stdin: train.py or the module that stands for it, the words after it, the
number of ranks, the environment, files for stdout and stderr. The answer is a line with the process ids of
the forks, one for each rank, then one with the exit code: 0, or that of the first rank to fail, which ends
the others. A fork ends as a process of its own does, with the same threads, exit handlers and tracebacks. It
has imported nothing else and run nothing before. What modules read of the environment at import is that of
the first request.
"""

import gc
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def preload() -> None:
    """Import what train.py imports, without running any of it."""
    from training import device

    device.prepare()
    import train  # noqa: F401
    from training import failures, log, preflight, rank_monitor, trainer  # noqa: F401

    gc.collect()
    gc.freeze()


def serve() -> dict[str, Any] | None:
    """Fork once per rank of a request; returns the request in a fork, and None at the end of the requests."""
    # the buffer of sys.stdin could hold requests that a fork must not read
    with os.fdopen(os.dup(0), "rb", buffering=0) as requests:
        while line := requests.readline():
            request: dict[str, Any] = json.loads(line)
            variables = launch(request["ranks"])
            processes: list[int] = []
            for each in variables:
                process = os.fork()
                if process == 0:
                    os.environ.clear()
                    os.environ.update(request["environment"] | each)
                    return request
                processes.append(process)
            os.write(1, json.dumps(processes).encode() + b"\n")
            os.write(1, f"{wait(processes)}\n".encode())
    return None


def launch(num_ranks: int) -> list[dict[str, str]]:
    """Return the environment variables by which each rank finds the others; none for a single one."""
    if num_ranks == 1:
        return [{}]
    with socket.create_server(("localhost", 0)) as free:
        shared = {
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def wait(processes: list[int]) -> int:
    """Wait until all have ended; return the exit code of the first that fails, or 0."""
    left, code = {*processes}, 0
    while left:
        process, status = os.wait()
        left.remove(process)
        if code == 0 and status != 0:
            code = os.waitstatus_to_exitcode(status)
            for each in left:
                os.kill(each, signal.SIGKILL)
    return code


def run(request: dict[str, Any]) -> None:
    """Run train.py, or the module, with the request's words and output."""
    inputs = os.open(os.devnull, os.O_RDONLY)
    os.dup2(inputs, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    module = request["module"]
    program = ["train.py"] if module is None else ["-m", module]
    sys.argv = [program[-1], *request["words"]]
    sys.orig_argv = [sys.executable, *program, *request["words"]]
    if module is None:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    preload()
    found = serve()
    if found is not None:
        run(found)
