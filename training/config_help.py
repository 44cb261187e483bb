"""Every key of a run's config with its type, default and meaning, from the config classes' docstrings."""

import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from config import Table, kind_of, to_table, type_name, variants
from errors import UserError
from training.run_config import RunConfig

_INTRODUCTION = """\
# Configuration

Every key of a run's TOML file, as `python train.py --help-config` prints it. A key is overridden on the
command line as `--table.key VALUE`; None in a description is "none" in TOML. NAME is any name you choose.
`extends`, a file or a list of files, stands above all tables (docs/training.md, "A config of your own")."""
_WIDTH = 110
_ENTRY = re.compile(r"^(?: {4})(\w+): (.*)$")


def describe_config(table: str | None = None) -> str:
    """Describe the keys of a run's config as Markdown.

    Args:
        table: The dotted name of a table such as "model.attention", for it and the tables below it; None for
            all of them.

    Raises:
        UserError: There is no such table; lists the tables.
    """
    sections = list(_sections(RunConfig, ""))
    names = dict.fromkeys(name for name, _ in sections if name)
    if table is not None and table not in names:
        raise UserError(f"--help-config {table}: no such table, wanted one of {', '.join(names)}")
    chosen = [
        text for name, text in sections if table is None or name == table or name.startswith(f"{table}.")
    ]
    return "\n\n".join([*([] if table else [_INTRODUCTION]), *(text for text in chosen if text)])


def _sections(hint: Any, name: str, described: dict[Any, str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield (table, description) of a type's table, one for each kind that it has, and of those below it."""
    classes = variants(hint)
    described = {} if described is None else described
    other = described.setdefault(tuple(classes), name)
    if other != name and classes:
        yield name, f"## [{name}]\n\nThe same keys as [{other}]."
        return
    seen: set[str] = set()
    for variant in classes:
        kind = f', kind = "{kind_of(variant)}"' if len(classes) > 1 else ""
        yield name, _section(variant, name, kind) if name else ""
    for variant in classes:
        for field, child in typing.get_type_hints(variant).items():
            path = f"{name}.{field}".lstrip(".")
            if path in seen or get_origin(child) is typing.ClassVar:
                continue
            seen.add(path)
            if get_origin(child) is dict:
                path, child = f"{path}.NAME", get_args(child)[1]
            # a source of a mixture is described where the mixture's own kinds are
            if not set(variants(child)) & set(classes):
                yield from _sections(child, path, described)


def _section(cls: type, name: str, kind: str) -> str:
    summary, meanings = _read_docstring(cls)
    hints = typing.get_type_hints(cls)
    lines = [f"## [{name}]{kind}", "", textwrap.fill(summary, _WIDTH), ""]
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.name == "kind" and kind:
            continue
        assert field.name in meanings, f"{cls.__name__}.{field.name} is missing in the class's docstring"
        default = _default(field)
        text = f"* `{field.name}` ({type_name(hints[field.name])}; {default}): {meanings[field.name]}"
        lines.append(textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_long_words=False))
    return "\n".join(lines).rstrip()


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"default {json.dumps(to_table(field.default))}"
    if field.default_factory is not dataclasses.MISSING:
        value: Table | list = to_table(field.default_factory())
        return "optional" if isinstance(value, dict) else f"default {json.dumps(value)}"
    return "required"


def _read_docstring(cls: type) -> tuple[str, dict[str, str]]:
    """Return the first paragraph of a class's docstring, and its and its bases' Attributes by name."""
    summary, _, _ = (inspect.getdoc(cls) or "").partition("\n\n")
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, attributes = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("\n\nAttributes:\n")
        name = ""
        for line in attributes.splitlines():
            entry = _ENTRY.match(line)
            if entry is not None:
                name = entry.group(1)
                meanings[name] = entry.group(2)
            elif not line.strip():
                break
            else:
                meanings[name] += " " + line.strip()
    return " ".join(summary.split()), meanings
