"""What --dry-run says a plan costs, on which GPU and at which MFU, and whether it fits."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torchtitan.tools.utils import get_peak_flops

from config import load
from errors import UserError
from train import main
from training.dry_run import dry_run
from training.fit import describe_fit
from training.gpus import GPUS, find_gpu
from training.memory import GIB, estimate_memory
from training.preflight import build_meta_model
from training.run_config import RunConfig
from training.step_time import estimate_step_time

ROOT = Path(__file__).parents[2]


def config(name: str, *words: str) -> RunConfig:
    return load(RunConfig, ROOT / "configs" / f"{name}.toml", words)


def hours(text: str) -> tuple[float, float]:
    """Return the hours and GPU-hours of the run that a dry run prints."""
    match = re.search(
        r"^time of this run +([\d.,]+) (hours|minutes|seconds), ([\d.,]+) GPU-hours", text, re.MULTILINE
    )
    assert match is not None, text
    per_hour = {"hours": 1, "minutes": 60, "seconds": 3600}[match[2]]
    return float(match[1].replace(",", "")) / per_hour, float(match[3].replace(",", ""))


def line(text: str, name: str) -> str:
    """Return what a dry run prints beside a name."""
    found = re.search(rf"^{name} {{2,}}(.*)$", text, re.MULTILINE)
    assert found is not None, text
    return found[1]


def test_gpu_hours_of_the_06b_at_a_stated_mfu_by_hand() -> None:
    for name in ("0.6b_softmax_muon", "0.6b_parallax_muon"):
        run = config(name)
        flops = 20_000 * 1024 * 4096 * build_meta_model(run).num_flops_per_token(4096)
        for mfu, gpu, peak in ((40.0, "h100", 989e12), (25.0, "A100", 312e12)):
            text = dry_run(run, 64, gpu=gpu, mfu=mfu)
            expected = flops / (mfu / 100 * peak) / 3600
            assert hours(text) == (
                pytest.approx(expected / 64, rel=0.005),
                pytest.approx(expected, rel=0.005),
            )
            assert f"{mfu}% by whole rows (mfu_whole_rows_percent), as stated" in text
    assert 280 < hours(dry_run(config("0.6b_softmax_muon"), 64, gpu="h100", mfu=40.0))[1] < 310


def test_without_a_stated_mfu_the_time_is_that_of_the_model_of_a_step() -> None:
    run = config("0.6b_parallax_muon")
    time = estimate_step_time(run, build_meta_model(run), 64)
    assert time is not None
    h200 = dry_run(run, 64)
    assert hours(h200)[0] == pytest.approx(20_000 * time.total / 3600, rel=0.005)
    assert f"{1e3 * time.total:.0f} ms on 64 H200s, compiled: products" in h200
    # the same share of another peak
    assert "by training/step_time.py for H200s" in dry_run(run, 64, gpu="b200")
    assert hours(dry_run(run, 64, gpu="b200"))[1] == pytest.approx(hours(h200)[1] * 989 / 2250, rel=0.01)


def test_attention_without_a_model_of_its_time_asks_for_the_mfu() -> None:
    run = config("60m_lla_muon")
    assert "no estimate for attention.kind lla; state an MFU by --mfu PERCENT" in dry_run(run, 8)
    assert hours(dry_run(run, 8, mfu=3.0))[1] > 0


DECAY = ("60m_parallax_decay_muon", "--checkpoint.start_from", "runs/stable/checkpoint/step-1000")


@pytest.mark.parametrize(
    ("words", "first", "last"),
    [
        (("60m_parallax_muon",), 1, 2000),
        (("60m_parallax_muon", "--training.stop_at_step", "500"), 1, 500),
        (("60m_parallax_muon", "--training.stop_at_tokens", str(262_144 * 3 - 1)), 1, 3),
        (DECAY, 1001, 1500),
        ((*DECAY, "--training.stop_at_step", "1200"), 1001, 1200),
        ((*DECAY, "--training.stop_at_step", "1001"), 1001, 1001),
    ],
    ids=["whole", "stopped", "stopped by tokens", "branch", "stopped branch", "one step"],
)
def test_a_branch_and_a_stopped_run_cost_their_own_steps(
    words: tuple[str, ...], first: int, last: int
) -> None:
    run = config(*words)
    text, model, count = dry_run(run, 1), build_meta_model(run), last - first + 1
    told = line(text, "this run")
    assert told.startswith(f"{count:,} {'step' if count == 1 else 'steps'} ({first:,} to {last:,}), ")
    flops = count * 256 * 1024 * model.num_flops_per_token(1024)
    assert told.endswith(f" {flops:.3e} FLOPs")
    time = estimate_step_time(run, model, 1)
    assert time is not None
    assert hours(text)[0] == pytest.approx(count * time.total / 3600, rel=0.005)


def test_a_branch_that_no_launch_would_start_is_refused() -> None:
    late = config(DECAY[0], DECAY[1], "runs/stable/checkpoint/step-1300")
    with pytest.raises(UserError, match="is a checkpoint of step 1300, but the decay of this run begins"):
        dry_run(late, 1)
    with pytest.raises(UserError, match="is a checkpoint of step 1000, but this run ends at step 900"):
        dry_run(config(*DECAY, "--training.stop_at_step", "900"), 1)
    with pytest.raises(UserError, match="is 'runs/stable', but its name is not step-N"):
        dry_run(config(DECAY[0], DECAY[1], "runs/stable"), 1)


@pytest.mark.parametrize(
    ("ranks", "rows", "told"),
    [
        (1, "32", "8 micro-batches on 1 rank"),
        (1, "256", "1 micro-batch on 1 rank"),
        (8, "32", "1 micro-batch on each of 8 ranks"),
        (2, "32", "4 micro-batches on each of 2 ranks"),
    ],
)
def test_micro_batches_and_ranks_are_counted_in_words(ranks: int, rows: str, told: str) -> None:
    run = config("60m_parallax_muon", "--training.local_batch_size", rows)
    assert line(dry_run(run, ranks), "step") == f"262,144 tokens, {told}"


def test_times_have_three_digits_in_a_unit_of_their_size() -> None:
    def told(steps: int, mfu: float, ranks: int = 1) -> str:
        run = config("60m_parallax_muon", "--training.stop_at_step", str(steps))
        return line(dry_run(run, ranks, mfu=mfu), "time of this run").partition(", without")[0]

    # by hand: seconds of a step at 1%, 13.7
    seconds = 262_144 * build_meta_model(config("60m_parallax_muon")).num_flops_per_token(1024) / 989e10
    assert told(2000, 1.0) == f"{2000 * seconds / 3600:.2f} hours, {2000 * seconds / 3600:.2f} GPU-hours"
    assert told(200, 1.0) == f"{200 * seconds / 60:.1f} minutes, {200 * seconds / 3600:.3f} GPU-hours"
    assert told(200, 1.0, 8) == f"{200 * seconds / 480:.2f} minutes, {200 * seconds / 3600:.3f} GPU-hours"
    assert told(1, 1.0) == f"{seconds:.1f} seconds, {seconds / 3600:.5f} GPU-hours"
    assert 6 < 2000 * seconds / 3600 < 9
    run = config("1.7b_softmax_adamw")
    gpu_hours = 20_000 * 2**22 * build_meta_model(run).num_flops_per_token(4096) / 312e10 / 3600
    assert gpu_hours > 10_000
    assert f", {gpu_hours:,.0f} GPU-hours" in dry_run(run, 8, gpu="a100", mfu=1.0)


def test_the_largest_loss_is_that_of_the_parts() -> None:
    run = config("0.6b_parallax_muon")
    time = estimate_step_time(run, build_meta_model(run), 64)
    assert time is not None
    text = dry_run(run, 64)
    assert line(text, "largest loss") == f"memory-bound {100 * time.memory_bound / time.total:.0f}%"
    network = config("1.7b_parallax_muon", "--training.local_batch_size", "1")
    assert line(dry_run(network, 512), "largest loss").startswith("communication ")
    # neither another GPU nor a stated MFU has parts
    assert "largest loss" not in dry_run(run, 64, gpu="b200") + dry_run(run, 64, mfu=40.0)


def test_what_is_no_plan_is_refused() -> None:
    run = config("debug_softmax_muon")
    for mfu in (0.4, 0.0, 101.0, float("nan")):
        with pytest.raises(UserError, match="--mfu is a percentage, at least 1 and at most 100; got"):
            dry_run(run, 1, mfu=mfu)
    with pytest.raises(UserError, match=r"--gpu is 'v100', want one of a100, h100, .*training/gpus.py"):
        dry_run(run, 1, gpu="v100")


def test_the_peaks_are_those_of_a_runs_mfu() -> None:
    names = {
        "a100": "NVIDIA A100-SXM4-80GB",
        "h100": "NVIDIA H100 80GB HBM3",
        "h100-pcie": "NVIDIA H100 PCIe",
        "h200": "NVIDIA H200",
        "b200": "NVIDIA B200",
    }
    assert {key: gpu.peak_flops for key, gpu in GPUS.items()} == {
        key: get_peak_flops(name) for key, name in names.items()
    }


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_plan_that_does_not_fit_says_what_would(rows: int, mode: str) -> None:
    def read(rows: int, mode: str) -> RunConfig:
        words = [*("--training.local_batch_size", str(rows)), *("--training.activation_checkpointing", mode)]
        return config("0.6b_parallax_muon", *words)

    run = read(rows, mode)
    model = build_meta_model(run)
    peak = estimate_memory(run, model, 8).peak / GIB
    text = describe_fit(run, model, 8, find_gpu("h100"))
    verdict = "fits" if peak <= 72 else "may not fit" if peak <= 80 else "does not fit"
    assert text.startswith(f"{verdict}: {peak:.1f} GiB of the 80 GiB of H100")
    if verdict == "fits":
        return
    remedy = re.search(r"(?:local_batch_size (\d+))?(?: and )?(?:training.activation_checkpointing "
                       r'"(\w+)")? would take ([\d.]+) GiB', text)  # fmt: skip
    assert remedy is not None, text
    smaller = read(int(remedy[1] or rows), remedy[2] or mode)
    changed = estimate_memory(smaller, model, 8).peak / GIB
    assert changed == pytest.approx(float(remedy[3]), abs=0.051)
    assert changed <= 72
    assert smaller.gradient_accumulation_steps(8) >= 1


def test_a_model_that_never_fits() -> None:
    run = config("1.7b_softmax_adamw", "--training.seq_len", "1048576", "--training.local_batch_size", "1")
    text = describe_fit(run, build_meta_model(run), 8, find_gpu("a100"))
    assert text.startswith("does not fit")
    assert text.endswith("no micro-batch fits; take more ranks, or a larger GPU")


def test_the_options_of_the_command_line() -> None:
    words = ["--config", "configs/0.6b_softmax_muon.toml", "--dry-run", "--world-size", "64"]
    command = [sys.executable, "train.py", *words, "--gpu", "h100", "--mfu", "40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert hours(done.stdout) == (4.59, 294)
    assert done.stdout.rstrip().endswith(" GiB")
    done = subprocess.run(
        [*command[:-1], "0.4"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --mfu is a percentage, at least 1 and at most 100; got 0.4\n"


@pytest.mark.parametrize("option", [("--gpu", "h100"), ("--mfu", "40"), ("--world-size", "64")])
def test_an_option_of_a_plan_does_not_start_a_run(
    option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--config", "configs/no_such_run.toml", *option])
    assert f"{option[0]} is an option of --dry-run; add that" in capsys.readouterr().err
