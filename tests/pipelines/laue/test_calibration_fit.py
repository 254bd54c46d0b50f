"""The joint fit of detector and orientation: derivatives, recovery, and sigmas that mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testkit.laue import AREA, CALIBRATION, phase, random_turns

from pipelines.laue.calibration_fit import (
    NAMES,
    Geometry,
    covariance_of,
    gauss_newton,
    linearise,
    projection_derivatives,
    rotation_of,
    vector_of,
    with_vector,
)
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import beams_of

OFF = np.array([1.0, 10.0, 10.0, 0.5, 0.5])


def spots_of(seed: int, name: str = "Ge") -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """R, and B0 hkl, positions and energies of its spots by the forward simulation."""
    of = phase(name)
    turn = random_turns(1, seed)[0]
    spots = simulate_spots(turn @ of.material.B0, of.scene.reflections, CALIBRATION, AREA)
    return turn, spots.hkl @ of.material.B0.T, spots.xy_px, spots.energy_keV


def test_positions_are_those_of_the_geometry() -> None:
    turn, g, xy, _ = spots_of(0)
    np.testing.assert_allclose(linearise(Geometry(CALIBRATION, turn), g)[0], xy, atol=1e-8)
    np.testing.assert_allclose(CALIBRATION.pixels(beams_of(g @ turn.T)[0]), xy, atol=1e-8)


@given(st.integers(0, 50), st.lists(st.floats(-1, 1), min_size=5, max_size=5))
@settings(max_examples=20, deadline=None)
def test_derivatives_are_those_of_finite_differences(seed: int, shift: list[float]) -> None:
    turn, g, _, energy = spots_of(seed)
    here = with_vector(CALIBRATION, vector_of(CALIBRATION) + np.array(shift) * [5.0, 100.0, 100.0, 3.0, 3.0])
    geometry = Geometry(here, turn, 0.02)
    _, jacobian = linearise(geometry, g, energy)
    steps = np.array([1e-4, 1e-3, 1e-3, 1e-4, 1e-4, 1e-6, 1e-6, 1e-6, 1e-4])
    for k, h in enumerate(steps):
        sides = []
        for sign in (1.0, -1.0):
            move = np.zeros(9)
            move[k] = sign * h
            moved = Geometry(
                with_vector(here, vector_of(here) + move[:5]), rotation_of(move[5:8]) @ turn, 0.02 + move[8]
            )
            # The depth's own shift is held: its derivative is left out on purpose.
            plain = linearise(moved, g)[0] if k < 8 else linearise(moved, g, energy)[0]
            sides.append(plain)
        numeric = (sides[0] - sides[1]) / (2 * h)
        np.testing.assert_allclose(jacobian[:, :, k], numeric, rtol=1e-4, atol=1e-4 * np.abs(numeric).max())


def test_projection_derivative_of_the_centre_is_the_normal() -> None:
    d = projection_derivatives(CALIBRATION)
    np.testing.assert_allclose(d[1, 0], CALIBRATION.projection[2], atol=1e-12)
    np.testing.assert_allclose(d[2, 1], CALIBRATION.projection[2], atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_exact_spots_give_the_exact_detector(seed: int) -> None:
    turn, g, xy, _ = spots_of(seed)
    rng = np.random.default_rng(seed)
    start = with_vector(CALIBRATION, vector_of(CALIBRATION) + OFF * rng.choice([-1, 1], 5))
    found = gauss_newton(Geometry(start, rotation_of(rng.normal(0, 0.005, 3)) @ turn), g, xy, iterations=8)
    assert found is not None
    np.testing.assert_allclose(vector_of(found.calibration), vector_of(CALIBRATION), atol=1e-7)
    np.testing.assert_allclose(found.rotation, turn, atol=1e-9)


def test_sigmas_are_those_of_many_frames() -> None:
    turn, g, xy, energy = spots_of(3)
    rng = np.random.default_rng(11)
    z = []
    for _ in range(300):
        noisy = xy + rng.normal(0.0, 0.2, xy.shape)
        found = gauss_newton(Geometry(CALIBRATION, turn), g, noisy, energy_keV=energy, iterations=3)
        assert found is not None
        covariance, _ = covariance_of(found, g, noisy, energy)
        error = np.append(vector_of(found.calibration) - vector_of(CALIBRATION), found.depth_mm)
        z.append(error / np.sqrt(np.diag(covariance))[[0, 1, 2, 3, 4, 8]])
    assert np.all(np.abs(np.mean(z, axis=0)) < 4 / np.sqrt(300))
    # 300 values: one standard deviation of the spread is 4 %.
    assert 0.9 < np.std(z) < 1.1
    assert np.all(np.abs(np.std(z, axis=0) - 1.0) < 0.16)


def test_undetermined_is_said_not_solved() -> None:
    turn, g, xy, _ = spots_of(0)
    nearest = np.argsort(np.hypot(*(xy - xy[0]).T))[:3]
    assert gauss_newton(Geometry(CALIBRATION, turn), g[nearest], xy[nearest]) is None
    with pytest.raises(ValueError, match="3 spots do not determine 8 parameters"):
        covariance_of(Geometry(CALIBRATION, turn), g[nearest], xy[nearest])
    same = np.zeros(20, dtype=int)
    assert gauss_newton(Geometry(CALIBRATION, turn), g[same], xy[same]) is None
    with pytest.raises(ValueError, match="too close"):
        covariance_of(Geometry(CALIBRATION, turn), g[same], xy[same] + np.arange(20)[:, None])


def test_names_are_those_of_a_calibration() -> None:
    np.testing.assert_array_equal(vector_of(CALIBRATION), [getattr(CALIBRATION, n) for n in NAMES])
    with pytest.raises(ValueError, match="positive"):
        with_vector(CALIBRATION, -vector_of(CALIBRATION))
