import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.lr_scheduler import build_lr_schedulers as build_titan_schedulers
from torchtitan.config import LRScheduler

from errors import UserError
from optimizers.config import AdamWGroup, GroupSchedule, OptimizerConfig, ScheduleConfig
from optimizers.schedule import (
    decay_start,
    group_schedule,
    lr_factor,
    schedules_by_group,
    weight_decay_factor,
)
from optimizers.titan import ParamGroupOptimizers, build_lr_schedulers, build_optimizers


def one_group_optimizers() -> ParamGroupOptimizers:
    model = torch.nn.Linear(2, 2, bias=False)
    config = OptimizerConfig(groups={"all": AdamWGroup(parameters=["weight"], lr=1.0)})
    return build_optimizers([model], config)


def factors(config: ScheduleConfig, total_steps: int) -> list[float]:
    return [lr_factor(step, config, total_steps) for step in range(total_steps)]


def test_wsd_at_chosen_steps() -> None:
    config = ScheduleConfig(kind="wsd", warmup_steps=10, decay_ratio=0.2)
    at = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 79: 1.0, 80: 1.0, 81: 0.95, 90: 0.5, 99: 0.05, 100: 0.0, 999: 0.0}
    for step, factor in at.items():
        assert lr_factor(step, config, 100) == pytest.approx(factor, abs=1e-12), step


def test_decay_shapes_with_a_minimum_learning_rate() -> None:
    for shape, value in (("linear", 0.5), ("one_minus_sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)):
        config = ScheduleConfig(kind="wsd", decay_ratio=0.5, decay_shape=shape, min_lr_ratio=0.1)
        assert lr_factor(75, config, 100) == pytest.approx(0.1 + 0.9 * value)
        assert lr_factor(100, config, 100) == pytest.approx(0.1)
    quarter = ScheduleConfig(kind="wsd", decay_ratio=0.4, decay_shape="cosine")
    assert lr_factor(70, quarter, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_cosine_decay_starts_after_the_warmup() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=20, min_lr_ratio=0.2)
    assert lr_factor(19, config, 120) == 1.0
    assert lr_factor(20, config, 120) == 1.0
    assert lr_factor(70, config, 120) == pytest.approx(0.2 + 0.8 * 0.5)
    assert lr_factor(119, config, 120) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 0.99)))


def test_decay_steps_equal_decay_ratio() -> None:
    by_steps = ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=20)
    at = {0: 0.1, 9: 1.0, 10: 1.0, 79: 1.0, 80: 1.0, 81: 0.95, 99: 0.05, 100: 0.0}
    for step, factor in at.items():
        assert lr_factor(step, by_steps, 100) == pytest.approx(factor, abs=1e-12), step
    # the decay is equally long for any number of steps
    assert lr_factor(181, by_steps, 200) == pytest.approx(0.95)
    assert factors(by_steps, 100) == factors(ScheduleConfig(warmup_steps=10, decay_ratio=0.2), 100)
    # the default is a ratio of 0.2; 0 steps are no decay
    assert factors(ScheduleConfig(warmup_steps=10), 100) == factors(by_steps, 100)
    assert factors(ScheduleConfig(decay_steps=0), 7) == [1.0] * 7


def test_decay_start_is_the_first_step_of_the_decay() -> None:
    assert decay_start(ScheduleConfig(decay_steps=20), 100) == 80
    assert decay_start(ScheduleConfig(decay_ratio=0.25), 60) == 45
    assert decay_start(ScheduleConfig(kind="cosine", warmup_steps=7), 60) == 7
    assert decay_start(ScheduleConfig(kind="constant", warmup_steps=7), 60) == 60
    decaying = ScheduleConfig(decay_steps=20)
    assert lr_factor(80, decaying, 100) == 1.0 > lr_factor(81, decaying, 100)


@pytest.mark.parametrize("shape", ["linear", "one_minus_sqrt", "cosine"])
def test_weight_decay_is_annealed_over_the_decay_phase(shape: Any) -> None:
    config = ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=20, decay_shape=shape, min_lr_ratio=0.1)
    for gamma, at in {
        2.0: {0: 1.0, 9: 1.0, 79: 1.0, 80: 1.0, 81: 0.9025, 90: 0.25, 99: 0.0025, 100: 0.0},
        0.5: {80: 1.0, 85: math.sqrt(0.75), 95: 0.5, 100: 0.0},
        1.0: {80: 1.0, 85: 0.75, 100: 0.0},
        0.0: {0: 1.0, 80: 1.0, 90: 1.0, 100: 1.0},
    }.items():
        for step, factor in at.items():
            assert weight_decay_factor(step, config, 100, gamma) == pytest.approx(factor, abs=1e-12), step
    cosine = ScheduleConfig(kind="cosine", warmup_steps=20)
    assert weight_decay_factor(19, cosine, 120, 2.0) == weight_decay_factor(20, cosine, 120, 2.0) == 1.0
    assert weight_decay_factor(70, cosine, 120, 2.0) == 0.25
    constant = ScheduleConfig(kind="constant", warmup_steps=20)
    assert {weight_decay_factor(step, constant, 120, 2.0) for step in range(121)} == {1.0}


