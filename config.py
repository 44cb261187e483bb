"""From a TOML file and dotted overrides to a typed RunConfig, strictly.

`extends = "base/x.toml"` (or a list, later ones win) pulls in other files: tables merge, values replace. A
table whose `kind` changes replaces the one below it, but for what all kinds of schedules, or of optimizers,
share. Unknown keys, wrong types and bad choices raise ConfigError before anything is built. "none" is None
where a key may be unset.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from optimizers.config import ScheduleConfig
from training.run_config import RunConfig

Table = dict[str, Any]

# what optimizers have in common; the learning rate of one is none for another
_GROUP_KEYS = ("parameters", "weight_decay", "weight_decay_gamma")


class ConfigError(ValueError):
    """A config file or an override says something that a run cannot be."""


def _read_toml(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a config file: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _kept(name: str, below: Table, above: Table) -> Table:
    """What stays of a table below another one, whose kind may be another."""
    before = below.get("kind", "wsd" if name == "schedule" else None)
    if "kind" not in above or before in (None, above["kind"]):
        return below
    if name == "schedule":
        return {key: value for key, value in below.items() if key not in ScheduleConfig.WSD_KEYS}
    is_group = name.startswith("optimizer.groups.")
    return {key: below[key] for key in _GROUP_KEYS if is_group and key in below}


def _merge(below: Table, above: Table, name: str = "", *, is_one_source: bool = False) -> Table:
    """Lay one table over another; keys of one source (the overrides) belong together whatever their kind."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            path = f"{name}.{key}".lstrip(".")
            kept = old if is_one_source else _kept(path, old, value)
            merged[key] = _merge(kept, value, path, is_one_source=is_one_source)
        else:
            merged[key] = value
    return merged


def _read_extended(path: Path, chain: tuple[Path, ...] = ()) -> Table:
    if path.resolve() in chain:
        raise ConfigError(f"{path}: extends itself")
    table = _read_toml(path)
    parents = table.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError(f"{path}: extends must be a file name or a list of them, got {parents!r}")
    merged: Table = {}
    for parent in parents:
        merged = _merge(merged, _read_extended(path.parent / parent, (*chain, path.resolve())))
    return _merge(merged, table)


def _parse_overrides(arguments: Sequence[str]) -> Table:
    table: Table = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"expected an override such as --training.steps 100, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            text = words.pop(0)
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        table = _merge(table, typing.cast(Table, value), is_one_source=True)
    return table


def _keys(hint: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a schema; names that a run chooses are not known."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = [f"{prefix}.{f.name}".lstrip(".") for f in dataclasses.fields(hint)]
        return [key for n in names for key in (n, *_keys(hints[n.rpartition(".")[2]], n))]
    return [key for a in get_args(hint) if dataclasses.is_dataclass(a) for key in _keys(a, prefix)]


def _nearest(key: str, prefix: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
    elsewhere = [k for k in _keys(RunConfig) if k.rpartition(".")[2] == key]
    if not close and elsewhere:
        return f"nearest is {elsewhere[0]}"
    close = close or difflib.get_close_matches(key, allowed, n=1, cutoff=0.0)
    return f"nearest is {prefix}{close[0]}" if close else "no key is allowed here"


def _type_name(hint: Any) -> str:
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    if hint in names:
        return names[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(a) for a in args)
    if origin is list:
        return "a list, each entry " + _type_name(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join('"none"' if a is type(None) else _type_name(a) for a in args)
    return "a table"


def _build_dataclass(cls: type, value: Table, key: str) -> Any:
    prefix = f"{key}." if key else ""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in value:
        if name not in fields:
            raise ConfigError(f"{prefix}{name}: unknown key; {_nearest(name, prefix, list(fields))}")
    for name, field in fields.items():
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if name not in value and not has_default:
            lost = " (a table whose kind changed needs its own)" if "kind" in value else ""
            raise ConfigError(f"{prefix}{name}: missing; want {_type_name(hints[name])}{lost}")
    arguments = {name: _convert(hints[name], v, f"{prefix}{name}") for name, v in value.items()}
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _build_kind(variants: Sequence[type], value: Table, key: str) -> Any:
    by_kind = {get_args(typing.get_type_hints(v)["kind"])[0]: v for v in variants}
    kind = value.get("kind")
    if kind not in by_kind:
        raise ConfigError(f"{key}.kind: got {kind!r}, want one of {', '.join(map(json.dumps, by_kind))}")
    return _build_dataclass(by_kind[kind], value, key)


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    wrong = ConfigError(f"{key}: got {json.dumps(value, default=str)}, want {_type_name(hint)}")
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and value == "none":
            return None
        rest = [a for a in args if a is not type(None)]
        if len(rest) == 1:
            return _convert(rest[0], value, key)
        if all(dataclasses.is_dataclass(a) for a in rest):
            if not isinstance(value, dict):
                raise wrong
            return _build_kind(rest, value, key)
        raise AssertionError(f"{key}: unions hold one type and None, or dataclasses with a kind")
    if origin is Literal:
        if value not in args:
            raise wrong
        return value
    if origin is list:
        if not isinstance(value, list):
            raise wrong
        return [_convert(args[0], v, f"{key}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {name: _convert(args[1], v, f"{key}.{name}") for name, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise wrong
        return _build_dataclass(typing.cast(type, hint), value, key)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise wrong
    return value


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run.

    Args:
        path: The TOML file.
        overrides: Words such as "--training.steps", "100" or "--training.steps=100"; values as in TOML, bare
            strings allowed.

    Returns:
        The run, every value typed and checked.

    Raises:
        ConfigError: Names the dotted key, what was got, what is allowed, and the nearest valid key.
    """
    path = Path(path)
    table = _merge(_read_extended(path), _parse_overrides(overrides))
    run = table.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", path.stem)
        run.setdefault("folder", f"runs/{run['name']}")
    try:
        return _build_dataclass(RunConfig, table, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
