"""train.py with failing storage: `-m tests.training.failing_storage FAULT --config ...`.

FAULT "write": the last rank fails to write its part of the checkpoint of step 2. FAULT "folder": every rank
but the first has a run folder of its own, as on nodes without a shared file system.
"""

import os
import sys
from typing import Any

import train
from training import device


def break_write() -> None:
    """Make the disk of the last rank full for one checkpoint."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    write_data = FileSystemWriter.write_data

    def failing(self: FileSystemWriter, *arguments: Any) -> Any:
        if is_last and str(self.path).endswith("step-2"):
            raise OSError(28, "No space left on device")
        return write_data(self, *arguments)

    FileSystemWriter.write_data = failing  # pyrefly: ignore [bad-assignment]


def separate_folders(words: list[str]) -> list[str]:
    """Give every rank but the first another run.folder."""
    from training import preflight

    preflight.SECONDS_TO_APPEAR = 0.5
    place, rank = words.index("--run.folder") + 1, os.environ["RANK"]
    return words if rank == "0" else [*words[:place], f"{words[place]}_{rank}", *words[place + 1 :]]


if __name__ == "__main__":
    device.prepare()
    fault, *words = sys.argv[1:]
    if fault == "write":
        break_write()
    else:
        words = separate_folders(words)
    os._exit(train.main(words))
