"""Answers of our batched scoring and of the harness's own Hugging Face model, and their comparison."""

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from data.tokenizer import Tokenizer
from errors import UserError
from eval.harness import HarnessModel, load_tasks
from eval.harness_state import quiet
from eval.scoring.language_model import LanguageModel, Qwen3Model
from eval.scoring.scorer import Scorer
from eval.scoring.transformers_model import TransformersModel
from models.checkpoint.load import load_model
from models.config import ModelConfig
from models.convert.format import to_config_json, to_hugging_face
from models.init import init_weights
from models.qwen3 import Qwen3
from tokens import END_OF_DOCUMENT


@dataclass(frozen=True)
class Answers:
    """One side's answers to the requests of some tasks.

    Attributes:
        values: Log-likelihood in nats and greedy flag of every request, by task; the flag is None for rolling
            log-likelihoods.
        arguments: Context and continuation of every request, in the same order.
        metrics: The harness's metrics by task.
        num_documents: Number of documents of each task.
        seconds: Time of answering the requests, including tokenization.
    """

    values: dict[str, list[tuple[float, bool | None]]]
    arguments: dict[str, list[tuple[str, str]]]
    metrics: dict[str, dict[str, float]]
    num_documents: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class Parity:
    """Differences between the answers of two sides.

    Attributes:
        num_documents: Number of documents of all tasks.
        num_requests: Number of requests of all tasks.
        max_difference: Maximum difference of a log-likelihood, in nats.
        max_relative: Maximum of the difference over 1 + the log-likelihood's magnitude.
        flags_differ: Number of requests whose greedy flags differ.
        choices_differ: Accuracies that are not exactly equal, by task and metric: (ours, theirs).
    """

    num_documents: int
    num_requests: int
    max_difference: float
    max_relative: float
    flags_differ: int
    choices_differ: dict[str, dict[str, tuple[float, float]]]


def to_transformers(model: Qwen3) -> Any:
    """Convert a model to transformers, with copies of its weights in the same dtype on the same device.

    Args:
        model: A model that transformers' Qwen3 can represent, with softmax attention.

    Returns:
        A `Qwen3ForCausalLM` in eval mode.
    """
    weight = model.tok_embeddings.weight
    assert isinstance(weight, torch.Tensor)
    dtype = str(weight.dtype).removeprefix("torch.")
    table = to_config_json(model.config, dtype=dtype, num_positions=None, eos_token_id=None)
    with torch.device(weight.device):
        theirs: Any = transformers.Qwen3ForCausalLM(transformers.Qwen3Config.from_dict(table))
    theirs = theirs.to(weight.dtype)
    missing = theirs.load_state_dict(to_hugging_face(model.state_dict()), strict=False)
    assert not missing.unexpected_keys, missing
    theirs.tie_weights()
    return theirs.eval()


def harness_model(hf_model: Any, tokenizer: Any, *, max_length: int, batch_size: int) -> HFLM:
    """Wrap a model of transformers in the harness's own Hugging Face model.

    Args:
        hf_model: A `PreTrainedModel`.
        tokenizer: A `PreTrainedTokenizerFast`.
        max_length: Maximum tokens of an input.
        batch_size: Rows of a batch.
    """
    return HFLM(pretrained=hf_model, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size)


