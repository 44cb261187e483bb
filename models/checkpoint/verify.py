"""Check whole checkpoints: every entry is read, compared with its checksum and decoded."""

from dataclasses import dataclass
from pathlib import Path

from models.checkpoint.metadata import DamagedCheckpointError
from models.checkpoint.reader import CheckpointReader
from models.run_folder import RunFolder


@dataclass(frozen=True)
class CheckpointSize:
    """The size of a good checkpoint.

    Attributes:
        num_entries: Parts of tensors, and other values.
        num_bytes: Bytes of its files without .metadata.
    """

    num_entries: int
    num_bytes: int


def verify_checkpoint(checkpoint: Path) -> CheckpointSize:
    """Read and check a whole checkpoint, entry by entry.

    Args:
        checkpoint: Its folder.

    Returns:
        Its size.

    Raises:
        DamagedCheckpointError: At the first damage.
    """
    reader = CheckpointReader(checkpoint)
    num_entries = sum(1 for _ in reader.values())
    return CheckpointSize(num_entries, sum(reader.index.file_bytes.values()))


def newest_good(damaged: Path) -> Path | None:
    """Return the newest other checkpoint of the same run that is good; reads whole checkpoints to know.

    Args:
        damaged: The checkpoint that is not to be returned.
    """
    whole = RunFolder.of_checkpoint(damaged).whole_checkpoints()
    for step in sorted(whole, reverse=True):
        if whole[step].name == damaged.name:
            continue
        try:
            verify_checkpoint(whole[step])
        except DamagedCheckpointError:
            continue
        return whole[step]
    return None
