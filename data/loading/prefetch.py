"""Items prepared ahead by one background thread, in order, at most so many at a time."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _Channel(Generic[Item]):
    """What the thread and the consumer share: a bounded queue that both ends can shut."""

    def __init__(self, depth: int) -> None:
        self.changed = threading.Condition()
        self.items: deque[Item] = deque()
        self.depth = depth
        self.is_closed = False
        self.is_done = False
        self.error: BaseException | None = None

    def put(self, item: Item) -> bool:
        """Add an item when there is room; False once the consumer has closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or len(self.items) < self.depth)
            if not self.is_closed:
                self.items.append(item)
                self.changed.notify_all()
            return not self.is_closed

    def finish(self, error: BaseException | None) -> None:
        """State that no item follows, and why."""
        with self.changed:
            self.is_done, self.error = True, error
            self.changed.notify_all()

    def get(self) -> Item:
        """Take the next item; StopIteration at the end, or the thread's own exception in its place."""
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
        """Make both ends give up."""
        with self.changed:
            self.is_closed = True
            self.items.clear()
            self.changed.notify_all()


class Prefetcher(Iterator[Item]):
    """An iterator whose items a background thread prepares.

    An exception in the thread is raised to the consumer in the place where the item would have come. The
    thread ends when the items do, at `close()`, when the prefetcher is garbage, and before the interpreter
    exits.
    """

    def __init__(self, make_items: Callable[[], Iterator[Item]], depth: int) -> None:
        """Start the thread.

        Args:
            make_items: Called in the thread; must not refer to the prefetcher, or that never becomes garbage.
            depth: Items held ready at most, at least 1.
        """
        assert depth >= 1
        self._channel: _Channel[Item] = _Channel(depth)
        # A daemon, since the interpreter joins other threads before any exit handler could stop this one.
        thread = threading.Thread(
            target=_fill, args=(self._channel, make_items), name="prefetch", daemon=True
        )
        self._close = weakref.finalize(self, _stop, self._channel, thread)
        thread.start()

    def __next__(self) -> Item:
        """Return the next item, waiting for it if need be."""
        return self._channel.get()

    def close(self) -> None:
        """End the thread and drop what it prepared; safe to call again."""
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
    # Garbage collection may run in the thread itself.
    if thread is not threading.current_thread() and thread.ident is not None:
        thread.join()
