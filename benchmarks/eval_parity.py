"""Evaluation parity: our batched scoring beside lm-evaluation-harness's own Hugging Face model.

    python -m benchmarks.eval_parity --data DIR --tasks piqa sciq --limit 200 --gguf SmolLM2.gguf
    python -m benchmarks.eval_parity --data DIR --tokenizer DIR --size 60m --checkpoint RUN --dtype bfloat16

Both sides have the same weights and answer the same requests in one process. --gguf is a model that
transformers reads; without it the model is a Qwen3 of ours (--checkpoint, or random weights of --size) and
its copy in transformers. Ours answers first; then log-likelihoods, greedy flags and accuracies are compared,
and the times of answering (without loading the tasks) as a ratio. The harness uses the fastest of
--batch-sizes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from errors import UserError, run_command
from eval.task_results import ACCURACIES


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("eval_parity", __doc__, name="eval_parity")
    parser.add_argument("--data", type=Path, required=True, help="as in python -m eval.downstream")
    parser.add_argument("--tasks", nargs="+", default=list(ACCURACIES), help='task names, or "paper" (all)')
    parser.add_argument("--limit", type=int, default=200, help="documents per task (200)")
    parser.add_argument("--gguf", type=Path, help="GGUF file of a model that transformers reads")
    parser.add_argument("--checkpoint", type=Path, help="run or checkpoint of a Qwen3 of ours")
    parser.add_argument("--tokenizer", help="tokenizer of a Qwen3 of ours")
    parser.add_argument("--size", default="60m", help="size of a Qwen3 with random weights (60m)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(float32)")
    parser.add_argument("--max-length", type=int, default=2048, help="maximum tokens of an input (2048)")
    parser.add_argument("--token-budget", type=int, default=65536, help="tokens of our batches (65536)")
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=[16, 64, 256],
        help="batch sizes of the harness (16 64 256)",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(".cache/eval_parity"),
        help="folder of the tokenizer file for transformers (.cache/eval_parity)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.eval_parity`.

    Args:
        arguments: Command line arguments; None for those of the process.

    Raises:
        UserError: Neither --gguf nor --tokenizer is given, or every batch size is too large for the GPU.
    """
    options = parse(_parser(), arguments)
    if options.gguf is None and options.tokenizer is None:
        raise UserError("--tokenizer is missing; give the tokenizer of the model, or a model by --gguf")
    from benchmarks.harness_comparison import run_parity  # needs the extra `eval`

    result = run_parity(options)
    result = {"command": f"python -m benchmarks.eval_parity {' '.join(arguments or sys.argv[1:])}", **result}
    path = write_result(options.name, result, options.out)
    print(result["parity"])
    print(
        "errors relative to fp64 where the sides differ most:",
        result["largest_error_against_fp64_where_they_differ_most"],
    )
    print(f"the harness's best time over ours: {result['harness_seconds_over_ours']:.2f}; wrote {path}")


if __name__ == "__main__":
    sys.exit(run_command(main))
