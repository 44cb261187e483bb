"""The process of a member: the ordinary train.py on its config, with its output in the run folder's log."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from models.run_folder import RunFolder
from training.sweep import with_parent
from training.sweep.records import FAILED, LONGEST_NOTE, log_lines
from training.sweep.slots import Slot

_TRAIN = Path(__file__).parents[2] / "train.py"
# time for a checkpoint after a signal, before torchrun kills its workers
_SHUTDOWN_SECONDS = "300"


def train_command(config_file: Path, num_gpus: int) -> list[str]:
    """Return the command that trains a member.

    Args:
        config_file: Its resolved config.
        num_gpus: Ranks.
    """
    ranks = ("--standalone", "--nproc-per-node", str(num_gpus), "--shutdown_timeout", _SHUTDOWN_SECONDS)
    launcher = () if num_gpus == 1 else ("-m", "torch.distributed.run", *ranks)
    return [sys.executable, *launcher, str(_TRAIN), "--config", str(config_file)]


class MemberProcess:
    """A member that trains, in a session of its own: only the sweep passes signals on to it.

    Args:
        folder: Its run folder; created if it is missing.
        command: From train_command.
        slot: Where it runs.
        environment: From slots.slot_environment.
    """

    def __init__(
        self, folder: RunFolder, command: list[str], slot: Slot, environment: Mapping[str, str]
    ) -> None:
        self.slot = slot
        self._folder = folder
        self._is_asked = False
        folder.path.mkdir(parents=True, exist_ok=True)
        where = f"GPU {', '.join(slot.gpus)}" if slot.gpus else "the CPU"
        self._note(f"started on {where}")
        bound = [sys.executable, "-I", "-S", with_parent.__file__, str(os.getpid()), *command]
        with folder.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                bound,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Return the exit code, and note a failure at the end of the log; None while it runs."""
        code = self._process.poll()
        if code and not self._is_asked:  # torchrun returns 1 after a signal
            self._note(f"failed with code {code}: {self._reason()}")
        return code

    def stop(self) -> None:
        """Ask the member to stop with a checkpoint."""
        self._is_asked = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end; return the exit code."""
        return self._process.wait()

    def _reason(self) -> str:
        """Return the line of the log that tells most of a failure: the last error, or the last line."""
        lines = [line for line in log_lines(self._folder) if not line.startswith("sweep: ")]
        errors = [line for line in lines if "error: " in line.lower()]
        return (errors or lines or ["it has printed nothing"])[-1].strip()

    def _note(self, text: str) -> None:
        text = text if len(text) <= LONGEST_NOTE else f"{text[: LONGEST_NOTE - 3]}..."
        log = self._folder.log_file
        # after a line that a killed launch did not end
        is_cut = log.exists() and not _ends_a_line(log)
        time = datetime.now().astimezone().isoformat(" ", "seconds")
        line = f"sweep: {text}" if f"sweep: {text}".startswith(FAILED) else f"sweep: {text}, {time}"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{chr(10) if is_cut else ''}{line}\n")


def _ends_a_line(path: Path) -> bool:
    """Return whether a file is empty or ends with a line break."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
