"""``grainwatch calibrate``: position and tilt of the detector from a frame of an unstrained crystal."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from grainwatch.config import ConfigError
from pipelines.files import read_images, reason
from pipelines.frame import BadFrame
from pipelines.laue.analysis import calibration_hash, read_mask
from pipelines.laue.calibration import (
    UNKNOWN,
    CalibrationError,
    CalibrationFit,
    CalibrationSettings,
    Calibrator,
    Spread,
    nominal_calibration,
)
from pipelines.laue.calibration_fit import NAMES
from pipelines.laue.calibration_output import FROM_ONE, Outputs, of_option
from pipelines.laue.crystal import load_material
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.lauetools_files import FRAME_SHAPES, read_cor, read_dat, read_det
from pipelines.laue.peaks import PeakSearch, find_peaks

_PEAK_LISTS = {".cor": read_cor, ".dat": read_dat}
_STRAINED = 1e-4
_DISTANCES_MM = (5.0, 5000.0)
_DEGREES = np.degrees(1.0)


def calibrate(
    frame: Annotated[str, typer.Argument(help="Image (.gz too), or .cor or .dat peak list, of one crystal.")],
    material: Annotated[
        str, typer.Option("--material", "-m", help="What the crystal is: built-in name or CIF file.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the calibration goes: a LaueTools .det file.")
    ],
    start: Annotated[
        str, typer.Option("--start", "-s", help="Calibration to start from: a LaueTools .det file.")
    ] = "",
    camera: Annotated[
        str, typer.Option(help="Without a start: LaueTools' name of the camera, sCMOS or MARCCD165.")
    ] = "",
    dd: Annotated[
        float | None,
        typer.Option(help="Without a start: distance from sample to detector, mm; 75 if not given."),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG of the residuals.")] = None,
    json_out: Annotated[
        str, typer.Option("--json", help="Where a JSON object goes; - is the terminal.")
    ] = "",
    mask: Annotated[str, typer.Option(help="Image whose non-zero pixels are dead.")] = "",
    energy: Annotated[tuple[float, float], typer.Option(help="Energy band of the beam, keV.")] = (5.0, 22.0),
    threshold: Annotated[float, typer.Option(help="Peak threshold in sigmas.")] = 5.3,
    depth: Annotated[
        bool, typer.Option("--depth/--no-depth", help="Refine the depth of penetration where it shows.")
    ] = True,
    max_residual: Annotated[float, typer.Option(help="Refuse a mean residual above this, px.")] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it is there.")] = False,
) -> None:
    """Calibrate the detector: dd, xcen, ycen, xbet, xgam with their standard deviations."""
    # What can be refused before the work is.
    outputs = Outputs("calibrate", out, overwrite, plot, json_out)
    image, peaks_of_list, label = _read(frame)
    begin, spread = _start(start, camera, dd, image, label)
    try:
        of = load_material(material)
    except (OSError, ValueError) as error:
        raise ConfigError(f"calibrate: --material: {reason(error)}") from error
    for remark in of.remarks:
        print(f"calibrate: material {of.name}: {remark}", file=sys.stderr)
    try:
        area = DetectorArea.of(begin, read_mask(Path(mask), begin.shape) if mask else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"calibrate: --mask: {reason(error)}") from error
    try:
        settings = CalibrationSettings(energy_keV=energy, max_residual_px=max_residual, depth=depth)
        search = PeakSearch(threshold_sigma=threshold)
        calibrator = Calibrator(of, begin, area, settings, spread)
    except ValueError as error:
        raise ConfigError(f"calibrate: {of_option(error)}") from error
    try:
        xy = peaks_of_list if image is None else _peaks(image, search, area)
        fit = calibrator.calibrate(xy)
    except (CalibrationError, BadFrame) as error:
        print(f"grainwatch: calibrate: {frame}: {error}", file=sys.stderr)
        raise typer.Exit(1) from error

    outputs.write_calibration(fit.calibration, fit.rotation, of.name, frame)
    # With the JSON on the terminal's standard output the table goes beside it.
    print(_table(fit, of.name), file=sys.stderr if json_out == "-" else sys.stdout)
    outputs.write_json(_report(fit, of.name, frame, len(xy)))
    title = f"{Path(frame).name}: {of.name}, {len(fit.spots)} spots, mean {fit.mean_residual_px:.3f} px"
    outputs.write_plot(fit, xy, image, title)


def _read(frame: str) -> tuple[npt.NDArray[Any] | None, npt.NDArray[np.float64], str]:
    # (image, no peaks, "") or (None, peaks with the brightest first, name of the camera).
    reader = _PEAK_LISTS.get(Path(frame).suffix.lower())
    try:
        if reader is not None:
            peaks = reader(frame)
            order = np.argsort(-peaks.intensity, kind="stable")
            return None, np.asarray(peaks.xy_px[order]), peaks.label
        images = read_images(frame)
        first = next(images, None)
        if first is None:
            raise ConfigError(f"calibrate: {frame}: holds no image")
        if next(images, None) is not None:
            print(f"calibrate: {frame} holds several images, {first[0]} is used", file=sys.stderr)
        return first[1], np.empty((0, 2)), ""
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"calibrate: {reason(error)}") from error


def _start(
    start: str, camera: str, dd: float | None, image: npt.NDArray[Any] | None, label: str
) -> tuple[Calibration, Spread]:
    if start:
        for option, given in (("--camera", camera != ""), ("--dd", dd is not None)):
            if given:
                raise ConfigError(f"calibrate: {option}: is in the file of --start; give one of the two")
        try:
            begin = read_det(start).calibration
        except (OSError, ValueError) as error:
            raise ConfigError(f"calibrate: --start: {reason(error)}") from error
        spread = Spread()
    else:
        by_shape = {shape: name for name, shape in FRAME_SHAPES.items()}
        name = camera or label or ("" if image is None else by_shape.get(image.shape, ""))
        if not name:
            raise ConfigError(
                "calibrate: the camera is not known from the frame: give --start with a calibration, or"
                f" --camera ({', '.join(sorted(FRAME_SHAPES))}) with --dd"
            )
        low, high = _DISTANCES_MM
        if dd is not None and not low <= dd <= high:
            raise ConfigError(f"calibrate: --dd {dd:g}: expected {low:g} to {high:g} mm")
        try:
            begin = nominal_calibration(name) if dd is None else nominal_calibration(name, dd)
        except ValueError as error:
            raise ConfigError(f"calibrate: --camera: {error}") from error
        spread = UNKNOWN
    if image is not None and image.shape != begin.shape:
        raise ConfigError(
            f"calibrate: the frame has {image.shape[0]} rows and {image.shape[1]} columns, but"
            f" {begin.label or 'the detector'} of the start has {begin.shape[0]} and {begin.shape[1]}: give"
            " a start for this detector"
        )
    return begin, spread


def _peaks(image: npt.NDArray[Any], search: PeakSearch, area: DetectorArea) -> npt.NDArray[np.float64]:
    found = find_peaks(image, search, area.usable)
    return np.asarray(found.xy_px[np.argsort(-found.intensity, kind="stable")])


def _table(fit: CalibrationFit, material: str) -> str:
    lines = [
        f"{material}: {len(fit.spots)} spots fitted of {fit.matched} matched and {fit.expected} expected,"
        f" mean residual {fit.mean_residual_px:.3f} px",
        f"{'parameter':<10} {'value':>11} {'sigma':>9} {'change':>10}",
    ]
    values = fit.values + FROM_ONE
    for name, value, sigma, change in zip(NAMES, values, fit.sigma, fit.change, strict=True):
        plain, unit = name.split("_")
        lines.append(f"{plain:<10} {value:>11.4f} {sigma:>9.4f} {change:>+10.4f} {unit}")
    if fit.depth_mm:
        sigma = float(np.sqrt(fit.covariance[8, 8]))
        lines.append(f"{'depth':<10} {1e3 * fit.depth_mm:>11.2f} {1e3 * sigma:>9.2f} {'':>10} um at 15 keV")
    turn = _DEGREES * float(np.sqrt(np.trace(fit.covariance[5:8, 5:8]) / 3.0))
    lines.append(f"orientation known to {turn:.4f} deg; xcen and ycen count from 1, as in the file")
    if fit.unstrained_probability < _STRAINED:
        worst = int(np.argmax(np.abs(fit.strain)))
        left, sigma = 1e3 * fit.strain.flat[worst], 1e3 * fit.strain_sigma.flat[worst]
        lines.append(
            f"warning: residuals are not random ({fit.unstrained_probability:.1g}): as if the crystal were"
            f" strained by {left:+.2f} +- {sigma:.2f} (10⁻³), or the detector not flat; the sigmas are"
            " too small then"
        )
    for a, b, rho in fit.correlated():
        lines.append(f"{a.split('_')[0]} and {b.split('_')[0]} are correlated: {rho:+.3f}")
    return "\n".join(lines)


def _report(fit: CalibrationFit, material: str, frame: str, peaks: int) -> dict[str, Any]:
    values = dict(zip(NAMES, (fit.values + FROM_ONE).tolist(), strict=True))
    return {
        "frame": frame,
        "material": material,
        "first_pixel": 1,
        **values,
        "sigma": dict(zip(NAMES, fit.sigma.tolist(), strict=True)),
        "change": dict(zip(NAMES, fit.change.tolist(), strict=True)),
        "covariance": fit.covariance.tolist(),
        "covariance_of": [*NAMES, "omega_x_rad", "omega_y_rad", "omega_z_rad", "depth_mm"][
            : len(fit.covariance)
        ],
        "orientation_matrix": fit.rotation.tolist(),
        "depth_um": 1e3 * fit.depth_mm,
        "peaks": peaks,
        "spots_fitted": len(fit.spots),
        "spots_matched": fit.matched,
        "spots_expected": fit.expected,
        "mean_residual_px": fit.mean_residual_px,
        "mean_residual_of_matched_px": fit.mean_matched_px,
        "strain": [[v if math.isfinite(v) else None for v in row] for row in fit.strain.tolist()],
        "strain_sigma": [[v if math.isfinite(v) else None for v in row] for row in fit.strain_sigma.tolist()],
        "unstrained_probability": fit.unstrained_probability,
        "rival_spots": fit.rival_spots,
        "calibration_hash": calibration_hash(fit.calibration),
    }
