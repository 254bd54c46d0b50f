"""Refinement against spots whose crystal is known, Monte Carlo and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from testkit.laue import AREA, CALIBRATION, phase, random_strain, random_turns, turn_about

from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import beams_of
from pipelines.laue.indexing.refine import (
    DEPTH_REFERENCE_KEV,
    ROTATION,
    ROTATION_AND_STRAIN,
    ROTATION_STRAIN_DEPTH,
    Fit,
    decompose,
    depth_shift,
    refine,
    strain_sigma,
)

PROJECTION = np.ascontiguousarray(CALIBRATION.projection)


def crystal(
    name: str, seed: int, strain: float = 1e-3
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """M, strain, and the g and positions of its spots by the forward simulation."""
    of = phase(name).material
    rng = np.random.default_rng(seed)
    e = random_strain(rng, strain)
    turn = random_turns(1, seed)[0]
    matrix = turn @ np.linalg.inv(np.eye(3) + e)
    spots = simulate_spots(matrix @ of.B0, phase(name).scene.reflections, CALIBRATION, AREA)
    return turn, e, spots.hkl @ of.B0.T, spots.xy_px


@pytest.mark.parametrize("name", ["Cu", "Ti", "ZrO2"])
@pytest.mark.parametrize("seed", range(4))
def test_noise_free_spots_give_the_strain_exactly(name: str, seed: int) -> None:
    turn, e, g, xy = crystal(name, seed)
    start = turn_about([0.3, -0.5, 0.8], 0.2) @ turn
    fit = refine(start, g, xy, PROJECTION, ROTATION_AND_STRAIN, iterations=8)
    assert fit is not None
    rotation, strain = decompose(fit.matrix)
    np.testing.assert_allclose(strain, e, rtol=0, atol=1e-9)
    np.testing.assert_allclose(rotation, turn, rtol=0, atol=1e-9)
    assert fit.residual_px.max() < 1e-6


def test_a_rotation_alone_stays_a_rotation() -> None:
    turn, _, g, xy = crystal("Ti", 5, strain=0.0)
    fit = refine(turn_about([1, 2, 3], 0.5) @ turn, g, xy, PROJECTION, ROTATION, iterations=8)
    assert fit is not None
    np.testing.assert_allclose(fit.matrix, turn, rtol=0, atol=1e-10)
    np.testing.assert_allclose(fit.matrix @ fit.matrix.T, np.eye(3), rtol=0, atol=1e-12)


@given(arrays(np.float64, 5, elements=st.floats(-0.05, 0.05)), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_decompose_inverts_what_makes_a_crystal(components: np.ndarray, seed: int) -> None:
    a, b, c, d, e = components
    strain = np.array([[a, c, d], [c, b, e], [d, e, -a - b]])
    turn = random_turns(1, seed)[0]
    rotation, found = decompose(1.7 * turn @ np.linalg.inv(np.eye(3) + strain))  # a scale moves no spot
    np.testing.assert_allclose(found, strain, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rotation, turn, rtol=0, atol=1e-12)
    assert abs(np.trace(found)) < 1e-14


def noisy_fits(n: int, parameters: int, sigma_px: float) -> tuple[np.ndarray, np.ndarray, list[Fit]]:
    turn, e, g, xy = crystal("Ti", 3)
    truth = turn @ np.linalg.inv(np.eye(3) + e)
    rng = np.random.default_rng(1)
    fits = []
    for _ in range(n):
        fit = refine(truth, g, xy + rng.normal(0, sigma_px, xy.shape), PROJECTION, parameters)
        assert fit is not None
        fits.append(fit)
    return turn, e, fits


def test_the_covariance_is_the_scatter_of_repeated_measurements() -> None:
    turn, e, fits = noisy_fits(600, ROTATION_AND_STRAIN, 0.2)
    truth = turn @ np.linalg.inv(np.eye(3) + e)
    # M = (I + [w] − η) M_true, read off without the parametrisation of the code.
    z = []
    for fit in fits:
        change = fit.matrix @ np.linalg.inv(truth)
        change = change / np.cbrt(np.linalg.det(change)) - np.eye(3)
        w = (
            np.array([change[2, 1] - change[1, 2], change[0, 2] - change[2, 0], change[1, 0] - change[0, 1]])
            / 2
        )
        eta = -(change + change.T) / 2
        parameters = np.array([*w, eta[0, 0], eta[1, 1], eta[1, 2], eta[0, 2], eta[0, 1]])
        z.append(np.linalg.solve(np.linalg.cholesky(fit.covariance), parameters))
    scatter = np.cov(np.array(z).T)
    assert np.all(np.abs(np.mean(z, axis=0)) < 0.2)
    assert np.all((np.linalg.eigvalsh(scatter) > 0.75) & (np.linalg.eigvalsh(scatter) < 1.3))


def test_strain_sigmas_are_the_scatter_of_strains() -> None:
    turn, e, fits = noisy_fits(600, ROTATION_AND_STRAIN, 0.2)
    frame = turn_about([1, 1, 0], 33.0)  # any frame fixed to the crystal
    strains = np.array([frame @ decompose(fit.matrix)[1] @ frame.T for fit in fits])
    sigmas = np.array([strain_sigma(fit.covariance, frame @ turn.T) for fit in fits])
    np.testing.assert_allclose(strains.std(axis=0), np.sqrt((sigmas**2).mean(axis=0)), rtol=0.12)
    np.testing.assert_allclose(strains.mean(axis=0), frame @ e @ frame.T, atol=3e-5)


def test_strain_sigmas_by_finite_differences() -> None:
    _, _, fits = noisy_fits(1, ROTATION_AND_STRAIN, 0.2)
    matrix, covariance = fits[0].matrix, fits[0].covariance
    rotation, strain = decompose(matrix)
    upper = np.triu_indices(3)
    columns = []
    for k in range(8):
        p = np.zeros(8)
        p[k] = step = 1e-6
        w, (a, b, c, d, f) = p[:3], p[3:]
        turn_of = np.array([[0, -w[2], w[1]], [w[2], 0, -w[0]], [-w[1], w[0], 0]])
        eta = np.array([[a, f, d], [f, b, c], [d, c, -a - b]])
        changed = decompose((np.eye(3) + turn_of - eta) @ matrix)[1]
        columns.append((changed - strain)[upper] / step)
    jacobian = np.array(columns).T
    expected = np.sqrt(np.diag(jacobian @ covariance @ jacobian.T))
    np.testing.assert_allclose(strain_sigma(covariance, rotation.T)[upper], expected, rtol=0.01)


def test_the_shift_of_a_deep_source_by_intersecting_rays() -> None:
    _, _, g, xy = crystal("Ti", 9)
    u = CALIBRATION.directions(xy)
    normal = CALIBRATION.projection[2]
    assert np.linalg.norm(normal) == pytest.approx(1)
    source = np.array([0.03, 0.0, 0.0])  # mm downstream
    hit = source + u * ((CALIBRATION.dd_mm - normal @ source) / (u @ normal))[:, None]
    moved = CALIBRATION.pixels(hit) - xy
    twice = np.full(len(g), DEPTH_REFERENCE_KEV * np.cbrt(2.0))  # there the depth is z_ref itself
    np.testing.assert_allclose(
        source[0] * depth_shift(xy, twice, PROJECTION, CALIBRATION.dd_mm), moved, rtol=0, atol=1e-9
    )
    at_reference = np.full(len(g), DEPTH_REFERENCE_KEV)
    assert np.all(depth_shift(xy, at_reference, PROJECTION, CALIBRATION.dd_mm) == 0)


def test_a_depth_is_recovered_with_the_strain() -> None:
    turn, e, g, xy = crystal("Si", 2, strain=3e-4)
    matrix = turn @ np.linalg.inv(np.eye(3) + e)
    spots = simulate_spots(matrix @ phase("Si").material.B0, phase("Si").scene.reflections, CALIBRATION, AREA)
    u, wavelength = beams_of(spots.hkl @ phase("Si").material.B0.T @ matrix.T)
    z = 0.02 * ((12.398419843 / wavelength / DEPTH_REFERENCE_KEV) ** 3 - 1.0)
    source = np.outer(z, [1.0, 0.0, 0.0])
    normal = CALIBRATION.projection[2]
    deep = CALIBRATION.pixels(source + u * ((CALIBRATION.dd_mm - source @ normal) / (u @ normal))[:, None])
    assert np.abs(deep - xy).max() > 0.2
    # The shift is computed at the measured place, which the depth itself has moved by less than 1 px.
    shift = depth_shift(xy, spots.energy_keV, PROJECTION, CALIBRATION.dd_mm)
    fit = refine(matrix, g, deep, PROJECTION, ROTATION_STRAIN_DEPTH, iterations=8, shift_px_per_mm=shift)
    assert fit is not None
    assert fit.depth_mm == pytest.approx(0.02, rel=1e-5)
    np.testing.assert_allclose(decompose(fit.matrix)[1], e, rtol=0, atol=1e-8)
    without = refine(matrix, g, deep, PROJECTION, ROTATION_AND_STRAIN, iterations=8)
    assert without is not None
    assert np.abs(decompose(without.matrix)[1] - e).max() > 1e-5  # a depth mimics strain


def test_the_scale_of_the_uncertainties_cancels_and_their_ratios_count() -> None:
    turn, e, g, xy = crystal("Ti", 4)
    matrix = turn @ np.linalg.inv(np.eye(3) + e)
    noisy = xy + np.random.default_rng(0).normal(0, 0.2, xy.shape)
    plain = refine(matrix, g, noisy, PROJECTION)
    scaled = refine(matrix, g, noisy, PROJECTION, sigma_px=np.full(len(g), 0.37))
    assert plain is not None
    assert scaled is not None
    np.testing.assert_allclose(scaled.matrix, plain.matrix, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scaled.covariance, plain.covariance, rtol=1e-6)
    noisy = xy.copy()
    noisy[0] += 3.0
    sigma = np.full(len(g), 0.1)
    sigma[0] = 1e4
    fit = refine(matrix, g, noisy, PROJECTION, sigma_px=sigma, iterations=8)
    assert fit is not None
    np.testing.assert_allclose(decompose(fit.matrix)[1], e, rtol=0, atol=1e-8)


def test_what_the_spots_do_not_determine_is_refused() -> None:
    turn, _, g, xy = crystal("Ti", 6)
    assert refine(turn, g[:3], xy[:3], PROJECTION, ROTATION_AND_STRAIN) is None
    assert refine(turn, g[:1], xy[:1], PROJECTION, ROTATION) is None
    same_g, same_xy = np.repeat(g[:1], 12, axis=0), np.repeat(xy[:1], 12, axis=0)
    assert refine(turn, same_g, same_xy, PROJECTION, ROTATION_AND_STRAIN) is None
    # A crystal can turn about a single reflection; a depth that moves nothing is not determined.
    assert refine(turn, same_g, same_xy, PROJECTION, ROTATION) is None
    assert refine(turn, g, xy, PROJECTION, ROTATION_STRAIN_DEPTH) is None
    broken = xy.copy()
    broken[2] = np.nan
    assert refine(turn, g, broken, PROJECTION) is None


def test_the_spots_of_one_zone_give_a_rotation_and_no_strain() -> None:
    scene = phase("Ti").scene
    hkl = scene.reflections.hkl.astype(int)
    zone = hkl @ np.array([0, 0, 1]) == 0
    for turn in random_turns(200, seed=3):
        q = scene.reflections.g[zone] @ turn.T
        u, _ = beams_of(q)
        xy = CALIBRATION.pixels(u)
        seen = AREA.contains(xy)
        if np.count_nonzero(seen) >= 8:
            break
    g, xy = scene.reflections.g[zone][seen], xy[seen]
    assert refine(turn, g, xy, PROJECTION, ROTATION_AND_STRAIN) is None
    assert refine(turn, g, xy, PROJECTION, ROTATION) is not None


def test_as_many_observations_as_parameters_leave_no_uncertainty() -> None:
    turn, _, g, xy = crystal("ZrO2", 7)
    some = np.linspace(0, len(g) - 1, 4).astype(int)
    fit = refine(turn, g[some], xy[some], PROJECTION, ROTATION_AND_STRAIN)
    assert fit is None or np.all(np.isnan(fit.covariance))
