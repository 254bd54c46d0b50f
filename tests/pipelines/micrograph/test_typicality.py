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


@given(st.integers(0, 500), st.integers(1, 100))
def test_a_subset_is_spread_evenly(count: int, most: int) -> None:
    some = regular_subset(count, most)
    assert len(some) == min(count, most)
    assert (np.diff(some) > 0).all()
    if len(some):
        assert some[0] >= 0
        assert some[-1] < count
        # As much before the first as after the last, and equal steps but for rounding.
        assert abs(some[0] - (count - 1 - some[-1])) <= 1
        assert np.ptp(np.diff(some)) <= 1 if len(some) > 1 else True
