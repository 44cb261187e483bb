"""A bounded prefetch queue, filled in order by one background thread."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _Channel(Generic[Item]):
    """A bounded queue between thread and consumer that either side can close."""

    def __init__(self, depth: int) -> None:
        self.changed = threading.Condition()
        self.items: deque[Item] = deque()
        self.depth = depth
        self.is_closed = False
        self.is_done = False
        self.error: BaseException | None = None

    def put(self, item: Item) -> bool:
        """Add an item, waiting for space; return False once the consumer has closed the queue."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or len(self.items) < self.depth)
            if not self.is_closed:
                self.items.append(item)
                self.changed.notify_all()
            return not self.is_closed

    def finish(self, error: BaseException | None) -> None:
        """Mark the end of the items, with the exception that caused it, if any."""
        with self.changed:
            self.is_done, self.error = True, error
            self.changed.notify_all()

    def get(self) -> Item:
        """Return the next item; at the end raise the thread's exception once, then StopIteration."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or self.is_done or bool(self.items))
            if self.is_closed:
                raise StopIteration
            if self.items:
                item = self.items.popleft()
                self.changed.notify_all()
                return item
            error, self.error = self.error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Drop all items and wake both sides, which then stop."""
        with self.changed:
            self.is_closed = True
            self.items.clear()
            self.changed.notify_all()


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
        self._channel: _Channel[Item] = _Channel(depth)
        # a daemon, since the interpreter joins other threads before any exit handler could stop this one
        thread = threading.Thread(
            target=_fill, args=(self._channel, make_items), name="prefetch", daemon=True
        )
        self._close = weakref.finalize(self, _stop, self._channel, thread)
        thread.start()

    def __next__(self) -> Item:
        """Return the next item; blocks until it is ready."""
        return self._channel.get()

    def close(self) -> None:
        """End the thread and drop the prefetched items; idempotent."""
        self._close()


def _fill(channel: _Channel[Item], make_items: Callable[[], Iterator[Item]]) -> None:
    try:
        for item in make_items():
            if not channel.put(item):
                break
    except BaseException as error:
        channel.finish(error)
    else:
        channel.finish(None)


def _stop(channel: _Channel[Item], thread: threading.Thread) -> None:
    channel.close()
    # garbage collection may run in the thread itself
    if thread is not threading.current_thread() and thread.ident is not None:
        thread.join()
