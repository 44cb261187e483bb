"""Trains stock torchtitan's Qwen3 for `benchmarks.training --stock`, by torchrun, in a process of its own.

`torchrun --standalone -m benchmarks.stock --config configs/0.6b_softmax_adamw.toml --rows 8 --steps 20
--folder OUT [-- --training.seq_len 4096 ...]` trains softmax attention and AdamW of torchtitan at the size of
the config (`benchmarks/stock_trainer.py`) and writes OUT/metrics.jsonl as a run of ours does.
"""

import argparse
import os
import sys
from pathlib import Path

from config import load
from errors import run_command
from training.run_config import RunConfig


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file whose sizes are taken")
    parser.add_argument("--rows", type=int, required=True, help="rows of a micro-batch")
    parser.add_argument(
        "--rows-per-step", type=int, help="rows of a step over all ranks (one micro-batch each)"
    )
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--folder", type=Path, required=True, help="folder of metrics.jsonl")
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    config = load(RunConfig, options.config, arguments[split + 1 :])
    from training import device

    device.prepare()  # before the first import of torchtitan
    from torchtitan.tools.logging import init_logger

    from benchmarks.stock_trainer import train

    init_logger()
    train(
        config,
        rows=options.rows,
        rows_per_step=options.rows_per_step or options.rows * int(os.environ["WORLD_SIZE"]),
        steps=options.steps,
        folder=options.folder,
    )


if __name__ == "__main__":
    code = run_command(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as train.py: an interpreter that ends may be aborted by gloo's threads
