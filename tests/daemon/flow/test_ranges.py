from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from daemon.flow.ranges import Ranges

numbers = st.integers(-5, 40)
intervals = st.lists(st.tuples(numbers, st.integers(0, 6)).map(lambda t: (t[0], t[0] + t[1])), max_size=12)


def members(ranges: Ranges) -> set[int]:
    return {n for a, b in ranges for n in range(a, b + 1)}


def well_formed(ranges: Ranges) -> bool:
    pieces = list(ranges)
    return all(a <= b for a, b in pieces) and all(p[1] + 1 < q[0] for p, q in itertools.pairwise(pieces))


@given(intervals, st.lists(numbers, max_size=20), st.lists(numbers, max_size=20))
def test_it_is_a_set(pieces: list[tuple[int, int]], more: list[int], less: list[int]) -> None:
    ranges = Ranges(pieces)
    truth = {n for a, b in pieces for n in range(a, b + 1)}
    for n in more:
        assert ranges.add(n) == (n not in truth)
        truth.add(n)
    for n in less:
        assert ranges.remove(n) == (n in truth)
        truth.discard(n)
    assert members(ranges) == truth
    assert len(ranges) == len(truth)
    assert ranges.highest == max(truth, default=None)
    assert well_formed(ranges)
    assert all((n in ranges) == (n in truth) for n in range(-6, 50))


@given(intervals, intervals, numbers, st.integers(0, 20))
def test_set_algebra(one: list[tuple[int, int]], two: list[tuple[int, int]], first: int, n: int) -> None:
    a, b, last = Ranges(one), Ranges(two), first + n
    window = set(range(first, last + 1))
    assert members(a.minus(b)) == members(a) - members(b)
    assert members(a.within(first, last)) == members(a) & window
    assert members(a.gaps(first, last)) == window - members(a)
    assert all(map(well_formed, (a.minus(b), a.within(first, last), a.gaps(first, last))))
