"""The GPUs of this machine, and how many members run on them at a time; without importing torch."""

import os
from collections.abc import Mapping
from typing import NamedTuple

from errors import UserError
from eval.gpus import VISIBLE
from training.sweep.plan import Plan


class Slot(NamedTuple):
    """A place for one member at a time.

    Attributes:
        number: Its number, from 0.
        gpus: The GPUs of its members, which other slots may share; empty on a machine without GPUs.
    """

    number: int
    gpus: tuple[str, ...]


def make_slots(plan: Plan, gpus: list[str]) -> list[Slot]:
    """Make the slots of a machine.

    Args:
        plan: Says how many GPUs a member has, and how many members a GPU.
        gpus: From visible_gpus.

    Returns:
        The first slots of all GPUs before the second of any.

    Raises:
        UserError: A member needs more GPUs than there are.
    """
    size = plan.gpus_per_member
    if gpus and len(gpus) < size:
        raise UserError(f"gpus_per_member is {size}, but there are {len(gpus)} GPUs here: lower it")
    groups = [tuple(gpus[i : i + size]) for i in range(0, len(gpus) - size + 1, size)] or [()]
    return [Slot(number, group) for number, group in enumerate(groups * plan.members_per_gpu)]


def slot_environment(environment: Mapping[str, str], slot: Slot, num_slots: int) -> dict[str, str]:
    """Return the environment of a member: its GPUs, and its share of the processor's cores.

    Args:
        environment: Of the sweep.
        slot: The member's.
        num_slots: Number of slots.
    """
    own = {"PYTHONUNBUFFERED": "1"}
    if slot.gpus:
        own[VISIBLE] = ",".join(slot.gpus)
    if "OMP_NUM_THREADS" not in environment:
        own["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_slots))
    return {**environment, **own}