def _timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **options)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def answer(lm: TemplateLM, tasks: Sequence[str], *, data: Path | None, limit: int | None) -> Answers:
    """Answer all requests of some tasks.

    Args:
        lm: The harness's model of one side.
        tasks: Task names, or "paper".
        data: As in eval.harness.evaluate_tasks.
        limit: Documents per task; None for all.

    Returns:
        The answers and their time.
    """
    seconds: list[float] = []
    for name in ("loglikelihood", "loglikelihood_rolling"):
        setattr(lm, name, _timed(getattr(type(lm), name).__get__(lm), seconds))
    with quiet():
        loaded = load_tasks(tasks, data)
        for task in loaded.values():
            task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
        table = {"tasks": loaded, "groups": {}, "group_map": {}}
        results = evaluate(lm, task_dict=table, limit=limit, bootstrap_iters=0)  # pyrefly: ignore
    assert results is not None
    values: dict[str, list[tuple[float, bool | None]]] = {}
    given: dict[str, list[tuple[str, str]]] = {}
    for name, samples in results["samples"].items():
        answers = [first for sample in samples for (first,) in sample["resps"]]
        values[name] = [each if isinstance(each, tuple) else (each, None) for each in answers]
        given[name] = [(str(each[0]), str(each[-1])) for sample in samples for each in sample["arguments"]]
    metrics = {
        name: {key: value for key, value in result.items() if key.endswith(",none") and "stderr" not in key}
        for name, result in results["results"].items()
    }
    counts = {name: results["n-samples"][name]["effective"] for name in loaded}
    return Answers(values, given, metrics, counts, sum(seconds))


def compare(ours: Answers, theirs: Answers) -> Parity:
    """Compare the answers of two sides to the same requests."""
    pairs = [
        pair for name in ours.values for pair in zip(ours.values[name], theirs.values[name], strict=True)
    ]
    accuracies = {
        task: {
            key: (value, theirs.metrics[task][key])
            for key, value in metrics.items()
            if key.startswith("acc") and value != theirs.metrics[task][key]
        }
        for task, metrics in ours.metrics.items()
    }
    return Parity(
        num_documents=sum(ours.num_documents.values()),
        num_requests=len(pairs),
        max_difference=max(abs(a[0] - b[0]) for a, b in pairs),
        max_relative=max(abs(a[0] - b[0]) / (1 + abs(b[0])) for a, b in pairs),
        flags_differ=sum(a[1] != b[1] for a, b in pairs),
        choices_differ={task: differ for task, differ in accuracies.items() if differ},
    )


def errors_at_largest_differences(
    ours: Answers, theirs: Answers, model: LanguageModel, tokenizer: Tokenizer, count: int = 10
) -> dict[str, float]:
    """Return the maximum error of each side, over the requests in which the sides differ most.

    Args:
        ours: Answers of our side.
        theirs: Answers of the harness's side to the same requests.
        model: The model in fp64.
        tokenizer: Its tokenizer.
        count: Number of requests to compute in fp64.

    Returns:
        Maximum error of "ours" and "harness" relative to fp64, in nats.
    """
    cases = [
        (a[0], b[0], pair)
        for name, values in ours.values.items()
        for a, b, pair in zip(values, theirs.values[name], ours.arguments[name], strict=True)
        if a[1] is not None
    ]
    largest = sorted(cases, key=lambda case: abs(case[0] - case[1]))[-count:]
    lm = HarnessModel(model, tokenizer, Scorer(model, token_budget=1))
    requests = [Instance("loglikelihood", {}, pair, index) for index, (_, _, pair) in enumerate(largest)]
    truth = [value for value, _ in lm.loglikelihood(requests)]
    errors = [(abs(a - t), abs(b - t)) for (a, b, _), t in zip(largest, truth, strict=True)]
    first, second = (max(each) for each in zip(*errors, strict=True))
    return {"ours": first, "harness": second}


def open_gguf(path: Path) -> tuple[Any, Any, Tokenizer]:
    """Load a model from a GGUF file by transformers.

    Args:
        path: The GGUF file.

    Returns:
        The model in fp32, transformers' tokenizer, and the same tokenizer as ours.
    """
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    theirs: Any = transformers.AutoTokenizer.from_pretrained(**where)
    copy = type(theirs.backend_tokenizer).from_str(theirs.backend_tokenizer.to_str())
    return model, theirs, Tokenizer(copy, end_of_document=END_OF_DOCUMENT, name=path.name)


