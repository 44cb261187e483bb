"""The state of a process that lm-evaluation-harness changes or depends on: its log, its random numbers."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import numpy as np


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log of the harness and the progress bars of datasets, a page per task."""
    logger = logging.getLogger("lm_eval")
    level, has_bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if has_bars:
            datasets.enable_progress_bars()


@contextmanager
def seeded() -> Iterator[None]:
    """Seed tasks that shuffle documents or answers with the harness's own seeds, the same on all ranks."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
