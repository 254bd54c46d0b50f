"""What chance can do: tails against exact sums, chance matches against Monte Carlo, calibration on noise."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from testkit.laue import AREA, CALIBRATION, indexer, phase, random_turns, simulated

from pipelines.laue.forward import random_positions
from pipelines.laue.indexing.evidence import (
    SpotDensity,
    false_probability,
    log_binomial_tail,
    log_trials,
)
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.indexing.match import SpotGrid, predict, score
from pipelines.laue.indexing.parameters import IndexingParameters
from pipelines.laue.indexing.rivals import plausibility


@pytest.mark.parametrize(
    ("k", "n", "p"),
    [
        (1, 1, 0.3),
        (5, 30, 0.02),
        (30, 30, 0.01),
        (25, 40, 0.05),
        (100, 200, 0.1),
        (3, 400, 0.01),
        (195, 200, 0.9),
    ],
)
def test_tail_is_the_exact_sum(k: int, n: int, p: float) -> None:
    exact_p = Fraction(p)
    total = sum(
        (math.comb(n, i) * exact_p**i * (1 - exact_p) ** (n - i) for i in range(k, n + 1)), Fraction(0)
    )
    exact = math.log(total.numerator) - math.log(total.denominator)
    assert log_binomial_tail(k, n, p) == pytest.approx(exact, rel=1e-10, abs=1e-12)


@given(st.integers(1, 500), st.floats(1e-6, 0.999), st.data())
@settings(deadline=None)
def test_tail_is_that_of_scipy(n: int, p: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    ours = log_binomial_tail(k, n, p)
    assert ours <= 0.0
    theirs = float(stats.binom.sf(k - 1, n, p))
    if theirs > 1e-250:
        assert ours == pytest.approx(math.log(theirs), rel=1e-8, abs=1e-9)
    if k < n:
        assert log_binomial_tail(k + 1, n, p) <= ours + 1e-12


def test_tail_at_its_ends() -> None:
    assert log_binomial_tail(0, 10, 0.2) == 0.0
    assert log_binomial_tail(3, 10, 0.0) == -math.inf
    assert log_binomial_tail(3, 10, 1.0) == 0.0
    assert log_binomial_tail(400, 400, 1e-3) == pytest.approx(400 * math.log(1e-3))


def test_a_mean_probability_overstates_the_tail_of_unequal_ones() -> None:
    # Hoeffding 1956, which the code leans on: beyond the mean, unequal p have the thinner tail.
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.uniform(0, 0.3, 12)
        exact = np.array([1.0])
        for one in p:
            exact = np.convolve(exact, [1 - one, one])
        for k in range(math.ceil(p.sum() + 1), 13):
            assert math.log(exact[k:].sum()) <= log_binomial_tail(k, 12, float(p.mean())) + 1e-12


@pytest.mark.parametrize("kind", ["uniform", "corner", "grains"])
@pytest.mark.parametrize("radius_px", [2.0, 6.0])
def test_chance_is_the_match_rate_of_random_orientations(kind: str, radius_px: float) -> None:
    if kind == "uniform":
        xy = random_positions(400, AREA, np.random.default_rng(2))
    elif kind == "corner":
        xy = random_positions(1600, AREA, np.random.default_rng(2))
        xy = xy[(xy[:, 0] < 900) & (xy[:, 1] > 1100)]
    else:
        xy = simulated("Cu", random_turns(10, seed=3), seed=4).xy_px
    scene = phase("Ti").scene
    turns = random_turns(400, seed=5)
    matched, expected = score(scene, SpotGrid.of(xy, CALIBRATION.shape), turns, radius_px, 10_000)
    density = SpotDensity(xy, CALIBRATION.shape)
    said = np.concatenate([density.chance(predict(scene, m).xy_px, radius_px) for m in turns])
    assert np.all((said > 0) & (said < 1))
    # Where spots crowd in one corner, the frame's own density everywhere is on the safe side.
    low, high = (0.9, 2.5) if kind == "corner" else (0.75, 1.25)
    assert low < said.sum() / matched.sum() < high
    assert len(said) == expected.sum()


def test_an_empty_frame_matches_nothing() -> None:
    density = SpotDensity(np.empty((0, 2)), CALIBRATION.shape)
    assert np.all(density.chance(np.array([[3.0, 5.0], [1000.0, 1000.0]]), 2.0) == 0)


def test_trials_are_the_cells_of_orientations() -> None:
    # SO(3) holds 8π² of rotation vectors: with a radius of 1 mrad, cells of 2 mrad, one spot matched.
    assert log_trials(1e-3, 1, 1) == pytest.approx(math.log(8 * math.pi**2 / (2e-3) ** 3))
    assert log_trials(1e-3, 1, 1) - log_trials(1e-3, 1, 24) == pytest.approx(math.log(24))
    assert log_trials(1e-3, 20, 24) > log_trials(1e-3, 10, 24) > log_trials(2e-3, 10, 24)
    assert log_trials(1e-3, 10, 24, max_strain=5e-3) > log_trials(1e-3, 10, 24)


@given(st.floats(-800, 50))
def test_false_probability_is_a_probability(log_expected: float) -> None:
    p = false_probability(log_expected)
    assert 0.0 <= p <= 1.0
    if -700 < log_expected < -20:
        assert p == pytest.approx(math.exp(log_expected), rel=1e-6)
    assert false_probability(-math.inf) == 0.0


def test_plausibility_falls_with_what_is_missing() -> None:
    chance = np.full(40, 0.02)
    all_seen, half = np.ones(40, dtype=bool), np.arange(40) % 2 == 0
    assert plausibility(all_seen, chance) > plausibility(half, chance)
    twice_the_spots = np.concatenate([all_seen, np.zeros(40, dtype=bool)])
    assert plausibility(twice_the_spots, np.full(80, 0.02)) < plausibility(all_seen, chance)
    assert plausibility(np.zeros(40, dtype=bool), chance) < 0
    assert math.isfinite(plausibility(all_seen, np.zeros(40)))


@pytest.mark.parametrize(("name", "peaks", "frames"), [("Cu", 60, 60), ("Cu", 200, 10), ("Ti", 100, 10)])
def test_chance_crystals_are_as_rare_as_said(name: str, peaks: int, frames: int) -> None:
    # Every candidate is let through; of random peaks, all are false. A frame may hold one with p <= P
    # in P of the cases at most.
    door = Indexer(indexer(name).phases, IndexingParameters(max_false_probability=0.5, min_matched=4))
    rng = np.random.default_rng(7)
    said = [
        crystal.false_probability
        for _ in range(frames)
        for crystal in door.index(random_positions(peaks, AREA, rng))
    ]
    for p in (0.5, 0.1, 0.01):
        allowed = p * frames
        assert np.count_nonzero(np.array(said) <= p) <= allowed + 3 * math.sqrt(allowed)
