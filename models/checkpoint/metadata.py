"""Read the .metadata of a checkpoint: which tensors it has, and where in its files their bytes are.

It is a pickle. Only the classes that torch's writer puts there are resolved, so that reading one runs no code
of its author, and what it says is checked for consistency: a bit flip in it would otherwise send a tensor's
name to another's bytes.
"""

import math
import pathlib
import pickle
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from errors import UserError
from models.run_folder import metadata_file

_DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be loaded as it was written; the message names the file.

    Attributes:
        good: The newest good checkpoint beside it; None without one, or where none was looked for.
    """

    good: Path | None = None


@dataclass(frozen=True)
class StoredItem:
    """Where the bytes of an entry are. Its fields are those of torch's own record, which is private.

    Attributes:
        relative_path: File in the checkpoint's folder.
        offset: First byte.
        length: Number of bytes.
    """

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def _layout(name: str) -> torch.layout:
    return {"torch.strided": torch.strided}[name]


def _path(*parts: str) -> str:
    return str(pathlib.PurePath(*parts))


_PATHS = {
    (module, name): _path
    for module in ("pathlib", "pathlib._local")  # the second in Python 3.13
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(dcp_metadata.__name__, each.__name__): each for each in (
        BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties,
        TensorStorageMetadata, dcp_metadata._MEM_FORMAT_ENCODING,
    )},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StoredItem,
    ("torch.serialization", "_get_layout"): _layout,
    ("torch", "Size"): torch.Size,
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    **_PATHS,
}  # fmt: skip


# what pickle.dump writes for these classes, in protocols 2 to 5; none allocates much, as others do where
# a bit of a length is flipped
_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD"),
    *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
)


class _MetadataUnpickler(pickle._Unpickler):
    """An unpickler that resolves the names of _ALLOWED and imports nothing.

    It is the one in Python, half as fast as the one in C: that one allocates gigabytes where a flipped bit in
    an opcode tells it to.
    """

    dispatch = {  # noqa: RUF012  (as in the base class)
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPCODES)
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs") from None


@dataclass(frozen=True)
class Chunk:
    """A stored part of a tensor.

    Attributes:
        sizes: Its shape.
        dtype: Its dtype.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class CheckpointIndex:
    """What a checkpoint's .metadata says, checked for consistency.

    Attributes:
        metadata: As torch's planners take it.
        items: Where the bytes of every entry are.
        chunks: Shape and dtype of the entries that are parts of tensors; the others are Python values.
        file_bytes: Size of every file.
    """

    metadata: Metadata
    items: dict[MetadataIndex, StoredItem]
    chunks: dict[MetadataIndex, Chunk]
    file_bytes: dict[str, int]

    @property
    def tensor_sizes(self) -> dict[str, torch.Size]:
        """Global shapes of the tensors, by name."""
        entries = self.metadata.state_dict_metadata.items()
        return {name: entry.size for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def read_index(checkpoint: Path) -> CheckpointIndex:
    """Read and check the .metadata of a checkpoint.

    Args:
        checkpoint: Folder of the checkpoint.

    Raises:
        DamagedCheckpointError: It cannot be read, names other classes, or contradicts itself.
    """
    path = metadata_file(checkpoint)
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        return _index(metadata)
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # damaged pickles raise errors of any kind
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise DamagedCheckpointError(f"{path} is damaged: {' '.join(reason.split())[:200]}") from error


def _index(metadata: Any) -> CheckpointIndex:
    """Check what was unpickled; raises any kind of error."""
    _require(isinstance(metadata, Metadata), "it holds no metadata")
    chunks: dict[MetadataIndex, Chunk] = {}
    wanted: set[MetadataIndex] = set()
    for name, entry in metadata.state_dict_metadata.items():
        _require(isinstance(name, str), "an entry's name is no text")
        if isinstance(entry, BytesStorageMetadata):
            wanted.add(MetadataIndex(name))
            continue
        _require(isinstance(entry, TensorStorageMetadata), f"{name} is neither tensor nor value")
        _check_rows(name, tuple(entry.size), entry.chunks)
        dtype = entry.properties.dtype
        _require(isinstance(dtype, torch.dtype), f"{name} has no dtype")
        for chunk in entry.chunks:
            chunks[MetadataIndex(name, chunk.offsets)] = Chunk(tuple(chunk.sizes), dtype)
    items = metadata.storage_data
    _require(items.keys() == wanted | chunks.keys(), "its entries and their places in the files differ")
    file_bytes = _check_places(items.values())
    names = {index: index.fqn for index in items}
    paths = metadata.planner_data
    if isinstance(paths, dict):
        _require(paths.keys() == set(names.values()), "its entries and their paths differ")
        flat = all(".".join(map(str, path)) == name for name, path in paths.items())
        _require(flat, "a path is not that of its entry")
    return CheckpointIndex(metadata, items, chunks, file_bytes)


def _check_rows(name: str, size: tuple[int, ...], chunks: Iterable[ChunkStorageMetadata]) -> None:
    """Check that the chunks of a tensor, which is sharded by rows, are all of its rows, each once."""
    end = 0
    for offsets, sizes in sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks):
        if math.prod(sizes) == 0:
            continue  # ranks beyond the last row
        whole = all(offset == 0 for offset in offsets[1:]) and sizes[1:] == size[1:]
        _require(len(offsets) == len(sizes) == len(size) and whole, f"a part of {name} is not whole rows")
        if size:
            _require(offsets[0] == end, f"the rows of {name} overlap, or some are missing")
            end += sizes[0]
    _require(not size or math.prod(size) == 0 or end == size[0], f"rows of {name} are missing")


def _check_places(items: Iterable[StoredItem]) -> dict[str, int]:
    """Check that items follow each other in their files without gaps; return the size of each file."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for item in items:
        _require(isinstance(item, StoredItem), "an entry has no place in a file")
        _require(item.transform_descriptors is None, "it is compressed or encrypted by an extension")
        _require(item.length > 0, "an entry has no bytes")
        name = item.relative_path
        _require(pathlib.PurePath(name).name == name and name not in ("", ".."), f"{name!r} is no file of it")
        spans[name].append((item.offset, item.offset + item.length))
    for name, places in spans.items():
        places.sort()
        follows = places[0][0] == 0 and all(before[1] == after[0] for before, after in pairwise(places))
        _require(follows, f"entries overlap in {name}, or leave gaps")
    return {name: places[-1][1] for name, places in spans.items()}


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
