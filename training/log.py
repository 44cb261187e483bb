"""Logging to the console: progress from the main rank, warnings and errors from every rank."""

import logging
import warnings

logger = logging.getLogger("parallax")

# torchtitan logs through the root logger; these of its warnings are irrelevant to a run
_IRRELEVANT = ("Error running lspci", "Peak flops undefined for: cpu", "ENV[TORCH_")


def _is_relevant(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_IRRELEVANT)


def setup(rank: int) -> None:
    """Set up logging to standard error.

    Args:
        rank: This process's rank; only rank 0 logs progress.
    """
    handler = logging.StreamHandler()
    prefix = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    handler.addFilter(_is_relevant)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    # its records propagate to the root's handler, and would be printed twice
    logging.getLogger("huggingface_hub").handlers.clear()
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    warnings.filterwarnings("ignore", message="DTensor .* may not have complete support on cpu device mesh")
