"""The one reader of checkpoints, for resume, evaluation, generation and conversion.

Every entry is a zip archive with a CRC-32 per record, which torch does not look at. The reader compares the
files' sizes with .metadata, reads each entry once into memory, checks its checksums, decodes it without
running code from it, and compares shape and dtype. Threads read and check ahead of the decoding.
"""

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from models.checkpoint.metadata import DamagedCheckpointError, read_index
from models.run_folder import step_of

# per rank; checksums take 0.3 s per GiB and thread, decoding more than that
_NUM_THREADS = 4
_NUM_AHEAD = 8
# as the trainer's state dict names it; converted weights have none
_STEP = MetadataIndex("train_state.step")
_LOCAL_HEADER_BYTES, _LOCAL_NAME_OFFSET = 30, 26


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
                    yield self._next(pending)
            while pending:
                yield self._next(pending)

    def _next(self, pending: deque[tuple[MetadataIndex, "Future[_Entry]"]]) -> tuple[MetadataIndex, Any]:
        index, entry = pending.popleft()
        try:
            return index, self._decode(index, entry.result())
        except BaseException:
            for _, other in pending:
                other.cancel()
            raise

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
        length, parts = self.index.items[index].length, list[bytes]()
        try:
            with (self.checkpoint / name).open("rb", buffering=0) as file:
                while length:  # one call reads 2 GiB at most
                    parts.append(os.pread(file.fileno(), length, offset))
                    if not parts[-1]:
                        raise self._damage(index, "the file ends in it")
                    offset, length = offset + len(parts[-1]), length - len(parts[-1])
        except OSError as error:
            raise DamagedCheckpointError(f"{self.checkpoint / name} cannot be read: {error}") from error
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        try:
            return _Entry(data, check_archive(data))
        except Exception as error:  # zipfile raises errors of many kinds for damaged archives
            raise self._damage(index, "its checksum does not match") from error

    def _decode(self, index: MetadataIndex, entry: "_Entry") -> Any:
        try:
            value = decode(entry.data, entry.records)
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
    """The bytes of an entry, and the places of its records."""

    data: bytes
    records: dict[str, slice]


def check_archive(data: bytes) -> dict[str, slice]:
    """Compare every record of a zip archive with its CRC-32, without copying it.

    Args:
        data: The archive, as torch.save writes it: nothing is compressed.

    Returns:
        The place of each record, by its name without the folder.

    Raises:
        Exception: Of any kind, if the archive is damaged.
    """
    view, records = memoryview(data), dict[str, slice]()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for record in archive.infolist():
            lengths = struct.unpack_from("<HH", data, record.header_offset + _LOCAL_NAME_OFFSET)
            start = record.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
            content = view[start : start + record.file_size]
            is_stored = record.compress_type == zipfile.ZIP_STORED and len(content) == record.file_size
            # torch returns uninitialized memory for a record whose attributes say that it is a folder
            if not is_stored or record.external_attr or zlib.crc32(content) != record.CRC:
                raise zipfile.BadZipFile(record.filename)
            records[record.filename.partition("/")[2]] = slice(start, start + record.file_size)
    return records


def decode(data: bytes, records: Mapping[str, slice]) -> Any:
    """Decode what torch.save wrote, without running code from it.

    Args:
        data: The archive.
        records: From check_archive.

    Returns:
        The value. A contiguous tensor shares the memory of data and is read-only.

    Raises:
        Exception: Of any kind, if it holds anything but tensors and plain values.
    """
    with torch.serialization.skip_data():
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(value, torch.Tensor):
        return value
    place = records.get("data/0")
    if place is None or not value.numel() or not value.is_contiguous() or value.storage_offset():
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if place.stop - place.start != value.nbytes:
        raise ValueError(f"{place.stop - place.start} bytes for a tensor of {value.nbytes}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(data, dtype=value.dtype, count=value.numel(), offset=place.start)
    return flat.view(value.shape)


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
