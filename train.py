"""Train a run.

`torchrun --nproc-per-node 8 train.py --config configs/0.6b_parallax_muon.toml [--training.steps 40000 ...]`

--print-config shows the resolved run; --dry-run builds it without memory, data or tokenizer and prints its
size and cost on --world-size ranks; --checkpoint runs/stable/checkpoint/step-N starts from a checkpoint of
another run. Any other --table.key VALUE overrides the config file.
"""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import config
from config import to_toml
from training.run_config import RunConfig

# torchrun ends the other ranks as soon as one has failed: rank 0 is to have said what all of them would say
_SECONDS_TO_SPEAK = 5.0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="TOML file of the run")
    parser.add_argument("--print-config", action="store_true", help="print the resolved run and end")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, FLOPs and memory and end")
    parser.add_argument("--world-size", type=int, default=1, help="ranks that --dry-run plans for (1)")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="short for --checkpoint.start_from")
    options, overrides = parser.parse_known_args(arguments)
    if options.checkpoint is not None:
        overrides += ["--checkpoint.start_from", options.checkpoint]
    return options, overrides


def _train(run: RunConfig) -> None:
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update(one | os.environ)  # one process, started without torchrun
    from training import device

    device.prepare()  # before the first import of torchtitan
    import torch.distributed as dist

    from training import log
    from training.titan import check_run
    from training.trainer import Trainer

    rank = int(os.environ["RANK"])
    log.setup(rank)
    trainer = Trainer(run, check_run(run, int(os.environ["WORLD_SIZE"])))
    try:
        trainer.train()
    finally:
        trainer.close()
    dist.destroy_process_group()


def _is_ours(error: ValueError) -> bool:
    """Whether this project raised it: ours say what the user got wrong, others are faults."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised_in, root = Path(last.filename), Path(__file__).parent
    is_in_project = raised_in.is_relative_to(root) and ".venv" not in raised_in.relative_to(root).parts
    return is_in_project and (last.line or "").startswith("raise ")  # and not int("x")


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name.

    Returns:
        The exit code: 0, or 2 for a config that no run can have.
    """
    options, overrides = _parse(arguments)
    try:
        run = config.load(RunConfig, options.config, overrides)
        if options.print_config:
            print(to_toml(run), end="", flush=True)
        elif options.dry_run:
            from training.dry_run import dry_run

            print(dry_run(run, options.world_size), flush=True)
        else:
            _train(run)
    except ValueError as error:
        if not _is_ours(error):
            raise
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what torchrun sends once rank 0 has spoken
            time.sleep(_SECONDS_TO_SPEAK)
        print(f"{'' if rank == '0' else f'rank {rank}: '}error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # before training has taken over the signal: there is nothing to save
        code = 130
    os._exit(code)  # DTensor's caches keep gloo's threads, which now and then abort an interpreter that ends
