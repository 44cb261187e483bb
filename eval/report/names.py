"""Names of rows and arms, from what their runs chose and others did not: "Parallax, Muon, lr 0.01"."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.report.choices import NO_KEY, Config, choices, differing_choices, hidden_optimizer, is_rate

_KINDS = {
    **{"softmax": "Softmax", "parallax": "Parallax", "lla": "LLA", "value-average": "Value average"},
    **{"linear": "Linear", "affine-linear": "Affine linear", "affine-mesanet": "Affine MesaNet"},
    **{"gated-deltanet": "Gated DeltaNet", "kda": "KDA", "mesanet": "MesaNet", "mamba2": "Mamba-2"},
    **{"muon": "Muon", "adamw": "AdamW", "mixed": "Muon and AdamW"},
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
    if key == "model.size":
        return str(value)
    if key.startswith("optimizer.groups.") and not key.startswith("optimizer.groups.hidden."):
        name = f"{key.split('.')[2]} {name}"
    return f"{name} {format_value(value)}"


def model_name(run: Config, differing: Sequence[str]) -> str:
    """Name a run's attention and what else it chose for its model, among the keys in which runs differ."""
    chosen = choices(run)
    keys = [key for key in differing if key.startswith("model.") and key != "model.attention.kind"]
    changes = [_format_choice(key, chosen[key]) for key in keys if key in chosen]
    return " ".join([display_kind(run.get("model.attention.kind", "")), *changes]).strip()


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
    models = [model_name(run, [*differing]) for run in runs]
    optimizers = [display_kind(hidden_optimizer(run)) for run in runs]
    parts = [[part for part in pair if part] for pair in zip(models, optimizers, strict=True)]
    for key, values in differing.items():
        is_named = key.startswith("model.") or key.endswith(".kind") or (is_rate(key) and not with_rates)
        if not is_named and _splits(parts, values):
            for part, value in zip(parts, values, strict=True):
                if value != NO_KEY:
                    part.append(_format_choice(key, value))
    names = [", ".join(part) for part in parts]
    short = [_unless_shared(name, folder.name, names) for name, folder in zip(names, folders, strict=True)]
    return [_unless_shared(name, str(folder), short) for name, folder in zip(short, folders, strict=True)]


def _unless_shared(name: str, addition: str, names: Sequence[str]) -> str:
    if name and names.count(name) == 1:
        return name
    return f"{name} ({addition})" if name else addition


def _splits(parts: Sequence[Sequence[str]], values: Sequence[Any]) -> bool:
    """Return whether two configs of the same name so far have different values, and all are short."""
    if any(len(str(value)) > _MAX_VALUE for value in values):
        return False
    found: dict[tuple[str, ...], Any] = {}
    return any(
        found.setdefault(tuple(part), value) != value for part, value in zip(parts, values, strict=True)
    )
