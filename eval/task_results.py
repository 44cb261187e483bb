"""Results of downstream tasks: metrics by task, the mean of the paper's accuracies, a printed table."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

NORMALIZED = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "sciq")
ACCURACIES = ("boolq", *NORMALIZED, "winogrande")
PAPER = (*ACCURACIES, "lambada_openai", "wikitext")

RESULTS_FILE = "results.json"
"""Written by `python -m eval.downstream --out`, read by `python -m eval.report`."""


@dataclass
class CutCounts:
    """What a task's requests lost where they did not fit into the model's max_length.

    Attributes:
        num_requests: Requests of the task.
        num_cut: Those that did not fit: a context or prompt that lost its beginning, or a whole text that was
            predicted in several windows, the later ones without what precedes their window.
        num_tokens: Tokens of all contexts, prompts and whole texts.
        num_dropped: Tokens of contexts and prompts that no prediction saw.
    """

    num_requests: int = 0
    num_cut: int = 0
    num_tokens: int = 0
    num_dropped: int = 0

    def add(self, num_tokens: int, *, is_cut: bool, num_dropped: int = 0) -> None:
        """Add a request.

        Args:
            num_tokens: Tokens of its context, prompt or whole text.
            is_cut: Whether it did not fit.
            num_dropped: Tokens that no prediction saw.
        """
        self.num_requests += 1
        self.num_cut += is_cut
        self.num_tokens += num_tokens
        self.num_dropped += num_dropped


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """Results of a model on downstream tasks.

    Attributes:
        metrics: Task -> metric -> value; a metric's standard error has its name and "_stderr":
            {"hellaswag": {"acc": .., "acc_stderr": .., "acc_norm": .., ..}}. A filter other than "none" is
            part of the name, as in "exact_match,strict-match".
        num_documents: Number of evaluated documents by task.
        num_fewshot: Number of few-shot examples by task.
        cut: What did not fit into the model's max_length, by task.
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
    num_fewshot: dict[str, int]
    cut: dict[str, CutCounts]


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
    """Format results as a table: task, metric, value, standard error, documents, few-shot examples.

    What did not fit into the model follows, a line per task.
    """
    lines = [f"{'task':<16} {'metric':<18} {'value':>10} {'stderr':>8} {'documents':>9} {'few-shot':>8}"]
    for task, metrics in results.metrics.items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr")
                text = f"{error:8.4f}" if error is not None else " " * 8
                documents = f"{results.num_documents[task]:9,} {results.num_fewshot[task]:8}"
                lines.append(f"{task:<16} {metric:<18} {value:10.4f} {text} {documents}")
    for name, value in (
        ("acc_norm or acc", results.mean_accuracy),
        ("acc", results.mean_plain_accuracy),
    ):
        if value is not None:
            lines.append(f"{'mean of eight':<16} {name:<18} {value:10.4f}")
    lines += [_format_cut(task, counts) for task, counts in results.cut.items() if counts.num_cut]
    speed = results.num_tokens / results.seconds
    lines.append(f"{results.num_tokens:,} tokens in {results.seconds:.1f} s ({speed:,.0f} tokens/s)")
    if results.num_reused:
        lines.append(f"{results.num_reused:,} requests were reused from an earlier evaluation of this model")
    return "\n".join(lines)


def _format_cut(task: str, counts: CutCounts) -> str:
    lost = "they were predicted in several windows"
    if counts.num_dropped:
        lost = (
            f"{counts.num_dropped:,} of {counts.num_tokens:,} tokens were dropped from the beginning of "
            "contexts; --max-length sets what fits"
        )
    return f"{task}: {counts.num_cut:,} of {counts.num_requests:,} requests did not fit: {lost}"
