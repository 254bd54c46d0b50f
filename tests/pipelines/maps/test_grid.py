"""Scan grids: frame numbers, positions, and positions that are no grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.maps.grid import NotAGrid, ScanGrid, infer_grid

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


def test_x_is_fastest_and_snake_turns_every_second_line() -> None:
    plain = ScanGrid((3, 2))
    assert [plain.index(n) for n in range(6)] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    snake = ScanGrid((3, 2), snake=True, first_frame=1)
    assert [snake.index(n) for n in range(1, 7)] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    # lines are counted through the planes: the third line of 3 x 1 x 3 runs forwards again
    volume = ScanGrid((3, 1, 3), snake=True)
    assert [volume.index(n)[0] for n in range(9)] == [0, 1, 2, 2, 1, 0, 0, 1, 2]


@given(shapes, st.booleans(), st.integers(-3, 1000))
def test_numbers_and_indices_are_one_to_one(shape: tuple[int, ...], snake: bool, first: int) -> None:
    grid = ScanGrid(shape, snake=snake, first_frame=first)
    frames = np.arange(first, first + math.prod(shape))
    indices = grid.indices(frames)
    assert np.array_equal(grid.frames(indices), frames)
    assert len(np.unique(indices, axis=0)) == grid.size
    moved = np.abs(np.diff(indices, axis=0))
    if snake:  # the stage never runs back over a whole line
        assert (moved[:, 0] <= 1).all()


@pytest.mark.parametrize("frame", [-1, 6])
def test_frames_outside_are_named(frame: int) -> None:
    with pytest.raises(ValueError, match=f"frame {frame} lies outside the scan of 3 x 2 points"):
        ScanGrid((3, 2)).index(frame)
    with pytest.raises(ValueError, match=r"\(3, 0\) lies outside"):
        ScanGrid((3, 2)).frame((3, 0))


def test_bad_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="positive whole numbers"):
        ScanGrid((3, 0))
    with pytest.raises(ValueError, match="step_um"):
        ScanGrid((3, 2), step_um=(1.0,))


@given(
    # On two or three points a line jitter itself can look like steps: 3 of 1000 such grids do.
    st.lists(st.integers(4, 9), min_size=1, max_size=3).map(tuple),
    st.integers(0, 2**32 - 1),
    st.floats(0.0, 0.12),
    st.floats(-5e3, 5e3),
)
@example((7,), 6, 0.1171875, 0.0)  # the shortest distance is half of a longer one
def test_positions_with_jitter_and_holes_give_their_grid(
    shape: tuple[int, ...], seed: int, jitter: float, origin: float
) -> None:
    rng = np.random.default_rng(seed)
    step = rng.uniform(0.3, 20.0, len(shape))
    truth = ScanGrid(shape, tuple(step))
    indices = truth.indices(np.arange(truth.size))
    keep = rng.permutation(truth.size)[: max(1, math.ceil(0.9 * truth.size))]
    corner = (indices == 0).sum(axis=1) >= len(
        shape
    ) - 1  # the axes themselves stay, so that the shape is known
    indices = indices[np.union1d(keep, np.flatnonzero(corner))]
    noise = rng.uniform(-jitter, jitter, indices.shape)
    positions = origin + (indices + noise) * step
    order = rng.permutation(len(indices))
    grid, found = infer_grid(positions[order])
    assert grid.shape == shape
    assert np.array_equal(found, indices[order])
    assert np.allclose(grid.step_um, step, rtol=0.25)
    assert np.array_equal(grid.nearest(positions, tolerance=0.5), indices)


def test_a_line_scan_has_one_moving_axis() -> None:
    rng = np.random.default_rng(3)
    x = np.arange(20.0) * 2.5
    grid, indices = infer_grid(np.stack([np.full(20, 7.0) + rng.normal(0, 0.05, 20), x], axis=1))
    assert grid.shape == (1, 20)
    assert grid.step_um == pytest.approx((0.0, 2.5))
    assert np.array_equal(indices[:, 1], np.arange(20))


def test_a_missing_line_is_a_hole_not_a_wider_step() -> None:
    x, y = np.meshgrid([0.0, 1.0, 3.0, 4.0, 5.0], [0.0, 2.0])
    grid, _ = infer_grid(np.stack([x.ravel(), y.ravel()], axis=1))
    assert grid.shape == (6, 2)
    assert grid.step_um == pytest.approx((1.0, 2.0))


@pytest.mark.parametrize("seed", range(5))
def test_scattered_positions_are_no_grid(seed: int) -> None:
    with pytest.raises(NotAGrid, match=r"axis [xy]: 40 positions"):
        infer_grid(np.random.default_rng(seed).uniform(0, 100, (40, 2)))


def test_two_frames_at_one_place_are_reported() -> None:
    with pytest.raises(NotAGrid, match="2 positions fall on the same grid point"):
        infer_grid([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.02]])
    with pytest.raises(NotAGrid, match="not a number"):
        infer_grid([[0.0, math.nan]])


def test_a_position_between_points_is_named() -> None:
    grid = ScanGrid((4, 4), (1.0, 2.0), origin_um=(10.0, 0.0))
    assert grid.nearest([[12.1, 3.9]]).tolist() == [[2, 2]]
    with pytest.raises(NotAGrid, match=r"axis y is at 0\.50 steps of 2 um"):
        grid.nearest([[10.0, 1.0]])
    with pytest.raises(NotAGrid, match="axis x is at 4"):
        grid.nearest([[14.0, 0.0]])
