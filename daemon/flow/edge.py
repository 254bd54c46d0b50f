"""A bounded edge between two threads, with a policy for when it is full.

Nothing vanishes in an edge: what its policy drops is handed back to the caller that put, with the
reason, so that a dropped frame ends as dropped in the ledger and a dropped message in a counter.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from grainwatch.config import EdgeTable
from grainwatch.messages import EdgeHealth

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Dropped(Generic[T]):
    """An item that did not make it through an edge, and why."""

    item: T
    reason: str


class Edge(Generic[T]):
    """A bounded first-in first-out queue with a policy, safe between threads.

    Parameters
    ----------
    name : str
        As `status` shows it ("laue intake", "sink hdf5").
    table : EdgeTable
        Policy, depth and, for "decimate", which fraction passes.
    notify : callable, optional
        Called after each put, outside the lock: wakes a reader of several edges.
    weigh : callable, optional
        Returns the bytes of an item, for the limit `table.mib`; without it, items weigh nothing.
    """

    def __init__(
        self,
        name: str,
        table: EdgeTable,
        notify: Callable[[], None] | None = None,
        weigh: Callable[[T], int] | None = None,
    ) -> None:
        self.name = name
        self._weigh = weigh or _weightless
        self._max_bytes = table.mib << 20
        self._bytes = 0
        self._table = table
        self._notify = notify
        self._items: deque[T] = deque()
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._closed = False
        self._offered = 0
        self._passed = 0
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T, timeout: float | None = None) -> Dropped[T] | None:
        """Offer an item; return what was dropped for it: the item itself, an older one, or None.

        Parameters
        ----------
        item : T
        timeout : float, optional
            Seconds that a blocking policy waits for room before it drops `item`; None waits until
            there is room or the edge is closed, 0 does not wait.
        """
        with self._lock:
            dropped = self._admit(item, timeout)
            if dropped is not None:
                self._dropped += 1
            self._filled.notify()
        if self._notify is not None:
            self._notify()
        return dropped

    def put_always(self, item: T) -> None:
        """Put an item that no policy may drop: the start or end of a series, of which there are few.

        It goes in beyond the depth if need be, and into a closed edge too.
        """
        with self._lock:
            self._append(item)
            self._filled.notify()
        if self._notify is not None:
            self._notify()

    def get_many(self, limit: int, timeout: float = 0.0) -> list[T]:
        """Take up to `limit` items, waiting up to `timeout` seconds for the first one."""
        with self._lock:
            if not self._items and timeout > 0 and not self._closed:
                self._filled.wait(timeout)
            items = [self._pop() for _ in range(min(limit, len(self._items)))]
            self._passed += len(items)
            if items:
                self._room.notify_all()
        return items

    def set_table(self, table: EdgeTable) -> None:
        """Go on with another policy and depth; what is inside stays, even beyond the depth."""
        with self._lock:
            self._table = table
            self._max_bytes = table.mib << 20
            self._room.notify_all()

    def close(self) -> None:
        """Take no more: waiting and later puts drop their item. What is inside can still be got."""
        with self._lock:
            self._closed = True
            self._room.notify_all()
            self._filled.notify_all()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def drain(self, reason: str) -> list[Dropped[T]]:
        """Drop all that is inside."""
        with self._lock:
            dropped = [Dropped(item, reason) for item in self._items]
            self._items.clear()
            self._bytes = 0
            self._dropped += len(dropped)
            self._room.notify_all()
        return dropped

    def health(self) -> EdgeHealth:
        """Return the counters."""
        with self._lock:
            return EdgeHealth(
                edge=self.name,
                policy=self._table.policy,
                depth=self._table.depth,
                filled=len(self._items),
                passed=self._passed,
                dropped=self._dropped,
            )

    def _admit(self, item: T, timeout: float | None) -> Dropped[T] | None:
        table = self._table
        if self._closed:
            return Dropped(item, f"{self.name}: the daemon is stopping")
        self._offered += 1
        if table.policy == "decimate" and (self._offered - 1) % table.keep_every:
            return Dropped(item, f"{self.name}: decimated, 1 of {table.keep_every} kept")
        if self._has_room(item):
            self._append(item)
            return None
        if table.policy == "drop-newest":
            return Dropped(item, f"{self.name}: full ({len(self._items)}), newest dropped")
        if table.policy == "drop-oldest":
            held = len(self._items)
            if self._bytes - self._weigh(self._items[0]) + self._weigh(item) > self._max_bytes and held > 1:
                # It is heavier than the oldest: one comes, one goes.
                return Dropped(item, f"{self.name}: full ({held}), newest dropped, it is larger")
            oldest = self._pop()
            self._append(item)
            return Dropped(oldest, f"{self.name}: full ({held}), oldest dropped")
        return self._wait_for_room(item, timeout)

    def _wait_for_room(self, item: T, timeout: float | None) -> Dropped[T] | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._has_room(item) and not self._closed:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return Dropped(item, f"{self.name}: full ({len(self._items)}), no room in {timeout:g} s")
            self._room.wait(left)
        if self._closed:
            return Dropped(item, f"{self.name}: the daemon is stopping")
        self._append(item)
        return None

    def _has_room(self, item: T) -> bool:
        if not self._items:
            return True
        return len(self._items) < self._table.depth and self._bytes + self._weigh(item) <= self._max_bytes

    def _append(self, item: T) -> None:
        self._items.append(item)
        self._bytes += self._weigh(item)

    def _pop(self) -> T:
        item = self._items.popleft()
        self._bytes -= self._weigh(item)
        return item


def _weightless(item: object) -> int:
    return 0
