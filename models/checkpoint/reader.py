"""The one reader of checkpoints, for resume, evaluation, generation and conversion.

Every entry is a zip archive with a CRC-32 per record, which torch does not look at. The reader compares the
files' sizes with .metadata, reads each entry once into memory, checks its checksums, decodes it without
running code from it, and compares shape and dtype. Threads read and check ahead of the decoding.
"""

import io
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from models.checkpoint.archive import check_archive, decode
from models.checkpoint.metadata import DamagedCheckpointError, read_index
from models.run_folder import step_of

# per rank; checksums take 0.3 s per GiB and thread, decoding more than that
_NUM_THREADS = 4
_NUM_AHEAD = 4
_MAX_BUFFER_BYTES = 2**28
# as the trainer's state dict names it; converted weights have none
_STEP = MetadataIndex("train_state.step")


class CheckpointReader(StorageReader):
    """Reads a checkpoint for torch.distributed.checkpoint.load, and checks all that it reads.

    Args:
        checkpoint: Folder of the checkpoint.

    Attributes:
        checkpoint: The folder.
        index: Its entries.

    Raises:
        DamagedCheckpointError: Its .metadata is damaged, or the folder is step-N and its state is of
            another step.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.index = read_index(checkpoint)
        # warm: to read into fresh memory takes four times as long, for its page faults
        self._buffers: list[bytearray] = []
        self._check_step()

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Do nothing: a reader serves one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata that the constructor has read."""
        return self.index.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Do nothing: nothing is set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan of this rank as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans of all ranks as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Return True: the constructor has checked it."""
        return True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read the entries of a plan into the planner's tensors and values.

        Raises:
            DamagedCheckpointError: An entry is not as it was written.
        """
        requests: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for request in plan.items:
            requests[request.storage_index].append(request)
        for index, value in self.values(requests):
            for request in requests[index]:
                if request.type == LoadItemType.BYTE_IO:
                    # planners unpickle without restriction: they get what is encoded here
                    planner.load_bytes(request, _encode(value))
                else:
                    _copy(value, request, planner)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def values(self, indices: Iterable[MetadataIndex] | None = None) -> Iterator[tuple[MetadataIndex, Any]]:
        """Yield entries in the order of the files, each checked and decoded.

        A tensor is valid until the next entry: it lies in a buffer that is used again.

        Args:
            indices: The entries to read; None for all.

        Raises:
            DamagedCheckpointError: An entry is not as it was written.
        """
        items = self.index.items
        ordered = sorted(items if indices is None else indices, key=self._place)
        for name in sorted({items[index].relative_path for index in ordered}):
            self._check_size(name)
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            pending: deque[tuple[MetadataIndex, Future[_Entry]]] = deque()
            for index in ordered:
                pending.append((index, pool.submit(self._read, index)))
                if len(pending) > _NUM_AHEAD:
                    yield from self._next(pending)
            while pending:
                yield from self._next(pending)

    def _next(
        self, pending: deque[tuple[MetadataIndex, "Future[_Entry]"]]
    ) -> Iterator[tuple[MetadataIndex, Any]]:
        index, future = pending.popleft()
        try:
            entry = future.result()
            yield index, self._decode(index, entry)
        except BaseException:
            for _, other in pending:
                other.cancel()
            raise
        if len(entry.buffer) <= _MAX_BUFFER_BYTES:
            self._buffers.append(entry.buffer)

    def _place(self, index: MetadataIndex) -> tuple[str, int]:
        return self.index.items[index].relative_path, self.index.items[index].offset

    def _check_size(self, name: str) -> None:
        path, wanted = self.checkpoint / name, self.index.file_bytes[name]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{path} is missing") from None
        if size != wanted:
            raise DamagedCheckpointError(f"{path} is damaged: it has {size:,} bytes, wanted {wanted:,}")

    def _read(self, index: MetadataIndex) -> "_Entry":
        """Read the bytes of an entry, and compare them with their checksums."""
        name, offset = self._place(index)
        length, num_read = self.index.items[index].length, 0
        buffer = self._buffers.pop() if self._buffers else bytearray()
        if len(buffer) < length:
            buffer = bytearray(length)
        view = memoryview(buffer)[:length]
        try:
            with (self.checkpoint / name).open("rb", buffering=0) as file:
                while num_read < length:  # one call reads 2 GiB at most
                    count = os.preadv(file.fileno(), [view[num_read:]], offset + num_read)
                    if not count:
                        raise self._damage(index, "the file ends in it")
                    num_read += count
        except OSError as error:
            raise DamagedCheckpointError(f"{self.checkpoint / name} cannot be read: {error}") from error
        try:
            return _Entry(view, check_archive(view), buffer)
        except Exception as error:  # zipfile raises errors of many kinds for damaged archives
            raise self._damage(index, "its checksum does not match") from error

    def _decode(self, index: MetadataIndex, entry: "_Entry") -> Any:
        try:
            value = decode(entry.view, entry.records)
        except Exception as error:  # of many kinds
            raise self._damage(index, "it is not plain data, and nothing else is read from it") from error
        chunk = self.index.chunks.get(index)
        if chunk is not None:
            is_tensor = isinstance(value, torch.Tensor)
            if not is_tensor or (tuple(value.shape), value.dtype) != (chunk.sizes, chunk.dtype):
                raise self._damage(index, "its shape or dtype is not that of .metadata")
        return value

    def _damage(self, index: MetadataIndex, problem: str) -> DamagedCheckpointError:
        path = self.checkpoint / self.index.items[index].relative_path
        return DamagedCheckpointError(f"{path} is damaged at {index.fqn}: {problem}")

    def _check_step(self) -> None:
        named = step_of(self.checkpoint)
        if named is None or _STEP not in self.index.items:
            return
        ((_, step),) = self.values([_STEP])
        if step != named:
            raise DamagedCheckpointError(
                f"{self.checkpoint} is a checkpoint of step {step}; rename the folder back to step-{step}, "
                "or to a name other than step-N to keep it unused"
            )


class _Entry(NamedTuple):
    """The bytes of an entry, the places of its records, and the buffer to give back."""

    view: memoryview
    records: dict[str, slice]
    buffer: bytearray


def _encode(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def _copy(chunk: torch.Tensor, request: ReadItem, planner: LoadPlanner) -> None:
    """Copy the part of a chunk that a rank needs to its tensor."""
    for dim, (offset, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
        chunk = chunk.narrow(dim, offset, length)
    target = planner.resolve_tensor(request).detach()
    target.copy_(chunk)
    planner.commit_tensor(request, target)
