"""Start a command that gets SIGTERM as soon as its parent has ended, however that ended (on Linux).

`python with_parent.py PARENT COMMAND ...`: members of a sweep that was killed stop with a checkpoint. The
request to the system survives the change of program; a hook between fork and exec, which would do without a
program of its own, is not safe beside threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: str, *command: str) -> None:
    """Become the command, unless the parent has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() == int(parent):
        os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
