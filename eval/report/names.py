"""Names of rows and arms, from what their runs chose and others did not: "Parallax, Muon, lr 0.01"."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.report.choices import Config, choices, differing_choices, hidden_optimizer, is_default, is_rate
from models.sizes import split_size

_KINDS = {
    **{"softmax": "Softmax", "parallax": "Parallax", "lla": "LLA", "value-average": "Value average"},
    **{"linear": "Linear", "affine-linear": "Affine linear", "affine-mesanet": "Affine MesaNet"},
    **{"gated-deltanet": "Gated DeltaNet", "kda": "KDA", "mesanet": "MesaNet", "mamba2": "Mamba-2"},
    **{"muon": "Muon", "adamw": "AdamW", "mixed": "Muon and AdamW"},
    **{"soap": "SOAP", "orthogonalized-adamw": "Orthogonalized AdamW"},
}
_MAX_VALUE = 24  # characters; a longer value, such as a list of files, makes no name


def display_kind(kind: str) -> str:
    """Return the name of a kind of attention or optimizer as in a paper; the kind itself if unknown."""
    return _KINDS.get(kind, kind)


def format_value(value: Any) -> str:
    """Format a value of a config: true, 0.01, text."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _format_choice(key: str, value: Any) -> str:
    name = key.rpartition(".")[2]
    if key == "schedule.kind":
        return str(value)
    if key.startswith("optimizer.groups.") and not key.startswith("optimizer.groups.hidden."):
        group = key.split(".")[2]
        if _is_kind_of_group(key):
            return f"{display_kind(str(value))} for {group}"
        name = f"{group} {name}"
    return f"{name} {format_value(value)}"


def _is_kind_of_group(key: str) -> bool:
    """Return whether a key chooses the optimizer of a group: runs with other groups lack it."""
    return key.startswith("optimizer.groups.") and key.endswith(".kind") and key.count(".") == 3


def _model_names(runs: Sequence[Config], differing: Sequence[str]) -> list[str]:
    """Name each run's attention and what else it chose for its model, among the keys in which runs differ."""
    changes = [key for key in differing if key.startswith("model.attention.") and not key.endswith(".kind")]
    chosen = [choices(run) for run in runs]
    sizes = [split_size(each.get("model.size", "")) for each in chosen]
    several = len({size for size, _ in sizes}) > 1
    found = []
    for run, each, (size, control) in zip(runs, chosen, sizes, strict=True):
        words = [display_kind(run.get("model.attention.kind", "")), size if several else ""]
        words.append(control.replace("_", " ") if control and "model.size" in differing else "")
        words += [_format_choice(key, each[key]) for key in changes if key in each]
        found.append(" ".join(word for word in words if word))
    return found


def name_configs(runs: Sequence[Config], folders: Sequence[Path], *, with_rates: bool = True) -> list[str]:
    """Name each config: attention, optimizer, and as many of the differing choices as tell them apart.

    Args:
        runs: Resolved configs, all different, or run more than once with the same seeds.
        folders: A run folder of each, whose name is appended where nothing else differs.
        with_rates: Whether learning rates may be in a name.

    Returns:
        A different name for each.
    """
    differing = differing_choices(runs)
    models = _model_names(runs, [*differing])
    optimizers = [display_kind(hidden_optimizer(run)) for run in runs]
    parts = [[part for part in pair if part] for pair in zip(models, optimizers, strict=True)]
    for key in differing:
        is_named = key.startswith("model.attention.") or key in ("model.size", "optimizer.groups.hidden.kind")
        if is_named or (is_rate(key) and not with_rates):
            continue
        same = _of_the_same_name(parts, differing[key])
        # of a sweep every row has its rate; what else differs is named where it tells rows apart
        for index in range(len(runs)) if same and is_rate(key) else same:
            if not is_default(runs[index], key) or (_is_kind_of_group(key) and key in runs[index]):
                parts[index].append(_format_choice(key, runs[index][key]))
    names = [", ".join(part) for part in parts]
    short = [_unless_shared(name, folder.name, names) for name, folder in zip(names, folders, strict=True)]
    return [_unless_shared(name, str(folder), short) for name, folder in zip(short, folders, strict=True)]


def _unless_shared(name: str, addition: str, names: Sequence[str]) -> str:
    if name and names.count(name) == 1:
        return name
    return f"{name} ({addition})" if name else addition


def _of_the_same_name(parts: Sequence[Sequence[str]], values: Sequence[Any]) -> list[int]:
    """Return the indices of configs that share their name so far with others of another, short value."""
    if any(len(str(value)) > _MAX_VALUE for value in values):
        return []
    found: dict[tuple[str, ...], set[str]] = {}
    for part, value in zip(parts, values, strict=True):
        found.setdefault(tuple(part), set()).add(repr(value))
    return [index for index, part in enumerate(parts) if len(found[tuple(part)]) > 1]
