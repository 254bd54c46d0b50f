"""Puts numbered messages in order and knows which are missing. No sockets, no clocks."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class Sequencer(Generic[T]):
    """Hands out items by rising number, each once.

    Parameters
    ----------
    expected : int, optional
        The first number to hand out; without it, that of the first item offered.
    """

    def __init__(self, expected: int | None = None) -> None:
        self.expected = expected
        self._held: dict[int, T] = {}
        self._order: list[int] = []

    def __len__(self) -> int:
        """Number of items held back behind a hole."""
        return len(self._held)

    def offer(self, seq: int, item: T) -> bool:
        """Take an item; False when its number has been handed out or offered before."""
        if self.expected is None:
            self.expected = seq
        if seq < self.expected or seq in self._held:
            return False
        self._held[seq] = item
        heapq.heappush(self._order, seq)
        return True

    def take(self) -> list[T]:
        """Return the items whose turn it is, in order."""
        items = []
        while self._order and self._order[0] == self.expected:
            items.append(self._held.pop(heapq.heappop(self._order)))
            self.expected += 1
        return items

    def hole(self) -> tuple[int, int] | None:
        """Return the first and last number that are missing before the next item, if any are."""
        if not self._order or self.expected is None or self._order[0] <= self.expected:
            return None
        return self.expected, self._order[0] - 1

    def cover(self, last: int) -> tuple[list[T], list[tuple[int, int]]]:
        """Stop waiting for numbers up to `last`.

        Returns
        -------
        items : list
            The items whose turn it is now.
        skipped : list of (first, last)
            The numbers that nobody offered.
        """
        items = self.take()
        skipped = []
        while self.expected is not None and self.expected <= last:
            end = min(self._order[0] - 1, last) if self._order else last
            skipped.append((self.expected, end))
            self.expected = end + 1
            items += self.take()
        return items, skipped

    def begin(self, expected: int | None) -> None:
        """Set the next number (None: the first of those held) and let go of items before it."""
        self.expected = min(self._held, default=None) if expected is None else expected
        if self.expected is not None:
            self._held = {seq: item for seq, item in self._held.items() if seq >= self.expected}
            self._order = sorted(self._held)

    def restart(self, expected: int) -> tuple[list[T], list[tuple[int, int]]]:
        """Hand out all that is held, as `cover` does, and begin anew at another number."""
        result = self.cover(max(self._order)) if self._order else (self.take(), [])
        self.expected = expected
        return result
