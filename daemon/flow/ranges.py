"""Sets of whole numbers that mostly run on: frame numbers, kept as intervals."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """A set of whole numbers as sorted, disjoint, closed intervals that do not touch.

    A number next to the last interval, which is what a detector sends, costs O(1).

    >>> r = Ranges([(0, 3)])
    >>> r.add(4), r.add(4), r.add(8)
    (True, False, True)
    >>> list(r)
    [(0, 4), (8, 8)]
    """

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()) -> None:
        self._first: list[int] = []
        self._last: list[int] = []
        self._count = 0
        for first, last in intervals:
            self.add_range(first, last)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._first, self._last, strict=True))

    def __len__(self) -> int:
        """How many numbers are in the set."""
        return self._count

    def __bool__(self) -> bool:
        return self._count > 0

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._first, number) - 1
        return at >= 0 and number <= self._last[at]

    @property
    def highest(self) -> int | None:
        """The largest number, None of an empty set."""
        return self._last[-1] if self._last else None

    def add(self, number: int) -> bool:
        """Add a number; return whether it is new."""
        if self._last and number == self._last[-1] + 1:
            self._last[-1] = number
            self._count += 1
            return True
        if number in self:
            return False
        self.add_range(number, number)
        return True

    def add_range(self, first: int, last: int) -> None:
        """Add all numbers from `first` to `last`, both included."""
        # Intervals that overlap or touch [first, last] are lo .. hi - 1.
        lo = bisect_left(self._last, first - 1)
        hi = bisect_right(self._first, last + 1)
        if lo < hi:
            first = min(first, self._first[lo])
            last = max(last, self._last[hi - 1])
        gone = sum(b - a + 1 for a, b in zip(self._first[lo:hi], self._last[lo:hi], strict=True))
        self._first[lo:hi] = [first]
        self._last[lo:hi] = [last]
        self._count += last - first + 1 - gone

    def remove(self, number: int) -> bool:
        """Take a number out; return whether it was in."""
        at = bisect_right(self._first, number) - 1
        if at < 0 or number > self._last[at]:
            return False
        first, last = self._first[at], self._last[at]
        pieces = [(a, b) for a, b in ((first, number - 1), (number + 1, last)) if a <= b]
        self._first[at : at + 1] = [a for a, _ in pieces]
        self._last[at : at + 1] = [b for _, b in pieces]
        self._count -= 1
        return True

    def within(self, first: int, last: int) -> Ranges:
        """Return the numbers of the set from `first` to `last`."""
        return Ranges((max(a, first), min(b, last)) for a, b in self if b >= first and a <= last)

    def gaps(self, first: int, last: int) -> Ranges:
        """Return the numbers from `first` to `last` that are not in the set."""
        found = Ranges()
        at = first
        for a, b in self.within(first, last):
            if at < a:
                found.add_range(at, a - 1)
            at = b + 1
        if at <= last:
            found.add_range(at, last)
        return found

    def minus(self, other: Ranges) -> Ranges:
        """Return the numbers that are in this set and not in `other`."""
        left = Ranges()
        for a, b in self:
            for first, last in other.gaps(a, b):
                left.add_range(first, last)
        return left
