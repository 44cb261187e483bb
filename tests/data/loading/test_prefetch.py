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
    # torchdata's name of its thread
    return [thread for thread in threading.enumerate() if "_populate_queue" in thread.name]


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
        assert _prefetch_threads()
        assert _wait_until(lambda: len(made) == 3)
        time.sleep(0.05)
        assert len(made) == 3
        assert next(prefetcher) == 0
        assert _wait_until(lambda: len(made) == 4)
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


def test_close_waits_for_the_item_in_preparation() -> None:
    is_going_on, may_end = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        is_going_on.set()
        may_end.wait(10)
        yield 1

    prefetcher = Prefetcher(items, 2)
    assert next(prefetcher) == 0
    assert is_going_on.wait(5)
    # longer than the half second after which torchdata gives up
    threading.Timer(0.8, may_end.set).start()
    prefetcher.close()
    assert may_end.is_set()
    assert not _prefetch_threads()


class _TwoArgumentsError(Exception):
    def __init__(self, file: str, line: int) -> None:
        super().__init__(file, line)


@pytest.mark.parametrize("error", [_TwoArgumentsError("a.jsonl", 3), KeyboardInterrupt(), KeyError("text")])
def test_any_exception_arrives_as_it_is(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield 0
        raise error

    prefetcher = Prefetcher(items, 2)
    assert next(prefetcher) == 0
    with pytest.raises(type(error)) as caught:
        next(prefetcher)
    assert caught.value is error
    prefetcher.close()
    assert not _prefetch_threads()


# torchdata then joins its thread from within, which is reported and ignored
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_garbage_collection_in_the_thread_ends_it_without_waiting_for_itself() -> None:
    collect = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        collect.wait(10)
        gc.collect()
        yield 1

    cycle: list[object] = [Prefetcher(items, 2)]
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        collect.set()
        assert _wait_until(lambda: not _prefetch_threads())
    finally:
        gc.enable()


def test_a_garbage_collected_prefetcher_ends_its_thread() -> None:
    prefetcher = Prefetcher(itertools.count, 2)
    assert next(prefetcher) == 0
    del prefetcher
    gc.collect()
    assert _wait_until(lambda: not _prefetch_threads())


@pytest.mark.parametrize(
    "items",
    ["itertools.count()", "(torch.ones(1000, 1000) @ torch.ones(1000, 1000) for _ in itertools.count())"],
)
def test_the_interpreter_exits_while_a_prefetcher_is_open(items: str) -> None:
    # torch aborts the interpreter if a thread is still in one of its operations
    code = (
        "import itertools, torch; from data.loading.prefetch import Prefetcher; "
        f"p = Prefetcher(lambda: iter({items}), 2); next(p); print('end')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
