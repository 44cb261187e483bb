import gc
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from data.loading.prefetch import Prefetcher


def _prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def _wait_until(is_true: object, seconds: float = 5.0) -> bool:
    assert callable(is_true)
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.002)
    return bool(is_true())


def test_items_are_in_order_and_end() -> None:
    prefetcher = Prefetcher(lambda: iter(range(100)), 3)
    assert list(prefetcher) == list(range(100))
    assert list(prefetcher) == []
    prefetcher.close()
    assert not _prefetch_threads()


def test_at_most_depth_items_are_prepared_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for index in itertools.count():
            made.append(index)
            yield index

    prefetcher = Prefetcher(items, 3)
    try:
        # three in the queue, and one waiting for space
        assert _wait_until(lambda: len(made) == 4)
        time.sleep(0.05)
        assert len(made) == 4
        assert next(prefetcher) == 0
        assert _wait_until(lambda: len(made) == 5)
    finally:
        prefetcher.close()
    assert not _prefetch_threads()


def test_an_exception_is_raised_in_place_of_the_item_with_its_traceback() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("part-7.parquet is damaged")

    prefetcher = Prefetcher(items, 8)
    assert [next(prefetcher), next(prefetcher)] == [1, 2]
    with pytest.raises(ValueError, match=r"part-7\.parquet is damaged") as caught:
        next(prefetcher)
    assert "items" in [entry.name for entry in caught.traceback]
    with pytest.raises(StopIteration):
        next(prefetcher)
    prefetcher.close()


def test_close_ends_a_thread_that_waits_for_space() -> None:
    prefetcher = Prefetcher(itertools.count, 2)
    assert next(prefetcher) == 0
    prefetcher.close()
    assert not _prefetch_threads()
    with pytest.raises(StopIteration):
        next(prefetcher)
    prefetcher.close()


def test_a_garbage_collected_prefetcher_ends_its_thread() -> None:
    prefetcher = Prefetcher(itertools.count, 2)
    assert next(prefetcher) == 0
    del prefetcher
    gc.collect()
    assert _wait_until(lambda: not _prefetch_threads())


def test_the_interpreter_exits_while_a_prefetcher_is_open() -> None:
    code = (
        "import itertools; from data.loading.prefetch import Prefetcher; "
        "p = Prefetcher(itertools.count, 2); assert next(p) == 0; print('end')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
