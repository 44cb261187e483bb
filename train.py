"""Train a run.

`torchrun --nproc-per-node 8 train.py --config configs/0.6b_parallax_muon.toml [--training.steps 40000 ...]`

--print-config shows the resolved run, --help-config the meaning of every key. --dry-run builds the run
without memory, data or tokenizer and prints its size and cost on --world-size GPUs of a kind.
--checkpoint runs/stable/checkpoint/step-N starts from a checkpoint of another run. Any other
--table.key VALUE overrides the config file.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

import config
from errors import CLOSED_OUTPUT_CODE, INTERRUPT_CODE, describe_error, exit_code
from training.launcher import complete_environment
from training.run_config import RunConfig
from training.signals import StopRequest

# torchrun ends the other ranks as soon as one has failed: the main rank is to print what all of them would
_SECONDS_TO_PRINT = 5.0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="TOML file of the run")
    parser.add_argument("--print-config", action="store_true", help="print the resolved run and exit")
    parser.add_argument(
        "--help-config",
        nargs="?",
        const="",
        metavar="TABLE",
        help="print every key of the config, or of one table of it, with type, default and meaning, and exit",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print parameters, FLOPs, time and memory and exit"
    )
    parser.add_argument("--world-size", type=int, help="ranks that --dry-run plans for (1)")
    parser.add_argument("--gpu", help="GPU that --dry-run plans for (h200): training/gpus.py")
    parser.add_argument(
        "--mfu",
        type=float,
        metavar="PERCENT",
        help="MFU that --dry-run plans with, by whole rows; by default estimated (softmax, parallax)",
    )
    parser.add_argument("--checkpoint", metavar="FOLDER", help="short for --checkpoint.start_from")
    options, overrides = parser.parse_known_args(arguments)
    known = parser.format_usage().replace("[", " ").replace("]", " ").split()
    for word in overrides:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option in known:
            parser.error(f"{word} is unknown; write {option}")
    if options.config is None and options.help_config is None:
        parser.error("the following arguments are required: --config")
    if not options.dry_run:
        # else who leaves out --dry-run would start the run that was to be planned
        plans = ("world_size", "gpu", "mfu")
        for name in (name for name in plans if getattr(options, name) is not None):
            parser.error(f"--{name.replace('_', '-')} is an option of --dry-run; add that to plan the run")
    if options.checkpoint is not None:
        overrides += ["--checkpoint.start_from", options.checkpoint]
    return options, overrides


def _train(run_config: RunConfig) -> None:
    stop = StopRequest()
    stop.watch_torchrun()
    from training import device

    device.prepare()  # before the first import of torchtitan
    import torch.distributed as dist

    from training import log
    from training.failures import one_line_failures
    from training.preflight import check_run
    from training.rank_monitor import RankMonitor
    from training.trainer import Trainer

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    log.setup(rank)
    monitor = RankMonitor(run_config)
    with one_line_failures(run_config, monitor, world_size):
        trainer = Trainer(run_config, check_run(run_config, world_size), stop, monitor)
        try:
            trainer.train()
        finally:
            trainer.close()
    dist.destroy_process_group()


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    if options.help_config is not None:
        from training.config_help import describe_config

        print(describe_config(options.help_config or None))
        return
    if not (options.print_config or options.dry_run):
        complete_environment(os.environ)  # first: an error is printed by rank
    run_config = config.load(RunConfig, options.config, overrides)
    if options.print_config:
        print(config.to_toml(run_config), end="")
    elif options.dry_run:
        from training.dry_run import dry_run
        from training.gpus import MEASURED

        world_size = 1 if options.world_size is None else options.world_size
        text = dry_run(run_config, world_size, gpu=options.gpu or MEASURED, mfu=options.mfu)
        print(text)
    else:
        _train(run_config)


def _report(error: Exception) -> None:
    """Print one line, on the main rank before the others."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from torchrun, once the main rank has printed it
        time.sleep(_SECONDS_TO_PRINT)
    who = "" if rank == "0" else f"rank {rank}: "
    print(f"{who}error: {describe_error(error)}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name.

    Returns:
        The exit code: 0; 2 for what the user got wrong; 1 for a run that cannot continue, for example a loss
        of NaN.
    """
    options, overrides = _parse(arguments)
    try:
        _run(options, overrides)
        sys.stdout.flush()  # os._exit does not
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        if code != CLOSED_OUTPUT_CODE:
            _report(error)
        return code
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # before training has taken over the signal: there is nothing to save
        code = INTERRUPT_CODE
    os._exit(code)  # DTensor's caches keep gloo's threads, which now and then abort an interpreter that ends
