"""Trains stock torchtitan's Qwen3 for `benchmarks.training --stock`, by torchrun, in a process of its own.

`torchrun --standalone -m benchmarks.stock --config configs/0.6b_softmax_adamw.toml --rows 8 --steps 20
--folder OUT [-- --training.seq_len 4096 ...]` trains softmax attention and AdamW of torchtitan at the size of
the config (`benchmarks/stock_trainer.py`) and writes OUT/metrics.jsonl as a run of ours does.
"""

import os
import sys
from pathlib import Path

from benchmarks.command import make_parser, parse_with_overrides
from config import load
from errors import run_command
from training.run_config import RunConfig


def main() -> None:
    """Run the command line."""
    parser = make_parser("stock", __doc__)
    parser.add_argument("--config", required=True, help="config file whose sizes are taken")
    parser.add_argument("--rows", type=int, required=True, help="rows of a micro-batch")
    parser.add_argument(
        "--rows-per-step", type=int, help="rows of a step over all ranks (one micro-batch each)"
    )
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--folder", type=Path, required=True, help="folder of metrics.jsonl")
    options, overrides = parse_with_overrides(parser)
    config = load(RunConfig, options.config, overrides)
    from training import device

    device.prepare()  # before the first import of torchtitan
    from torchtitan.tools.logging import init_logger

    from benchmarks.stock_trainer import train

    init_logger()
    rows, rows_per_step = options.rows, options.rows_per_step
    train(
        config,
        rows=rows,
        rows_per_step=rows * int(os.environ["WORLD_SIZE"]) if rows_per_step is None else rows_per_step,
        steps=options.steps,
        folder=options.folder,
    )


if __name__ == "__main__":
    code = run_command(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as train.py: an interpreter that ends may be aborted by gloo's threads
