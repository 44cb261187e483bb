"""Hugging Face folders of dense Qwen3 models to run folders of ours, and back.

`python -m models.convert from-hf HF_DIR --out RUN [--attention parallax]`: a run folder that evaluates and
generates, and whose weights a training run starts from (`checkpoint.initial_weights = "RUN"`).
`python -m models.convert to-hf RUN --out HF_DIR [--dtype bfloat16]`: a folder that transformers loads with
`AutoModelForCausalLM.from_pretrained(HF_DIR)`; a Parallax model carries its own code and wants
trust_remote_code=True.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from models.convert.format import to_hugging_face
from models.convert.from_hf import convert_from_hf
from models.convert.to_hf import convert_to_hf

__all__ = ["convert_from_hf", "convert_to_hf", "main", "to_hugging_face"]

_DTYPES = ("float32", "bfloat16", "float16")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ways = parser.add_subparsers(dest="way", required=True)
    take = ways.add_parser("from-hf", help="a Hugging Face folder to a run folder", allow_abbrev=False)
    take.add_argument("source", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors")
    take.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder to write")
    take.add_argument(
        "--attention",
        choices=("softmax", "parallax"),
        help="parallax gives a softmax model a probe that starts as the same function (as the folder has it)",
    )
    take.add_argument("--seed", type=int, default=0, help="seed of the probe's initial W_R (0)")
    give = ways.add_parser("to-hf", help="a run folder to a Hugging Face folder", allow_abbrev=False)
    give.add_argument("source", type=Path, metavar="RUN", help="a run folder, or a checkpoint/step-N in one")
    give.add_argument("--out", type=Path, required=True, metavar="HF_DIR", help="the folder to write")
    give.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (the run's own)")
    give.add_argument("--shard-gb", type=float, default=5.0, help="the most 10^9 bytes of a file (5)")
    for way in (take, give):
        way.add_argument(
            "--dtype", choices=_DTYPES, default="float32", help="of the written weights (float32)"
        )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name.

    Returns:
        The exit code: 0, or 2 where something is not what it must be.
    """
    options = _parse(arguments)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            print(_convert(options))
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _convert(options: argparse.Namespace) -> str:
    if options.way == "from-hf":
        return convert_from_hf(
            options.source, options.out, attention=options.attention, dtype=options.dtype, seed=options.seed
        )
    return convert_to_hf(
        options.source,
        options.out,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        shard_bytes=round(options.shard_gb * 1e9),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
