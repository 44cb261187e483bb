"""The report shows the held-out loss of averaged weights beside that of the weights."""

from pathlib import Path

from tests.eval.report.run_folders import STEPS, cells, held_out, launch, make_run, report, training

HELD_OUT = "Held-out loss (nats/token)"
AVERAGE = "Held-out loss of the average (nats/token)"
RATE = "--optimizer.groups.hidden.lr"


def test_the_loss_of_the_averaged_weights_stands_beside_the_plain_one(tmp_path: Path) -> None:
    average = {"average_validation_loss": 1.75, "average_validation_stderr": 0.0125}
    last = {**held_out(STEPS, 2.0), "validation_stderr": 0.015, **average}
    # that of an earlier step is not the result
    earlier = {**held_out(15, 2.5), "average_validation_loss": 2.25}
    folders = [
        make_run(tmp_path / "a", [launch(), *training(2.0), earlier, last], RATE, "0.01"),
        make_run(tmp_path / "b", [launch(), *training(2.0), earlier, held_out(STEPS, 1.9)], RATE, "0.02"),
    ]
    text = report(folders, tmp_path, baseline="b")
    names = ["Parallax, Muon, lr 0.01", "Parallax, Muon, lr 0.02"]
    rows = [cells(text, "Results", name) for name in names]
    assert [row[HELD_OUT] for row in rows] == ["2.0000", "**1.9000**"]
    assert [row[AVERAGE] for row in rows] == ["1.7500", "-"]
    assert rows[0]["S.e. of the average (nats/token)"] == "0.0125"
    assert [*rows[0]].index(AVERAGE) == [*rows[0]].index(HELD_OUT) + 2
    assert "The average is that of the weights" in text
    assert AVERAGE not in cells(text, f"Difference to {names[1]}", names[0])
    assert cells(report(folders[:1], tmp_path), "Results", "Parallax, Muon")[AVERAGE] == "1.7500"
    without = report(folders[1:], tmp_path)
    assert AVERAGE not in without
    assert "The average is that" not in without
