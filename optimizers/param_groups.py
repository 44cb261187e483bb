"""Assignment of a model's parameters to the parameter groups of the configuration."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from errors import UserError
from optimizers.config import Misfit, ParameterGroup

_NUM_NAMES_SHOWN = 8


def unwrapped_named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return a model's parameters by their names in the unwrapped model, which are those of its state dict.

    Unlike named_parameters(), a state dict does not have the prefixes of activation checkpointing's wrappers.

    Args:
        model: Sharded or not, with or without activation checkpointing, compiled in place or not.

    Returns:
        Names and parameters in the order of the model; a tied parameter once, under its first name.
    """
    names: dict[nn.Parameter, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            names.setdefault(value, name)
    return [(name, parameter) for parameter, name in names.items()]


def assign_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]], groups: Mapping[str, ParameterGroup]
) -> dict[str, list[nn.Parameter]]:
    """Assign every trainable parameter to exactly one group.

    Args:
        named_parameters: Names in the unwrapped model, and parameters without duplicates.
        groups: Groups by name; a pattern must match the full name of a parameter.

    Returns:
        The trainable parameters of each group, in the order of the model.

    Raises:
        UserError: No group or several groups match a parameter, a group matches nothing, or a group matches a
            parameter that its kind cannot update.
    """
    patterns = {
        group_name: [re.compile(pattern) for pattern in group.parameters]
        for group_name, group in groups.items()
    }
    assigned: dict[str, list[nn.Parameter]] = {group_name: [] for group_name in groups}
    unmatched: list[str] = []
    ambiguous: list[str] = []
    misfits: dict[Misfit, list[str]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        matching = [group for group, own in patterns.items() if any(p.fullmatch(name) for p in own)]
        if not matching:
            unmatched.append(name)
        elif len(matching) > 1:
            ambiguous.append(f"{name} ({', '.join(matching)})")
        else:
            assigned[matching[0]].append(parameter)
            misfit = groups[matching[0]].misfit(parameter.shape)
            if misfit is not None:
                described = f"{name} {list(parameter.shape)} ({matching[0]}){misfit.detail}"
                misfits.setdefault(misfit, []).append(described)
    empty = [group_name for group_name, members in assigned.items() if not members]
    _raise_if(
        "no group matches these parameters",
        unmatched,
        "add a pattern to `parameters` of a group, or a group of their own",
    )
    _raise_if("several groups match these parameters", ambiguous, "make the patterns exclude each other")
    for misfit, described in misfits.items():
        _raise_if(misfit.problem, described, misfit.remedy)
    _raise_if("these groups match no trainable parameter", empty, "correct their patterns or remove them")
    return assigned


def _raise_if(problem: str, names: list[str], remedy: str) -> None:
    if not names:
        return
    shown = ", ".join(names[:_NUM_NAMES_SHOWN])
    more = f" and {len(names) - _NUM_NAMES_SHOWN} more" if len(names) > _NUM_NAMES_SHOWN else ""
    raise UserError(f"optimizer groups: {problem}: {shown}{more}; {remedy}")
