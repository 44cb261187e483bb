"""Which member each is compared with in the report's table of gains, by the plan's `pairs`."""

from collections.abc import Sequence

from errors import UserError
from training.sweep.members import Member
from training.sweep.plan import Plan, PlanSource


def check_pairs(plan: Plan, source: PlanSource, members: Sequence[Member]) -> None:
    """Raise unless the plan's pairs are of its configs.

    Args:
        plan: The plan.
        source: Where its keys were set, for the error message.
        members: All of its members.

    Raises:
        UserError: Names the entry of `pairs`.
    """
    known = dict.fromkeys(member.variant.config_file.stem for member in members)
    for pair in plan.pairs.items():
        for name in pair:
            if name not in known:
                wanted = f"want the plan's configs without .toml: {', '.join(known)}"
                raise UserError(f"{source.of(f'pairs.{pair[0]}')}: pairs: got {name!r}, {wanted}")


def partner(plan: Plan, member: Member, members: Sequence[Member]) -> Member | None:
    """Find the member that one is compared with.

    Args:
        plan: The plan.
        member: A member.
        members: All members of the plan.

    Returns:
        The one of the paired config and of the same seed, in the stage that compare_with names, or in the
        same stage with the same values of its axes. None without one, and for a stage that tunes.
    """
    wanted = plan.pairs.get(member.variant.config_file.stem)
    if wanted is None or member.variant.tuned:
        return None
    stage = next(each for each in plan.stages if each.name == member.stage)
    for other in members:
        if other.variant.config_file.stem != wanted or other.seed != member.seed:
            continue
        if stage.compare_with is None:
            is_partner = other.stage == stage.name and other.variant.values == member.variant.values
        else:
            is_partner = other.stage == stage.compare_with
        if is_partner:
            return other
    return None
