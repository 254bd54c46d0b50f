"""Pairs of crystals in neighbouring points against a plain greedy matching."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.laue.crystal import load_material
from pipelines.maps.links import left_matrix, link, nearest_operator
from pipelines.rotations import misorientation_deg, multiply, nearest_equivalent, random_rotations

GROUPS = [load_material(name).proper_point_group for name in ("Cu", "Ti", "ZrO2")]
OPERATORS = np.concatenate(GROUPS)
STARTS = np.array([0, 24, 36, 38], dtype=np.int64)
TOLERANCE_DEG = 3.0


def crystals(
    n: int, base: npt.NDArray[np.float64], rng: np.random.Generator, spread_deg: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Crystals a few degrees around `base`, each in a random symmetry equivalent."""
    material = rng.integers(0, 3, n).astype(np.int32)
    small = np.column_stack([np.ones(n), np.radians(rng.normal(0, spread_deg, (n, 3))) / 2])
    small /= np.linalg.norm(small, axis=1, keepdims=True)
    q = multiply(small, base)
    operator = np.array([GROUPS[m][rng.integers(len(GROUPS[m]))] for m in material]).reshape(-1, 4)
    return multiply(operator, q), material


def pairs(
    a: tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]],
    b: tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]],
    neighbour: npt.NDArray[np.int32],
    precedes: bool,
) -> list[tuple[int, int]]:
    cosine = math.cos(math.radians(TOLERANCE_DEG) / 2)
    flags = np.full(len(neighbour), precedes)
    found = link(*a, *b, neighbour, flags, OPERATORS, STARTS, cosine)
    return [(int(i), int(j)) for i, j in found]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.lists(st.integers(1, 4), max_size=6))
def test_best_pairs_first_one_to_one_with_each_neighbour(seed: int, k: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    base = random_rotations(1, rng)[0]
    here, there = crystals(k, base, rng, 1.0), crystals(sum(sizes), base, rng, 1.0)
    neighbour = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    expected = set()
    for number in range(len(sizes)):
        open_pairs = [
            (float(misorientation_deg(here[0][i], there[0][j], GROUPS[here[1][i]])), i, int(j))
            for i in range(k)
            for j in np.flatnonzero(neighbour == number)
            if here[1][i] == there[1][j]
        ]
        while open_pairs:
            angle, i, j = min(open_pairs)
            if angle > TOLERANCE_DEG:
                break
            expected.add((i, j))
            open_pairs = [pair for pair in open_pairs if pair[1] != i and pair[2] != j]
    assert set(pairs(here, there, neighbour, False)) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4))
def test_pairs_do_not_depend_on_who_came_first(seed: int, k: int, m: int) -> None:
    """Also when rounding alone decides: equal crystals, written as different equivalents."""
    rng = np.random.default_rng(seed)
    base = random_rotations(1, rng)[0]
    a, b = crystals(k, base, rng, 0.0), crystals(m, base, rng, 0.0)
    forwards = pairs(a, b, np.zeros(m, dtype=np.int32), False)
    backwards = pairs(b, a, np.zeros(k, dtype=np.int32), True)
    assert sorted(forwards) == sorted((i, j) for j, i in backwards)
    assert len(forwards) == sum(
        min(np.sum(a[1] == material), np.sum(b[1] == material)) for material in range(3)
    )


@given(st.integers(0, 2**32 - 1))
def test_the_operator_brings_the_nearest_equivalent(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = random_rotations(2, rng)
    group = GROUPS[0]
    moved = left_matrix(group[nearest_operator(a, b, group, 0, 24)]) @ b
    expected = nearest_equivalent(b, a, group)
    assert np.allclose(moved * np.sign(moved @ expected), expected, atol=1e-12)
