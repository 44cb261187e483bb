"""The process that started this one."""

import multiprocessing
import os
import threading


def exit_with_parent() -> None:
    """End this process with its parent from now on: a killed one cannot shut its workers down."""
    threading.Thread(target=_wait_and_exit, daemon=True).start()


def _wait_and_exit() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
