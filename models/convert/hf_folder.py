"""Files of a Hugging Face folder, none of which leads out of it: JSON objects; tensors, that are finite."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from errors import UserError, decode_text

_SINGLE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# of the hub's cache: models--NAME/snapshots/COMMIT/FILE is a link to models--NAME/blobs/HASH
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
# in one error message
_MAX_NAMED = 8


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: The file.
        shape: Its dimensions.
        dtype: Dtype in safetensors' words: "F32", "BF16", ..
    """

    file: Path
    shape: list[int]
    dtype: str


def file_in(folder: Path, name: str) -> Path:
    """Return the path of a file, which may be missing, of a folder from outside.

    Args:
        folder: The folder.
        name: The file's name, as the folder itself may give it.

    Raises:
        UserError: The name leads out of the folder: it is absolute, has a "..", or is a link to elsewhere.
            Links of the hub's cache, to the files of the same model, are read.
    """
    path = folder / name
    try:
        inside = folder.resolve()
        roots = [inside]
        if inside.parent.name == _SNAPSHOTS:
            roots.append(inside.parents[1] / _BLOBS)
        is_inside = any(path.resolve().is_relative_to(root) for root in roots)
    except (OSError, ValueError, RuntimeError):  # no name of a file, or links in a circle
        is_inside = False
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts or not is_inside:
        raise UserError(
            f'{folder}: {name!r} is not within the folder (an absolute path, "..", or a link to elsewhere); '
            "copy the file into it"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: It is not UTF-8, not valid JSON, or holds something else.
    """
    try:
        table = json.loads(decode_text(path.read_bytes(), str(path)))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        found = "null" if table is None else f"a {type(table).__name__}"
        raise UserError(f"{path} holds {found}, wanted a JSON object")
    return table


def read_headers(folder: Path) -> dict[str, SavedTensor]:
    """Read the shape, dtype and file of every tensor in a folder.

    Raises:
        UserError: Files are missing, damaged or outside of the folder, or a tensor is in two of them.
    """
    files = _weight_files(folder)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{folder} lacks files listed in {_INDEX}: {', '.join(missing)}")
    saved: dict[str, SavedTensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open has no __iter__)
                    if key in saved:
                        raise UserError(f"{folder}: {key} is in {saved[key].file.name} and in {path.name}")
                    header = file.get_slice(key)
                    saved[key] = SavedTensor(path, header.get_shape(), header.get_dtype())
        except SafetensorError as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({error}); download it again"
            ) from None
    return saved


def _weight_files(folder: Path) -> list[Path]:
    index = file_in(folder, _INDEX)
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(type(x) is str for x in listed.values()):
            shown = json.dumps(listed)[:80]
            raise UserError(f"{index}: weight_map is {shown}, wanted a table of each tensor's file")
        try:
            return [file_in(folder, name) for name in sorted({*listed.values()})]
        except UserError as error:
            raise UserError(f"{index}: {error}") from None
    single = file_in(folder, _SINGLE_FILE)
    if not single.is_file():
        raise UserError(f"{folder} has neither {_SINGLE_FILE} nor {_INDEX}; no other format is supported")
    return [single]


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Read a tensor as a view of the memory-mapped file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def check_finite(saved: Mapping[str, SavedTensor], names: Iterable[str], dtype: torch.dtype) -> None:
    """Raise where a weight is NaN or Inf, or becomes so in another dtype; one tensor is in memory at a time.

    Args:
        saved: The tensors of a folder.
        names: Those to check.
        dtype: The dtype to which they are converted.

    Raises:
        UserError: Names the tensors and their file.
    """
    found: list[str] = []
    for name in names:
        weight = read_tensor(saved[name].file, name).to(dtype)
        num_nan, num_inf = int(weight.isnan().sum()), int(weight.isinf().sum())
        counts = [f"{num} {what}" for num, what in ((num_nan, "NaN"), (num_inf, "Inf")) if num]
        if counts:
            found.append(f"{name} has {' and '.join(counts)} (of {saved[name].file})")
    if found:
        more = f" and {len(found) - _MAX_NAMED} more tensors" if len(found) > _MAX_NAMED else ""
        named, kind = "; ".join(found[:_MAX_NAMED]), str(dtype).removeprefix("torch.")
        raise UserError(
            f"weights are not finite in {kind}: {named}{more}; the model has diverged, "
            "the file is damaged, or --dtype is too narrow"
        )
