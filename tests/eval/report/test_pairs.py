"""Every difference says of how many pairs of equal seeds it is, by the seeds that have a value."""

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from eval.report.plan_file import PlanFile, PlannedRun, PlannedStage
from eval.report.plan_report import write_plan_report
from tests.eval.report.run_folders import STEPS, cells, held_out, launch, make_run, report, training

BEFORE = 22  # of 30 steps, the decay of the debug configs takes the last 8
HELD_OUT = "Held-out loss (nats/token)"
Losses = dict[str, list[float | None]]


def make_runs(folder: Path, losses: Losses, before: Losses | None = None) -> list[PlannedRun]:
    """Write a run for each seed from 1 on, unfinished where its loss is None."""
    folder.mkdir(parents=True)
    members = []
    for kind, of_seeds in losses.items():
        for seed, end in enumerate(of_seeds, 1):
            early = None if before is None else before[kind][seed - 1]
            records = [launch(), *training(end or 3.0, last=STEPS if end else 24)]
            records += [held_out(BEFORE, early)] if early else []
            records += [held_out(STEPS, end)] if end else []
            words = ("--run.seed", str(seed), "--data.shuffle_seed", str(seed))
            make_run(folder / f"{kind}_seed{seed}", records, *words, name=f"debug_{kind}_muon")
            run, other = f"{folder.name}/{kind}_seed{seed}", f"{folder.name}/softmax_seed{seed}"
            compared = other if kind == "parallax" else None
            members.append(
                PlannedRun(
                    number=len(members), config="x", run=run, arm=kind, seed=seed, compared_with=compared
                )
            )
    return members


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_a_difference_of_means_over_other_seeds_is_unpaired(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    # all three seeds have both runs, but one alone has both losses, of which Parallax's is lower
    losses: Losses = {"softmax": [None, 3.0, 2.0], "parallax": [3.5, 2.9, None]}
    make_runs(tmp_path / "x", losses)
    text = report([tmp_path / "x"], tmp_path, baseline="softmax_seed1")
    row = cells(text, "Difference to Softmax, Muon", "Parallax, Muon")
    assert row["Seeds of row / baseline"] == "3 / 3"
    assert row[HELD_OUT].startswith("+0.7000 ± ")
    assert row[HELD_OUT].endswith(" (unpaired, 2 and 2 seeds)")
    with (tmp_path / "out" / "differences.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line[f"{HELD_OUT}, note"] == "unpaired, 2 and 2 seeds"
    assert "Parallax, Muon (unpaired, 2 and 2 seeds)" in legend_of(figures["differences.png"])


def test_pairs_are_counted_by_the_seeds_that_have_a_value(tmp_path: Path, figures: dict[str, Figure]) -> None:
    make_runs(tmp_path / "x", {"softmax": [3.0, 3.1, 3.2, None], "parallax": [2.9, 2.8, 3.1, 3.0]})
    text = report([tmp_path / "x"], tmp_path, baseline="softmax_seed1")
    row = cells(text, "Difference to Softmax, Muon", "Parallax, Muon")
    assert row[HELD_OUT] == "-0.1667 ± 0.0667 (3 pairs)"
    assert "Parallax, Muon (3 pairs)" in legend_of(figures["differences.png"])


def test_the_gains_of_a_plan_say_over_how_many_seeds_they_are(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    # the gain of each seed is that before the decay; the second seed of softmax has no end
    before: Losses = {"softmax": [3.5, 3.6, 3.7], "parallax": [3.4, 3.2, 3.6]}
    losses: Losses = {"softmax": [3.0, None, 3.2], "parallax": [2.9, 2.7, 3.1]}
    members = make_runs(tmp_path / "p" / "seeds", losses, before)
    PlanFile(baseline="softmax", stages=[PlannedStage(name="seeds", members=members)]).write(tmp_path / "p")
    text = write_plan_report(tmp_path / "p", out=tmp_path / "out").read_text()
    row = cells(text, "Stage seeds", "parallax")
    assert row["Difference before decay"] == "-0.2000 ± 0.1000"
    assert row["Difference at the end"] == "-0.1000 ± 0.0000 (2 of 3)"
    assert row["Change over the decay"] == "+0.0000 ± 0.0000 (2 of 3)"
    assert "(n of m)" in text
    (axes,) = figures["gains.png"].axes
    assert [each.get_text() for each in axes.texts] == ["2 of 3", "seeds"]
    assert "parallax (2 pairs)" in legend_of(figures["gains_over_training.png"])


@pytest.mark.parametrize("ends", [[3.0, None, 2.0], [3.0, None, None]])
def test_gains_over_training_are_of_pairs_alone(
    ends: list[float | None], tmp_path: Path, figures: dict[str, Figure]
) -> None:
    members = make_runs(tmp_path / "p" / "seeds", {"softmax": ends, "parallax": [2.9, 2.8, None]})
    PlanFile(baseline="softmax", stages=[PlannedStage(name="seeds", members=members)]).write(tmp_path / "p")
    write_plan_report(tmp_path / "p", out=tmp_path / "out")
    (axes,) = figures["gains_over_training.png"].axes
    line = next(line for line in axes.lines if line.get_label() == "parallax (1 pair)")
    assert np.asarray(line.get_ydata()) == pytest.approx(-0.1)
