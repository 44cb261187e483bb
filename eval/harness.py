"""Evaluation of our models on tasks of lm-evaluation-harness; the only module that imports it."""

import functools
import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval import __version__ as harness_version
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, perplexity
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from data.progress import Progress
from data.tokenizer import Tokenizer
from errors import UnsupportedError, UserError
from eval.harness_state import quiet, seeded
from eval.local_tasks import downloading, local_task
from eval.scoring.language_model import LanguageModel
from eval.scoring.requests import continuation_start, num_excess
from eval.scoring.saved_results import SavedResults
from eval.scoring.scorer import Scorer, windows
from eval.task_results import PAPER, CutCounts, TaskResults, mean_accuracy
from models.generation.text_stream import decode_behind, stop_at

# the harness's default for tasks without max_gen_toks
_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """A language model and its tokenizer behind the harness's interface.

    Args:
        model: The model.
        tokenizer: Its tokenizer; the end-of-document token stands for an empty context.
        scorer: A scorer of that model.

    Attributes:
        cut: What did not fit into the model so far, by task.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, scorer: Scorer) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._scorer = scorer
        self.cut: dict[str, CutCounts] = {}

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-document token."""
        return self._tokenizer.end_of_document_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text, without adding special tokens."""
        return self._tokenizer.encode_prompts([string])[0]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scorer.log_likelihoods([(context, text) for _, context, text in requests])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Compute log-likelihoods of continuations, tokenized with their contexts as the harness does.

        Args:
            requests: Requests whose args are a context and a continuation. The end-of-document token stands
                for an empty context; spaces at the end of a context are moved to the continuation.
            disable_tqdm: Ignored: there is no progress bar.

        Returns:
            For each the log-likelihood in nats and whether the continuation is greedy; (0.0, True) for an
            empty continuation alone.

        Raises:
            UserError: A continuation that is not empty has no token, nor has its context.
        """
        pairs: list[tuple[str, str]] = []
        for context, continuation in (request.args for request in requests):
            stripped = context.rstrip()
            # a context of spaces alone stays: without it there would be no token to predict from
            at = len(stripped) if stripped and continuation else len(context)
            pairs.append((context[:at], context[at:] + continuation))
        texts = list(dict.fromkeys(text for a, b in pairs for text in (a, a + b)))
        ids = dict(zip(texts, self._tokenizer.encode_prompts(texts), strict=True))
        split = [self._split(a, b, ids) for a, b in pairs]
        for request, (context, continuation) in zip(requests, split, strict=True):
            excess = num_excess(context, continuation, self._model.max_length)
            self._count(request, len(context), is_cut=excess > 0, num_dropped=excess)
        return self._scorer.log_likelihoods(split)

    def _split(
        self, context: str, continuation: str, ids: Mapping[str, list[int]]
    ) -> tuple[list[int], list[int]]:
        """Split the tokens of a context and its continuation; ids are those of the texts."""
        if not continuation:
            return ids[context] or [self.eot_token_id], []
        whole = ids[context + continuation]
        if not whole:
            raise UserError(f"the continuation {continuation!r} after {context!r} has no token: leave it out")
        first = continuation_start(ids[context], whole)
        if not first:
            starts_document = whole[0] == self.eot_token_id and len(whole) > 1
            whole, first = whole if starts_document else [self.eot_token_id, *whole], 1
        return whole[:first], whole[first:]

    def _count(self, request: Instance, num_tokens: int, *, is_cut: bool, num_dropped: int = 0) -> None:
        counts = self.cut.setdefault(request.task_name or "", CutCounts())
        counts.add(num_tokens, is_cut=is_cut, num_dropped=num_dropped)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Compute log-likelihoods of whole texts in nats, in rolling windows.

        Args:
            requests: Requests whose args are a text; the end-of-document token precedes it.
            disable_tqdm: Ignored: there is no progress bar.
        """
        split: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        texts = [request.args[0] for request in requests]
        for owner, ids in enumerate(self._tokenizer.encode_prompts(texts)):
            self._count(requests[owner], len(ids), is_cut=len(ids) > self._model.max_length)
            tokens = [self.eot_token_id, *ids]
            for start, predicted, end in windows(len(tokens), self._model.max_length):
                split.append((tokens[start:predicted], tokens[predicted:end]))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._scorer.log_likelihoods(split), strict=True):
            sums[owner] += log_prob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts greedily.

        Args:
            requests: Requests whose args are a text and the harness's options: `until`, `max_gen_toks`.
            disable_tqdm: Ignored: there is no progress bar.

        Returns:
            The continuations, truncated before the first stop string.

        Raises:
            UnsupportedError: A task samples.
            UserError: max_gen_toks leaves no room for a prompt.
        """
        by_length: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            _, options = _prompt(request)
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise UnsupportedError(f"{request.task_name} samples; greedy generation works here")
            by_length.setdefault(int(options.get("max_gen_toks", _MAX_NEW_TOKENS)), []).append(index)
        texts = [""] * len(requests)
        for max_new_tokens, indices in sorted(by_length.items()):
            found = self._generate([requests[index] for index in indices], max_new_tokens)
            for index, text in zip(indices, found, strict=True):
                texts[index] = text
        return texts

    def _generate(self, requests: Sequence[Instance], max_new_tokens: int) -> list[str]:
        room = self._model.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"a task generates {max_new_tokens} tokens, but the model's max_length is "
                f"{self._model.max_length}, prompt included; give a larger --max-length if it can, or leave "
                "the task out"
            )
        until = [_as_list(_prompt(request)[1].get("until")) for request in requests]
        prompts: list[list[int]] = []
        encoded = self._tokenizer.encode_prompts([_prompt(request)[0] for request in requests])
        for request, ids in zip(requests, encoded, strict=True):
            excess = max(len(ids) - room, 0)
            self._count(request, len(ids), is_cut=excess > 0, num_dropped=excess)
            prompts.append((ids or [self.eot_token_id])[excess:])

        decode = self._tokenizer.decode
        stops = [stop_at(decode, ends, [ids]) for ends, ids in zip(until, encoded, strict=True)]
        found = self._scorer.generate(
            prompts,
            until,
            max_new_tokens,
            {self.eot_token_id},
            stop=lambda index, tokens: stops[index](0, tokens),
        )
        answers: list[str] = []
        for ids, tokens, ends in zip(encoded, found, until, strict=True):
            text = decode_behind(decode, ids, [token for token in tokens if token != self.eot_token_id])
            for end in ends:
                text = text.split(end)[0]
            answers.append(text)
        return answers


