"""A run with SOAP on the sphere and a group's own schedule: resumed, on two ranks, and as a branch."""

from pathlib import Path

import pytest

from config import load
from errors import UserError
from models.run_folder import RunFolder
from tests.training.launch import ROOT, losses, records, train
from training.resume import check_start
from training.run_config import RunConfig

SOAP_H = [
    *("--optimizer.groups.hidden.kind", "soap"),
    *("--optimizer.groups.hidden.lr", "0.01"),
    *("--optimizer.groups.hidden.weight_decay", "0"),
    *("--optimizer.groups.hidden.fixed_norm", "true"),
    *("--optimizer.groups.hidden.refresh_every", "4"),
    *("--optimizer.groups.hidden.schedule.decay_ratio", "0.5"),
    *("--metrics.update_every", "1"),
]


def test_it_trains_and_resumes_bit_identically(corpus: Path, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train("debug_parallax_muon", corpus, straight, *SOAP_H)
    for stop in ("6", "20"):
        stops = ["--training.stop_at_step", stop, "--checkpoint.every", "6"]
        train("debug_parallax_muon", corpus, resumed, *SOAP_H, *stops)
    assert losses(resumed) == losses(straight)
    steps = [line for line in records(straight) if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert steps[0]["update_rms/hidden"] == 0.0  # SOAP's first step
    assert all(line["update_rms/hidden"] > 0.0 for line in steps[1:])
    # the group decays over 10 steps, the others over 5
    factors = {
        name: [line[f"lr/{name}"] / steps[5][f"lr/{name}"] for line in steps]
        for name in ("hidden", "vectors")
    }
    assert factors["hidden"][11:] == pytest.approx([1.0 - n / 10 for n in range(1, 10)])
    assert factors["vectors"][15:] == pytest.approx([1.0 - n / 5 for n in range(5)])


@pytest.mark.slow
def test_two_ranks_train_as_one(corpus: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, ranks in ((one, 1), (two, 2)):
        train("debug_parallax_muon", corpus, folder, *SOAP_H, ranks=ranks)
    # eigenvectors of nearly equal eigenvalues amplify the rounding of gradients
    for (step, loss, norm), (other, *others) in zip(losses(one), losses(two), strict=True):
        assert step == other
        assert others == [pytest.approx(loss, abs=2e-3), pytest.approx(norm, rel=2e-2)]


def test_a_branch_after_the_start_of_a_groups_decay_is_refused(tmp_path: Path) -> None:
    def run(folder: str, *words: str) -> RunConfig:
        path = ROOT / "configs" / "debug_parallax_muon.toml"
        return load(RunConfig, path, ["--run.folder", str(tmp_path / folder), *words])

    RunFolder(tmp_path / "stable").write_config(run("stable", "--schedule.kind", "constant"))
    checkpoint = tmp_path / "stable" / "checkpoint" / "step-20"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").write_text("")
    start = ["--checkpoint.start_from", str(checkpoint), "--schedule.decay_ratio", "0.25"]
    check_start(run("branch", *start))
    own = ["--optimizer.groups.hidden.schedule.decay_steps", "50"]
    with pytest.raises(UserError, match=r"the decay of this run begins after step 10"):
        check_start(run("branch", *start, *own))
