"""Converts Hugging Face folders of dense Qwen3 models to run folders, and back.

`python -m models.convert from-hf HF_DIR --out RUN [--attention parallax]` writes a run folder that evaluates
and generates, and whose weights a training run can start from (`checkpoint.initial_weights = "RUN"`).
`python -m models.convert to-hf RUN --out HF_DIR [--dtype bfloat16]` writes a folder that transformers loads
by `AutoModelForCausalLM.from_pretrained(HF_DIR)`; a Parallax model contains its own code, which needs
trust_remote_code=True.
"""

import argparse
import sys
import warnings
from pathlib import Path

from errors import check_out, run_command
from models.convert.from_hf import convert_from_hf
from models.convert.to_hf import convert_to_hf

_DTYPES = ("float32", "bfloat16", "float16")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    from_hf = directions.add_parser(
        "from-hf", help="a Hugging Face folder to a run folder", allow_abbrev=False
    )
    from_hf.add_argument(
        "source", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors"
    )
    from_hf.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to write")
    from_hf.add_argument(
        "--attention",
        choices=("softmax", "parallax"),
        help="parallax adds a probe with a gain of 0 to a softmax model (the folder's own attention)",
    )
    from_hf.add_argument("--seed", type=int, default=0, help="seed of the probe's initial W_R (0)")
    to_hf = directions.add_parser("to-hf", help="a run folder to a Hugging Face folder", allow_abbrev=False)
    to_hf.add_argument(
        "source", type=Path, metavar="RUN", help="a run folder, or one of its checkpoint/step-N"
    )
    to_hf.add_argument("--out", type=Path, required=True, metavar="HF_DIR", help="folder to write")
    to_hf.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (the run's own)")
    to_hf.add_argument("--average", action="store_true", help="the average of the weights ([average])")
    to_hf.add_argument("--shard-gb", type=float, default=5.0, help="maximum size of a file in 10^9 bytes (5)")
    for direction in (from_hf, to_hf):
        direction.add_argument(
            "--dtype", choices=_DTYPES, default="float32", help="dtype of the written weights (float32)"
        )
    return parser.parse_args()


def main() -> None:
    """Run the command line.

    Raises:
        UserError: As convert_from_hf and convert_to_hf.
    """
    options = _parse()
    check_out(options.out)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        print(_convert(options))


def _convert(options: argparse.Namespace) -> str:
    if options.direction == "from-hf":
        return convert_from_hf(
            options.source, options.out, attention=options.attention, dtype=options.dtype, seed=options.seed
        )
    return convert_to_hf(
        options.source,
        options.out,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        shard_bytes=options.shard_gb * 1e9,
        average=options.average,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
