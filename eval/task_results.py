"""Results of downstream tasks: metrics by task, the mean of the paper's accuracies, a printed table."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

NORMALIZED = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "sciq")
ACCURACIES = ("boolq", *NORMALIZED, "winogrande")
PAPER = (*ACCURACIES, "lambada_openai", "wikitext")

RESULTS_FILE = "results.json"
"""Written by `python -m eval.downstream --out`, read by `python -m eval.report`."""


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """Results of a model on downstream tasks.

    Attributes:
        metrics: Task -> metric -> value; a metric's standard error has its name and "_stderr":
            {"hellaswag": {"acc": .., "acc_stderr": .., "acc_norm": .., ..}}. A filter other than "none" is
            part of the name, as in "exact_match,strict-match".
        num_documents: Number of evaluated documents by task.
        mean_accuracy: Mean of the paper's eight accuracies, acc_norm where the harness has it; None unless
            all eight were evaluated.
        mean_plain_accuracy: Mean of acc of the same eight.
        num_tokens: Tokens that went through the model, on all ranks.
        num_reused: Requests whose results were already in the cache file.
        seconds: Wall time.
    """

    metrics: dict[str, dict[str, float]]
    num_documents: dict[str, int]
    mean_accuracy: float | None
    mean_plain_accuracy: float | None
    num_tokens: int
    num_reused: int
    seconds: float


def mean_accuracy(metrics: Mapping[str, Mapping[str, float]], *, normalized: bool) -> float | None:
    """Compute the mean of the paper's eight accuracies.

    Args:
        metrics: Task -> metric -> value.
        normalized: Whether to take acc_norm where the harness has it; otherwise acc of all eight.

    Returns:
        None unless all eight are there.
    """
    names = {task: "acc_norm" if normalized and task in NORMALIZED else "acc" for task in ACCURACIES}
    if any(name not in metrics.get(task, {}) for task, name in names.items()):
        return None
    return statistics.fmean(metrics[task][name] for task, name in names.items())


def format_table(results: TaskResults) -> str:
    """Format results as a table: task, metric, value, standard error, documents."""
    lines = [f"{'task':<16} {'metric':<18} {'value':>10} {'stderr':>8} {'documents':>9}"]
    for task, metrics in results.metrics.items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr")
                text = f"{error:8.4f}" if error is not None else " " * 8
                documents = f"{results.num_documents[task]:9,}"
                lines.append(f"{task:<16} {metric:<18} {value:10.4f} {text} {documents}")
    for name, value in (
        ("acc_norm or acc", results.mean_accuracy),
        ("acc", results.mean_plain_accuracy),
    ):
        if value is not None:
            lines.append(f"{'mean of eight':<16} {name:<18} {value:10.4f}")
    speed = results.num_tokens / results.seconds
    lines.append(f"{results.num_tokens:,} tokens in {results.seconds:.1f} s ({speed:,.0f} tokens/s)")
    if results.num_reused:
        lines.append(f"{results.num_reused:,} requests were reused from an earlier evaluation of this model")
    return "\n".join(lines)
