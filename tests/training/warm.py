"""Starts train.py in forks of a process that has imported it: a start costs 6 s of CPU time, a fork none.

    python -m tests.training.warm

A request is a line of JSON on stdin: the words after train.py, and files for stdout and stderr. The answer is
a line with the process id of the fork, then one with its exit code. A fork ends as a process of its own does,
with the same threads, exit handlers and tracebacks. It has imported nothing else and run nothing before.
"""

import gc
import json
import os
import runpy
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
    """Fork once per request; returns the request in a fork, and None at the end of the requests."""
    # the buffer of sys.stdin could hold requests that a fork must not read
    with os.fdopen(os.dup(0), "rb", buffering=0) as requests:
        while line := requests.readline():
            process = os.fork()
            if process == 0:
                request: dict[str, Any] = json.loads(line)
                return request
            os.write(1, f"{process}\n".encode())
            _, status = os.waitpid(process, 0)
            os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return None


def run(request: dict[str, Any]) -> None:
    """Run train.py with the request's words and output."""
    inputs = os.open(os.devnull, os.O_RDONLY)
    os.dup2(inputs, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["train.py", *request["words"]]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    preload()
    found = serve()
    if found is not None:
        run(found)
