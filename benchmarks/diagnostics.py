"""The cost of diagnostics during training: a measurement beside the training step of the same model.

    python -m benchmarks.diagnostics configs/0.6b_parallax_muon.toml [...] [-- --data.tokenizer DIR ...]

trains each config on one GPU, one micro-batch per step, and measures every 10 steps. It prints the seconds of
the first measurement, which is cold and reads the held-out text, and the median of the others; and the share
of training time that a measurement every 100 steps takes, for one micro-batch per step and for the config's
own global batch on one GPU (the same step times the number of micro-batches). Arguments after `--` are
overrides of every run, for example the folder of the data. The measured text is held out of the training
shards unless they name another `data.validation`.
"""

import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import make_parser, parse_with_overrides
from benchmarks.machine import describe, write_result
from benchmarks.training import WARMUP_STEPS, launch, read_steps
from config import load
from data.config import ShardsSource
from errors import run_command
from eval.diagnostics.record import read_records
from models.run_folder import RunFolder
from training.run_config import RunConfig

EVERY = 10
"""Steps between two measurements of the benchmark."""

STEPS = 5 * EVERY
EVERY_IN_TRAINING = 100
"""Steps between two measurements for which the share is printed, the default of diagnostics.every."""


def run_overrides(config: RunConfig) -> list[str]:
    """Return overrides by which a config trains one micro-batch per step, measures, and evaluates little."""
    rows = str(config.training.local_batch_size)
    words = ["--training.global_batch_size", rows, "--training.stop_at_step", str(STEPS)]
    words += ["--diagnostics.every", str(EVERY), "--eval.every", "none", "--eval.max_tokens", "65536"]
    data = config.data
    if isinstance(data.train, ShardsSource) and isinstance(data.validation, ShardsSource):
        words += ["--data.validation.folder", data.train.folder, "--data.validation_documents", "held_out"]
    return words


def cost(
    measurements: Sequence[float], step_seconds: Sequence[float], num_micro_batches: int
) -> dict[str, float]:
    """Summarize a run.

    Args:
        measurements: Seconds of each measurement, the first one cold.
        step_seconds: Seconds of each step of one micro-batch, without the warm-up.
        num_micro_batches: Micro-batches of a step of the config's own global batch on one GPU.

    Returns:
        Seconds of the first measurement, of the others' median and of a step, and the percentages of
        training time with one measurement per EVERY_IN_TRAINING steps.
    """
    cold, *warm = measurements
    seconds, step = statistics.median(warm), statistics.median(step_seconds)

    def percent(step_of_training: float) -> float:
        return 100 * seconds / (seconds + EVERY_IN_TRAINING * step_of_training)

    return {
        "cold_seconds": cold,
        "seconds": seconds,
        "step_seconds": step,
        "percent_of_global_batch": percent(num_micro_batches * step),
        "percent_of_micro_batch": percent(step),
    }


def measure(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Train a config for STEPS steps and return its `cost`, with the sizes.

    Args:
        path: The TOML file.
        overrides: Overrides as train.py takes them.
    """
    config = load(RunConfig, path, overrides)
    training = config.training
    num_micro_batches = config.gradient_accumulation_steps(1)
    words = ["--config", path, *run_overrides(config), *overrides]
    with tempfile.TemporaryDirectory() as folder:
        launch(["train.py", *words, "--run.folder", folder], (), 1)
        steps = read_steps(Path(folder))[WARMUP_STEPS:]
        file = RunFolder(Path(folder)).diagnostics_file
        records = read_records(file)
        size = file.stat().st_size // len(records)
    return {
        "config": path,
        "num_layers": config.model.dimensions.num_layers,
        "seq_len": training.seq_len,
        "micro_batch_rows": training.local_batch_size,
        "num_micro_batches": num_micro_batches,
        "num_queries": records[0]["sample"]["num_queries"],
        "num_rows": records[0]["sample"]["num_rows"],
        "record_bytes": size,
        "measurements": [record["seconds"] for record in records],
        **cost(
            [record["seconds"] for record in records],
            [record["step_seconds"] for record in steps],
            num_micro_batches,
        ),
    }


def main() -> None:
    """Run `python -m benchmarks.diagnostics`."""
    parser = make_parser("diagnostics", __doc__, name="diagnostics")
    parser.add_argument("configs", nargs="+", help="config files")
    options, overrides = parse_with_overrides(parser)
    command = "python -m benchmarks.diagnostics " + shlex.join(sys.argv[1:])
    rows = []
    for path in options.configs:
        rows.append(measure(path, overrides))
        write_result(options.name, {"command": command, "rows": rows}, options.out)
    print(describe())
    print(f"{'config':40} {'cold':>8} {'seconds':>8} {'step':>8} {'global batch':>13} {'micro-batch':>12}")
    for row in rows:
        times = "".join(f" {row[name]:8.3f}" for name in ("cold_seconds", "seconds", "step_seconds"))
        shares = f" {row['percent_of_global_batch']:12.4f}% {row['percent_of_micro_batch']:11.3f}%"
        print(f"{Path(row['config']).stem:40}{times}{shares}")


if __name__ == "__main__":
    sys.exit(run_command(main))
