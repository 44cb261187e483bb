"""Changes of an attention's settings, as words: head_dim=32 rope=false."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, make_dataclass
from typing import Any, Literal, get_type_hints

from config import load, to_table
from errors import UserError
from models.config import (
    AffineLinearConfig,
    AffineMesaNetConfig,
    AttentionConfig,
    LinearConfig,
    LocalLinearConfig,
    ParallaxConfig,
    SoftmaxConfig,
)

_HEAD_DIM = Literal[2, 4, 8, 16, 32, 64, 128]
"""Widths of heads that have the model's width together."""


def _schema(attention: AttentionConfig, head_dim: int) -> type:
    """Return the dataclass of all that can be changed, with the values without changes as defaults."""
    hints = get_type_hints(type(attention))
    names = [field.name for field in fields(attention) if field.name != "kind"]
    keys = [(name, hints[name], getattr(attention, name)) for name in names]
    match attention:
        case SoftmaxConfig() | ParallaxConfig() | LocalLinearConfig():
            keys += [("head_dim", _HEAD_DIM, head_dim), ("rope", bool, True)]
        case LinearConfig() | AffineLinearConfig() | AffineMesaNetConfig():
            keys += [("rope", bool, True)]
    return make_dataclass("Changes", keys, kw_only=True)


def read_changes(attention: AttentionConfig, head_dim: int, words: Sequence[str]) -> dict[str, Any]:
    """Read words such as "head_dim=32"; of several with one key the last counts.

    Args:
        attention: The attention without changes.
        head_dim: Its heads' width.
        words: A key, "=" and a value, as in TOML or a bare string; "none" is None.

    Returns:
        The values that are other than without changes, by key.

    Raises:
        UserError: There is no such key, or its values are of another type.
    """
    for word in words:
        if "=" not in word:
            raise UserError(f"--set has {word!r}, want KEY=VALUE, such as head_dim=32")
    schema = _schema(attention, head_dim)
    overrides, origin = [f"--{word}" for word in words], f"--set for {attention.kind}"
    # a file without keys: the words alone
    changed = load(schema, os.devnull, overrides, overrides_from=origin)
    default = asdict(schema())
    return {key: value for key, value in asdict(changed).items() if value != default[key]}


def format_changes(changed: Mapping[str, Any]) -> str:
    """Return the words of values by key, sorted and with spaces between them."""
    values = {key: to_table(value) for key, value in sorted(changed.items())}
    return " ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items())
