"""Losses of the model's kernels beside those of plain PyTorch code, on the same rows.

    python -m benchmarks.plain_path configs/60m_softmax_muon.toml [...] [-- --data.tokenizer DIR ...]

trains each config on one GPU three times for 200 steps: as it is; by plain code in the same precision
(attention in blocks of PyTorch products, norms, RoPE and loss by PyTorch, nothing compiled or captured); and
by plain code in fp32. The first two round at other places. If the kernels compute the same, their losses are
as far from those in fp32 as the plain code's, which are the size of bf16's noise. Writes the losses of each
run, and draws the differences to fp32, under the same name. Interrupted, the same command with --resume
trains only what is missing.
"""

import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import add_resume, command_without_resume, make_parser, parse_with_overrides
from benchmarks.machine import write_result
from benchmarks.training import launch, load_rows, read_steps
from config import load
from errors import run_command
from training.run_config import RunConfig

PATHS: dict[str, list[str]] = {
    "kernels": ["train.py"],
    "plain": ["-m", "benchmarks.plain_trainer"],
    "plain in fp32": ["-m", "benchmarks.plain_trainer"],
}
"""Program of each path."""

_TRUTH = "plain in fp32"
_SMOOTHED = 10
"""Steps of a mean in the figure."""


def losses_of(path: str, name: str, steps: int, overrides: Sequence[str]) -> list[float]:
    """Train a config and return the training loss of each step.

    Args:
        path: The TOML file.
        name: Of PATHS.
        steps: Number of steps, of one micro-batch.
        overrides: Overrides as train.py takes them.
    """
    rows = str(load(RunConfig, path, overrides).training.local_batch_size)
    fixed = ["--training.global_batch_size", rows, "--training.stop_at_step", str(steps)]
    fixed += ["--data.validation", "none", "--eval.every", "none", "--diagnostics.every", "none"]
    if name == _TRUTH:
        fixed += ["--training.precision", "float32"]
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", path, *overrides, *fixed, "--run.folder", folder]
        launch([*PATHS[name], *words], (), 1)
        return [record["loss"] for record in read_steps(Path(folder))]


def differences(losses: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Compare the losses of each path with those in fp32.

    Args:
        losses: By name of PATHS.

    Returns:
        For each other path the root mean square and the mean of the differences, and the mean over the last
        quarter of the steps, in nats.
    """
    found = {}
    for name, values in losses.items():
        if name == _TRUTH:
            continue
        gaps = [value - truth for value, truth in zip(values, losses[_TRUTH], strict=True)]
        found[name] = {
            "rms": math.sqrt(statistics.fmean(gap * gap for gap in gaps)),
            "mean": statistics.fmean(gaps),
            "mean_of_last_quarter": statistics.fmean(gaps[-max(1, len(gaps) // 4) :]),
        }
    return found


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the differences to fp32 over the steps, a panel for each config, as PNG and PDF."""
    from eval.figure import label_axes, new_panels, save  # matplotlib is an extra

    figure, grid = new_panels(len(rows), 1, size=(6.4, 2.8 * len(rows)))
    for row, (axes,) in zip(rows, grid, strict=True):
        for name in row["differences"]:
            gaps = [a - b for a, b in zip(row["losses"][name], row["losses"][_TRUTH], strict=True)]
            means = [statistics.fmean(gaps[max(0, i - _SMOOTHED + 1) : i + 1]) for i in range(len(gaps))]
            axes.plot(range(1, len(gaps) + 1), means, label=name, linewidth=1.2)
        axes.axhline(0.0, color="#999999", linewidth=0.8)
        axes.set_title(Path(row["config"]).stem, fontsize=11)
        axes.legend(frameon=False, fontsize=9)
        label_axes(axes, x="Step", y="Loss minus fp32's (nats)")
    save(figure, path)


def main() -> None:
    """Run `python -m benchmarks.plain_path`."""
    parser = make_parser("plain_path", __doc__, name="plain_path")
    parser.add_argument("configs", nargs="+", help="config files, of softmax attention or Parallax")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (200)")
    add_resume(parser)
    options, overrides = parse_with_overrides(parser)
    command = command_without_resume("plain_path")
    rows = load_rows(options.out / f"{options.name}.json", command) if options.resume else []
    by_config = {row["config"]: row for row in rows}
    for path in options.configs:
        if path not in by_config:
            by_config[path] = {"config": path, "losses": {}}
            rows.append(by_config[path])
        row = by_config[path]
        for name in PATHS:
            if name not in row["losses"]:
                row["losses"][name] = losses_of(path, name, options.steps, overrides)
                write_result(options.name, {"command": command, "rows": rows}, options.out)
        row["differences"] = differences(row["losses"])
        write_result(options.name, {"command": command, "rows": rows}, options.out)
        for name, found in row["differences"].items():
            numbers = ", ".join(f"{key} {value:+.5f}" for key, value in found.items())
            print(f"{Path(path).stem}, {name} minus fp32: {numbers}", flush=True)
    plot(rows, options.out / f"{options.name}.png")


if __name__ == "__main__":
    sys.exit(run_command(main))
