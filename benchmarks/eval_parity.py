"""Compare our batched scoring with lm-evaluation-harness's HFLM: same weights and requests, one process.

    python -m benchmarks.eval_parity --data DIR --tasks piqa sciq --limit 200 --gguf SmolLM2.gguf
    python -m benchmarks.eval_parity --data DIR --tokenizer DIR --size 60m --checkpoint RUN --dtype bfloat16

--gguf names a model that transformers reads; without it the model is a Qwen3 of ours (--checkpoint, or random
weights of --size) and the same model in transformers. Both sides compute all requests of the tasks, ours
first. Log-likelihoods and greedy flags per request and accuracies are compared, and the times of computing
them (without loading tasks) are given as a ratio. HFLM runs at the fastest of --batch-sizes.
"""

import argparse
import gc
import math
import sys
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

from benchmarks.machine import write_result
from data.tokenizer import Tokenizer
from errors import run_command
from eval.harness import HarnessModel, load_tasks, quiet
from eval.scoring.language_model import LanguageModel, Qwen3Model
from eval.scoring.scorer import Scorer
from eval.scoring.transformers_model import TransformersModel
from eval.task_results import ACCURACIES
from models.checkpoint import load_model
from models.config import ModelConfig
from models.convert.format import to_config_json, to_hugging_face
from models.init import init_weights
from models.qwen3 import Qwen3


@dataclass(frozen=True)
class Answers:
    """Answers of one side to all requests of the tasks.

    Attributes:
        values: Log-likelihood in nats and greedy flag of every request, by task; the flag is None for a
            rolling log-likelihood.
        arguments: Context and continuation of every request, in the same order.
        metrics: The harness's metrics by task.
        num_documents: Documents of each task.
        seconds: Time of computing the answers, tokenization included.
    """

    values: dict[str, list[tuple[float, bool | None]]]
    arguments: dict[str, list[tuple[str, str]]]
    metrics: dict[str, dict[str, float]]
    num_documents: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class Parity:
    """Comparison of the answers of two sides.

    Attributes:
        num_documents: Documents of all tasks.
        num_requests: Requests of all tasks.
        max_difference: Largest difference of a log-likelihood in nats.
        max_relative: Largest difference of a log-likelihood over 1 + its magnitude.
        flags_differ: Requests whose greedy flags differ.
        choices_differ: By task, accuracies that are not bit-identical: (ours, theirs).
    """

    num_documents: int
    num_requests: int
    max_difference: float
    max_relative: float
    flags_differ: int
    choices_differ: dict[str, dict[str, tuple[float, float]]]


def to_transformers(model: Qwen3) -> Any:
    """Build the same model in transformers, with copies of the weights, in their dtype, on their device."""
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


def harness_model(theirs: Any, tokenizer: Any, *, max_length: int, batch_size: int) -> HFLM:
    """Wrap a model of transformers as the harness's HFLM.

    Args:
        theirs: A `PreTrainedModel`.
        tokenizer: A `PreTrainedTokenizerFast`.
        max_length: Most tokens of an input.
        batch_size: Rows per batch.
    """
    return HFLM(pretrained=theirs, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size)


def _timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        since = time.perf_counter()
        result = method(*args, **options)
        seconds.append(time.perf_counter() - since)
        return result

    return call


def answer(lm: TemplateLM, tasks: Sequence[str], *, data: Path | None, limit: int | None) -> Answers:
    """Compute one side's answers to all requests of the tasks.

    Args:
        lm: The side's model.
        tasks: Names of tasks, or "paper".
        data: As for eval.harness.evaluate_tasks.
        limit: First documents of each task to evaluate; None for all.
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


def largest_errors(
    ours: Answers, theirs: Answers, model: LanguageModel, tokenizer: Tokenizer, count: int = 10
) -> dict[str, float]:
    """Compute the largest error of each side over the requests in which they differ most.

    Args:
        ours: Answers of one side.
        theirs: Answers of the other to the same requests.
        model: The same weights in fp64.
        tokenizer: Its tokenizer.
        count: Number of requests to compute in fp64.

    Returns:
        The largest error of each side against fp64, in nats.
    """
    cases = [
        (a[0], b[0], pair)
        for name, values in ours.values.items()
        for a, b, pair in zip(values, theirs.values[name], ours.arguments[name], strict=True)
        if a[1] is not None
    ]
    worst = sorted(cases, key=lambda case: abs(case[0] - case[1]))[-count:]
    lm = HarnessModel(model, tokenizer, Scorer(model, token_budget=1))
    requests = [Instance("loglikelihood", {}, pair, index) for index, (_, _, pair) in enumerate(worst)]
    truth = [value for value, _ in lm.loglikelihood(requests)]
    distances = [(abs(a - t), abs(b - t)) for (a, b, _), t in zip(worst, truth, strict=True)]
    first, second = (max(each) for each in zip(*distances, strict=True))
    return {"ours": first, "harness": second}


def open_gguf(path: Path) -> tuple[Any, Any, Tokenizer]:
    """Load a model from a GGUF file through transformers.

    Args:
        path: The file.

    Returns:
        The model in fp32, the tokenizer of transformers, and the same tokenizer as ours.
    """
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    theirs: Any = transformers.AutoTokenizer.from_pretrained(**where)
    copy = type(theirs.backend_tokenizer).from_str(theirs.backend_tokenizer.to_str())
    return model, theirs, Tokenizer(copy, end_of_document="<|endoftext|>", name=path.name)


def fast_tokenizer(tokenizer: Tokenizer, folder: Path) -> Any:
    """Convert a tokenizer to one of transformers, through a file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token=tokenizer.end_of_document,
        pad_token=tokenizer.end_of_document,
    )


