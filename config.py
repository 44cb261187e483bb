"""The codec of configs: TOML and dotted overrides to dataclasses, strictly, and dataclasses to TOML.

The schema is a tree of dataclasses, given by the caller. `extends = "base/x.toml"` (or a list, later files
win) adds other files: tables merge, values replace. Where the `kind` of a table changes, only the keys in
KEYS_OF_ALL_KINDS of its classes survive. Unknown keys, wrong types and bad choices raise ConfigError before
anything is built. "none" is None where a key may be unset.
"""

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import tomli_w

from errors import ConfigError, shown

Table = dict[str, Any]
Key = tuple[str | int, ...]
Layer = tuple[str, Table]  # a file or the command line, and what it sets
T = TypeVar("T")

COMMAND_LINE = "command line"
_MAX_DEPTH = 32


class _TypeMismatchError(ConfigError):
    """A value of another type than the key's."""


def load(
    schema: type[T], path: str | Path, overrides: Sequence[str] = (), *, overrides_from: str = COMMAND_LINE
) -> T:
    """Read a config file, the files that it extends, and overrides.

    Args:
        schema: The dataclass of the whole file. Its static method `name_after_file(table, path)`, if any,
            fills in what follows from the file's name.
        path: The TOML file.
        overrides: Words such as "--training.steps", "100" or "--training.steps=100"; values as in TOML, bare
            strings allowed.
        overrides_from: Where they come from, for error messages.

    Returns:
        The config, every value typed and checked.

    Raises:
        ConfigError: Names the file or the command line, the dotted key, what was got, what is allowed, and
            the nearest valid key.
    """
    path = Path(path)
    layers = [*_read_layers(path), (overrides_from, _parse_overrides(overrides, overrides_from))]
    merged: Table = {}
    for _, table in layers:
        merged = _merge(merged, table, schema)
    name_after_file = getattr(schema, "name_after_file", None)
    if name_after_file is not None:
        name_after_file(merged, path)
    try:
        return _Decoder(schema).convert(schema, merged, ())
    except ConfigError as error:
        raise ConfigError(f"{_blame(layers, error.keys) or path}: {error}", error.keys) from None


def from_table(schema: Any, table: Table, source: str | Path, key: str = "") -> Any:
    """Decode a table that `to_table` or `to_toml` wrote.

    Args:
        schema: The dataclass of the table, or a union of dataclasses that differ by their `kind`.
        table: The table; "none" stands for None.
        source: Where it comes from, for error messages.
        key: The table's own dotted key there, for error messages.

    Returns:
        A value of the schema.

    Raises:
        ConfigError: A key, type or value that this version of the schema does not have.
    """
    try:
        return _Decoder(schema).convert(schema, table, tuple(key.split(".")) if key else ())
    except ConfigError as error:
        raise ConfigError(f"{source} does not fit this version of the code: {error}", error.keys) from None


def to_table(config: Any) -> Any:
    """Encode a config as nested dicts of TOML values; None becomes "none"."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_table(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_table(value) for key, value in config.items()}
    if isinstance(config, list):
        return [to_table(value) for value in config]
    return "none" if config is None else config


def to_toml(config: Any) -> str:
    """Encode a config, or a dict of configs by table, as TOML that loads to an equal one."""
    return tomli_w.dumps(to_table(config))


def read_toml(path: Path) -> Table:
    """Read a TOML file.

    Raises:
        ConfigError: It is missing, can't be read, or is not valid TOML.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.toml")], n=1)
        nearest = f"; nearest is {path.parent / near[0]}" if near else ""
        raise ConfigError(f"{path}: no such config file{nearest}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a config file: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError itself: an integer of thousands of digits
        place = re.search(r"at line (\d+)", str(error))
        line = ": " + shown(text.split("\n")[int(place[1]) - 1].strip()) if place else ""
        raise ConfigError(f"{path}: not valid TOML: {error}{line}") from None
    _check_values(table, path)
    return table


def type_name(hint: Any) -> str:
    """Describe the values that a key of a type takes."""
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", Any: "any value"}
    if hint in names:
        return names[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(a) for a in args)
    if origin is list:
        return "a list, each entry " + type_name(args[0])
    if _is_union(hint):
        named = dict.fromkeys(type_name(a) for a in args if a is not type(None))
        return " or ".join([*named, *(['"none"'] if type(None) in args else [])])
    return "a table"


def variants(hint: Any) -> list[type]:
    """Return the dataclasses that a table of a type can be: one, several kinds, or none."""
    if dataclasses.is_dataclass(hint):
        return [typing.cast(type, hint)]
    return [a for a in get_args(hint) if dataclasses.is_dataclass(a)] if _is_union(hint) else []


def kind_of(variant: type) -> str:
    """Return the `kind` that chooses a dataclass among the variants of a table."""
    return get_args(typing.get_type_hints(variant)["kind"])[0]


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (typing.Union, types.UnionType)


def _dotted(key: Key) -> str:
    plain = (part if isinstance(part, int) or part.isprintable() else json.dumps(part) for part in key)
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in plain)
    return "".join(parts).removeprefix(".")


