"""Peak search on raw frames: positions, intensities and shapes of Laue spots.

The steps: background and noise by tiles, a smoothed response and its local maxima above a
threshold in sigmas (`detect`), a look at each candidate's surroundings, saturated areas
taken as one, bumps on stronger spots removed, and a fit (`fit`). Deterministic, on one core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipelines.laue.peaks import detect, fit
from pipelines.laue.peaks.background import BackgroundMap, Pixels, background_map, map_background
from pipelines.laue.peaks.parameters import WINDOW_HALF, PeakSearch
from pipelines.laue.peaks.rows import KERNEL_NORM, LARGEST, poisson_excess

_DEFAULT = PeakSearch()

FloatArray = npt.NDArray[np.float64]
__all__ = ["BackgroundMap", "PeakSearch", "PeakTable", "background_map", "empty_table", "find_peaks"]

SATURATED = 1
"""The spot holds saturated pixels; they did not count in the fit."""
OVERLAP = 2
"""Another spot's window meets this one's."""
EDGE = 4
"""The frame's border or unusable pixels cut into the core of the spot."""
FIT_FAILED = 8
"""No ellipse could be fitted: position and intensity are those of a round spot, or the centroid's."""

_AT_ONCE = 1024  # windows in memory
_CONFIRMED = 1.0  # of the threshold, reached by the height of a round spot
_SURE_SNR = 10.0  # where no Gaussian fits, a lone maximum counts as a spot from here on
_PLATEAU_PX = 4096  # a larger saturated area is no spot
_WIDEST = 40  # half size of the window around a large saturated area
_FWHM = 2.0 * math.sqrt(2.0 * math.log(2.0))


@dataclass(frozen=True, eq=False)
class PeakTable:
    """Spots of a frame, by falling intensity; equal ones by row, then column.

    Attributes
    ----------
    xy_px : (n, 2) float64
        x (column) and y (row), from 0 at the centre of the first pixel.
    intensity : (n,) float64
        Integrated above the background, counts: 2π A s1 s2 of the fit.
    amplitude, background : (n,) float64
        Height of the fit above the background, and the background, counts.
    fwhm_px : (n, 2) float64
        Full widths at half maximum along the major and minor axis, the pixel's own width
        (variance 1/12 px²) taken off.
    tilt_deg : (n,) float64
        From the x axis (columns) to the major axis, towards y (rows), in (−90, 90].
    sigma_px : (n,) float64
        Standard deviation of a coordinate (root mean square of x and y).
    snr : (n,) float64
        Response above the local background over its noise; the threshold is in this unit.
    flags : (n,) uint8
        SATURATED | OVERLAP | EDGE | FIT_FAILED.
    truncated : bool
        There were more maxima than `PeakSearch.max_peaks`; the strongest were looked at.
    """

    xy_px: FloatArray
    intensity: FloatArray
    amplitude: FloatArray
    background: FloatArray
    fwhm_px: FloatArray
    tilt_deg: FloatArray
    sigma_px: FloatArray
    snr: FloatArray
    flags: npt.NDArray[np.uint8]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.intensity)

    def take(self, indices: npt.ArrayLike) -> Self:
        """Return the rows that `indices` (integers or a boolean mask) selects."""
        index = np.asarray(indices)
        if index.dtype != np.bool_:
            index = index.astype(np.intp)
        rows = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "truncated"}
        return type(self)(**rows, truncated=self.truncated)


def empty_table(truncated: bool = False) -> PeakTable:
    """Return a table without spots."""
    z = np.zeros(0)
    return PeakTable(np.zeros((0, 2)), z, z, z, np.zeros((0, 2)), z, z, z, np.zeros(0, np.uint8), truncated)


def find_peaks(
    image: npt.NDArray[Any],
    params: PeakSearch = _DEFAULT,
    usable: npt.NDArray[np.uint8] | None = None,
) -> PeakTable:
    """Find the spots of a frame.

    Parameters
    ----------
    image : (rows, columns) array of integers or floats
        Not changed, and not copied when C-ordered in native byte order.
    params : PeakSearch
    usable : (rows, columns) uint8 array, optional
        1 where a pixel can be used (`DetectorArea.usable`). Without it zeros are taken for
        pixels without a reading where the background is well above zero.

    Raises
    ------
    BadFrame
        If the frame cannot be searched: not 2-D, a mask for another shape, nothing but zeros,
        nothing but saturated or unusable pixels.
    """
    frame = Pixels.of(image, params, usable)
    ground = map_background(frame, params)
    excess = poisson_excess(params.threshold_sigma, params.gain)
    centres, response, truncated = _maxima(frame, ground, params, excess)
    if len(centres) == 0:
        return empty_table(truncated)
    spots = _candidates(frame, ground, params, excess, centres, response)
    if len(spots.centres) == 0:
        return empty_table(truncated)
    fits, overlapping = _fit(frame, ground, params, spots)
    return _table(spots, fits, overlapping, params, image.shape, truncated)