def to_fast_tokenizer(tokenizer: Tokenizer, folder: Path) -> Any:
    """Convert a tokenizer to transformers.

    Args:
        tokenizer: The tokenizer.
        folder: Folder that its file is written to.

    Returns:
        A `PreTrainedTokenizerFast`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token=tokenizer.end_of_document,
        pad_token=tokenizer.end_of_document,
    )


def _open_models(options: argparse.Namespace) -> tuple[LanguageModel, Tokenizer, Any, Any]:
    """Return model and tokenizer of our side, and of the harness's side."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    if options.gguf is not None:
        hf_model, hf_tokenizer, tokenizer = open_gguf(options.gguf)
        hf_model = hf_model.to(device=device, dtype=dtype)
        return TransformersModel(hf_model, max_length=options.max_length), tokenizer, hf_model, hf_tokenizer
    tokenizer = Tokenizer.load(options.tokenizer)
    if options.checkpoint is not None:
        model = load_model(options.checkpoint, device=device, dtype=dtype)
    else:
        # a multiple of 64 rows, like the head of a trained model
        config = ModelConfig(size=options.size, vocab_size=math.ceil(tokenizer.vocab_size / 64) * 64)
        model = Qwen3(config)
        init_weights(model, 0)
        model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    hf_tokenizer = to_fast_tokenizer(tokenizer, options.scratch)
    ours = Qwen3Model(model, max_length=options.max_length)
    return ours, tokenizer, to_transformers(model), hf_tokenizer


def _summary(answers: Answers) -> dict[str, Any]:
    num_requests = sum(map(len, answers.values.values()))
    rate = num_requests / answers.seconds
    return {"seconds": answers.seconds, "requests_per_second": rate, "metrics": answers.metrics}


def run_parity(options: argparse.Namespace) -> dict[str, Any]:
    """Answer the tasks by both sides and compare the answers.

    Args:
        options: Of `python -m benchmarks.eval_parity`.

    Returns:
        The result as it is written to JSON; times in seconds, log-likelihoods in nats.

    Raises:
        UserError: Every batch size of the harness is too large for the GPU.
    """
    model, tokenizer, hf_model, hf_tokenizer = _open_models(options)

    def answer_ours(limit: int) -> Answers:
        scorer = Scorer(model, token_budget=options.token_budget)
        return answer(HarnessModel(model, tokenizer, scorer), options.tasks, data=options.data, limit=limit)

    warm_up = min(8, options.limit)
    if torch.cuda.is_available():
        answer_ours(warm_up)
    ours = answer_ours(options.limit)
    print(f"ours: {ours.seconds:.1f} s", flush=True)
    by_batch_size: dict[int, Answers] = {}
    for batch_size in options.batch_sizes:
        lm = harness_model(hf_model, hf_tokenizer, max_length=options.max_length, batch_size=batch_size)
        if torch.cuda.is_available():
            answer(lm, options.tasks, data=options.data, limit=warm_up)
        try:
            answers = answer(lm, options.tasks, data=options.data, limit=options.limit)
        except torch.cuda.OutOfMemoryError:
            print(f"harness, batch size {batch_size}: out of memory", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            continue
        by_batch_size[batch_size] = answers
        print(f"harness, batch size {batch_size}: {answers.seconds:.1f} s", flush=True)
    if not by_batch_size:
        raise UserError(
            f"--batch-sizes {options.batch_sizes}: the harness is out of memory; give smaller ones"
        )
    theirs = min(by_batch_size.values(), key=lambda answers: answers.seconds)
    parity = compare(ours, theirs)
    # the last use of the weights: they become fp64 in place
    exact = TransformersModel(hf_model.double(), max_length=options.max_length)
    errors = errors_at_largest_differences(ours, theirs, exact, tokenizer)
    return {
        "versions": {"transformers": transformers.__version__},
        "num_documents": ours.num_documents,
        "parity": asdict(parity),
        "largest_error_against_fp64_where_they_differ_most": errors,
        "ours": _summary(ours),
        "harness": {str(size): _summary(each) for size, each in by_batch_size.items()},
        "harness_seconds_over_ours": theirs.seconds / ours.seconds,
    }
