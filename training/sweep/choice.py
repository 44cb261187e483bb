"""Choose the best tuned values of each arm by held-out loss, and warn where they lie at an end of an axis."""

import statistics
from collections.abc import Mapping, Sequence

from eval.report.plan_file import Choice
from training.sweep.members import Member, Variant
from training.sweep.plan import Axis, Stage


def choose(
    stage: Stage, members: Sequence[Member], losses: Mapping[int, float]
) -> list[tuple[Variant, Choice]]:
    """Choose the best variant of each arm.

    Args:
        stage: The stage.
        members: Its members, all of which have finished or failed.
        losses: Number of a member -> held-out loss after the last step in nats/token; failed ones are left
            out.

    Returns:
        The variant of lowest mean loss over seeds, and the choice for the record, for each arm that has one.
        Variants of which a seed has failed are not chosen.
    """
    arms: dict[str, dict[tuple[int, ...], list[Member]]] = {}
    for member in members:
        arms.setdefault(member.variant.arm, {}).setdefault(member.variant.tuned, []).append(member)
    found = []
    for arm, variants in arms.items():
        means = {
            tuned: statistics.fmean(losses[each.number] for each in seeds)
            for tuned, seeds in variants.items()
            if all(each.number in losses for each in seeds)
        }
        if means:
            best = min(means, key=lambda tuned: means[tuned])
            found.append((variants[best][0].variant, _describe(stage, arm, best, means, len(variants))))
    return found


def _describe(
    stage: Stage, arm: str, best: tuple[int, ...], means: Mapping[tuple[int, ...], float], num_variants: int
) -> Choice:
    axes = [axis for axis in stage.axes if axis.tuned]
    values = {axis.label: axis.values[index] for axis, index in zip(axes, best, strict=True)}
    ends = (_end(axis, place, best[place], means) for place, axis in enumerate(axes))
    warnings = [end for end in ends if end is not None]
    if len(means) < num_variants:
        warnings.append(f"{num_variants - len(means)} of {num_variants} have no loss")
    return Choice(arm=arm, values=values, loss=means[best], warning="; ".join(warnings) or None)


def _end(axis: Axis, place: int, best: int, means: Mapping[tuple[int, ...], float]) -> str | None:
    """Describe at which end of an axis the best lies; None if it lies inside, or the axis has no ends."""
    if not axis.is_ordered or len(axis.values) < 2:
        return None
    order = sorted(range(len(axis.values)), key=lambda index: _first(axis, index))
    with_loss = [index for index in order if any(tuned[place] == index for tuned in means)]
    ends = {with_loss[-1]: "largest", with_loss[0]: "smallest"}
    if best not in ends:
        return None
    tried = "tried" if best in (order[0], order[-1]) else "that has a loss"
    return f"the best {axis.label} is the {ends[best]} {tried}: add values beyond it"


def _first(axis: Axis, index: int) -> float:
    value = axis.values[index]
    return value[0] if len(axis.keys) > 1 else value