def _prompt(request: Instance) -> tuple[str, dict[str, Any]]:
    """Return the text to continue and the harness's options."""
    text, options = request.args
    return str(text), options


def _as_list(until: str | Sequence[str] | None) -> list[str]:
    ends = [until] if isinstance(until, str) else list(until or ())
    return [end for end in ends if end]


@functools.cache
def _task_manager() -> TaskManager:
    """Index all tasks of the harness, which takes seconds."""
    return TaskManager()


def load_tasks(names: Sequence[str], data: Path | None, num_fewshot: int | None = None) -> dict[str, Task]:
    """Load tasks of the harness with their documents.

    Args:
        names: Tasks, tags or groups; "paper" for the paper's ten.
        data: Folder with their documents; None to have the harness download them from the hub.
        num_fewshot: Few-shot examples of each task; None for the task's own number. As in the harness, a task
            that sets 0 itself keeps it; so does one of whole texts, which have no place for examples.

    Returns:
        Tasks by name, without duplicates.

    Raises:
        UserError: The harness has no such task, the hub cannot be reached, or a file is missing or damaged.
    """
    wanted = list(dict.fromkeys(each for name in names for each in (PAPER if name == "paper" else (name,))))
    manager = _task_manager()
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown or not wanted:
        close = [get_close_matches(name, manager.all_tasks, n=1) for name in unknown]
        nearest = f"nearest is {', '.join(each[0] for each in close if each)}; " if any(close) else ""
        spaces = "separate names by spaces; " if any("," in name for name in unknown) else ""
        raise UserError(
            f"lm-evaluation-harness {harness_version} has no task "
            f'{", ".join(unknown) or "(none was named)"}; {spaces or nearest}"paper" stands for the ten of '
            "the paper"
        )
    if data is None:
        downloaded: dict[str, Task] = {}
        for name in wanted:
            with downloading(name):
                downloaded |= manager.load([name])["tasks"]
        for task in downloaded.values():
            _set_up(task, num_fewshot)
        return downloaded
    group = {"group": "local", "task": [local_task(name, data) for name in wanted]}
    try:
        tasks = manager.load(group)["tasks"]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"the documents of {', '.join(wanted)} in {data} do not fit the task: {error!r}"
        ) from error
    for name, task in tasks.items():
        _set_up(task, num_fewshot)
        if task.config.num_fewshot and not task.has_training_docs():
            raise UserError(
                f"{name} has {task.config.num_fewshot} few-shot examples: want them in "
                f"{data}/{name}.train.jsonl"
            )
    return tasks