def test_decay_ratio_and_decay_steps_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r'decay_ratio \(0.25\) and decay_steps \(500\).*"none"'):
        ScheduleConfig(decay_ratio=0.25, decay_steps=500)
    with pytest.raises(UserError, match=r"decay_steps must be at least 0 .* got -1"):
        ScheduleConfig(decay_steps=-1)
    with pytest.raises(UserError, match=r"decay \(500 steps\).*100 steps.*schedule.decay_steps"):
        lr_factor(0, ScheduleConfig(decay_steps=500), 100)


def test_constant_after_the_warmup() -> None:
    assert factors(ScheduleConfig(kind="constant", warmup_steps=4), 8) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("shape", ["linear", "one_minus_sqrt", "cosine"])
@pytest.mark.parametrize(("warmup", "ratio"), [(0, 1.0), (7, 0.25), (3, 0.0), (10, 0.5)])
def test_equals_torchtitan(shape: Any, warmup: int, ratio: float) -> None:
    ours = ScheduleConfig(
        kind="wsd", warmup_steps=warmup, decay_ratio=ratio, decay_shape=shape, min_lr_ratio=0.05
    )
    titan_config = LRScheduler(
        warmup_steps=warmup,
        decay_ratio=ratio,
        decay_type="sqrt" if shape == "one_minus_sqrt" else shape,
        min_lr_factor=0.05,
    )
    scheduler = build_titan_schedulers(one_group_optimizers(), titan_config, 20).schedulers[0]
    assert isinstance(scheduler, LambdaLR)
    for step in range(20):
        assert lr_factor(step, ours, 20) == pytest.approx(scheduler.lr_lambdas[0](step), rel=1e-12), step


def test_warmup_and_decay_longer_than_the_run_are_an_error() -> None:
    config = ScheduleConfig(kind="wsd", warmup_steps=15, decay_ratio=0.5)
    with pytest.raises(UserError, match=r"warmup_steps \(15\).*decay \(10 steps\).*20 steps"):
        build_lr_schedulers(one_group_optimizers(), config, 20)
    with pytest.raises(UserError, match=r"warmup_steps \(30\)"):
        lr_factor(0, ScheduleConfig(kind="constant", warmup_steps=30), 20)
    with pytest.raises(UserError, match=r"warmup_steps \(30\)"):
        lr_factor(0, ScheduleConfig(kind="cosine", warmup_steps=30), 20)


@pytest.mark.parametrize(("total_steps", "start"), [(7, 6), (8, 6), (12, 10), (13, 10)])
def test_the_decay_takes_the_nearest_number_of_steps(total_steps: int, start: int) -> None:
    assert decay_start(ScheduleConfig(decay_ratio=0.2), total_steps) == start


RUN = ScheduleConfig(kind="wsd", warmup_steps=4, decay_ratio=0.5, min_lr_ratio=0.1)


def group_of(**schedule: Any) -> AdamWGroup:
    return AdamWGroup(parameters=["weight"], lr=1.0, schedule=GroupSchedule(**schedule))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, RUN),
        ({"decay_shape": "one_minus_sqrt"}, replace(RUN, decay_shape="one_minus_sqrt")),
        ({"decay_steps": 3}, replace(RUN, decay_ratio=None, decay_steps=3)),
        ({"decay_ratio": 0.1, "min_lr_ratio": 0.0}, replace(RUN, decay_ratio=0.1, min_lr_ratio=0.0)),
        ({"kind": "wsd", "decay_ratio": 0.25}, replace(RUN, decay_ratio=0.25)),
        ({"kind": "constant"}, ScheduleConfig(kind="constant", warmup_steps=4)),
        ({"kind": "cosine"}, ScheduleConfig(kind="cosine", warmup_steps=4, min_lr_ratio=0.1)),
    ],
)
def test_a_group_takes_over_what_its_own_schedule_leaves_open(
    own: dict[str, Any], expected: ScheduleConfig
) -> None:
    assert group_schedule(group_of(**own), RUN) == expected
    assert group_schedule(AdamWGroup(parameters=["weight"], lr=1.0), RUN) == RUN


