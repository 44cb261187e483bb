"""The console of a run: our lines from the first rank, warnings and errors from every rank."""

import logging
import warnings

logger = logging.getLogger("parallax")

# torchtitan's logger is the root; these of its warnings speak of things that a run does not depend on
_NOISE = ("Error running lspci", "Peak flops undefined for: cpu", "ENV[TORCH_")


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE)


def setup(rank: int) -> None:
    """Send the lines to standard error.

    Args:
        rank: This process's rank; only rank 0 speaks of progress.
    """
    handler = logging.StreamHandler()
    prefix = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    handler.addFilter(_is_worth_reading)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    # its lines come through the root's handler, and would come twice
    logging.getLogger("huggingface_hub").handlers.clear()
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    warnings.filterwarnings("ignore", message="DTensor .* may not have complete support on cpu device mesh")
