"""Items prepared ahead by the thread of torchdata's `Prefetcher` node, which ends when it is told to.

torchdata supplies the thread and the bounded queue. It leaves three things open that a run needs, and that
are added here without its private parts (docs/data.md has the measurements):

* An exception keeps its type and its message. It travels as an item: torchdata itself raises another one,
  whose message is a traceback.
* No thread survives. Closing makes the items end and reads to their end, however long the item in preparation
  takes; torchdata waits half a second, and an interpreter that exits in the meantime may abort.
* A position is that of the items consumed, and the same on every number of ranks: it travels with its item.
  torchdata's states count what this rank has read, and asking for one starts the threads.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from torchdata.nodes import IterableWrapper
from torchdata.nodes import Prefetcher as PrefetcherNode

Item = TypeVar("Item")


class _Failure:
    """An exception in place of an item."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Prefetcher(Iterator[Item]):
    """An iterator whose items are prepared by a background thread, which the constructor starts.

    An exception in the thread is raised to the consumer in place of the item. The thread ends when the items
    do, at `close()`, when the prefetcher is garbage-collected, and before the interpreter exits.

    Args:
        make_items: Called in the thread; must not refer to the prefetcher, which would then never be
            garbage-collected.
        depth: Maximum number of items prepared ahead, at least 1.
    """

    def __init__(self, make_items: Callable[[], Iterator[Item]], depth: int) -> None:
        assert depth >= 1
        self._running = _Running(make_items, depth)
        self._close = weakref.finalize(self, self._running.stop)

    def __next__(self) -> Item:
        """Return the next item; blocks until it is ready."""
        return self._running.next()

    def close(self) -> None:
        """End the thread and drop the prefetched items; idempotent."""
        self._close()


class _Running(Generic[Item]):
    """The thread of a prefetcher, which does not refer to the prefetcher."""

    def __init__(self, make_items: Callable[[], Iterator[Item]], depth: int) -> None:
        self._make_items = make_items
        self._is_stopped = False
        self._thread: int | None = None
        # a position travels with its item: no snapshots
        self._node: PrefetcherNode[Item | _Failure] | None
        self._node = PrefetcherNode(IterableWrapper(self._items()), depth, snapshot_frequency=0)
        self._node.reset()

    def next(self) -> Item:
        if self._node is None:
            raise StopIteration
        item = next(self._node)
        if isinstance(item, _Failure):
            raise item.error
        return item

    def stop(self) -> None:
        """Make the items end, and read to their end."""
        self._is_stopped = True
        # garbage collection may run in the thread, which cannot wait for itself
        if self._node is not None and threading.get_ident() != self._thread:
            for _ in self._node:
                pass
        # joins the thread, which is about to return
        self._node = None

    def _items(self) -> Iterator[Item | _Failure]:
        """Yield the items, in the thread."""
        self._thread = threading.get_ident()
        items: Iterator[Item] | None = None
        while not self._is_stopped:
            try:
                items = self._make_items() if items is None else items
                item = next(items)
            except StopIteration:
                return
            except BaseException as error:
                yield _Failure(error)
                return
            yield item