def _likely_meant(hint: Any, value: Any, key: Key) -> str:
    """Return how a value of a wrong type may have been meant, to follow what is wanted; "" where unknown."""
    if get_origin(hint) is list:
        meant = f"[[{_dotted(key)}]]" if isinstance(value, dict) else f"[{shown(value)}]"
    elif type_name(hint).startswith("a string") and not isinstance(value, list | dict):
        meant = f'"{value}"'
    elif isinstance(value, str) and any("kind" in typing.get_type_hints(each) for each in variants(hint)):
        meant = f"{{ kind = {shown(value)} }}"
    else:
        return ""
    return f", such as '{meant}'"


def _check_values(table: Table, source: str | Path) -> None:
    """Raise ConfigError where a table is nested too deeply to be walked, or holds what TOML can't."""
    pending: list[tuple[Key, Any]] = [((), table)]
    while pending:
        key, value = pending.pop()
        if len(key) > _MAX_DEPTH:
            raise ConfigError(f"{source}: {_dotted(key[:3])}...: nested more than {_MAX_DEPTH} deep")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise ConfigError(
                f"{source}: {_dotted(key)}: got {str(value)[:20]}..., an integer beyond 64 bits"
            )
        if isinstance(value, dict | list):
            children = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [((*key, name), child) for name, child in children]