def _set_up(task: Task, num_fewshot: int | None) -> None:
    """Set a task's number of few-shot examples and its seed, and have its answers shuffled once."""
    if (process := task.get_config("process_docs")) is not None:
        # the harness calls it on every pass over the documents; shuffled answers must stay the same
        task.set_config(key="process_docs", value=functools.cache(process))
    own = task.get_config("num_fewshot")
    is_fixed = own == 0 or task.OUTPUT_TYPE == "loglikelihood_rolling"
    task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None or is_fixed else num_fewshot)
    task.set_fewshot_seed(seed=1234)
    # the dict is the task's own
    aggregations: dict[str, Any] = task.aggregation() or {}
    aggregations.update({metric: _or_infinite(each) for metric, each in aggregations.items()})


def _or_infinite(aggregate: Callable[[Any], float]) -> Callable[[Any], float]:
    """Return a metric's mean over documents that is infinite where the harness's own overflows."""

    @functools.wraps(aggregate)
    def aggregated(items: Any) -> float:
        try:
            return aggregate(items)
        except OverflowError:  # exp of the nats per word, such as of a page without a space
            return math.inf

    return aggregated


def _metrics(task: Task, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return a task's metrics, with standard errors over its documents where the metric is a mean of them."""
    values: dict[str, float] = {}
    aggregations = {metric: inspect.unwrap(each) for metric, each in (task.aggregation() or {}).items()}
    for key, value in result.items():
        metric, _, source = key.partition(",")
        if metric.endswith("_stderr") or not source or not isinstance(value, int | float):
            continue
        name = metric if source == "none" else key
        values[name] = float(value)
        aggregation = aggregations.get(metric)
        each = [sample[metric] for sample in samples if sample["filter"] == source]
        if aggregation in (mean, perplexity) and len(each) > 1:
            error = statistics.stdev(map(float, each)) / math.sqrt(len(each))
            # perplexity is exp(-mean): the error to first order
            values[f"{name}_stderr"] = error * (values[name] if aggregation is perplexity else 1.0)
    return values


def evaluate_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    token_budget: int = 65536,
    cache_file: Path | None = None,
    progress: Progress | None = None,
) -> TaskResults:
    """Evaluate a model on tasks of the harness.

    A collective: every rank passes the same arguments, computes its share of the batches and gets the same
    results. `eval.scoring.language_model.Qwen3Model(qwen3, max_length=seq_len)` makes a LanguageModel of one
    of ours, sharded or not.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, tags or groups; "paper" for the paper's ten.
        data: Folder with the tasks' documents, as for `python -m eval.downstream --data`; None to have the
            harness download them from the hub.
        limit: Evaluate only the first documents of each task, this many; None for all.
        num_fewshot: As for load_tasks.
        token_budget: Most tokens per batch.
        cache_file: JSONL file of results by request, read at the start and appended to; needs a model with
            an identity. None for no file.
        progress: Told how much of each kind of requests is done.

    Returns:
        Metrics by task, and the mean of the paper's eight accuracies.

    Raises:
        UserError: An unknown task, a missing or damaged file, or a cache file of another model.
    """
    start = time.perf_counter()
    saved = None
    if cache_file is not None:
        if not model.identity:
            raise UserError(f"cache_file is {cache_file}, but the model has no identity to check it against")
        fingerprint = SavedResults.key(model.identity, model.max_length, tokenizer.fingerprint)
        saved = SavedResults(cache_file, fingerprint)
    scorer = Scorer(model, token_budget=token_budget, saved=saved, progress=progress)
    with quiet(), seeded():
        loaded = load_tasks(tasks, data, num_fewshot)
        lm = HarnessModel(model, tokenizer, scorer)
        results = evaluate(
            lm,
            task_dict={"tasks": loaded, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
        )
    assert results is not None
    metrics = {
        name: _metrics(task, results["results"][name], results["samples"][name])
        for name, task in loaded.items()
    }
    return TaskResults(
        metrics=metrics,
        num_documents={name: results["n-samples"][name]["effective"] for name in loaded},
        num_fewshot={name: task.get_config("num_fewshot") for name, task in loaded.items()},
        cut={name: lm.cut.get(name, CutCounts()) for name in loaded},
        mean_accuracy=mean_accuracy(metrics, normalized=True),
        mean_plain_accuracy=mean_accuracy(metrics, normalized=False),
        num_tokens=scorer.num_tokens,
        num_reused=scorer.num_reused,
        seconds=time.perf_counter() - start,
    )
