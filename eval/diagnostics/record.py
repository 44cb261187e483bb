"""Records of diagnostics: a JSON object per measurement, with values of heads; means of layers from it.

Without torch: reports, and a sweep that looks whether a member has finished, read them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]

LAYERS = "layers"
"""The key of a record under which the layers are."""


def layer_values(layer: Mapping[str, Any]) -> dict[str, float]:
    """Reduce the heads of a recorded layer.

    Args:
        layer: One of a record's layers.

    Returns:
        "<quantity>/<reduction>" and "heads/<quantity>" -> mean over heads, or the largest and smallest of
        "max" and "min"; "weights/<name>/<quantity>" and "gains/<name>/<quantity>". Standard errors, and
        values that no head has, are left out.
    """
    found: dict[str, float] = {}
    for name, values in layer["heads"].items():
        kept = [value for value in values if value is not None]
        reduction = name.rpartition("/")[2]
        if not kept or reduction.endswith("stderr"):
            continue
        reduce = {"max": max, "min": min}.get(reduction, lambda each: sum(each) / len(each))
        found[name] = reduce(kept)
    for part in ("weights", "gains"):
        for name, values in layer[part].items():
            found |= {f"{part}/{name}/{key}": value for key, value in values.items() if value is not None}
    return found


def means_of_layers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return "diagnostics/<value>/layer_NN" -> value, for the sinks of metrics that take numbers."""
    return {
        f"diagnostics/{name}/layer_{layer['layer']:02}": value
        for layer in record[LAYERS]
        for name, value in layer_values(layer).items()
    }


def compact(record: Record) -> Record:
    """Return what plots need of a record.

    Returns:
        "step" and "tokens"; "values": layer -> layer_values; "bounds" of the context lengths, and
        "by_context": quantity -> values of each layer that has it, by context length.
    """
    contexts: dict[str, list[list[float | None]]] = {}
    for layer in record[LAYERS]:
        for name, found in layer["by_context"].items():
            contexts.setdefault(name, []).append(found["mean"])
    return {
        **{key: record[key] for key in ("step", "tokens") if key in record},
        "values": {layer["layer"]: layer_values(layer) for layer in record[LAYERS]},
        "bounds": record["context"]["bounds"],
        "by_context": contexts,
    }


def read_records(path: Path) -> list[Record]:
    """Read diagnostics.jsonl: the last record of each step, by step; a damaged line is skipped."""
    found: dict[int, Record] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            found[int(record["step"])] = {**record, LAYERS: list(record[LAYERS])}
        except (ValueError, KeyError, TypeError):
            continue
    return [found[step] for step in sorted(found)]
