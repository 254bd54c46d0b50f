"""Computed spots against the forward simulation (other code), matches against scipy's k-d tree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from testkit.laue import AREA, BAND_KEV, CALIBRATION, ONE_OF_EACH_SYSTEM, phase, random_strain, random_turns

from pipelines.laue.forward import random_positions, simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.indexing.match import CELL_PX, Scene, SpotGrid, pair, predict, score


def scene_of(name: str, area: DetectorArea = AREA) -> Scene:
    return Scene(phase(name).scene.reflections, CALIBRATION, area, BAND_KEV)


def half_masked() -> DetectorArea:
    """A detector with a gap, a dead half and dead pixels."""
    mask = np.zeros(CALIBRATION.shape, dtype=bool)
    mask[:, 1000:] = True
    mask[700:740] = True
    mask.flat[np.random.default_rng(5).choice(mask.size, 20_000)] = True
    return DetectorArea.of(CALIBRATION, mask)


def deformed(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    strains = np.array([random_strain(rng, 2e-3) for _ in range(n)])
    return random_turns(n, seed) @ (np.eye(3) - strains)


@pytest.mark.parametrize("area", [AREA, half_masked()], ids=["whole", "masked"])
@pytest.mark.parametrize("name", ONE_OF_EACH_SYSTEM)
def test_computed_spots_are_those_of_the_forward_simulation(name: str, area: DetectorArea) -> None:
    scene = scene_of(name, area)
    listed = scene.reflections
    for matrix in deformed(3, seed=len(name)):
        ours = predict(scene, matrix)
        theirs = simulate_spots(matrix @ listed.material.B0, listed, CALIBRATION, area)
        np.testing.assert_array_equal(ours.index, theirs.reflection)
        assert len(np.unique(ours.index)) == len(ours.index) > 5
        np.testing.assert_allclose(ours.xy_px, theirs.xy_px, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(listed.hkl[ours.index] * ours.order[:, None], theirs.hkl)
        np.testing.assert_allclose(ours.energy_keV, theirs.energy_keV, rtol=1e-12)


def test_harmonics_are_one_spot_and_each_spot_has_a_place_of_its_own() -> None:
    scene = scene_of("Cu")
    matrix = random_turns(1, seed=8)[0]
    spots = simulate_spots(matrix @ scene.reflections.material.B0, scene.reflections, CALIBRATION, AREA)
    assert spots.n_orders.max() > 1  # the case is there
    ours = predict(scene, matrix)
    assert len(ours.xy_px) == len(spots)
    nearest = cKDTree(ours.xy_px).query(ours.xy_px, k=2)[0][:, 1]
    assert nearest.min() > 0.5


@pytest.mark.parametrize("band", [(5.0, 30.0), (8.0, 14.0), (17.9, 18.1)])
def test_computed_spots_follow_the_energy_band(band: tuple[float, float]) -> None:
    scene = phase("Ti", energy_keV=band).scene
    for matrix in random_turns(2, seed=4):
        ours = predict(scene, matrix)
        theirs = simulate_spots(
            matrix @ scene.reflections.material.B0, scene.reflections, CALIBRATION, AREA, band
        )
        np.testing.assert_array_equal(ours.index, theirs.reflection)
        assert np.all((ours.energy_keV >= band[0]) & (ours.energy_keV <= band[1]))


def test_the_first_reflections_alone_can_be_asked_for() -> None:
    scene = scene_of("ZrO2")
    matrix = random_turns(1, seed=2)[0]
    everything, some = predict(scene, matrix), predict(scene, matrix, 1200)
    np.testing.assert_array_equal(some.index, everything.index[everything.index < 1200])


@pytest.mark.parametrize("area", [AREA, half_masked()], ids=["whole", "masked"])
@pytest.mark.parametrize("radius_px", [1.5, 8.0, CELL_PX])
def test_scores_count_what_a_tree_of_the_spots_counts(area: DetectorArea, radius_px: float) -> None:
    scene = scene_of("Ti", area)
    xy = random_positions(900, AREA, np.random.default_rng(3))
    tree = cKDTree(xy)
    matrices = random_turns(40, seed=11)
    matched, expected = score(scene, SpotGrid.of(xy, CALIBRATION.shape), matrices, radius_px, 1500)
    for matrix, hits, total in zip(matrices, matched, expected, strict=True):
        spots = simulate_spots(matrix @ scene.reflections.material.B0, scene.reflections, CALIBRATION, area)
        counted = spots.xy_px[spots.reflection < 1500]
        distance, _ = tree.query(counted)
        assert (hits, total) == (np.count_nonzero(distance < radius_px), len(counted))
    assert matched.sum() > 0


def test_what_a_mask_hides_is_not_expected() -> None:
    matrices = random_turns(30, seed=6)
    no_spots = SpotGrid.of(np.empty((0, 2)), CALIBRATION.shape)
    whole = score(scene_of("Cu"), no_spots, matrices, 2.0, 2000)[1]
    half = score(scene_of("Cu", half_masked()), no_spots, matrices, 2.0, 2000)[1]
    assert np.all(half <= whole)
    assert 0.3 < half.sum() / whole.sum() < 0.7


# Quarters of a pixel: distances tie, and lie on the radius and on the borders of cells.
POSITION = st.tuples(*[st.integers(-2, 4 * 64 + 2).map(lambda n: n / 4)] * 2)


@given(
    st.lists(POSITION, max_size=30), st.lists(POSITION, max_size=30), st.sampled_from([0.75, 3.0, 15.9, 16.0])
)
@settings(deadline=None, max_examples=300)
def test_pairs_are_one_to_one_and_nearest(
    computed: list[tuple[float, float]], measured: list[tuple[float, float]], radius_px: float
) -> None:
    a = np.array(computed).reshape(-1, 2)
    b = np.array(measured).reshape(-1, 2)
    spot, distance = pair(a, SpotGrid.of(b, (64, 64)), radius_px)
    used = spot[spot >= 0]
    assert len(np.unique(used)) == len(used)
    between = np.linalg.norm(a[:, None] - b[None], axis=2).reshape(len(a), len(b))
    for i in range(len(a)):
        if spot[i] >= 0:
            assert distance[i] == pytest.approx(between[i].min(), abs=1e-12)
            assert distance[i] == pytest.approx(between[i, spot[i]], abs=1e-12)
            assert distance[i] < radius_px
        else:
            assert np.isinf(distance[i])
    for j in range(len(b)):
        wants = [
            i for i in range(len(a)) if between[i, j] < radius_px and between[i, j] < _others(between[i], j)
        ]
        if wants:  # the nearest of those that have no nearer spot gets it
            best = min(between[i, j] for i in wants)
            (owner,) = np.flatnonzero(spot == j)
            assert between[owner, j] == pytest.approx(best, abs=1e-12)


def _others(row: np.ndarray, j: int) -> float:
    return float(np.delete(row, j).min(initial=np.inf))


def test_a_radius_for_each_computed_spot() -> None:
    grid = SpotGrid.of(np.array([[10.0, 10.0], [40.0, 10.0]]), (64, 64))
    computed = np.array([[12.0, 10.0], [42.0, 10.0]])
    spot, _ = pair(computed, grid, np.array([1.0, 3.0]))
    assert spot.tolist() == [-1, 1]


def test_spots_that_are_left_keep_their_numbers() -> None:
    xy = random_positions(300, AREA, np.random.default_rng(9))
    grid = SpotGrid.of(xy, CALIBRATION.shape)
    taken = np.random.default_rng(10).random(300) < 0.4
    rest, kept = grid.without(taken)
    np.testing.assert_array_equal(rest.xy_px, xy[~taken])
    np.testing.assert_array_equal(kept, np.flatnonzero(~taken))
    spot, distance = pair(xy, rest, 0.5)
    np.testing.assert_array_equal(kept[spot[~taken]], kept)
    assert np.all(distance[~taken] == 0)


def test_spots_at_the_border_and_off_the_detector_are_found_where_they_are() -> None:
    edge = np.array([[-0.4, -0.4], [2015.4, 2017.4], [2015.4, -0.4], [-3.0, 900.0]])
    grid = SpotGrid.of(edge, CALIBRATION.shape)
    spot, distance = pair(edge + 0.25, grid, 1.0)
    assert spot.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(distance, np.hypot(0.25, 0.25))


@pytest.mark.parametrize(
    "calibration",
    [
        Calibration(250.0, 740.0, 830.0, -1.2, 0.3, 0.172, (1679, 1475), "PILATUS"),
        Calibration(60.0, 2100.0, 1900.0, 2.5, -3.0, 0.05, (4000, 4000)),
    ],
    ids=["pilatus", "fine"],
)
def test_other_detectors(calibration: Calibration) -> None:
    scene = phase("Ti", calibration).scene
    for matrix in random_turns(3, seed=1):
        ours = predict(scene, matrix)
        theirs = simulate_spots(
            matrix @ scene.reflections.material.B0, scene.reflections, calibration, scene.area
        )
        np.testing.assert_array_equal(ours.index, theirs.reflection)
        np.testing.assert_allclose(ours.xy_px, theirs.xy_px, rtol=0, atol=1e-6)
