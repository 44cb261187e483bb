"""Train a run.

`torchrun --nproc-per-node 8 train.py --config configs/0.6b_parallax_muon.toml [--training.steps 100 ...]`

--print-config shows the resolved run; --dry-run builds it without memory, data or tokenizer and prints its
size and cost on --world-size ranks. Any other --table.key VALUE overrides the config file.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import config
from training.config_table import to_toml
from training.run_config import RunConfig


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="TOML file of the run")
    parser.add_argument("--print-config", action="store_true", help="print the resolved run and end")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, FLOPs and memory and end")
    parser.add_argument(
        "--world-size", type=int, default=1, help="ranks that --dry-run plans for (default 1)"
    )
    return parser.parse_known_args(arguments)


def _train(run: RunConfig) -> int:
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "localhost"),
    ):
        os.environ.setdefault(name, value)  # one process, started without torchrun
    os.environ.setdefault("MASTER_PORT", "0")
    from training import device

    device.prepare()  # before the first import of torchtitan
    import torch.distributed as dist

    from training import log
    from training.spec import check_run
    from training.trainer import Trainer

    rank = int(os.environ["RANK"])
    log.setup(rank)
    try:
        tokenizer = check_run(run, int(os.environ["WORLD_SIZE"]))
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    trainer = Trainer(run, tokenizer)
    try:
        trainer.train()
    finally:
        trainer.close()
    dist.destroy_process_group()
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name.

    Returns:
        The exit code: 0, or 2 for a config that no run can have.
    """
    options, overrides = _parse(arguments)
    try:
        run = config.load(options.config, overrides)
        if options.print_config:
            print(to_toml(run), end="")
        elif options.dry_run:
            from training.dry_run import dry_run

            print(dry_run(run, options.world_size))
        else:
            return _train(run)
    except config.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
