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
    """Return the hours and GPU-hours of the whole run that a dry run prints."""
    match = re.search(r"^time of the whole run +([\d.,]+) hours, ([\d,]+) GPU-hours", text, re.MULTILINE)
    assert match is not None, text
    return float(match[1].replace(",", "")), float(match[2].replace(",", ""))


def test_gpu_hours_of_the_06b_at_a_stated_mfu_by_hand() -> None:
    for name in ("0.6b_softmax_muon", "0.6b_parallax_muon"):
        run = config(name)
        flops = 20_000 * 1024 * 4096 * build_meta_model(run).num_flops_per_token(4096)
        for mfu, gpu, peak in ((40.0, "h100", 989e12), (25.0, "A100", 312e12)):
            text = dry_run(run, 64, gpu=gpu, mfu=mfu)
            expected = flops / (mfu / 100 * peak) / 3600
            assert hours(text) == (pytest.approx(expected / 64, abs=0.051), pytest.approx(expected, abs=0.51))
            assert f"{mfu}% by whole rows (mfu_whole_rows_percent), as stated" in text
    assert 280 < hours(dry_run(config("0.6b_softmax_muon"), 64, gpu="h100", mfu=40.0))[1] < 310


def test_without_a_stated_mfu_the_time_is_that_of_the_model_of_a_step() -> None:
    run = config("0.6b_parallax_muon")
    time = estimate_step_time(run, build_meta_model(run), 64)
    assert time is not None
    h200 = dry_run(run, 64)
    assert hours(h200)[0] == pytest.approx(20_000 * time.total / 3600, abs=0.051)
    assert f"{1e3 * time.total:.0f} ms on 64 H200s, compiled: products" in h200
    # the same share of another peak
    assert "by training/step_time.py for H200s" in dry_run(run, 64, gpu="b200")
    assert hours(dry_run(run, 64, gpu="b200"))[1] == pytest.approx(hours(h200)[1] * 989 / 2250, rel=0.01)


def test_attention_without_a_model_of_its_time_asks_for_the_mfu() -> None:
    run = config("60m_lla_muon")
    assert "no estimate for attention.kind lla; state an MFU by --mfu PERCENT" in dry_run(run, 8)
    assert hours(dry_run(run, 8, mfu=3.0))[1] > 0


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
    assert hours(done.stdout) == (4.6, 294)
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