def _maxima(
    frame: Pixels, ground: BackgroundMap, params: PeakSearch, excess: float
) -> tuple[npt.NDArray[np.int32], FloatArray, bool]:
    rows, columns = frame.image.shape
    room = ((rows + 1) // 2) * ((columns + 1) // 2)
    positions, responses = np.empty((room, 2), np.int32), np.empty(room, np.float32)
    n = detect.find_maxima(
        frame.image, frame.usable, frame.masked, ground.lowest, LARGEST,
        ground.level, ground.grid.height_px, ground.grid.width_px,
        ground.response_noise, params.threshold_sigma, excess, positions, responses,
    )  # fmt: skip
    positions, responses = positions[:n], responses[:n]
    if n > params.max_peaks:
        strongest = np.sort(np.argsort(-responses, kind="stable")[: params.max_peaks])
        positions, responses = positions[strongest], responses[strongest]
    return np.ascontiguousarray(positions), responses.astype(np.float64), n > params.max_peaks


def _windows(
    frame: Pixels, lowest: float, centres: npt.NDArray[np.int32], half: int
) -> npt.NDArray[np.float32]:
    out = np.empty((len(centres), 2 * half + 1, 2 * half + 1), np.float32)
    detect.gather_windows(frame.image, frame.usable, frame.masked, lowest, LARGEST, centres, out)
    return out


@dataclass(frozen=True)
class _Spots:
    """Maxima that passed: centres (row, column), windows, what was judged, and plateaus."""

    centres: npt.NDArray[np.int32]
    windows: npt.NDArray[np.float32]
    judged: FloatArray  # local background, response above it, its noise
    pixel_noise: FloatArray  # white noise of a pixel that gives the response's noise
    plateau: FloatArray  # row, column, pixels, half extent; 0 pixels where not saturated

    def take(self, index: npt.NDArray[Any]) -> _Spots:
        return _Spots(*(getattr(self, f.name)[index] for f in fields(self)))


def _candidates(
    frame: Pixels,
    ground: BackgroundMap,
    params: PeakSearch,
    excess: float,
    centres: npt.NDArray[np.int32],
    response: FloatArray,
) -> _Spots:
    """Judge maxima by their surroundings, join plateaus, drop bumps on stronger spots."""
    windows = _windows(frame, ground.lowest, centres, WINDOW_HALF)
    local = ground.at(centres[:, ::-1].astype(np.float64))
    core = windows[:, WINDOW_HALF - 1 : WINDOW_HALF + 2, WINDOW_HALF - 1 : WINDOW_HALF + 2]
    saturated = (core >= frame.saturation).any(axis=(1, 2))
    judged = np.empty((len(centres), 4))
    fit.inspect(
        windows, response, local, frame.saturation,
        params.threshold_sigma, excess, params.max_sharpness, judged,
    )  # fmt: skip
    plateau = np.zeros((len(centres), 4))
    keep = (judged[:, 3] > 0).astype(np.uint8)
    index = np.flatnonzero(saturated & (keep > 0))
    if len(index):
        label, areas = np.empty(len(index), np.int32), np.zeros((len(index), 4))
        detect.label_plateaus(
            frame.image,
            frame.usable,
            frame.masked,
            frame.saturation,
            centres[index],
            _PLATEAU_PX,
            label,
            areas,
        )
        order = np.lexsort((index, -judged[index, 1], label))
        first = order[np.concatenate([[True], np.diff(label[order]) != 0])]
        keep[index] = 0
        first = first[areas[label[first], 2] > 0]
        keep[index[first]] = 1
        plateau[index[first]] = areas[label[first]]
    spots = _Spots(centres, windows, judged[:, :3].copy(), judged[:, 2] / KERNEL_NORM, plateau).take(
        np.flatnonzero(keep)
    )
    n = len(spots.centres)
    stays = np.ones(n, np.uint8)
    about = np.column_stack([spots.judged[:, :2], spots.pixel_noise])
    detect.suppress(
        spots.windows,
        spots.centres,
        about,
        params.separation_px,
        params.prominence_sigma,
        params.gain,
        stays,
    )
    return spots.take(np.flatnonzero(stays))


def _fit(
    frame: Pixels, ground: BackgroundMap, params: PeakSearch, spots: _Spots
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Fit all spots; those with neighbours once more with the neighbours taken off."""
    n = len(spots.centres)
    start = np.empty((n, 5))
    start[:, 0], start[:, 1] = spots.judged[:, 0], spots.pixel_noise
    start[:, 2], start[:, 3], start[:, 4] = spots.centres[:, 1], spots.centres[:, 0], -1.0
    flat = spots.plateau[:, 2] > 0
    start[flat, 2], start[flat, 3] = spots.plateau[flat, 1], spots.plateau[flat, 0]
    start[flat, 4] = spots.plateau[flat, 3]
    first, neighbours = fit.neighbour_lists(spots.centres, 2 * WINDOW_HALF)
    out = np.zeros((n, fit.FIT_COLUMNS))
    out[:, fit.X], out[:, fit.Y] = start[:, 2], start[:, 3]
    large = start[:, 4] > WINDOW_HALF - fit.WINGS_PX
    meet = np.ones(n, np.bool_)
    for subtract in (False, True):
        chosen, models = meet, out.copy()
        for half, group in ((WINDOW_HALF, chosen & ~large), (_WIDEST, chosen & large)):
            members = np.flatnonzero(group)
            for at in range(0, len(members), _AT_ONCE):
                which = members[at : at + _AT_ONCE]
                windows = spots.windows[which]
                if half > WINDOW_HALF:
                    windows = _windows(frame, ground.lowest, spots.centres[which], half)
                fit.fit_windows(
                    windows, which, spots.centres, start, first, neighbours, models,
                    min(frame.saturation, LARGEST), params.gain, params.box_px, subtract, out,
                )  # fmt: skip
        meet = fit.windows_meet(out, first, neighbours, params.box_px)
    return out, meet


def _table(
    spots: _Spots,
    fits: FloatArray,
    overlapping: npt.NDArray[np.bool_],
    params: PeakSearch,
    shape: tuple[int, ...],
    truncated: bool,
) -> PeakTable:
    fitted, round_ = fits[:, fit.STATUS] == fit.FITTED, fits[:, fit.STATUS] == fit.ROUND
    a, b, c = fits[:, fit.QA], fits[:, fit.QB], fits[:, fit.QC]
    # Variances along the axes: inverse eigenvalues of [[a, b], [b, c]].
    mean, half_gap = 0.5 * (a + c), np.hypot(0.5 * (a - c), b)
    major, minor = 1.0 / np.maximum(mean - half_gap, 1e-6), 1.0 / (mean + half_gap)
    tilt = np.degrees(0.5 * np.arctan2(-2.0 * b, c - a))
    tilt = np.where(tilt <= -90.0, tilt + 180.0, tilt)
    area = 2.0 * np.pi * np.sqrt(major * minor)
    intensity = np.where(fitted | round_, fits[:, fit.HEIGHT] * area, fits[:, fit.SIGNAL])
    fwhm = _FWHM * np.sqrt(np.maximum(np.stack([major, minor], axis=1) - 1.0 / 12.0, 0.0))
    flags = np.zeros(len(fits), np.uint8)
    flags[spots.plateau[:, 2] > 0] |= SATURATED
    flags[~fitted] |= FIT_FAILED
    flags[overlapping] |= OVERLAP
    core = spots.windows[:, WINDOW_HALF - 2 : WINDOW_HALF + 3, WINDOW_HALF - 2 : WINDOW_HALF + 3]
    flags[np.isnan(core).any(axis=(1, 2))] |= EDGE
    table = PeakTable(
        xy_px=fits[:, [fit.X, fit.Y]],
        intensity=intensity,
        amplitude=fits[:, fit.HEIGHT].copy(),
        background=fits[:, fit.LEVEL].copy(),
        fwhm_px=fwhm,
        tilt_deg=tilt,
        sigma_px=np.sqrt(0.5 * (fits[:, fit.VAR_X] + fits[:, fit.VAR_Y])),
        snr=spots.judged[:, 1] / spots.judged[:, 2],
        flags=flags,
        truncated=truncated,
    )
    # Texture and flanks of bright spots seldom look like a spot. What no ellipse fits must be
    # strong, or as high when fitted with a round spot (whose response is half its height).
    confirmed = round_ & (0.5 * table.amplitude > _CONFIRMED * params.threshold_sigma * spots.judged[:, 2])
    strong = confirmed | (table.snr >= _SURE_SNR)
    doubtful = ~fitted & (spots.plateau[:, 2] == 0) & (overlapping | ~strong)
    edges = np.array(shape[::-1]) - 0.5
    inside = ((table.xy_px > -0.5) & (table.xy_px < edges)).all(axis=1)
    good = ~doubtful & inside & (intensity > 0) & (table.amplitude > 0)
    order = np.lexsort((table.xy_px[:, 0], table.xy_px[:, 1], -intensity))
    return table.take(order[good[order]])