def test_each_group_follows_its_own_schedule() -> None:
    model = torch.nn.Linear(2, 2)
    groups = {
        "own": AdamWGroup(
            parameters=["weight"],
            lr=2.0,
            weight_decay=0.1,
            weight_decay_gamma=1.0,
            schedule=GroupSchedule(decay_steps=5),
        ),
        "run": AdamWGroup(parameters=["bias"], lr=1.0),
    }
    optimizers = build_optimizers([model], OptimizerConfig(groups={**groups}))
    scheduler = build_lr_schedulers(optimizers, RUN, 20)
    own = ScheduleConfig(kind="wsd", warmup_steps=4, decay_steps=5, min_lr_ratio=0.1)
    for step in range(20):
        lr, decay = scheduler.lr_by_group(), scheduler.weight_decay_by_group()
        assert lr == {"own": 2.0 * lr_factor(step, own, 20), "run": lr_factor(step, RUN, 20)}
        assert decay["own"] == 0.1 * weight_decay_factor(step, own, 20, 1.0)
        scheduler.step()


def test_a_schedule_of_a_group_that_makes_no_sense_is_refused() -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"decay_steps": 17}, r"optimizer.groups.own.schedule: warmup_steps \(4\) and the decay \(17"),
        ({"kind": "cosine", "decay_ratio": 0.1}, "optimizer.groups.own.schedule: decay_ratio is 0.1"),
        (
            {"kind": "cosine", "decay_shape": "linear"},
            "decay_shape is 'linear', which a cosine schedule does",
        ),
        (
            {"kind": "constant", "min_lr_ratio": 0.0},
            "min_lr_ratio is 0.0, which a constant schedule does not",
        ),
    )
    for own, message in refused:
        with pytest.raises(UserError, match=message):
            schedules_by_group({"own": group_of(**own)}, RUN, 20)
    with pytest.raises(UserError, match="both given"):
        GroupSchedule(decay_ratio=0.1, decay_steps=2)
    with pytest.raises(UserError, match=r"^warmup_steps"):
        schedules_by_group({"own": group_of(decay_ratio=0.1)}, RUN, 4)


def test_the_remedy_names_the_keys_that_help() -> None:
    def refusal(schedule: ScheduleConfig, total_steps: int, **own: Any) -> str:
        with pytest.raises(UserError) as error:
            schedules_by_group({"own": group_of(**own)}, schedule, total_steps)
        return str(error.value)

    for kind in ("cosine", "constant"):
        message = refusal(ScheduleConfig(kind=kind, warmup_steps=30), 20)
        assert message == (
            "warmup_steps (30) must fit into the 20 steps of the run; lower schedule.warmup_steps"
        )
    assert refusal(RUN, 7).endswith("lower schedule.warmup_steps or schedule.decay_ratio")
    message = refusal(ScheduleConfig(warmup_steps=4, decay_steps=4), 7)
    assert message.endswith("lower schedule.warmup_steps or schedule.decay_steps")
    for own in ({"decay_steps": 17}, {"decay_ratio": 0.9}):
        message = refusal(RUN, 20, **own)
        assert message.endswith(f"schedule.warmup_steps or optimizer.groups.own.schedule.{next(iter(own))}")
    constant = ScheduleConfig(kind="constant", warmup_steps=18)
    message = refusal(constant, 20, kind="wsd")
    assert message.endswith("schedule.warmup_steps or optimizer.groups.own.schedule.decay_ratio")


def test_annealing_of_a_group_that_has_no_decay_phase_is_refused() -> None:
    def groups(**schedule: Any) -> dict[str, AdamWGroup]:
        return {"own": replace(group_of(**schedule), weight_decay=0.1, weight_decay_gamma=2.0)}

    constant = ScheduleConfig(kind="constant")
    message = "optimizer.groups.own.weight_decay_gamma is 2.0, which a constant schedule does not read"
    for own, schedule in (({}, constant), ({"kind": "constant"}, RUN)):
        with pytest.raises(UserError, match=message):
            schedules_by_group(groups(**own), schedule, 20)
    # a group with a decay of its own; and the run that others continue with their decay
    assert schedules_by_group(groups(kind="wsd"), constant, 20)
    assert schedules_by_group(groups(), ScheduleConfig(decay_ratio=0.0), 20)
