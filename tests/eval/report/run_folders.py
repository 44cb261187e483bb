"""Run folders as the trainer writes them, and cells of the report on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import config
from config import to_toml
from eval.report.writer import write_report
from training.run_config import RunConfig

CONFIGS = Path(__file__).parents[3] / "configs"
STEPS = 30
STEP_TOKENS = 8 * 32
SMALL = (
    *("--training.steps", str(STEPS), "--training.seq_len", "32"),
    *("--training.global_batch_size", "8", "--training.local_batch_size", "8"),
)
LAUNCH = {"num_ranks": 2, "device": "NVIDIA H100", "flops_per_token": 100.0, "num_parameters": 2_500_000}


def launch(step: int = 0, **changes: Any) -> dict[str, Any]:
    return {"step": step, "launch": {**LAUNCH, "tokenizer_fingerprint": "f" * 16, **changes}}


def step_record(step: int, loss: float, seconds: float = 1.8) -> dict[str, Any]:
    return {
        **{
            "step": step,
            "loss": loss,
            "grad_norm": 1.0,
            "tokens": step * STEP_TOKENS,
            "step_seconds": seconds,
        },
        **{"tokens_per_second": 1000.0 + step, "mfu_percent": 40.0, "peak_memory_gib": 10.0 + step},
    }


def training(loss: float, first: int = 1, last: int = STEPS) -> list[dict[str, Any]]:
    """Records of steps whose loss falls by 0.1 per step to `loss` at STEPS."""
    return [step_record(step, loss + 0.1 * (STEPS - step)) for step in range(first, last + 1)]


def held_out(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "validation_loss": loss, "validation_tokens": 500}


def make_run(
    folder: Path, records: Sequence[dict[str, Any]], *words: str, name: str = "debug_parallax_muon"
) -> Path:
    """Write a run folder as the trainer does."""
    loaded = config.load(RunConfig, CONFIGS / f"{name}.toml", [*SMALL, "--run.folder", str(folder), *words])
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(loaded))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def seeds(
    tmp_path: Path, name: str, losses: Sequence[float], *words: str, optimizer: str = "muon"
) -> list[Path]:
    """Write finished runs of one row, with a held-out loss before, in the middle and after."""
    folders = []
    for seed, loss in enumerate(losses):
        evaluations = (held_out(0, 8.0), held_out(15, loss + 1.0), held_out(STEPS, loss))
        own = (*words, "--run.seed", str(seed), "--data.shuffle_seed", str(10 + seed))
        records = [launch(), *training(loss + 0.5), *evaluations]
        folder = tmp_path / "_".join([name, optimizer, *words[1::2], str(seed)])
        folders.append(make_run(folder, records, *own, name=f"debug_{name}_{optimizer}"))
    return folders


def _split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def cells(text: str, heading: str, row: str) -> dict[str, str]:
    """Return the cells of a row of the table below a heading, by column."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    line = next(line for line in lines if line.startswith(f"| {row} |"))
    return dict(zip(_split(lines[0]), _split(line), strict=True))


def rows_of(text: str, heading: str) -> list[str]:
    """Return the first cells of the table below a heading."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [_split(line)[0] for line in section.splitlines() if line.startswith("|")][2:]


def report(folders: Sequence[Path], tmp_path: Path, **options: Any) -> str:
    options = {"baseline": None, **options}
    return write_report(folders, out=tmp_path / "out", **options).read_text()


def write_results(
    path: Path, checkpoint: Path, metrics: dict[str, float], num_documents: int, **more: Any
) -> None:
    path.parent.mkdir(exist_ok=True)
    found = {task: {"acc": value, "acc_norm": value} for task, value in metrics.items()}
    counts = dict.fromkeys(metrics, num_documents)
    means = {"mean_accuracy": None, "mean_plain_accuracy": None}
    results = {"checkpoint": str(checkpoint), "metrics": found, "num_documents": counts, **means, **more}
    path.write_text(json.dumps(results))


def diagnostics_record(step: int, ratio: float | None, entropy: float) -> dict[str, Any]:
    """Make a record of two layers with two heads each; the second layer's values are 1 larger."""
    layers = []
    for layer in (0, 1):
        heads: dict[str, Any] = {"entropy/mean": [entropy + layer - 0.5, entropy + layer + 0.5]}
        if ratio is not None:
            heads["correction_ratio/median"] = [ratio + layer, ratio + layer]
        context = {"entropy": {"mean": [entropy + layer, None], "stderr": [0.1, None]}}
        weights = {"wq": {"stable_rank": 40.0 + step, "spectral_norm": 2.0}}
        layers.append(
            {"layer": layer, "heads": heads, "by_context": context, "weights": weights, "gains": {}}
        )
    bounds = {"bounds": [[1, 16], [17, 32]], "num_queries": [3, 4]}
    return {"step": step, "tokens": step * STEP_TOKENS, "context": bounds, "layers": layers}
