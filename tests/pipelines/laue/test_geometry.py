"""Detector geometry against outside truth, the written-out formulas, and its own inverse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.laue.geometry import (
    HC_KEV_A,
    HC_LAUETOOLS_KEV_A,
    Calibration,
    DetectorArea,
    beams_of,
    directions_of_angles,
    two_theta_chi_deg,
)

VECTORS = Path(__file__).resolve().parents[2] / "data" / "geometry_vectors.json"
GE = Calibration.from_lauetools((70.775, 941.74, 1082.56, 0.63, -0.682), 0.079142, (2048, 2048), "MARCCD165")


CASES = json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]


def calibration_of(case: dict[str, Any]) -> Calibration:
    c = case["calibration"]
    parameters = (c["dd_mm"], c["xcen_px"], c["ycen_px"], c["xbet_deg"], c["xgam_deg"])
    return Calibration.from_lauetools(parameters, c["pixel_size_mm"], (2048, 2048))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["material"])
def test_known_spots(case: dict[str, Any]) -> None:
    ub = np.array(case["U"]) @ np.array(case["B0"])
    spots = case["spots"]
    u, wavelength = beams_of(np.array([s["hkl"] for s in spots]) @ ub.T)
    xy = calibration_of(case).pixels(u) + 1  # the file counts from 1
    two_theta, chi = two_theta_chi_deg(u)
    for got, name in [(xy[:, 0], "x_px"), (xy[:, 1], "y_px")]:
        np.testing.assert_allclose(got, [s[name] for s in spots], rtol=0, atol=1e-9)
    for got, name in [
        (wavelength, "wavelength_A"),
        (HC_LAUETOOLS_KEV_A / wavelength, "energy_keV"),
        (two_theta, "two_theta_deg"),
        (chi, "chi_deg"),
    ]:
        np.testing.assert_allclose(got, [s[name] for s in spots], rtol=0, atol=1e-11)


calibrations = st.builds(
    Calibration,
    dd_mm=st.floats(20, 300),
    xcen_px=st.floats(-500, 3000),
    ycen_px=st.floats(-500, 3000),
    xbet_deg=st.floats(-30, 30),
    xgam_deg=st.floats(-180, 180),
    pixel_size_mm=st.floats(0.01, 0.3),
    shape=st.just((2018, 2016)),
)
positions = st.tuples(st.floats(-500, 3000), st.floats(-500, 3000))


@given(calibrations, positions)
def test_a_position_survives_the_way_to_a_beam_and_back(
    calibration: Calibration, xy: tuple[float, float]
) -> None:
    u = calibration.directions(xy)
    assert np.linalg.norm(u) == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(calibration.pixels(u), xy, atol=1e-6)


@given(calibrations, positions)
def test_the_projection_is_lauetools_formula(calibration: Calibration, xy: tuple[float, float]) -> None:
    # LaueGeometry.py, written out: camera frame v = (-u_y, u_x, u_z), n = (0, sin xbet, cos xbet),
    # IM = dd v/(v.n), OM = IM - dd n, x0 = OM_x, y0 = OM_y / cos xbet, then turned by xgam.
    u = calibration.directions(xy)
    b, g = math.radians(calibration.xbet_deg), math.radians(calibration.xgam_deg)
    v = np.array([-u[1], u[0], u[2]])
    n = np.array([0.0, math.sin(b), math.cos(b)])
    om = calibration.dd_mm * v / (v @ n) - calibration.dd_mm * n
    x0, y0 = om[0], om[1] / math.cos(b)
    x = calibration.xcen_px + (math.cos(g) * x0 - math.sin(g) * y0) / calibration.pixel_size_mm
    y = calibration.ycen_px + (math.sin(g) * x0 + math.cos(g) * y0) / calibration.pixel_size_mm
    np.testing.assert_allclose((x, y), xy, atol=1e-6)


@given(calibrations, positions)
def test_scattering_vectors_reflect_the_beam_to_where_they_came_from(
    calibration: Calibration, xy: tuple[float, float]
) -> None:
    q = calibration.scattering_vectors(xy)
    if q[0] > -1e-3:  # the transmitted beam itself: q has no direction
        return
    u, _ = beams_of(q)
    np.testing.assert_allclose(u, calibration.directions(xy), atol=1e-9)


@given(st.floats(0.01, 179.9), st.floats(-89.9, 89.9))
def test_angles_and_back(two_theta: float, chi: float) -> None:
    back = two_theta_chi_deg(directions_of_angles(two_theta, chi))
    np.testing.assert_allclose(back, (two_theta, chi), atol=1e-7)


@given(st.tuples(st.floats(-3, -0.01), st.floats(-3, 3), st.floats(-3, 3)))
def test_beams_satisfy_bragg_and_keep_their_energy(q: tuple[float, float, float]) -> None:
    u, wavelength = beams_of(q)
    assert np.linalg.norm(u) == pytest.approx(1.0, abs=1e-9)
    sin_theta = math.sqrt(0.5 * max(0.0, 1 - u[0]))
    assert wavelength * np.linalg.norm(q) == pytest.approx(2 * sin_theta, abs=1e-6)


def test_what_points_downstream_reflects_nothing() -> None:
    u, wavelength = beams_of([[0.1, 0.2, 0.3], [0.0, 1.0, 0.0]])
    assert np.isnan(u).all()
    assert np.isnan(wavelength).all()


def test_a_beam_away_from_the_detector_hits_nothing() -> None:
    assert np.isnan(GE.pixels([[0.0, 0.0, -1.0], [1.0, 0.0, -0.1]])).all()


def test_the_centre_is_the_foot_of_the_perpendicular() -> None:
    b = math.radians(GE.xbet_deg)
    np.testing.assert_allclose(
        GE.pixels([math.sin(b), 0.0, math.cos(b)]), (GE.xcen_px, GE.ycen_px), atol=1e-9
    )


def test_lauetools_counts_from_one() -> None:
    assert (GE.xcen_px, GE.ycen_px) == (940.74, 1081.56)
    assert GE.to_lauetools() == pytest.approx((70.775, 941.74, 1082.56, 0.63, -0.682))
    assert pytest.approx(6.62607015e-34 * 299792458 / 1.602176634e-19 * 1e7, rel=1e-15) == HC_KEV_A


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dd_mm": 0.0}, "must be positive"),
        ({"pixel_size_mm": -0.07}, "must be positive"),
        ({"xbet_deg": float("nan")}, "not a number"),
        ({"shape": (0, 2016)}, "shape"),
    ],
)
def test_impossible_calibrations_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GE.with_parameters(**changes)


def test_the_area_ends_at_the_outer_edge_of_the_outer_pixels() -> None:
    area = DetectorArea.rectangle((10, 20))
    inside = [[-0.49, -0.49], [19.49, 9.49], [0.0, 9.0]]
    outside = [[-0.51, 0.0], [19.51, 0.0], [0.0, 9.51], [9.0, 12.0], [np.nan, 1.0], [np.inf, 1.0]]
    assert area.contains(inside).all()
    assert not area.contains(outside).any()


def test_marccd_sees_a_disc() -> None:
    area = DetectorArea.of(GE)
    radius_px = 0.5 * 165.0 / GE.pixel_size_mm
    assert area.usable.sum() == pytest.approx(
        math.pi * radius_px**2 - 4 * _segment(radius_px, 1024.0), rel=1e-4
    )
    assert not area.contains([[5.0, 5.0], [2040.0, 2040.0]]).any()
    assert area.contains([1023.5, 1.0])


def _segment(radius: float, distance: float) -> float:
    """Area that a chord cuts off a disc."""
    half = math.acos(distance / radius)
    return radius**2 * (half - math.sin(half) * math.cos(half))


def test_masked_pixels_see_nothing() -> None:
    mask = np.zeros((2048, 2048), dtype=bool)
    mask[700, 300] = True
    area = DetectorArea.of(GE, mask)
    assert not area.contains([300.4, 699.6])  # x is the column
    assert area.contains([700.0, 300.0])


def test_a_mask_for_another_detector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of shape \(10, 10\)"):
        DetectorArea.of(GE, np.zeros((10, 10), dtype=bool))
