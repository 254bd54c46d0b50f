"""Calibration of the detector: from wrong starts on real frames, simulated ones with known answers, drift."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.data import laue_dir
from bench.patterns import GEOMETRY_C, reflections
from bench.report import Report
from pipelines import rotations
from pipelines.files import read_images
from pipelines.laue.calibration import (
    UNKNOWN,
    CalibrationError,
    CalibrationFit,
    CalibrationSettings,
    Calibrator,
    nominal_calibration,
)
from pipelines.laue.calibration_fit import NAMES, Geometry, vector_of, with_vector
from pipelines.laue.crystal import load_material
from pipelines.laue.drift import DriftWatch, Observation, observe
from pipelines.laue.forward import random_positions, simulate_pattern, simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.joint_calibration import JointCalibrator, ReferenceFrame
from pipelines.laue.lauetools_files import read_cor, read_det
from pipelines.laue.peaks import find_peaks

FloatArray = npt.NDArray[np.float64]
OFF = np.array([1.0, 10.0, 10.0, 0.5, 0.5])
_OFF_WORDS = "1 mm, 10 px, 0.5 deg"


def rows(report: Report) -> None:
    folder = laue_dir()
    if folder is None:
        report.add("calibration of real frames", "no third-party frames: `make data`")
    else:
        _real_starts(report, folder)
        _real_frames(report, folder)
    _simulated(report)
    _refusals(report)
    _joint(report)
    _drift(report)


def _peaks(frame: Path, calibration: Calibration) -> FloatArray:
    found = find_peaks(next(iter(read_images(frame)))[1], usable=DetectorArea.of(calibration).usable)
    return np.asarray(found.xy_px[np.argsort(-found.intensity, kind="stable")])


def _z(fit: CalibrationFit, truth: Calibration) -> FloatArray:
    return np.asarray((fit.values - vector_of(truth)) / fit.sigma)


def _real_starts(report: Report, folder: Path) -> None:
    truth = read_det(folder / "truth" / "calibGe111.det").calibration
    peaks = _peaks(folder / "Ge_blanc_0000.mccd.gz", truth)
    germanium = load_material("Ge")
    rng = report.rng("calibrate", "starts")
    count = report.scale(full=100, quick=6)
    worst_z, residuals, times_s, failed = [0.0], [], [], []
    for number in range(count):
        # Every other start lies at a corner of the box, where all five are off at once.
        share = rng.choice([-1.0, 1.0], 5) if number % 2 else rng.uniform(-1.0, 1.0, 5)
        calibrator = Calibrator(germanium, with_vector(truth, vector_of(truth) + OFF * share))
        start = time.perf_counter()
        try:
            fit = calibrator.calibrate(peaks)
        except CalibrationError as error:
            failed.append(str(error))
            continue
        times_s.append(time.perf_counter() - start)
        worst_z.append(float(np.abs(_z(fit, truth)).max()))
        residuals.append(fit.mean_residual_px)
    converged = sum(z < 3.0 for z in worst_z[1:])
    words = f"{count} starts, half uniform within +-({_OFF_WORDS}), half at its corners, seed {report.seed}"
    report.add(
        f"Ge_blanc: starts off by {_OFF_WORDS} that end within 3 sigma of the published calibration",
        100.0 * converged / count,
        "%",
        at_least=100.0,
        peer="LaueTools: by hand",
        conditions=words,
        data={"failed": failed, "largest_z": worst_z[1:]},
    )
    report.add(
        "Ge_blanc: largest |difference|/sigma to the published calibration, any start, any parameter",
        max(worst_z) if residuals else float("nan"),
        at_most=3.0,
        conditions=words,
    )
    report.add(
        "Ge_blanc: mean residual",
        max(residuals, default=float("nan")),
        "px",
        at_most=0.2,
        peer="LaueTools 0.191 px, 95 spots (its own peaks)",
        conditions=f"the worst of the starts; {len(peaks)} peaks found here; spots beyond 3 medians left out",
    )
    report.add(
        "Ge_blanc: peaks to calibration",
        1e3 * float(np.median(times_s or [np.nan])),
        "ms",
        conditions="median",
    )


def _real_frames(report: Report, folder: Path) -> None:
    ge = read_det(folder / "truth" / "calibGe111.det").calibration
    footer = read_cor(folder / "truth" / "img_Ge_sCMOS_0000_181peaks.cor").calibration((2018, 2016))
    silicon = read_det(folder / "truth" / "GaN_Si" / "calib.det").calibration
    assert footer is not None
    cases = (
        ("Ge_blanc_0000.mccd.gz", "Ge", ge, "MARCCD165", True),
        ("img_Ge_sCMOS_0000.tif.gz", "Ge", footer, "sCMOS", True),
        ("nw1_0000.tif.gz", "Si", silicon, "sCMOS", True),
        ("nw1_0000.tif.gz", "Si", silicon, "sCMOS", False),
    )
    for frame, material, truth, camera, depth in cases:
        start = nominal_calibration(camera)
        settings = CalibrationSettings(depth=depth)
        calibrator = Calibrator(load_material(material), start, settings=settings, spread=UNKNOWN)
        fit = calibrator.calibrate(_peaks(folder / frame, start))
        difference = dict(zip(NAMES, (fit.values - vector_of(truth)).round(4).tolist(), strict=True))
        shown = ", ".join(
            f"{n.split('_')[0]} {d:+.3f} ({z:+.1f} sigma)"
            for (n, d), z in zip(difference.items(), _z(fit, truth), strict=True)
        )
        deep = f", depth {1e3 * fit.depth_mm:.0f} um" if fit.depth_mm else ", no depth refined"
        report.add(
            f"{frame} as {material} from the camera's name alone, mean residual{deep}",
            fit.mean_residual_px,
            "px",
            peer=f"against LaueTools' calibration: {shown}",
            conditions=f"{len(fit.spots)} of {fit.expected} spots, start dd 75 mm, centre in the middle, no"
            f" tilt; unstrained crystals look as strained with probability {fit.unstrained_probability:.1g}",
            data={"difference": difference, "sigma": fit.sigma.tolist()},
        )


def _simulated(report: Report) -> None:
    count = report.scale(full=200, quick=12)
    listed, area = reflections("Ge"), DetectorArea.of(GEOMETRY_C)
    rng = report.rng("calibrate", "simulated")
    z, failed = [], []
    for _ in range(count):
        turn = rotations.to_matrix(rotations.random_rotations(1, rng))
        made = simulate_pattern([listed], turn @ listed.material.B0, GEOMETRY_C, area, rng)
        start = with_vector(GEOMETRY_C, vector_of(GEOMETRY_C) + OFF * rng.uniform(-1.0, 1.0, 5))
        try:
            z.append(_z(Calibrator(listed.material, start).calibrate(made.xy_px), GEOMETRY_C))
        except CalibrationError as error:
            failed.append(str(error))
    conditions = (
        f"{count} Ge patterns, any orientation, 0.2 px noise, 20 % missing, 10 % spurious, starts uniform"
        f" within +-({_OFF_WORDS}), seed {report.seed}"
    )
    report.add(
        "simulated frames calibrated",
        100.0 * len(z) / count,
        "%",
        at_least=99.0,
        conditions=conditions,
        data={"failed": failed},
    )
    report.add(
        "(calibration - truth)/sigma, standard deviation",
        float(np.std(z)),
        at_least=0.9,
        at_most=1.1,
        peer="no peer gives a sigma",
        conditions=conditions,
        data={"z": np.array(z).tolist()},
    )
    report.add(
        "(calibration - truth)/sigma beyond 3",
        100.0 * float(np.mean(np.abs(z) > 3.0)),
        "%",
        conditions="normal: 0.3 %",
    )


def _joint(report: Report) -> None:
    count, frames = report.scale(full=100, quick=6), 5
    listed, area = reflections("Ge"), DetectorArea.of(GEOMETRY_C)
    rng = report.rng("calibrate", "joint")
    calibrator = JointCalibrator(listed.material, GEOMETRY_C, settings=CalibrationSettings(depth=False))
    for shared in (0.0, 0.8):
        z, found, times_s = [], [], []
        for _ in range(count):
            turn = rotations.to_matrix(rotations.random_rotations(1, rng))[0]
            truth = with_vector(GEOMETRY_C, vector_of(GEOMETRY_C) + 0.2 * OFF * rng.uniform(-1.0, 1.0, 5))
            spots = simulate_spots(turn @ listed.material.B0, listed, truth, area)
            again = rng.normal(0.0, 0.2 * np.sqrt(shared), spots.xy_px.shape)
            given = []
            for number in range(frames):
                own = rng.normal(0.0, 0.2 * np.sqrt(1.0 - shared), spots.xy_px.shape)
                g, chosen = spots.hkl @ listed.material.B0.T, np.arange(len(spots))
                given.append(ReferenceFrame(number, spots.xy_px + again + own, turn, g, chosen))
            start = time.perf_counter()
            fit = calibrator.calibrate(given)
            times_s.append(time.perf_counter() - start)
            z.append((fit.values - vector_of(truth)) / fit.sigma)
            found.append(fit.shared)
        report.add(
            "recalibrate: (calibration - truth)/sigma, standard deviation",
            float(np.std(z)),
            at_least=None if report.quick else 0.9,
            at_most=None if report.quick else 1.1,
            peer="no peer gives a sigma",
            conditions=f"{count} recordings of {frames} frames of a Ge crystal at rest, {shared:.0%} of the"
            f" residuals' variance the same in every frame (found: {np.mean(found):.0%}),"
            f" {1e3 * float(np.median(times_s)):.0f} ms, seed {report.seed}",
            data={"z": np.array(z).tolist()},
        )


def _refusals(report: Report) -> None:
    count = report.scale(full=25, quick=3)
    listed, area = reflections("Ge"), DetectorArea.of(GEOMETRY_C)
    rng = report.rng("calibrate", "refusals")
    accepted: dict[str, int] = {}

    def judge(words: str, calibrator: Calibrator, xy: FloatArray) -> None:
        accepted.setdefault(words, 0)
        try:
            calibrator.calibrate(xy)
        except CalibrationError:
            return
        accepted[words] += 1

    ge = Calibrator(listed.material, GEOMETRY_C)
    ti = Calibrator(load_material("Ti"), GEOMETRY_C)
    zirconia = Calibrator(load_material("ZrO2"), GEOMETRY_C)
    for _ in range(count):
        turns = rotations.to_matrix(rotations.random_rotations(2, rng))
        one = simulate_pattern([listed], turns[:1] @ listed.material.B0, GEOMETRY_C, area, rng)
        two = simulate_pattern([listed] * 2, turns @ listed.material.B0, GEOMETRY_C, area, rng)
        judge("random peaks as Ge", ge, random_positions(120, area, rng))
        judge("random peaks as ZrO2", zirconia, random_positions(120, area, rng))
        judge("Ge as Ti", ti, one.xy_px)
        judge("Ge as ZrO2", zirconia, one.xy_px)
        judge("two equal crystals", ge, two.xy_px)
    report.add(
        "calibrations given where there is none",
        float(sum(accepted.values())),
        at_most=0.0,
        conditions=f"{count} frames each of: {', '.join(accepted)}",
        data=accepted,
    )


def _drift(report: Report) -> None:
    listed, area = reflections("Ge"), DetectorArea.of(GEOMETRY_C)
    rng = report.rng("calibrate", "drift")
    turn = rotations.to_matrix(rotations.random_rotations(1, rng))[0]
    reference = Geometry(GEOMETRY_C, turn)

    def frame(move: FloatArray) -> Observation:
        where = with_vector(GEOMETRY_C, vector_of(GEOMETRY_C) + move)
        spots = simulate_spots(turn @ listed.material.B0, listed, where, area)
        xy = spots.xy_px + rng.normal(0.0, 0.2, spots.xy_px.shape)
        return observe(reference, spots.hkl @ listed.material.B0.T, xy, turn)

    asked = 200.0
    lengths = []
    pool = [frame(np.zeros(5)) for _ in range(report.scale(full=3000, quick=300))]
    for _ in range(report.scale(full=300, quick=20)):
        watch = DriftWatch(asked)
        while not (now := watch.update(pool[int(rng.integers(len(pool)))])).alarm:
            pass
        lengths.append(now.alarm_frame)
    report.add(
        "drift watch: frames between false alarms over those asked for",
        float(np.mean(lengths)) / asked,
        at_least=0.8,
        at_most=1.25 if not report.quick else None,
        peer="no peer watches drift",
        conditions=f"{len(lengths)} streams without drift, {asked:g} asked, 0.2 px noise",
    )
    spots = simulate_spots(turn @ listed.material.B0, listed, GEOMETRY_C, area)
    g = spots.hkl @ listed.material.B0.T
    times_s = []
    for _ in range(report.scale(full=400, quick=50)):
        begin = time.perf_counter()
        observe(reference, g, spots.xy_px, turn, spots.energy_keV)
        times_s.append(time.perf_counter() - begin)
    report.add(
        "drift watch: what it adds to a frame in the worker",
        1e3 * float(np.median(times_s)),
        "ms",
        at_most=0.5,
        conditions=f"median, {len(g)} spots, depth of penetration fitted beside",
    )
    one = frame(np.zeros(5))
    sigma = np.linalg.cholesky(one.unit_covariance * one.square_sum_px2 / one.freedom)
    for size in (2.0, 5.0):
        delays = []
        for _ in range(report.scale(full=60, quick=5)):
            watch = DriftWatch(1e5)
            for _ in range(100):
                watch.update(pool[int(rng.integers(len(pool)))])
            jump, number = sigma @ np.array([0.0, size, 0.0]), 1
            while not watch.update(
                replace(o := pool[int(rng.integers(len(pool)))], change=o.change + jump)
            ).alarm:
                number += 1
            delays.append(number)
        report.add(
            f"drift watch: frames until a jump of {size:g} sigma of a frame is found",
            float(np.mean(delays)),
            conditions="mean; 1e5 frames between false alarms",
            data={"delays": delays},
        )
    for words, rate in (("0.01 px a frame in xcen", 0.01), ("0.002 px a frame in xcen", 0.002)):
        delays = []
        for _ in range(report.scale(full=10, quick=2)):
            watch = DriftWatch(1e5)
            for _ in range(100):
                watch.update(frame(np.zeros(5)))
            number = 0
            while not watch.update(frame(np.array([0.0, rate * number, 0.0, 0.0, 0.0]))).alarm:
                number += 1
            delays.append(number)
        report.add(
            f"drift watch: frames until {words} is found",
            float(np.median(delays)),
            conditions=f"1e5 frames between false alarms; {rate * float(np.median(delays)):.2f} px by then",
            data={"delays": delays},
        )
