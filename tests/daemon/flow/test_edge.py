from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.flow.edge import Edge
from grainwatch.config import EdgeTable


def edge(policy: str, depth: int = 3, keep_every: int = 1) -> Edge[int]:
    return Edge("test", EdgeTable(policy=policy, depth=depth, keep_every=keep_every))  # type: ignore[arg-type]


def test_drop_oldest_hands_back_the_oldest() -> None:
    e = edge("drop-oldest")
    dropped = [e.put(n) for n in range(5)]
    assert [d.item for d in dropped if d] == [0, 1]
    assert "full (3)" in dropped[3].reason  # type: ignore[union-attr]
    assert e.get_many(10) == [2, 3, 4]


def test_drop_newest_hands_back_what_came() -> None:
    e = edge("drop-newest")
    assert [d.item for n in range(5) if (d := e.put(n))] == [3, 4]
    assert e.get_many(2) == [0, 1]


@pytest.mark.parametrize("policy", ["drop-oldest", "drop-newest"])
def test_what_waits_is_bounded_in_bytes_too(policy: str) -> None:
    table = EdgeTable(policy=policy, depth=100, mib=10)  # type: ignore[arg-type]
    e: Edge[int] = Edge("test", table, weigh=lambda mib: mib << 20)
    sizes = [4, 4, 4, 4, 1, 9, 30, 2]
    dropped = [d.item for s in sizes if (d := e.put(s))]
    kept = e.get_many(100)
    assert sorted(dropped + kept) == sorted(sizes)
    assert sum(kept) <= 10
    # However large it is, one item finds room.
    assert e.put(30) is None
    assert e.get_many(1) == [30]


def test_a_blocking_edge_waits_for_room_in_bytes() -> None:
    e: Edge[int] = Edge("test", EdgeTable(depth=100, mib=10), weigh=lambda mib: mib << 20)
    assert e.put(6) is None
    dropped = e.put(5, timeout=0.01)
    assert dropped is not None
    assert "full (1), no room in 0.01 s" in dropped.reason
    assert e.get_many(1) == [6]
    assert e.put(5, timeout=0.01) is None


def test_decimate_keeps_every_nth_from_the_first() -> None:
    e = edge("decimate", depth=10, keep_every=3)
    dropped = [d.item for n in range(10) if (d := e.put(n))]
    assert e.get_many(10) == [0, 3, 6, 9]
    assert dropped == [1, 2, 4, 5, 7, 8]


def test_block_waits_for_room() -> None:
    e = edge("block", depth=1)
    e.put(0)
    took = []

    def later() -> None:
        time.sleep(0.1)
        took.extend(e.get_many(1))

    thread = threading.Thread(target=later)
    thread.start()
    begin = time.monotonic()
    assert e.put(1) is None
    assert time.monotonic() - begin > 0.05
    thread.join()
    assert took == [0]
    assert e.get_many(1) == [1]


def test_block_gives_up_after_its_timeout_and_when_closed() -> None:
    e = edge("block", depth=1)
    e.put(0)
    dropped = e.put(1, timeout=0.02)
    assert dropped is not None
    assert dropped.item == 1
    threading.Timer(0.05, e.close).start()
    dropped = e.put(2)
    assert dropped is not None
    assert "stopping" in dropped.reason
    assert e.get_many(5) == [0]


def test_what_must_not_be_dropped_goes_in_beyond_the_depth() -> None:
    e = edge("drop-newest", depth=1)
    e.put(0)
    e.put_always(1)
    e.close()
    e.put_always(2)
    assert e.get_many(5) == [0, 1, 2]


def test_get_returns_at_once_when_something_comes() -> None:
    e = edge("block")
    threading.Timer(0.05, e.put, (7,)).start()
    begin = time.monotonic()
    assert e.get_many(1, timeout=5.0) == [7]
    assert time.monotonic() - begin < 2.0


@given(
    policy=st.sampled_from(["drop-oldest", "drop-newest", "decimate"]),
    depth=st.integers(1, 5),
    keep_every=st.integers(1, 4),
    steps=st.lists(st.integers(0, 3), max_size=60),
)
def test_nothing_vanishes(policy: str, depth: int, keep_every: int, steps: list[int]) -> None:
    e = edge(policy, depth, keep_every)
    dropped, got = [], []
    for n, take in enumerate(steps):
        d = e.put(n, timeout=0.0)
        if d is not None:
            dropped.append(d.item)
        got += e.get_many(take)
        assert len(e) <= depth
    left = [d.item for d in e.drain("over")]
    assert sorted(dropped + got + left) == list(range(len(steps)))
    assert got == sorted(got)
    health = e.health()
    assert (health.passed, health.dropped, health.filled) == (len(got), len(dropped) + len(left), 0)


@pytest.mark.parametrize("readers", [1, 3])
def test_many_threads_lose_nothing(readers: int) -> None:
    e = edge("block", depth=4)
    got: list[int] = []

    def read() -> None:
        while not (e.closed and not len(e)):
            got.extend(e.get_many(3, 0.02))

    def write(first: int) -> None:
        for n in range(first, first + 200):
            assert e.put(n) is None

    reading = [threading.Thread(target=read) for _ in range(readers)]
    writing = [threading.Thread(target=write, args=(k * 200,)) for k in range(3)]
    for thread in reading + writing:
        thread.start()
    for thread in writing:
        thread.join()
    while len(e):
        time.sleep(0.005)
    e.close()
    for thread in reading:
        thread.join()
    assert sorted(got) == list(range(600))
