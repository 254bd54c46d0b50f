"""Ranks among held-out images: the level holds whatever the distributions are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.micrograph.typicality import ranked_sources, regular_subset, typicality

DRAWS = 1500


def scores(rng: np.random.Generator, n: int) -> np.ndarray:
    """Numbers that are neither normal nor independent of each other."""
    heavy = rng.standard_t(2.0, n)
    return np.stack([np.exp(rng.normal(size=n)), heavy, heavy**2 + rng.exponential(size=n)], axis=1)


def test_of_images_of_the_same_kind_the_level_is_novel() -> None:
    rng = np.random.default_rng(1)
    sources = np.arange(39)
    found = np.empty(DRAWS)
    for k in range(DRAWS):
        table = scores(rng, 40)
        found[k] = typicality(table[1:], table[0], sources, (False, True, False))
    for level in (0.05, 0.1, 0.3, 0.5):
        # Of a rank among 40: exactly the level; five standard deviations of the count.
        off = 5.0 * np.sqrt(level * (1.0 - level) / DRAWS)
        assert np.mean(found <= level) == pytest.approx(level, abs=off)
        assert np.mean(found < level) <= level + off


def test_images_of_few_sources_do_not_break_the_level() -> None:
    rng = np.random.default_rng(2)
    sources = np.repeat(np.arange(24), 5)
    novel = 0
    for _ in range(DRAWS):
        own = rng.normal(size=25)  # what the images of a source have in common
        known = own[:24].repeat(5)[:, None] + 0.1 * rng.normal(size=(120, 1))
        asked = own[24:] + 0.1 * rng.normal(size=1)
        novel += typicality(known, asked, sources) < 0.05
    assert novel / DRAWS <= 0.05 + 5.0 * np.sqrt(0.05 * 0.95 / DRAWS)


def test_what_is_strange_in_one_respect_is_strange() -> None:
    known = np.random.default_rng(3).normal(size=(59, 3))
    sources = np.arange(59)
    assert typicality(known, np.array([0.0, 0.0, 9.0]), sources) == 1 / 60
    assert typicality(known, np.array([0.0, 0.0, -9.0]), sources) > 0.2
    assert typicality(known, np.array([0.0, 0.0, -9.0]), sources, (False, False, True)) == 1 / 60
    assert typicality(known, np.median(known, axis=0), sources, (True, True, True)) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_number_is_never_typical(bad: float) -> None:
    assert typicality(np.zeros((30, 2)), np.array([0.0, bad]), np.arange(30)) == 0.0


def test_known_images_that_are_all_equal_know_only_that() -> None:
    known, sources = np.full((30, 1), 2.0), np.arange(30)
    assert typicality(known, np.array([2.0]), sources) == 1.0
    assert typicality(known, np.array([2.1]), sources) == 1 / 31


def test_sources_count_where_there_are_enough_of_them() -> None:
    names = [f"spot {k // 3}" for k in range(60)]
    numbers, by_source = ranked_sources(names, 0.05)
    assert by_source
    assert len(set(numbers[:3])) == 1
    assert len(set(numbers)) == 20
    numbers, by_source = ranked_sources([f"spot {k // 30}" for k in range(60)], 0.05)
    assert not by_source
    assert numbers.tolist() == list(range(60))
    with pytest.raises(ValueError, match="hold out 20 or more"):
        ranked_sources(["a"] * 19, 0.05)
    with pytest.raises(ValueError, match="level: expected"):
        ranked_sources(names, 0.0)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 2000))
def test_a_subset_is_spread_evenly_in_both_directions(down: int, across: int, most: int) -> None:
    some = regular_subset((down, across), most)
    assert len(some) == min(down * across, most)
    assert (np.diff(some) > 0).all()
    if not len(some):
        return
    assert some[0] >= 0
    assert some[-1] < down * across
    rows, columns = np.divmod(some, across)
    assert np.ptp(np.bincount(rows, minlength=down)) <= 1
    assert np.ptp(np.bincount(columns, minlength=across)) <= 1


@pytest.mark.parametrize("side", [4, 8, 16])
def test_a_subset_is_no_stripe_where_the_width_is_a_multiple_of_the_step(side: int) -> None:
    # A quarter, counted row by row, were columns 2, 6, 10, ... alone.
    rows, columns = np.divmod(regular_subset((side, side), side * side // 4), side)
    assert np.bincount(rows).tolist() == np.bincount(columns).tolist() == [side // 4] * side
    # Nor is it one corner to the other.
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.2
    assert [
        int(np.count_nonzero((rows < side // 2) == top) - np.count_nonzero((columns < side // 2) == top))
        for top in (False, True)
    ] == [0, 0]


def test_a_subset_sees_what_varies_from_left_to_right() -> None:
    # A ramp of brightness over 16 x 16 patches, from 0 to 1: mean 0.5, standard deviation 0.31.
    ramp = np.tile(np.linspace(0.0, 1.0, 16), 16)
    for most in (4, 16, 64):
        seen = ramp[regular_subset((16, 16), most)]
        assert seen.mean() == pytest.approx(0.5, abs=0.05)
        assert seen.std() == pytest.approx(0.31, abs=0.03)


@given(st.integers(1, 500), st.integers(1, 100))
def test_a_subset_of_one_row_or_column_has_equal_steps(count: int, most: int) -> None:
    some = regular_subset((1, count), most)
    np.testing.assert_array_equal(some, regular_subset((count, 1), most))
    # As much before the first as after the last, and equal steps but for rounding.
    assert abs(some[0] - (count - 1 - some[-1])) <= 1
    assert np.ptp(np.diff(some)) <= 1 if len(some) > 1 else True


@pytest.mark.parametrize(
    ("count", "grid"), [(16, (4, 4)), (48, (6, 8)), (300, (15, 20)), (17, (1, 17)), (1, (1, 1)), (0, (1, 0))]
)
def test_of_patches_whose_grid_is_forgotten_a_usual_one_is_taken(count: int, grid: tuple[int, int]) -> None:
    for most in (1, 3, 4, 9, 16, 60):
        np.testing.assert_array_equal(regular_subset(count, most), regular_subset(grid, most))


@given(st.integers(1, 400), st.integers(1, 400))
def test_of_a_subset_another_one_can_be_taken(first: int, second: int) -> None:
    some = regular_subset((20, 20), first)
    fewer = some[regular_subset(len(some), second)]
    assert len(set(fewer.tolist())) == min(first, second)