def _read_layers(path: Path, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """Return a file's own table behind those that it extends."""
    if path.resolve() in chain:
        raise ConfigError(f"{path}: extends itself")
    table = read_toml(path)
    parents = table.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError(f"{path}: extends must be a file name or a list of them, got {parents!r}")
    below = [layer for p in parents for layer in _read_layers(path.parent / p, (*chain, path.resolve()))]
    return [*below, (str(path), table)]


def _parse_overrides(arguments: Sequence[str], source: str) -> Table:
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
            f"{key}{text}".encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{source}: {key!a}: got {text!a}, which is not UTF-8") from None
        value = parse_value(text)
        for part in reversed(key.split(".")):
            value = {part: value}
        # all overrides belong together: a kind among them drops none of their keys
        _check_values(typing.cast(Table, value), source)
        table = _merge(table, typing.cast(Table, value), None)
    return table


def parse_value(text: str) -> Any:
    """Return the value of an override: as in TOML, else the bare string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _merge(below: Table, above: Table, hint: Any) -> Table:
    """Lay one table over another; hint is the type of both, None to keep all keys whatever the kinds."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            child = _child_hint(hint, key)
            merged[key] = _merge(old if hint is None else _surviving(child, old, value), value, child)
        else:
            merged[key] = value
    return merged


def _child_hint(hint: Any, key: str) -> Any:
    """Return the type of a key of a table; Any where the schema does not have it."""
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    found = (typing.get_type_hints(variant).get(key) for variant in variants(hint))
    return None if hint is None else next((child for child in found if child is not None), Any)


def _surviving(hint: Any, below: Table, above: Table) -> Table:
    """Return what survives of a table below another one, which may change its kind."""
    classes = variants(hint)
    default = getattr(classes[0], "kind", None) if len(classes) == 1 else None
    if "kind" not in above or below.get("kind", default) in (None, above["kind"]):
        return below
    kept = {key for variant in classes for key in getattr(variant, "KEYS_OF_ALL_KINDS", ())}
    return {key: value for key, value in below.items() if key in kept}


def _blame(layers: Sequence[Layer], keys: Sequence[Key]) -> str | None:
    """Return the source of the last layer that sets one of the keys; None where none does."""

    def sets(table: Any, key: Key) -> bool:
        for part in (part for part in key if isinstance(part, str)):
            if not isinstance(table, dict) or part not in table:
                return isinstance(table, str | int | float | list)
            table = table[part]
        return True

    return next((source for source, table in reversed(layers) if any(sets(table, k) for k in keys)), None)


def _all_keys(hint: Any, prefix: str = "") -> Iterable[str]:
    """Return every dotted key of a schema, with NAME for the names that a run chooses."""
    if get_origin(hint) is dict:
        yield from _all_keys(get_args(hint)[1], f"{prefix}.NAME")
    for variant in variants(hint):
        hints = typing.get_type_hints(variant)
        for field in dataclasses.fields(variant):
            name = f"{prefix}.{field.name}".lstrip(".")
            yield name
            yield from _all_keys(hints[field.name], name)


class _Decoder:
    """Converts tables to the dataclasses of a schema.

    Attributes:
        schema: The whole file's, where the nearest key to an unknown one is looked for.
    """

    def __init__(self, schema: Any) -> None:
        self.schema = schema

    def convert(self, hint: Any, value: Any, key: Key) -> Any:
        """Return a TOML value as a value of a type."""
        origin, args = get_origin(hint), get_args(hint)
        want = type_name(hint) + _likely_meant(hint, value, key)
        wrong = _TypeMismatchError(f"{_dotted(key)}: got {shown(value)}, want {want}", [key])
        if _is_union(hint):
            return self._convert_union(hint, value, key, wrong)
        if origin is Literal:
            if not any(type(value) is type(arg) and value == arg for arg in args):
                raise wrong
            return value
        if origin is list:
            if not isinstance(value, list):
                raise wrong
            return [self.convert(args[0], v, (*key, i)) for i, v in enumerate(value)]
        if origin is dict or dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise wrong
            if origin is dict:
                return {name: self.convert(args[1], v, (*key, name)) for name, v in value.items()}
            return self._build(typing.cast(type, hint), value, key)
        if hint is float and type(value) is int:
            return float(value)
        if hint is not Any and type(value) is not hint:
            raise wrong
        return value

    def _convert_union(self, hint: Any, value: Any, key: Key, wrong: ConfigError) -> Any:
        if type(None) in get_args(hint) and value == "none":
            return None
        rest = [a for a in get_args(hint) if a is not type(None)]
        if len(rest) > 1:
            assert all(dataclasses.is_dataclass(a) for a in rest), f"{_dotted(key)}: a union of scalars"
            if not isinstance(value, dict):
                raise wrong
            return self._build_kind(rest, value, key)
        try:
            return self.convert(rest[0], value, key)
        except _TypeMismatchError as error:
            # the union's own message names "none" too
            raise wrong if error.keys == (key,) else error from None

    def _build_kind(self, classes: Sequence[type], value: Table, key: Key) -> Any:
        by_kind = {kind_of(variant): variant for variant in classes}
        name, kind, allowed = _dotted(key), value.get("kind"), f"one of {json.dumps([*by_kind])[1:-1]}"
        if kind is None:
            raise ConfigError(f"{name} has no kind: correct its name, or set kind to {allowed}", [key])
        if not isinstance(kind, str) or kind not in by_kind:
            raise ConfigError(f"{_dotted((*key, 'kind'))}: got {kind!r}, want {allowed}", [(*key, "kind")])
        return self._build(by_kind[kind], value, key, classes)

    def _build(self, cls: type, value: Table, key: Key, kinds: Sequence[type] = ()) -> Any:
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
        for name in value:
            if name not in fields:
                remedy = self._remedy(name, key, list(fields), kinds)
                raise ConfigError(f"{_dotted((*key, name))}: unknown key; {remedy}", [(*key, name)])
        for name, field in fields.items():
            has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
            if name not in value and not has_default:
                lost = " (a table whose kind changed needs its own)" if "kind" in value else ""
                message = f"{_dotted((*key, name))}: missing; want {type_name(hints[name])}{lost}"
                raise ConfigError(message, [(*key, "kind")])
        arguments = {name: self.convert(hints[name], v, (*key, name)) for name, v in value.items()}
        try:
            return cls(**arguments)
        except ValueError as error:
            named = [(*key, word) for word in re.findall(r"\w+", str(error)) if word in fields]
            raise ConfigError(".".join(filter(None, [_dotted(key), str(error)])), named) from None

    def _remedy(self, name: str, key: Key, allowed: Sequence[str], kinds: Sequence[type]) -> str:
        """Return what to write instead of an unknown key of a table, which might have had other kinds."""
        if having := [kind_of(each) for each in kinds if name in typing.get_type_hints(each)]:
            return f"it is a key of kind {' or '.join(map(json.dumps, having))}"
        names = getattr(self.schema, "OTHER_NAMES", {})
        other = names.get(_dotted((*key, name)), names.get(name))
        if other is not None:
            own = other.rpartition(".")[2]
            return f"here it is {_dotted((*key, own)) if own in allowed else other}"
        if close := difflib.get_close_matches(name, allowed, n=1, cutoff=0.6):
            return f"nearest is {_dotted((*key, close[0]))}"
        elsewhere = [k for k in _all_keys(self.schema) if k.rpartition(".")[2] == name]
        if elsewhere:
            # of most tables in common with the unknown key, then the least deep
            nearness = {k: (len({*key} & {*k.split(".")}), -k.count(".")) for k in elsewhere}
            return f"nearest is {max(elsewhere, key=nearness.__getitem__)}"
        return f"want one of {', '.join(allowed)}" if allowed else "no key is allowed here"
