"""The types of the keys of config.json, checked before anything is made of them."""

import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from config import type_name
from models.config import ParallaxConfig

_LONGEST_SHOWN = 80

_TYPES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), int),
    **dict.fromkeys(("max_position_embeddings", "sliding_window", "max_window_layers"), int | None),
    **dict.fromkeys(("rms_norm_eps", "initializer_range"), float),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window"), bool),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), dict | None),
    **dict.fromkeys(("layer_types", "architectures"), list[str] | None),
    "rope_theta": float | None,
    "model_type": str,
    "eos_token_id": int | list[int] | None,
}


def wrong_types(table: Mapping[str, Any], probe_keys: typing.Collection[str]) -> list[str]:
    """Return a phrase for each key whose value is of another type than the key's.

    Args:
        table: JSON values by key.
        probe_keys: Keys that are fields of ParallaxConfig.
    """
    probe_types = typing.get_type_hints(ParallaxConfig)
    hints = _TYPES | {name: probe_types[name] for name in probe_keys}
    return [
        f"{name} is {_shown(table[name])}, wanted {_name(hint)}"
        for name, hint in hints.items()
        if name in table and not is_of_type(table[name], hint)
    ]


def _name(hint: Any) -> str:
    return type_name(hint).replace('"none"', "null")


def is_of_type(value: Any, hint: Any) -> bool:
    """Return whether a JSON value is of a type; an integer is a number too, true and false are neither."""
    args = get_args(hint)
    if get_origin(hint) in (typing.Union, types.UnionType):
        return any(is_of_type(value, each) for each in args)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(is_of_type(each, args[0]) for each in value)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in args
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
