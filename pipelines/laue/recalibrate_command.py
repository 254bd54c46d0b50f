"""``grainwatch recalibrate``: where the detector stands now, from frames that were measured anyway."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from grainwatch.commands.status import ask, socket_of
from grainwatch.config import ConfigError, read_config
from pipelines.files import read_images, reason
from pipelines.frame import BadFrame
from pipelines.laue.analysis import calibration_hash, read_mask
from pipelines.laue.calibration import CalibrationError, CalibrationSettings, Calibrator
from pipelines.laue.calibration_fit import NAMES
from pipelines.laue.calibration_output import FROM_ONE, Outputs, of_option
from pipelines.laue.crystal import Material, load_material
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.joint_calibration import JointCalibrator, JointFit, ReferenceFrame
from pipelines.laue.lauetools_files import read_det
from pipelines.laue.peaks import PeakSearch, find_peaks
from pipelines.laue.recent_frames import (
    FramePeaks,
    Made,
    how_made,
    newest_first,
    newest_series,
    parts_of,
    peaks_of,
    pipeline_of,
    reference_of,
    search,
)
from pipelines.results_files import ResultsFile, ResultsFileError

_SIGNIFICANT = 1e-3
_SILENT = 3
"""A frame or two without the crystal are an accident; after more the peaks are searched for it."""


@dataclass(frozen=True)
class _Recording:
    """What was given: results files of one series and how they were made, or images."""

    results: list[Path]
    images: list[str]
    made: Made | None
    folders: list[Path]

    @property
    def label(self) -> str:
        names = [path.name for path in self.results] or [Path(image).name for image in self.images]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def recalibrate(
    recording: Annotated[
        list[str],
        typer.Argument(
            help="Results file, folder of results (its newest series), configuration of a daemon, or images."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the calibration goes: a LaueTools .det file.")
    ],
    material: Annotated[
        str,
        typer.Option(
            "--material",
            "-m",
            help="Reference crystal: built-in name or CIF file; by default the drift watch's.",
        ),
    ] = "",
    start: Annotated[
        str, typer.Option("--start", "-s", help="Calibration so far; by default the one of the results.")
    ] = "",
    frames: Annotated[str, typer.Option(help="Only these frames: 120:150 (150 left out), 120: or 120.")] = "",
    last: Annotated[int, typer.Option(min=1, help="At most so many frames, the last good ones.")] = 20,
    stream: Annotated[str, typer.Option(help="Stream of the daemon, where it has several.")] = "",
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG of the residuals.")] = None,
    json_out: Annotated[
        str, typer.Option("--json", help="Where a JSON object goes; - is the terminal.")
    ] = "",
    mask: Annotated[
        str, typer.Option(help="Image whose non-zero pixels are dead; by default that of the results.")
    ] = "",
    energy: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Energy band of the beam, keV; by default that of the results, or 5 22."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Peak threshold in sigmas, for images.")] = 5.3,
    min_spots: Annotated[int, typer.Option(help="Fewest spots of the crystal in a frame.")] = 20,
    depth: Annotated[
        bool, typer.Option("--depth/--no-depth", help="Refine the depth of penetration where it shows.")
    ] = True,
    max_residual: Annotated[float, typer.Option(help="Refuse a mean residual above this, px.")] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it is there.")] = False,
) -> None:
    """Calibrate the detector anew from frames of a reference crystal: old and new values, and how sure."""
    # What can be refused before the work is.
    outputs = Outputs("recalibrate", out, overwrite, plot, json_out)
    given = _recording(recording, stream or None)
    bounds = _bounds(frames)
    begin = _start(start, given)
    of = _material(material, given)
    for remark in of.remarks:
        _say(f"material {of.name}: {remark}")
    table = given.made.pipeline if given.made is not None else None
    band = energy or (table.energy_keV if table is not None else (5.0, 22.0))
    area = _area(mask, given, begin)
    try:
        settings = CalibrationSettings(
            energy_keV=band, max_residual_px=max_residual, min_spots=min_spots, depth=depth
        )
        alone = Calibrator(of, begin, area, settings)
        joint = JointCalibrator(of, begin, area, settings)
        peak_search = PeakSearch(threshold_sigma=threshold)
    except ValueError as error:
        raise ConfigError(f"recalibrate: {of_option(error)}") from error
    try:
        chosen = _chosen(given, alone, bounds, last, peak_search)
        fit = joint.calibrate(chosen)
    except (CalibrationError, BadFrame) as error:
        print(f"grainwatch: recalibrate: {given.label}: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    outputs.write_calibration(fit.calibration, fit.rotations[-1], of.name, given.label)
    print(_table(fit, of.name, given.label), file=sys.stderr if json_out == "-" else sys.stdout)
    outputs.write_json(_report(fit, of.name, given.label))
    title = f"{given.label}: {of.name}, {_counted(fit)}, mean {fit.mean_residual_px:.3f} px"
    outputs.write_plot(fit, fit.peaks_px, None, title)


# What is given.


def _recording(names: list[str], stream: str | None) -> _Recording:
    if len(names) == 1 and Path(names[0]).suffix == ".toml":
        path = Path(names[0])
        given = _of_results(_daemon_series(path, stream), [path.absolute().parent])
        assert given.made is not None
        # What holds now: after a reload a results file still has the configuration that it began with.
        table = pipeline_of(path.read_text(encoding="utf-8"), given.made.stream)
        return replace(given, made=replace(given.made, pipeline=table or given.made.pipeline))
    if len(names) == 1 and Path(names[0]).is_dir():
        found = newest_series(Path(names[0]), stream)
        if not found:
            of = f" of stream {stream}" if stream else ""
            raise ConfigError(f"recalibrate: {names[0]}: no results files{of} in this folder")
        return _of_results(found, [])
    paths = [Path(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"recalibrate: {path}: no such file")
    try:
        with ResultsFile(paths[0]) as file:
            uid = file.series_uid
    except ResultsFileError:
        return _Recording([], names, None, [])
    return _of_results(paths if len(paths) > 1 else parts_of(paths[0], uid), [])


def _of_results(paths: list[Path], folders: list[Path]) -> _Recording:
    try:
        made = how_made(paths)
    except ResultsFileError as error:
        raise ConfigError(f"recalibrate: {error}") from error
    near = paths[0].absolute().parent
    return _Recording(paths, [], made, [*folders, Path.cwd(), near, near.parent])


def _daemon_series(path: Path, stream: str | None) -> list[Path]:
    """Return the results files of the newest series of a daemon, which may run or not."""
    config, _ = read_config(path)
    if stream is not None and stream not in config.streams:
        raise ConfigError(f"recalibrate: --stream: {stream!r} is not one of {', '.join(config.streams)}")
    try:
        known = ask(socket_of(path), {"command": "series", "limit": 100})["series"]
    except ConfigError:
        known = []  # it does not run: its folder says as much
    for series in known:
        file = Path(series["results_file"] or "")
        if stream in (None, series["stream"]) and file.is_file():
            return parts_of(file, series["uid"])
    hdf5 = next((t for name, t in config.sinks.items() if t.get("type", name) == "hdf5"), None)
    if hdf5 is None:
        raise ConfigError(f"recalibrate: {path}: has no sink hdf5, so no results file to read frames from")
    folder = path.absolute().parent / str(hdf5.get("folder", "results"))
    found = newest_series(folder, stream)
    if not found:
        raise ConfigError(f"recalibrate: {path}: no results files in {folder} yet")
    return found


def _bounds(text: str) -> tuple[int | None, int | None]:
    # Numbers of the first and the last frame, both included.
    match = re.fullmatch(r"(\d*)(:?)(\d*)", text)
    if match is None or text == ":" or (match[3] and not match[2]):
        raise ConfigError(f"recalibrate: --frames: expected 120:150, 120:, :150 or 120, got {text!r}")
    first = int(match[1]) if match[1] else None
    if not match[2]:
        return first, first
    end = int(match[3]) - 1 if match[3] else None
    if end is not None and end < (first or 0):
        raise ConfigError(f"recalibrate: --frames: {text} holds no frame: the second number is left out")
    return first, end


def _start(start: str, given: _Recording) -> Calibration:
    try:
        if start:
            return read_det(start).calibration
    except (OSError, ValueError) as error:
        raise ConfigError(f"recalibrate: --start: {reason(error)}") from error
    table = given.made.pipeline if given.made is not None else None
    if table is None or given.made is None:
        raise ConfigError("recalibrate: give the calibration so far with --start")
    for path in _located(table.geometry, given):
        try:
            found = read_det(path).calibration
        except (OSError, ValueError):
            continue
        if calibration_hash(found) == given.made.calibration_hash:
            return found
    raise ConfigError(
        f"recalibrate: the calibration that these results were made with ({table.geometry}) is not there any"
        " more, or was changed: give it with --start"
    )


def _material(name: str, given: _Recording) -> Material:
    table = given.made.pipeline if given.made is not None else None
    watched = table.drift.material if table is not None and table.drift is not None else ""
    if not name and not watched:
        raise ConfigError("recalibrate: say what the reference crystal is: --material Ge")
    failed: Exception | None = None
    for candidate in [name] if name else [watched, *map(str, _located(watched, given))]:
        try:
            return load_material(candidate)
        except (OSError, ValueError) as error:
            failed = failed or error
    assert failed is not None
    raise ConfigError(f"recalibrate: --material: {reason(failed)}") from failed


def _area(mask: str, given: _Recording, calibration: Calibration) -> DetectorArea:
    table = given.made.pipeline if given.made is not None else None
    path: Path | None = Path(mask) if mask else None
    if path is None and table is not None and table.mask:
        path = next((p for p in _located(table.mask, given) if p.is_file()), Path(table.mask))
    try:
        return DetectorArea.of(calibration, read_mask(path, calibration.shape) if path else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"recalibrate: --mask: {reason(error)}") from error


def _located(name: str, given: _Recording) -> list[Path]:
    # A configuration's relative paths count from its folder, which a results file does not know.
    return [folder / name for folder in given.folders]


# Which frames.


def _chosen(
    given: _Recording,
    calibrator: Calibrator,
    bounds: tuple[int | None, int | None],
    last: int,
    peak_search: PeakSearch,
) -> list[ReferenceFrame]:
    """Return the newest good frames, in order of their numbers."""
    if given.made is None:
        frames = [
            f for f in _peaks_of_images(given.images, calibrator, peak_search) if _inside(f.number, bounds)
        ]
        return sorted(search(frames[::-1][:last], calibrator, _say), key=lambda f: f.number)
    alarm = given.made.alarm_frame
    if bounds == (None, None) and alarm >= 0:
        _say(f"frames from {alarm} on, where the drift watch raised its alarm (--frames chooses others)")
        bounds = (alarm, None)
    material, min_spots = calibrator.material, calibrator.settings.min_spots
    found: list[ReferenceFrame] = []
    newest: list[FramePeaks] = []
    without = 0  # frames after the last one that shows the crystal
    for result in newest_first(given.results, *bounds):
        frame = reference_of(result, material, min_spots)
        if frame is not None:
            found.append(frame)
            if len(found) == last:
                break
        elif not found:
            without += 1
            if without <= last:
                newest.append(peaks_of(result))
    if not found:
        _say(f"no result holds a crystal of {material.name}: searching the peaks for it")
        found = search(newest, calibrator, _say)
    elif without:
        found = _newer(newest, without, found, calibrator)
    return sorted(found, key=lambda frame: frame.number)


def _newer(
    newest: list[FramePeaks], without: int, indexed: list[ReferenceFrame], calibrator: Calibrator
) -> list[ReferenceFrame]:
    """Return frames that nobody has indexed but show the crystal all the same, else those that are indexed.

    A detector that moved too far for indexing leaves the crystal in the frames before alone.
    """
    material = calibrator.material.name
    _say(f"the last {without} frames hold no crystal of {material} any more")
    if without >= _SILENT:
        _say(f"searching their peaks for {material}")
        try:
            return search(newest, calibrator, _say)
        except CalibrationError as error:
            _say(f"not found: {error}")
    _say(f"taking frames up to {indexed[0].number}: where the detector stood then")
    return indexed


def _peaks_of_images(images: list[str], calibrator: Calibrator, peak_search: PeakSearch) -> list[FramePeaks]:
    found: list[FramePeaks] = []
    for name in images:
        try:
            for label, image in read_images(name):
                if image.shape != calibrator.start.shape:
                    raise ConfigError(
                        f"recalibrate: {label}: {image.shape[0]} rows and {image.shape[1]} columns, the"
                        f" calibration is for {calibrator.start.shape[0]} and {calibrator.start.shape[1]}"
                    )
                peaks = find_peaks(image, peak_search, calibrator.area.usable)
                order = np.argsort(-peaks.intensity, kind="stable")
                found.append(FramePeaks(len(found), np.asarray(peaks.xy_px[order])))
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"recalibrate: {reason(error)}") from error
    return found


def _inside(number: int, bounds: tuple[int | None, int | None]) -> bool:
    first, last = bounds
    return (first is None or number >= first) and (last is None or number <= last)


def _say(what: str) -> None:
    print(f"grainwatch: recalibrate: {what}", file=sys.stderr)


# What is told.


def _table(fit: JointFit, material: str, label: str) -> str:
    numbers = f"{fit.frames[0]} to {fit.frames[-1]}" if len(fit.frames) > 1 else f"{fit.frames[0]}"
    lines = [
        f"{material}: {_counted(fit)} ({numbers}) of {label}, {len(fit.spots)} spots fitted of"
        f" {fit.matched} matched and {fit.expected} expected, mean residual {fit.mean_residual_px:.3f} px",
        f"{'parameter':<10} {'old':>11} {'new':>11} {'sigma':>9} {'change':>10}",
    ]
    new = fit.values + FROM_ONE
    for name, value, sigma, change in zip(NAMES, new, fit.sigma, fit.change, strict=True):
        plain, unit = name.split("_")
        lines.append(
            f"{plain:<10} {value - change:>11.4f} {value:>11.4f} {sigma:>9.4f} {change:>+10.4f} {unit}"
            f" ({change / sigma:+.1f} sigma)"
        )
    if fit.left_out:
        lines.append(f"left out, with too few spots: frames {', '.join(map(str, fit.left_out))}")
    if fit.depth_mm:
        sigma = float(np.sqrt(fit.covariance[5, 5]))
        lines.append(f"{'depth':<10} {'':>11} {1e3 * fit.depth_mm:>11.2f} {1e3 * sigma:>9.2f} um at 15 keV")
    if fit.shared > 0.05:
        lines.append(
            f"{fit.shared:.0%} of the residuals come again at the same place in every frame: more frames"
            " average out the rest only; the sigmas say so"
        )
    verdict = "has moved" if fit.unchanged < _SIGNIFICANT else "has not moved beyond doubt"
    lines.append(
        f"the detector {verdict}: one that stands as in the old calibration comes out as far from it with"
        f" probability {fit.unchanged:.2g} (all five together, the old values taken for exact)"
    )
    return "\n".join(lines)


def _counted(fit: JointFit) -> str:
    return f"{len(fit.frames)} frame{'s' if len(fit.frames) > 1 else ''}"


def _report(fit: JointFit, material: str, label: str) -> dict[str, Any]:
    def named(values: Any) -> dict[str, float]:
        return dict(zip(NAMES, np.asarray(values).tolist(), strict=True))

    return {
        "recording": label,
        "material": material,
        "frames": list(fit.frames),
        "left_out": list(fit.left_out),
        "first_pixel": 1,
        **named(fit.values + FROM_ONE),
        "old": named(fit.values - fit.change + FROM_ONE),
        "sigma": named(fit.sigma),
        "change": named(fit.change),
        "unchanged_probability": fit.unchanged,
        "covariance": fit.covariance.tolist(),
        "covariance_of": [*NAMES, "depth_mm"][: len(fit.covariance)],
        "depth_um": 1e3 * fit.depth_mm,
        "spots_fitted": len(fit.spots),
        "spots_matched": fit.matched,
        "spots_expected": fit.expected,
        "mean_residual_px": fit.mean_residual_px,
        "shared_residuals": fit.shared,
        "agreement_probability": fit.agreement if math.isfinite(fit.agreement) else None,
        "calibration_hash": calibration_hash(fit.calibration),
    }
