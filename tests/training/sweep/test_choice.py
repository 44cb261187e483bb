"""The best values of each arm, and the warnings about the ends of an axis."""

import random
import statistics
from pathlib import Path

import pytest

from tests.training.sweep.plans import observe, rates, write_plan
from training.sweep.choice import choose

VALUES = [0.02, 0.0025, 0.01, 0.005]  # not in order


@pytest.mark.parametrize("seed", range(20))
def test_the_best_has_the_lowest_mean_of_those_with_all_seeds(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    observer = observe(write_plan(tmp_path, rates(VALUES, seeds=[0, 1, 2])))
    members = [status.member for status in observer.look().statuses]
    losses = {m.number: generator.random() for m in members if generator.random() < 0.9}
    found = {choice.arm: choice for _, choice in choose(observer.plan.stages[0], members, losses)}
    for arm in {member.variant.arm for member in members}:
        means = {}
        for value in VALUES:
            own = [m for m in members if m.variant.arm == arm and m.variant.values["lr"] == value]
            if all(m.number in losses for m in own):
                means[value] = statistics.fmean(losses[m.number] for m in own)
        if not means:
            assert arm not in found
            continue
        choice, best = found[arm], min(means, key=lambda value: means[value])
        assert choice.values == {"lr": best}
        assert choice.loss == means[best]
        warning = choice.warning or ""
        assert ("largest" in warning) == (best == max(means) and best != min(means))
        assert ("smallest" in warning) == (best == min(means))
        assert ("tried" in warning) == (best in (min(VALUES), max(VALUES)))
        assert ("have no loss" in warning) == (len(means) < len(VALUES))


def test_words_have_no_ends_and_one_value_is_no_axis(tmp_path: Path) -> None:
    words = rates([0.01]).replace(
        'optimizer.groups.hidden.lr"]\nvalues = [0.01]', 'model.attention.impl"]\nvalues = ["eager", "none"]'
    )
    for text in (words, rates([0.01])):
        observer = observe(write_plan(tmp_path, text))
        members = [status.member for status in observer.look().statuses]
        losses = {member.number: float(member.number) for member in members}
        found = choose(observer.plan.stages[0], members, losses)
        assert [choice.warning for _, choice in found] == [None, None]
