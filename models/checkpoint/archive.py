"""The zip archives of torch.save: their checksums, and their content without running code from it."""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import torch

_LOCAL_HEADER_BYTES, _LOCAL_NAME_OFFSET = 30, 26


class _BytesView(io.RawIOBase):
    """A file over bytes that are not copied, as io.BytesIO does.

    Args:
        view: The bytes.
    """

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view, self._position = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        if start + offset < 0:
            raise OSError(f"seek to {start + offset}")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        # the base class allocates the size first, and a flipped bit may make it 512 GiB
        stop = len(self._view) if size is None or size < 0 else self._position + size
        part = bytes(self._view[self._position : stop])
        self._position += len(part)
        return part

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def check_archive(view: memoryview) -> dict[str, slice]:
    """Compare every record of an archive with its CRC-32, without copying it.

    Args:
        view: The archive, as torch.save writes it: nothing is compressed.

    Returns:
        The place of each record, by its name without the folder.

    Raises:
        Exception: Of any kind, if the archive is damaged.
    """
    records: dict[str, slice] = {}
    with zipfile.ZipFile(_BytesView(view)) as archive:  # pyrefly: ignore [bad-argument-type]
        for record in archive.infolist():
            lengths = struct.unpack_from("<HH", view, record.header_offset + _LOCAL_NAME_OFFSET)
            start = record.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
            content = view[start : start + record.file_size]
            is_stored = record.compress_type == zipfile.ZIP_STORED and len(content) == record.file_size
            # torch returns uninitialized memory for a record whose attributes say that it is a folder
            if not is_stored or record.external_attr or zlib.crc32(content) != record.CRC:
                raise zipfile.BadZipFile(record.filename)
            records[record.filename.partition("/")[2]] = slice(start, start + record.file_size)
    return records


def decode(view: memoryview, records: Mapping[str, slice]) -> Any:
    """Decode what torch.save wrote, without running code from it.

    Args:
        view: The archive, in writable memory.
        records: From check_archive.

    Returns:
        The value. A contiguous tensor shares the archive's memory.

    Raises:
        Exception: Of any kind, if it holds anything but tensors and plain values.
    """
    with torch.serialization.skip_data():
        value = _load(view)
    if not isinstance(value, torch.Tensor):
        return value
    place = records.get("data/0")
    if place is None or not value.numel() or not value.is_contiguous() or value.storage_offset():
        return _load(view)
    if place.stop - place.start != value.nbytes:
        raise ValueError(f"{place.stop - place.start} bytes for a tensor of {value.nbytes}")
    flat = torch.frombuffer(view, dtype=value.dtype, count=value.numel(), offset=place.start)
    return flat.view(value.shape)


def _load(view: memoryview) -> Any:
    # pyrefly: ignore [bad-argument-type]
    return torch.load(_BytesView(view), map_location="cpu", weights_only=True)