def _open(options: argparse.Namespace) -> tuple[LanguageModel, Tokenizer, Any, Any]:
    """Open our model and tokenizer, and theirs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    if options.gguf is not None:
        theirs, fast, tokenizer = open_gguf(options.gguf)
        theirs = theirs.to(device=device, dtype=dtype)
        return TransformersModel(theirs, max_length=options.max_length), tokenizer, theirs, fast
    tokenizer = Tokenizer.load(options.tokenizer)
    if options.checkpoint is not None:
        model = load_model(options.checkpoint, device=device, dtype=dtype)
    else:
        # a multiple of 64, as in trained models
        config = ModelConfig(size=options.size, vocab_size=math.ceil(tokenizer.vocab_size / 64) * 64)
        model = Qwen3(config)
        init_weights(model, 0)
        model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    fast = fast_tokenizer(tokenizer, options.scratch)
    return Qwen3Model(model, max_length=options.max_length), tokenizer, to_transformers(model), fast


def _side(answers: Answers) -> dict[str, Any]:
    num_requests = sum(map(len, answers.values.values()))
    rate = num_requests / answers.seconds
    return {"seconds": answers.seconds, "requests_per_second": rate, "metrics": answers.metrics}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="as for python -m eval.downstream")
    parser.add_argument("--tasks", nargs="+", default=list(ACCURACIES))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tokenizer", help="tokenizer of the Qwen3")
    parser.add_argument("--size", default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--token-budget", type=int, default=65536)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64, 256], help="of HFLM")
    parser.add_argument("--scratch", type=Path, default=Path(".cache/eval_parity"))
    parser.add_argument("--name", default="eval_parity", help="name of the results file")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.eval_parity`."""
    options = _parser().parse_args(arguments)
    model, tokenizer, theirs_model, fast = _open(options)
    where = {"data": options.data, "limit": options.limit}

    def run_ours(limit: int) -> Answers:
        scorer = Scorer(model, token_budget=options.token_budget)
        return answer(HarnessModel(model, tokenizer, scorer), options.tasks, data=options.data, limit=limit)

    warm_up = min(8, options.limit)
    if torch.cuda.is_available():
        run_ours(warm_up)
    ours = run_ours(options.limit)
    print(f"ours: {ours.seconds:.1f} s", flush=True)
    found: dict[int, Answers] = {}
    for batch_size in options.batch_sizes:
        lm = harness_model(theirs_model, fast, max_length=options.max_length, batch_size=batch_size)
        if torch.cuda.is_available():
            answer(lm, options.tasks, data=options.data, limit=warm_up)
        try:
            found[batch_size] = answer(lm, options.tasks, **where)
        except torch.cuda.OutOfMemoryError:
            print(f"HFLM, batch size {batch_size}: out of memory", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            continue
        print(f"HFLM, batch size {batch_size}: {found[batch_size].seconds:.1f} s", flush=True)
    best = min(found, key=lambda size: found[size].seconds)
    parity = compare(ours, found[best])
    # converts the weights to fp64 in place, which is their last use
    exact = TransformersModel(theirs_model.double(), max_length=options.max_length)
    errors = largest_errors(ours, found[best], exact, tokenizer)
    result = {
        "command": f"python -m benchmarks.eval_parity {' '.join(arguments or sys.argv[1:])}",
        "versions": {"transformers": transformers.__version__},
        "num_documents": ours.num_documents,
        "parity": asdict(parity),
        "largest_error_against_fp64_where_they_differ_most": errors,
        "ours": _side(ours),
        "harness": {str(size): _side(each) for size, each in found.items()},
        "harness_seconds_over_ours": found[best].seconds / ours.seconds,
    }
    path = write_result(options.name, result)
    print(parity)
    print(f"errors against fp64 where they differ most: {errors}")
    print(f"best time of HFLM over ours: {result['harness_seconds_over_ours']:.2f}; wrote {path}")


if __name__ == "__main__":
    sys.exit(run_command(main))
