from __future__ import annotations

import itertools

from daemon.flow.scan import GridWalk, grid_index
from grainwatch.config import ScanTable


def test_each_point_once_and_neighbours_touch_in_a_snake() -> None:
    for shape in ((4,), (5, 3), (3, 2, 4)):
        n = 1
        for k in shape:
            n *= k
        plain = [grid_index(ScanTable(shape=shape), i) for i in range(n)]
        snake = [grid_index(ScanTable(shape=shape, snake=True), i) for i in range(n)]
        assert len(set(plain)) == len(set(snake)) == n
        assert plain == sorted(plain, key=lambda p: p[::-1])  # type: ignore[index]
        assert grid_index(ScanTable(shape=shape), n) is None
        assert grid_index(ScanTable(shape=shape), -1) is None
    plane = [grid_index(ScanTable(shape=(5, 3), snake=True), i) for i in range(15)]
    steps = [sum(abs(a - b) for a, b in zip(p, q, strict=True)) for p, q in itertools.pairwise(plane)]  # type: ignore[arg-type]
    assert set(steps) == {1}


def test_numbers_count_from_the_first_frame() -> None:
    assert GridWalk(ScanTable(shape=(3, 2)), 1).index(4, None) == (0, 1)


def test_positions_count_where_there_are_steps() -> None:
    walk = GridWalk(ScanTable(shape=(4, 3), step_um=(2.0, -5.0)), 0)
    # The first frame that came is number 1: its place is (1, 0).
    assert walk.index(1, (102.1, 50.0)) == (1, 0)
    assert walk.index(2, (106.0, 40.0)) == (3, 2)
    assert walk.index(3, (112.0, 40.0)) is None
    assert walk.index(4, (float("nan"), 1.0)) is None
    assert walk.index(5, None) == (1, 1)


def test_an_origin_that_is_told_places_frames_of_any_order() -> None:
    """Also after a restart, when the first frame that comes is not the first of the scan."""
    scan = ScanTable(shape=(3, 2), step_um=(0.5, 2.0), origin_um=(10.0, -3.0))
    for first in (0, 4):
        walk = GridWalk(scan, 0)
        assert walk.index(first, (10.5, -1.0)) == (1, 1)
        assert walk.index(99, (10.0, -3.0)) == (0, 0)
        assert walk.index(3, (11.5, -3.0)) is None
        assert walk.index(5, None) == (2, 1)
