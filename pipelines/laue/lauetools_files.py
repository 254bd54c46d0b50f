"""LaueTools' text files: .det (calibration), .cor and .dat (peaks), .fit (indexed spots).

Positions and detector centres count from 1 in these files and from 0 in memory; this module is
the only place that converts. Frame dimensions are (rows, columns): "(2018, 2016)" of the sCMOS
camera is an image of 2018 rows and 2016 columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.laue.geometry import Calibration
from pipelines.laue.text_tables import TextLines, numbers_in

FloatArray = npt.NDArray[np.float64]
Parameters = tuple[float, float, float, float, float]
"""dd (mm), xcen, ycen (px from 1), xbet, xgam (deg), as LaueTools writes them."""

FRAME_SHAPES: Mapping[str, tuple[int, int]] = {"sCMOS": (2018, 2016), "MARCCD165": (2048, 2048)}
"""Rows and columns of the cameras whose files may leave them out."""

_FIRST_PIXEL = 1.0
_COR_COLUMNS = ("2theta", "chi", "X", "Y", "I")
_DAT_COLUMNS = ("peak_X", "peak_Y", "peak_Itot", "peak_Isub")


class DetFile(NamedTuple):
    """Content of a .det file.

    `orientation_matrix` M is that of the calibration crystal: UB = M @ material.B0 (q = UB @ hkl).
    """

    calibration: Calibration
    orientation_matrix: FloatArray | None
    material: str | None


@dataclass(frozen=True, eq=False)
class PeakFile:
    """Content of a .cor or .dat file.

    Attributes
    ----------
    xy_px : (n, 2) float64
        x (column), y (row) from 0.
    intensity : (n,) float64
    two_theta_deg, chi_deg : (n,) float64 or None
        The angles as written; a .dat file has none.
    extra : mapping of str to (n,) float64
        All other columns by their names, as written.
    parameters : tuple of 5 float or None
        Calibration in the footer, as LaueTools writes it (centre counted from 1).
    pixel_size_mm : float or None
    label : str
        LaueTools' name of the camera, empty when not stated.
    """

    xy_px: FloatArray
    intensity: FloatArray
    two_theta_deg: FloatArray | None = None
    chi_deg: FloatArray | None = None
    extra: Mapping[str, FloatArray] = field(default_factory=dict)
    parameters: Parameters | None = None
    pixel_size_mm: float | None = None
    label: str = ""

    def calibration(self, shape: tuple[int, int] | None = None) -> Calibration | None:
        """Return the calibration in the footer, None where there is none.

        Parameters
        ----------
        shape : (int, int), optional
            Rows, columns; needed where the file does not name a known camera.

        Raises
        ------
        ValueError
            If the frame's shape is not known.
        """
        if self.parameters is None or self.pixel_size_mm is None:
            return None
        shape = shape or FRAME_SHAPES.get(self.label)
        if shape is None:
            raise ValueError(f"camera {self.label!r} is unknown: state the rows and columns of its frames")
        return Calibration.from_lauetools(self.parameters, self.pixel_size_mm, shape, self.label)


@dataclass(frozen=True, eq=False)
class FitGrain:
    """One indexed crystal of a .fit file.

    Attributes
    ----------
    material : str
    UB : (3, 3) float64, 1/angstrom
        q = UB @ hkl in the lab frame: the product of the two matrices in the file.
    orientation_matrix, B0 : (3, 3) float64
        Those two: orientation with strain, and the reciprocal cell of the unstrained material.
    hkl : (n, 3) int64
    xy_px : (n, 2) float64
        Measured x (column), y (row) from 0.
    energy_keV : (n,) float64
    extra : mapping of str to (n,) float64
        All other columns by their names, as written (their positions count from 1).
    strain_crystal, strain_sample : (3, 3) float64 or None
        Deviatoric strain as a plain number, in the file's direct crystal and "sample2" frames.
    lattice_A_deg : (6,) float64 or None
        Refined lattice parameters.
    calibration : Calibration or None
    mean_deviation_px : float
        NaN where the file does not state it.
    """

    material: str
    UB: FloatArray
    orientation_matrix: FloatArray
    B0: FloatArray
    hkl: npt.NDArray[np.int64]
    xy_px: FloatArray
    energy_keV: FloatArray
    extra: Mapping[str, FloatArray] = field(default_factory=dict)
    strain_crystal: FloatArray | None = None
    strain_sample: FloatArray | None = None
    lattice_A_deg: FloatArray | None = None
    calibration: Calibration | None = None
    mean_deviation_px: float = float("nan")


def read_det(path: str | Path) -> DetFile:
    """Read a calibration.

    Raises
    ------
    FileFormatError
        If numbers are missing, or the detector is not above the sample (kf_direction Z>0).
    """
    lines = TextLines(path)
    first = numbers_in(lines.text(0).replace(",", " "))
    if len(first) < 5:
        raise lines.error(0, "expected dd, xcen, ycen, xbet, xgam, pixelsize, rows, columns", lines.text(0))
    keys = lines.key_values()
    if "kf_direction" in keys and keys["kf_direction"][1].replace(" ", "") != "Z>0":
        i, value = keys["kf_direction"]
        raise lines.error(i, "only kf_direction Z>0 (detector above the sample) is supported", value)
    pixel_size = first[5] if len(first) > 5 else lines.value(keys, "pixelsize")
    if "xpixelsize" in keys and lines.value(keys, "xpixelsize") != lines.value(keys, "ypixelsize"):
        raise lines.error(keys["xpixelsize"][0], "expected square pixels", keys["xpixelsize"][1])
    shape = first[6:8] if len(first) >= 8 else numbers_in(keys.get("framedim", (0, ""))[1])
    if len(shape) != 2:
        raise lines.error(0, "expected rows and columns as numbers 7 and 8, or a line '# framedim : (r, c)'")
    orientation = None
    for i, line in enumerate(lines):
        if line.startswith("Orientation Matrix") and i + 1 < len(lines):
            numbers = numbers_in(lines.text(i + 1))
            if len(numbers) != 9 or not np.all(np.isfinite(numbers)):
                raise lines.error(i + 1, "expected an orientation matrix of 3 x 3 numbers", lines.text(i + 1))
            orientation = np.array(numbers).reshape(3, 3)
    done_with = next((m for line in lines if (m := re.match(r"Calibration done with (\S+) at", line))), None)
    material = keys["Material"][1] if "Material" in keys else done_with.group(1) if done_with else None
    label = keys.get("CCDLabel", (0, ""))[1]
    calibration = _calibration(lines, 0, first[:5], pixel_size, shape, label)
    return DetFile(calibration, orientation, material or None)


def write_det(
    path: str | Path,
    calibration: Calibration,
    orientation_matrix: npt.ArrayLike | None = None,
    material: str = "",
    note: str = "grainwatch",
    when: str = "an unstated time",
    data_file: str = "",
) -> None:
    """Write a calibration that LaueTools reads.

    `orientation_matrix` as in `DetFile`; `note`, `when` and `data_file` say with what program, when and
    from which frame it was made.
    """
    numbers = [_full(v) for v in (*calibration.to_lauetools(), calibration.pixel_size_mm)]
    rows, columns = calibration.shape
    text = [
        ", ".join([*numbers, str(rows), str(columns)]),
        "Sample-Detector distance(IM), xO, yO, angle1, angle2, pixelsize, dim1, dim2",
        f"Calibration done with {material or 'unknown'} at {when} with {note}",
        f"Experimental Data file: {data_file}",
    ]
    if orientation_matrix is not None:
        matrix = np.asarray(orientation_matrix, dtype=np.float64)
        inner = "],[".join(",".join(_full(v) for v in row) for row in matrix)
        text += ["Orientation Matrix:", f"[[{inner}]]"]
    if material:
        text.append(f"# Material : {material}")
    names = ("dd", "xcen", "ycen", "xbet", "xgam", "pixelsize")
    text += [f"# {name} : {value}" for name, value in zip(names, numbers, strict=True)]
    text += [f"# {axis}pixelsize : {numbers[5]}" for axis in "xy"]
    text += [f"# CCDLabel : {calibration.label}", f"# framedim : ({rows}, {columns})", "# kf_direction : Z>0"]
    _write(path, text)


def read_cor(path: str | Path) -> PeakFile:
    """Read peaks with angles; raises FileFormatError naming the line."""
    lines = TextLines(path)
    first, columns = lines.columns(("2theta", "chi", "x", "y"), default=_COR_COLUMNS)
    table = _Table(lines.table(range(first, len(lines)), columns))
    keys = lines.key_values()
    parameters = None
    if "dd" in keys:
        dd, xcen, ycen, xbet, xgam = (lines.value(keys, k) for k in ("dd", "xcen", "ycen", "xbet", "xgam"))
        parameters = (dd, xcen, ycen, xbet, xgam)
    xy = table.pop_xy("X", "Y")
    return PeakFile(
        xy_px=xy,
        two_theta_deg=table.pop("2theta"),
        chi_deg=table.pop("chi"),
        intensity=table.pop("I") if "I" in table else np.ones(len(xy)),
        extra=table.rest(),
        parameters=parameters,
        pixel_size_mm=lines.value(keys, "pixelsize") if "pixelsize" in keys else None,
        label=keys.get("CCDLabel", (0, ""))[1],
    )


def write_cor(path: str | Path, peaks: PeakFile, calibration: Calibration | None = None) -> None:
    """Write peaks with angles, and the calibration in the footer.

    Raises
    ------
    ValueError
        If the peaks have no angles.
    """
    if peaks.two_theta_deg is None or peaks.chi_deg is None:
        raise ValueError(f"{path}: a .cor file needs 2theta and chi of each peak")
    columns = [peaks.two_theta_deg, peaks.chi_deg, *(peaks.xy_px + _FIRST_PIXEL).T, peaks.intensity]
    text = [" ".join([*_COR_COLUMNS, *peaks.extra]), *_rows([*columns, *peaks.extra.values()])]
    parameters, pixel_size, label = peaks.parameters, peaks.pixel_size_mm, peaks.label
    if calibration is not None:
        parameters, pixel_size = calibration.to_lauetools(), calibration.pixel_size_mm
        label = calibration.label
    if parameters is not None and pixel_size is not None:
        text.append("# Calibration parameters")
        names = ("dd", "xcen", "ycen", "xbet", "xgam", "pixelsize", "ypixelsize")
        values = (*parameters, pixel_size, pixel_size)
        text += [f"# {name}     :   {_full(value)}" for name, value in zip(names, values, strict=True)]
        text += [f"# CCDLabel    :   {label}"] if label else []
    _write(path, text)


def read_dat(path: str | Path) -> PeakFile:
    """Read a peak list without angles; `intensity` is the one above background.

    Raises
    ------
    FileFormatError
        Naming file and line.
    """
    lines = TextLines(path)
    first, columns = lines.columns(("peak_x", "peak_y"))
    table = _Table(lines.table(range(first, len(lines)), columns))
    name = next((n for n in ("peak_Isub", "peak_I", "peak_Itot") if n in table), None)
    if name is None:
        raise lines.error(first - 1, "expected a column peak_Isub, peak_I or peak_Itot", " ".join(columns))
    return PeakFile(xy_px=table.pop_xy("peak_X", "peak_Y"), intensity=table.pop(name), extra=table.rest())


def write_dat(path: str | Path, peaks: PeakFile) -> None:
    """Write a peak list; the intensity stands in peak_Isub, and in peak_Itot unless `extra` has one."""
    extra = dict(peaks.extra)
    total = extra.pop("peak_Itot", peaks.intensity)
    columns = [*(peaks.xy_px + _FIRST_PIXEL).T, total, peaks.intensity, *extra.values()]
    text = [" ".join([*_DAT_COLUMNS, *extra]), *_rows(columns)]
    _write(path, [*text, f"# Comments: nb of peaks {len(peaks.xy_px)}"])


def read_fit(path: str | Path) -> list[FitGrain]:
    """Read indexed crystals, in the order of the file.

    Raises
    ------
    FileFormatError
        Naming file, line and expectation; also where rows are missing of a grain's announced spots.
    """
    lines = TextLines(path)
    starts = [i for i, line in enumerate(lines) if line.startswith("#Number of indexed spots")]
    if not starts:
        raise lines.error(0, "expected a line '#Number of indexed spots: n'; is this a .fit file?")
    ends = [*starts[1:], len(lines)]
    return [_read_grain(lines, start, end) for start, end in zip(starts, ends, strict=True)]


def write_fit(path: str | Path, grains: Sequence[FitGrain]) -> None:
    """Write indexed crystals, one block each."""
    text: list[str] = []
    for number, grain in enumerate(grains):
        n = len(grain.hkl)
        extra = dict(grain.extra)
        known = {
            "spot_index": extra.pop("spot_index", np.arange(n, dtype=np.float64)),
            "intensity": extra.pop("intensity", np.zeros(n)),
            **dict(zip("hkl", grain.hkl.T.astype(np.float64), strict=True)),
            "2theta": extra.pop("2theta", None),
            "Chi": extra.pop("Chi", None),
            **dict(zip(("Xexp", "Yexp"), (grain.xy_px + _FIRST_PIXEL).T, strict=True)),
            "Energy": grain.energy_keV,
            "PixDev": extra.pop("PixDev", None),
            **extra,
        }
        columns = {name: values for name, values in known.items() if values is not None}
        text += [
            f"#Strain and Orientation Refinement, grain {number}",
            f"#Number of indexed spots: {n}",
            "#Element",
            f"#{grain.material}",
            "#grainIndex",
            f"#G_{number}",
            f"#Mean Deviation(pixel): {_full(grain.mean_deviation_px)}",
            "##" + " ".join(columns),
            *_rows(list(columns.values())),
            "#UB matrix in q= (UB) B0 G* ",
            *_matrix(grain.orientation_matrix),
            "#B0 matrix in q= UB (B0) G*",
            *_matrix(grain.B0),
        ]
        if grain.strain_crystal is not None:
            text += [
                "#deviatoric strain in direct crystal frame (10-3 unit)",
                *_matrix(grain.strain_crystal * 1e3),
            ]
        if grain.strain_sample is not None:
            text += ["#deviatoric strain in sample2 frame (10-3 unit)", *_matrix(grain.strain_sample * 1e3)]
        if grain.lattice_A_deg is not None:
            text += ["#new lattice parameters", f"#[{' '.join(_full(v) for v in grain.lattice_A_deg)}]"]
        if grain.calibration is not None:
            parameters = ", ".join(_full(v) for v in grain.calibration.to_lauetools())
            text += ["#CCDLabel", f"#{grain.calibration.label}", "#DetectorParameters", f"#[{parameters}]"]
            text += ["#pixelsize", f"#{_full(grain.calibration.pixel_size_mm)}"]
            text += ["#Frame dimensions", f"#({grain.calibration.shape[0]}, {grain.calibration.shape[1]})"]
        text.append("#")
    _write(path, text)


def _read_grain(lines: TextLines, start: int, end: int) -> FitGrain:
    titles = {
        lines.text(i).lstrip("#").strip(): i for i in range(start, end) if lines.text(i).startswith("#")
    }

    def after(prefix: str) -> int | None:
        """Line that follows the title beginning with `prefix`."""
        found = next((i for title, i in titles.items() if title.startswith(prefix)), None)
        return None if found is None or found + 1 >= end else found + 1

    def required(prefix: str) -> int:
        i = after(prefix)
        if i is None:
            raise lines.error(start, f"expected '#{prefix}' for the grain that begins here")
        return i

    header = required("spot_index") - 1
    # Batch runs of LaueTools 3.2 write the unit into the title.
    columns = ["Energy" if c == "energy(keV)" else c for c in lines.text(header).lstrip("#").split()]
    missing = [c for c in ("h", "k", "l", "Xexp", "Yexp", "Energy") if c not in columns]
    if missing:
        raise lines.error(header, f"expected columns {', '.join(missing)} among the spots' columns")
    table = _Table(lines.table(range(header + 1, end), columns))
    announced = numbers_in(lines.text(start).split(":")[-1])
    hkl = np.stack([table.pop(name) for name in "hkl"], axis=1)
    if len(announced) != 1 or len(hkl) != announced[0]:
        raise lines.error(
            start, f"expected as many rows as announced, there are {len(hkl)}", lines.text(start)
        )
    if not np.array_equal(hkl, np.rint(hkl)):
        raise lines.error(header, "expected integer Miller indices in the columns h, k, l")
    orientation, b0 = lines.matrix(required("UB matrix in q=")), lines.matrix(required("B0 matrix in q="))
    crystal, sample = after("deviatoric strain in direct crystal"), after("deviatoric strain in sample")
    lattice, deviation = after("new lattice parameters"), after("Mean Deviation")
    return FitGrain(
        material=lines.text(required("Element")).lstrip("#").strip(),
        UB=orientation @ b0,
        orientation_matrix=orientation,
        B0=b0,
        hkl=hkl.astype(np.int64),
        xy_px=table.pop_xy("Xexp", "Yexp"),
        energy_keV=table.pop("Energy"),
        extra=table.rest(),
        strain_crystal=None if crystal is None else lines.matrix(crystal) * 1e-3,
        strain_sample=None if sample is None else lines.matrix(sample) * 1e-3,
        lattice_A_deg=None if lattice is None else np.array(lines.numbers(lattice, 6)),
        calibration=_fit_calibration(lines, after),
        mean_deviation_px=np.nan if deviation is None else float(lines.text(deviation - 1).split(":")[-1]),
    )


def _fit_calibration(lines: TextLines, after: Callable[[str], int | None]) -> Calibration | None:
    where, pixel_size, shape = after("DetectorParameters"), after("pixelsize"), after("Frame dimensions")
    if where is None or pixel_size is None or shape is None:
        return None
    label = after("CCDLabel")
    return _calibration(
        lines,
        where,
        lines.numbers(where, 5),
        lines.numbers(pixel_size, 1)[0],
        lines.numbers(shape, 2),
        "" if label is None else lines.text(label).lstrip("#").strip(),
    )


def _calibration(
    lines: TextLines,
    i: int,
    parameters: Sequence[float],
    pixel_size_mm: float,
    shape: Sequence[float],
    label: str,
) -> Calibration:
    dd, xcen, ycen, xbet, xgam = parameters
    if any(v != int(v) for v in shape):
        raise lines.error(i, f"expected whole numbers of rows and columns, found {shape}")
    if not max(abs(xbet), abs(xgam)) <= 180:  # a number too few or too many shifts all others
        raise lines.error(i, f"xbet and xgam must lie between -180 and 180 deg, found {xbet}, {xgam}")
    try:
        return Calibration.from_lauetools(
            (dd, xcen, ycen, xbet, xgam), pixel_size_mm, (int(shape[0]), int(shape[1])), label
        )
    except ValueError as error:
        raise lines.error(i, str(error)) from error


class _Table:
    """Columns by name, whatever the case of its letters, taken out one after the other."""

    def __init__(self, columns: Mapping[str, FloatArray]) -> None:
        self._columns = {name.lower(): (name, values) for name, values in columns.items()}

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._columns

    def pop(self, name: str) -> FloatArray:
        """Take a column out."""
        return self._columns.pop(name.lower())[1]

    def pop_xy(self, x: str, y: str) -> FloatArray:
        """Take positions out, (n, 2), counted from 0."""
        return np.stack([self.pop(x), self.pop(y)], axis=1) - _FIRST_PIXEL

    def rest(self) -> dict[str, FloatArray]:
        """Return what was not taken, by the names in the file."""
        return dict(self._columns.values())


def _full(value: float) -> str:
    """Shortest text that reads back as the same number."""
    return repr(float(value))


def _rows(columns: Sequence[FloatArray]) -> list[str]:
    return [" ".join(_full(v) for v in row) for row in zip(*columns, strict=True)]


def _matrix(matrix: FloatArray) -> list[str]:
    rows = ["[" + " ".join(_full(v) for v in row) + "]" for row in matrix]
    return [f"#[{rows[0]}", f"# {rows[1]}", f"# {rows[2]}]"]


def _write(path: str | Path, lines: Sequence[str]) -> None:
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
