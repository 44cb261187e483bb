"""Results of runs in a folder."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from config import from_table, to_table
from data.folder_lock import FolderLock, LockedError
from disk import write_text
from errors import UserError
from eval.mad.runs import Outcome, Run

_FILE = "mad.jsonl"
_LOCK = "mad.lock"


class ResultsFile:
    """The outcomes of runs in a folder, a line each; a run that has a line is not trained again.

    Args:
        folder: The folder.
        device: What the runs are trained on, for the record.

    Raises:
        UserError: A line of the file cannot be read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._path = folder / _FILE
        is_cuda = device.type == "cuda"
        self._hardware = torch.cuda.get_device_name(device) if is_cuda else device.type
        self._lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self.outcomes = _decode(self._lines, self._path)

    def add(self, run: Run, outcome: Outcome) -> None:
        """Write the outcome of a run; the file is replaced atomically."""
        facts = {"device": self._hardware, "torch": torch.__version__}
        self._lines.append(json.dumps({"run": to_table(run), "outcome": to_table(outcome), **facts}))
        write_text(self._path, "\n".join(self._lines) + "\n")
        self.outcomes[run] = outcome


@contextmanager
def open_results(folder: Path, device: torch.device) -> Iterator[ResultsFile]:
    """Open the results of a folder, which no other process may write meanwhile.

    Args:
        folder: The folder; made if it is not there.
        device: What the runs are trained on, for the record.

    Yields:
        The results.

    Raises:
        UserError: The folder is in use, or a line cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder / _LOCK)
    try:
        lock.acquire()
    except LockedError as error:
        raise UserError(
            f"--out {folder} is in use by {error}; give another folder, and show both together by --with"
        ) from None
    try:
        yield ResultsFile(folder, device)
    finally:
        lock.release()


def read_results(folder: Path) -> dict[Run, Outcome]:
    """Return the outcomes of the runs in a folder.

    Raises:
        UserError: There are none, or a line cannot be read.
    """
    path = folder / _FILE
    if not path.is_file():
        raise UserError(f"--with {folder} has no {_FILE}; want the --out of an earlier python -m eval.mad")
    return _decode(path.read_text(encoding="utf-8").splitlines(), path)


def _decode(lines: Sequence[str], path: Path) -> dict[Run, Outcome]:
    outcomes: dict[Run, Outcome] = {}
    for number, line in enumerate(lines, start=1):
        source = f"line {number} of {path}"
        try:
            record: dict[str, Any] = json.loads(line)
            run, outcome = record["run"], record["outcome"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source} is no result of python -m eval.mad ({error}); remove it") from None
        outcomes[from_table(Run, run, source, "run")] = from_table(Outcome, outcome, source, "outcome")
    return outcomes
