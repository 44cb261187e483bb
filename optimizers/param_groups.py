"""Assignment of a model's parameters to the named groups of the configuration."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from optimizers.config import ParameterGroup

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_NUM_NAMES_SHOWN = 8


def clean_name(name: str) -> str:
    """Return a parameter's name without what torch.compile and activation checkpointing put into it.

    Args:
        name: Fully qualified name, as named_parameters() gives it.

    Returns:
        The name in the unwrapped model.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def assign_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]], groups: Mapping[str, ParameterGroup]
) -> dict[str, list[nn.Parameter]]:
    """Assign every trainable parameter to exactly one group.

    Args:
        named_parameters: Names and parameters without duplicates, as named_parameters() gives them: a tied
            parameter goes by its first name.
        groups: Groups by name; their patterns must match a whole clean name.

    Returns:
        The parameters of each group, in the order of the model, without those that need no gradient.

    Raises:
        ValueError: A parameter is matched by no group or by several, a group matches nothing, or a Muon group
            matches a parameter that is no matrix.
    """
    patterns = {
        group_name: [re.compile(pattern) for pattern in group.parameters]
        for group_name, group in groups.items()
    }
    assigned: dict[str, list[nn.Parameter]] = {group_name: [] for group_name in groups}
    orphans: list[str] = []
    contested: list[str] = []
    not_matrices: list[str] = []
    for raw_name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        name = clean_name(raw_name)
        owners = [owner for owner, own in patterns.items() if any(p.fullmatch(name) for p in own)]
        if not owners:
            orphans.append(name)
        elif len(owners) > 1:
            contested.append(f"{name} ({', '.join(owners)})")
        else:
            assigned[owners[0]].append(parameter)
            if groups[owners[0]].kind == "muon" and parameter.ndim != 2:
                not_matrices.append(f"{name} {list(parameter.shape)} ({owners[0]})")
    empty = [group_name for group_name, members in assigned.items() if not members]
    _raise_if("no group matches these parameters", orphans, "add a pattern, or freeze them")
    _raise_if("several groups match these parameters", contested, "make the patterns exclude each other")
    _raise_if(
        "Muon groups match parameters that are no matrices", not_matrices, "move them to an adamw group"
    )
    _raise_if("these groups match no trainable parameter", empty, "correct their patterns or drop them")
    return assigned


def _raise_if(problem: str, names: list[str], remedy: str) -> None:
    if not names:
        return
    shown = ", ".join(names[:_NUM_NAMES_SHOWN])
    more = f" and {len(names) - _NUM_NAMES_SHOWN} more" if len(names) > _NUM_NAMES_SHOWN else ""
    raise ValueError(f"optimizer groups: {problem}: {shown}{more}; {remedy}")
