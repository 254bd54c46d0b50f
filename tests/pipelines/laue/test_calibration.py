"""From the peaks of one crystal to a calibration: real frames, simulated ones, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from testkit.laue import AREA, CALIBRATION, material, random_strain, random_turns, simulated

from pipelines.files import read_images
from pipelines.laue.calibration import (
    UNKNOWN,
    CalibrationError,
    CalibrationFit,
    CalibrationSettings,
    Calibrator,
    Spread,
    nominal_calibration,
)
from pipelines.laue.calibration_fit import vector_of, with_vector
from pipelines.laue.forward import random_positions
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.lauetools_files import read_cor, read_dat, read_det
from pipelines.laue.peaks import find_peaks

OFF = np.array([1.0, 10.0, 10.0, 0.5, 0.5])


def off(calibration: Calibration, seed: int) -> Calibration:
    """Put the detector at a corner of what a start may be off."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], 5)
    return with_vector(calibration, vector_of(calibration) + OFF * signs)


def peaks_of(frame: Path, calibration: Calibration) -> np.ndarray:
    found = find_peaks(next(iter(read_images(frame)))[1], usable=DetectorArea.of(calibration).usable)
    return found.xy_px[np.argsort(-found.intensity, kind="stable")]


def z_of(fit: CalibrationFit, truth: Calibration) -> np.ndarray:
    return (fit.values - vector_of(truth)) / fit.sigma


@pytest.fixture(scope="module")
def ge_truth(truth_dir: Path) -> Calibration:
    return read_det(truth_dir / "truth" / "calibGe111.det").calibration


@pytest.fixture(scope="module")
def ge_peaks(truth_dir: Path, ge_truth: Calibration) -> np.ndarray:
    return peaks_of(truth_dir / "Ge_blanc_0000.mccd.gz", ge_truth)


@pytest.mark.truth
def test_germanium_comes_out_as_published_from_a_wrong_start(
    ge_truth: Calibration, ge_peaks: np.ndarray
) -> None:
    for seed in (0, 3):
        fit = Calibrator(material("Ge"), off(ge_truth, seed)).calibrate(ge_peaks)
        assert np.all(np.abs(z_of(fit, ge_truth)) < 3.0)
        assert fit.mean_residual_px <= 0.2
        assert len(fit.spots) >= 95  # as many as LaueTools fitted
        assert fit.rival_spots == 0


@pytest.mark.truth
def test_published_peaks_give_the_published_residual(truth_dir: Path, ge_truth: Calibration) -> None:
    peaks = read_dat(truth_dir / "truth" / "Ge_blanc_0000_LT_5.dat")
    fit = Calibrator(material("Ge"), off(ge_truth, 9)).calibrate(
        peaks.xy_px[np.argsort(-peaks.intensity, kind="stable")]
    )
    # LaueTools: 95 spots, 0.191 px.
    assert fit.matched == 95
    assert fit.mean_matched_px == pytest.approx(0.191, abs=0.002)
    assert np.all(np.abs(z_of(fit, ge_truth)) < 1.0)


@pytest.mark.truth
@pytest.mark.parametrize(
    ("frame", "name", "camera"),
    [
        ("Ge_blanc_0000.mccd.gz", "Ge", "MARCCD165"),
        ("img_Ge_sCMOS_0000.tif.gz", "Ge", "sCMOS"),
        ("nw1_0000.tif.gz", "Si", "sCMOS"),
    ],
)
def test_the_name_of_the_camera_is_start_enough(
    truth_dir: Path, ge_truth: Calibration, frame: str, name: str, camera: str
) -> None:
    if frame.startswith("Ge_blanc"):
        truth = ge_truth
    elif name == "Si":
        truth = read_det(truth_dir / "truth" / "GaN_Si" / "calib.det").calibration
    else:
        footer = read_cor(truth_dir / "truth" / "img_Ge_sCMOS_0000_181peaks.cor").calibration((2018, 2016))
        assert footer is not None
        truth = footer
    start = nominal_calibration(camera)
    fit = Calibrator(material(name), start, spread=UNKNOWN).calibrate(peaks_of(truth_dir / frame, start))
    # Two fits to differently measured peaks, one of them without a depth: a few sigmas may lie between.
    assert np.all(np.abs(fit.values - vector_of(truth)) < [0.03, 0.25, 0.25, 0.02, 0.02])
    assert (fit.depth_mm > 0) == (name == "Si")  # germanium stops these photons at its surface
    assert fit.mean_residual_px < 0.25


@pytest.mark.parametrize(("name", "seed"), [("Ge", 0), ("Si", 1), ("Cu", 2), ("ZrO2", 3), ("Ti", 4)])
def test_a_known_detector_is_found_within_its_sigmas(name: str, seed: int) -> None:
    made = simulated(name, random_turns(1, seed), seed)
    fit = Calibrator(material(name), off(CALIBRATION, seed)).calibrate(made.xy_px)
    assert np.all(np.abs(z_of(fit, CALIBRATION)) < 3.5)
    assert fit.mean_residual_px == pytest.approx(0.2 * np.sqrt(np.pi / 2), rel=0.2)
    own = made.crystal[fit.spots] == 0
    assert own.mean() > 0.97
    np.testing.assert_array_equal(np.abs(fit.hkl[own]).sum(1) > 0, True)
    assert np.all(np.abs(fit.correlation()) <= 1 + 1e-9)


