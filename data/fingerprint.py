"""What identifies the data of a run, part by part, and what changed since a position in it was saved."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from data.tokenizer_content import describe_other_tokenizer, is_older_fingerprint, same_tokenizer
from errors import UserError

logger = logging.getLogger(__name__)

# entries of a list of files: a position is saved with every checkpoint
_MAX_ENTRIES = 1024
# names in a message
_MAX_NAMES = 3
# the keys of a config that decide each part
_KEYS = {
    "source": "data.train and data.shuffle_seed",
    "tokenizer": "data.tokenizer",
    "packing": "data.packing, data.shuffle_seed and training.seq_len",
}


def join_parts(parts: Mapping[str, Any]) -> str:
    """Return a fingerprint of named parts, which messages name when they change.

    Args:
        parts: Plain JSON.
    """
    return json.dumps(parts, sort_keys=True, separators=(",", ":"))


def parts_of(fingerprint: str) -> Any:
    """Return the parts of a fingerprint that `join_parts` made; any other, such as a hash, as it is."""
    return json.loads(fingerprint) if fingerprint.startswith("{") else fingerprint


def fingerprint_files(identities: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return the parts that identify a list of files and its order.

    Args:
        identities: Plain JSON of each file, in order; its first item is the file's name.

    Returns:
        "files" with a hash by name, and "order". More than 1,024 files are hashed in as many groups of
        consecutive files, each of which is named by its first and its last.
    """
    size = -(-len(identities) // _MAX_ENTRIES)
    files: dict[str, str] = {}
    for first in range(0, len(identities), max(size, 1)):
        group = identities[first : first + size]
        name = str(group[0][0]) if size == 1 else f"{group[0][0]} to {group[-1][0]}"
        # files of several folders may have the same name
        unique = f"{name} (file {first + 1})" if name in files else name
        files[unique] = _hash([list(identity) for identity in group])
    return {"files": files, "order": _hash([identity[0] for identity in identities])}


def is_older(saved: Any, current: Any) -> bool:
    """Return whether saved parts are a hash of an earlier version, which did not look at content."""
    return isinstance(saved, str) and isinstance(current, dict)


def describe_changes(saved: Any, current: Any, key: str = "") -> list[str]:
    """Say key by key what differs between the parts of two fingerprints; nothing if they are equal.

    Args:
        saved: The earlier parts, or one of them.
        current: The same of this run.
        key: Dotted name of the part; empty for all of them.
    """
    if saved == current:
        return []
    name = key.rpartition(".")[2]
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        change = f"{key or 'fingerprint'} was {saved!r} and is {current!r}"
        return ["the files are in another order" if name == "order" else change]
    if name == "files":
        return _file_changes(saved, current)
    kinds = _kind(saved), _kind(current)
    if kinds[0] != kinds[1]:
        # the other keys of two kinds have nothing in common
        return [f"{f'{key}.kind' if key else 'kind'} was {kinds[0]!r} and is {kinds[1]!r}"]
    names = {**saved, **current}
    if saved.get("files") != current.get("files"):
        names.pop("order", None)
    return [
        line
        for each in names
        for line in describe_changes(saved.get(each), current.get(each), f"{key}.{each}" if key else each)
    ]


def check_fingerprint(part: str, saved: Any, current: Any, *, log: bool) -> None:
    """Check that a saved data position belongs to this run's data; logs a warning about one that cannot tell.

    Args:
        part: A part of a position's fingerprint: "source", "tokenizer" or "packing".
        saved: Its fingerprint when the position was saved.
        current: Its fingerprint in this run.
        log: Whether this process logs the warning.

    Raises:
        UserError: It has changed; names what.
    """
    if saved == current:
        return
    if part == "tokenizer":
        older = is_older_fingerprint(saved) and same_tokenizer(saved, current)
        changes = [describe_other_tokenizer(saved, current)]
    elif part == "source":
        saved_parts, parts = parts_of(saved), parts_of(current)
        older, changes = is_older(saved_parts, parts), describe_changes(saved_parts, parts)
    else:
        older, changes = False, describe_changes(saved, current, part)
    if older:
        if log:
            logger.warning("the checkpoint is of an earlier version: its %s was compared only in part", part)
        return
    raise UserError(
        f"the saved data position belongs to another {part} ({'; '.join(changes)}): restore {_KEYS[part]}, "
        "or start the new data from its beginning in a branch: another run.folder, checkpoint.start_from, "
        "checkpoint.restart_data = true"
    )


def _kind(parts: dict[str, Any]) -> str:
    """Return the kind of a source by its parts; those of mixtures and shards do not name theirs."""
    return parts.get("kind", "mixture" if "weights" in parts else "shards")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def _file_changes(saved: dict[str, str], current: dict[str, str]) -> list[str]:
    # a hash is of the name too: these are files of one name in several folders
    if saved.keys() == current.keys() and sorted(saved.values()) == sorted(current.values()):
        return ["the files are in another order"]
    groups = {
        "{} changed": [name for name in saved if name in current and saved[name] != current[name]],
        "{} left out": [name for name in saved if name not in current],
        "{} added": [name for name in current if name not in saved],
    }
    return [text.format(_listed(names)) for text, names in groups.items() if names]


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
