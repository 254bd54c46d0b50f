"""Whatever comes, in whatever order: each item once, by rising number, and nothing forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from grainwatch.sequence import Sequencer


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), max_size=80), st.lists(st.integers(0, 60), max_size=5), st.integers(0, 5))
def test_each_once_and_in_order(arrivals: list[int], covers: list[int], begin: int) -> None:
    sequencer: Sequencer[int] = Sequencer(begin)
    out: list[int] = []
    skipped: set[int] = set()
    taken: set[int] = set()
    steps = [*arrivals, *(-1 - c for c in covers)]
    for step in steps:
        if step >= 0:
            if sequencer.offer(step, step):
                taken.add(step)
            out += sequencer.take()
        else:
            items, ranges = sequencer.cover(-1 - step)
            out += items
            skipped |= {n for first, last in ranges for n in range(first, last + 1)}
    assert out == sorted(set(out))
    assert set(out) <= taken
    assert not skipped & set(out)
    assert sequencer.expected is not None
    assert set(range(begin, sequencer.expected)) == set(out) | skipped
    hole = sequencer.hole()
    if hole is not None:
        assert hole[0] == sequencer.expected
        assert len(sequencer) == len(taken) - len(out) > 0
    else:
        assert len(sequencer) == 0


@settings(deadline=None)
@given(st.permutations(range(20)))
def test_any_order_is_put_right(arrivals: list[int]) -> None:
    sequencer: Sequencer[int] = Sequencer(0)
    out = []
    for seq in arrivals:
        sequencer.offer(seq, seq)
        out += sequencer.take()
    assert out == list(range(20))
    assert sequencer.hole() is None


def test_the_first_item_sets_the_number_and_begin_lets_go_of_earlier_ones() -> None:
    sequencer: Sequencer[str] = Sequencer()
    assert sequencer.hole() is None
    assert sequencer.offer(7, "g")
    assert not sequencer.offer(6, "f")
    assert sequencer.take() == ["g"]
    sequencer.offer(10, "j")
    sequencer.offer(12, "l")
    sequencer.begin(11)
    assert sequencer.hole() == (11, 11)
    sequencer.begin(None)
    assert sequencer.take() == ["l"]


def test_restart_hands_out_all_and_begins_anew() -> None:
    sequencer: Sequencer[int] = Sequencer(5)
    for seq in (5, 7, 9):
        sequencer.offer(seq, seq)
    assert sequencer.restart(1) == ([5, 7, 9], [(6, 6), (8, 8)])
    assert sequencer.offer(1, 1)
    assert sequencer.take() == [1]