def test_the_same_frame_gives_the_same_answer_from_any_start() -> None:
    made = simulated("Ge", random_turns(1, 7), 7)
    values = [
        Calibrator(material("Ge"), off(CALIBRATION, seed)).calibrate(made.xy_px).values for seed in (1, 2)
    ]
    np.testing.assert_allclose(values, [values[0]] * 2, atol=1e-4)


def test_depth_is_found_where_there_is_one() -> None:
    from pipelines.laue.forward import simulate_spots
    from pipelines.laue.indexing.refine import depth_shift
    from pipelines.laue.reflections import build_reflections

    of = material("Si")
    spots = simulate_spots(
        random_turns(1, 5)[0] @ of.B0, build_reflections(of, (5.0, 22.0)), CALIBRATION, AREA
    )
    shift = depth_shift(spots.xy_px, spots.energy_keV, CALIBRATION.projection, CALIBRATION.dd_mm)
    order = np.argsort(-spots.intensity)
    noise = np.random.default_rng(5).normal(0, 0.1, spots.xy_px.shape)
    xy = (spots.xy_px + 0.03 * shift + noise)[order]
    fit = Calibrator(of, off(CALIBRATION, 5)).calibrate(xy)
    assert fit.depth_mm == pytest.approx(0.03, abs=4 * np.sqrt(fit.covariance[8, 8]))
    assert np.all(np.abs(z_of(fit, CALIBRATION)) < 3.5)
    without = Calibrator(of, CALIBRATION, settings=CalibrationSettings(depth=False)).calibrate(xy)
    assert without.depth_mm == 0.0
    assert without.mean_residual_px > fit.mean_residual_px


def refusal(xy: np.ndarray, name: str = "Ge", **changes: object) -> str:
    with pytest.raises(CalibrationError) as caught:
        Calibrator(material(name), CALIBRATION, **changes).calibrate(xy)  # type: ignore[arg-type]
    return str(caught.value)


def test_too_few_peaks_are_refused() -> None:
    made = simulated("Ge", random_turns(1, 0), 0)
    assert "14 peaks are too few" in refusal(made.xy_px[:14])
    assert "0 peaks are too few" in refusal(np.empty((0, 2)))


def test_chance_is_refused() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        assert "no crystal of Ge found" in refusal(random_positions(120, AREA, rng))


def test_another_material_is_refused() -> None:
    made = simulated("Ge", random_turns(1, 1), 1)
    assert "Ti" in refusal(made.xy_px, "Ti")


def test_two_crystals_are_refused_and_a_faint_second_one_is_not() -> None:
    two = simulated("Ge", random_turns(2, 2), 2)
    assert "more than one crystal" in refusal(two.xy_px)
    faint = np.flatnonzero((two.crystal == 0) | (np.cumsum(two.crystal == 1) <= 15))
    assert Calibrator(material("Ge"), CALIBRATION).calibrate(two.xy_px[faint]).rival_spots < 20


def test_strain_is_shown_and_much_of_it_refused() -> None:
    rng = np.random.default_rng(4)
    strain = random_strain(rng, 8e-4)
    turn = random_turns(1, 4)[0]
    some = simulated("Ge", turn @ np.linalg.inv(np.eye(3) + strain), 4)
    none = simulated("Ge", turn, 4)
    shown = [Calibrator(material("Ge"), CALIBRATION).calibrate(made.xy_px) for made in (some, none)]
    assert shown[0].unstrained_probability < 1e-3 < shown[1].unstrained_probability
    crystal_strain = shown[0].strain
    same = [s @ crystal_strain @ s.T for s in material("Ge").lattice_rotations]
    nearest = min(same, key=lambda e: float(np.abs(e - strain).max()))
    assert np.all(np.abs(nearest - strain) < 4 * shown[0].strain_sigma.max())
    much = simulated("Ge", turn @ np.linalg.inv(np.eye(3) + 5 * strain), 4)
    assert "strained" in refusal(much.xy_px)


def test_spots_in_a_corner_are_refused() -> None:
    made = simulated("ZrO2", random_turns(1, 6), 6)
    corner = made.xy_px[np.all(made.xy_px > 1400, axis=1)]
    assert len(corner) > 10
    few = CalibrationSettings(min_spots=6)
    assert "do not determine dd_mm" in refusal(corner, "ZrO2", settings=few)


def test_a_start_far_away_is_refused_with_the_limit() -> None:
    made = simulated("Ge", random_turns(1, 8), 8)
    assert "is the start within 3 mm, 40 px and 2 deg" in refusal(made.xy_px + np.array([400.0, 0.0]))
    tight = CalibrationSettings(max_centre_px=5.0)
    far = with_vector(CALIBRATION, vector_of(CALIBRATION) + np.array([0.0, 10.0, 0.0, 0.0, 0.0]))
    with pytest.raises(CalibrationError, match=r"xcen_px came out as .* from the start"):
        Calibrator(material("Ge"), far, settings=tight).calibrate(made.xy_px)


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match="not numbers"):
        Calibrator(material("Ge"), CALIBRATION).calibrate(np.full((30, 2), np.nan))
    with pytest.raises(ValueError, match="camera 'webcam' is unknown"):
        nominal_calibration("webcam")
    with pytest.raises(ValueError, match="centre_px"):
        Spread(centre_px=0.0)
    with pytest.raises(ValueError, match="energy_keV"):
        CalibrationSettings(energy_keV=(22.0, 5.0))
    with pytest.raises(ValueError, match="min_spots"):
        CalibrationSettings(min_spots=4)
