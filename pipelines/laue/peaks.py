"""Peak search on raw frames: positions, intensities and shapes of Laue spots.

The steps: background and noise by tiles, a smoothed response and its local maxima above a
threshold in sigmas (`peak_detect`), a look at each candidate's surroundings, saturated areas
taken as one, bumps on stronger spots removed, and a fit (`peak_fit`). Deterministic, on one core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipelines.frame import BadFrame
from pipelines.laue import peak_detect as detect
from pipelines.laue import peak_fit as fit

FloatArray = npt.NDArray[np.float64]

SATURATED = 1
"""The spot holds saturated pixels; they did not count in the fit."""
OVERLAP = 2
"""Another spot's window meets this one's."""
EDGE = 4
"""The frame's border or unusable pixels cut into the core of the spot."""
FIT_FAILED = 8
"""The position is the centroid of the core; shape and intensity are estimates."""

_WINDOW_HALF = 8  # of the pixels looked at around a candidate
_PLATEAU_PX = 4096  # a larger saturated area is no spot
_PLATEAU_WINGS_PX = 5  # looked at around a saturated area
_WIDEST_WINDOW_HALF = 40
_FWHM = 2.0 * math.sqrt(2.0 * math.log(2.0))


@dataclass(frozen=True)
class PeakSearch:
    """Parameters of the search.

    Attributes
    ----------
    threshold_sigma : float
        A spot's response must exceed the local background by so many standard deviations of
        the response without spots (see `peak_detect`).
    box_px : int
        Half size of the smallest fitted window, px; wide spots get larger ones by themselves.
    separation_px : float
        Of two maxima nearer than this the stronger stays.
    prominence_sigma : float
        A maximum beside a stronger one counts when the valley between is so many sigmas deep.
    tile_px : int
        Size of the tiles of background and noise.
    saturation : float, optional
        Pixels at or above it are saturated; None: the largest value of an integer type.
    gain : float
        Counts per photon, for photon noise.
    min_noise : float
        Least standard deviation of a pixel, counts; None: that of rounding, 1/sqrt(12), for integers.
    spike_ratio : float
        A single hot pixel or cosmic is no spot: the eight neighbours of the brightest pixel must
        together hold at least this fraction of it (a spot of 1.2 px full width holds 1.2 or more,
        one of 0.9 px 0.6). 0 accepts all, for direct detectors with spots inside one pixel.
    min_fwhm_px : float
        Narrower fits, along the minor axis, are spikes over two or three pixels.
    max_peaks : int
        At most so many of the strongest maxima are looked at: bounds the time of a bad frame.
    """

    threshold_sigma: float = 5.0
    box_px: int = 4
    separation_px: float = 2.5
    prominence_sigma: float = 3.0
    tile_px: int = 64
    saturation: float | None = None
    gain: float = 1.0
    min_noise: float | None = None
    spike_ratio: float = 0.5
    min_fwhm_px: float = 0.5
    max_peaks: int = 20000

    def __post_init__(self) -> None:
        if not 2.0 <= self.threshold_sigma <= 1e6:
            raise ValueError(f"threshold_sigma {self.threshold_sigma} must be 2 or more")
        if not 3 <= self.box_px <= _WINDOW_HALF:
            raise ValueError(f"box_px {self.box_px} must lie between 3 and {_WINDOW_HALF}")
        if self.tile_px < 16:
            raise ValueError(f"tile_px {self.tile_px} must be 16 or more")
        if self.max_peaks < 1:
            raise ValueError(f"max_peaks {self.max_peaks} must be positive")
        for name in ("separation_px", "prominence_sigma", "gain", "spike_ratio", "min_fwhm_px"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value} must be a number, 0 or more")


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


@dataclass(frozen=True)
class _Pixels:
    """A frame as the kernels want it."""

    image: npt.NDArray[Any]
    usable: npt.NDArray[np.uint8]
    masked: bool
    saturation: float
    finest: float

    @classmethod
    def of(cls, image: npt.NDArray[Any], params: PeakSearch, usable: npt.NDArray[np.uint8] | None) -> Self:
        if image.ndim != 2 or min(image.shape) < 8:
            raise BadFrame(
                f"an image of shape {image.shape} cannot be searched: 2-D, 8 pixels or more a side"
            )
        kind, dtype = image.dtype.kind, image.dtype.newbyteorder("=")
        if kind not in "biuf":
            raise BadFrame(f"pixels of type {image.dtype} are no real numbers")
        saturation = float(np.iinfo(dtype).max) if kind in "iu" else math.inf
        if params.saturation is not None:
            saturation = params.saturation
        if dtype.name not in detect.PIXEL_TYPES:
            dtype = np.dtype(np.int16 if dtype.itemsize == 1 else np.float64)
        pixels = np.require(image, dtype=dtype, requirements=["C", "A"])
        if usable is not None and usable.shape != image.shape:
            raise BadFrame(f"the mask of shape {usable.shape} does not fit the frame of shape {image.shape}")
        masked = usable is not None and not bool(usable.all())
        mask = np.require(usable, np.uint8, ["C", "A"]) if masked else np.zeros((1, 1), np.uint8)
        finest = params.min_noise
        if finest is None:
            finest = 1.0 / math.sqrt(12.0) if kind in "biu" else 0.0
        return cls(pixels, mask, masked, saturation, finest)


@dataclass(frozen=True)
class BackgroundMap:
    """Background and noise of a frame, at the nodes of a grid.

    Attributes
    ----------
    level, response_noise, pixel_noise : (n + 2, m + 2) float32
        Values at tile centres, one extrapolated node around: background, standard deviation of
        the response and of a pixel, counts.
    lowest : float
        Pixels at or below it do not count.
    """

    grid: detect.Grid
    level: npt.NDArray[np.float32]
    response_noise: npt.NDArray[np.float32]
    pixel_noise: npt.NDArray[np.float32]
    lowest: float

    def at(self, xy_px: FloatArray) -> FloatArray:
        """Return level, response noise and pixel noise at positions (n, 2): (n, 3)."""
        nodes = (self.level, self.response_noise, self.pixel_noise)
        return np.stack([self.grid.at(n, xy_px) for n in nodes], axis=1)


def _tiles(frame: _Pixels, grid: detect.Grid, lowest: float) -> tuple[FloatArray, FloatArray]:
    n_tiles = grid.n_rows * grid.n_columns
    capacity = (int(grid.height_px) // 4 + 2) * (int(grid.width_px) // 2 + 2)
    samples = np.empty((n_tiles, capacity), np.float32)
    counts = np.zeros(2 + n_tiles, np.int64)
    counts[:2] = grid.n_rows, grid.n_columns
    ceiling = min(frame.saturation, detect.LARGEST)
    detect.sample_tiles(frame.image, frame.usable, frame.masked, lowest, ceiling, samples, counts)
    out = np.empty((n_tiles, 2))
    # The samples are clipped no finer than the spread of small counts.
    detect.tile_statistics(samples, counts[2:], 2.6 * frame.finest, out)
    return out[:, 0].reshape(grid[:2]), out[:, 1].reshape(grid[:2])


def background_map(
    image: npt.NDArray[Any], params: PeakSearch, usable: npt.NDArray[np.uint8] | None = None
) -> BackgroundMap:
    """Return background and noise as the search sees them; arguments as in `find_peaks`."""
    return _background_map(_Pixels.of(image, params, usable), params)


def _background_map(frame: _Pixels, params: PeakSearch) -> BackgroundMap:
    shape = frame.image.shape
    grid = detect.Grid.of((shape[0], shape[1]), params.tile_px)
    # Where the background stands clear of zero, a zero is a pixel without a reading: outside a
    # round detector, in a gap, dead.
    lowest = 0.0
    level, spread = _tiles(frame, grid, lowest)
    known = ~np.isnan(level)
    if not known.any() or np.median(level[known] / np.maximum(spread[known], 1e-30)) < 4.0:
        lowest = -detect.LARGEST
        level, spread = _tiles(frame, grid, lowest)
        known = ~np.isnan(level)
    if not known.any():
        raise BadFrame(
            f"no pixel can be used: all are saturated (>= {frame.saturation:g}), masked or not a number"
        )
    if not level[known].any() and not frame.image.any():
        raise BadFrame("all pixels are zero: shutter closed, or the detector gave no data")
    nodes = grid.nodes(level)
    noise = np.empty(grid[:2])
    detect.tile_noise(
        frame.image,
        frame.usable,
        frame.masked,
        lowest,
        detect.LARGEST,
        nodes,
        grid.height_px,
        grid.width_px,
        noise,
    )
    noise = np.maximum(detect.smooth_noise(noise), frame.finest * detect.KERNEL_NORM)
    if frame.image.dtype.kind in "iu":
        # Below one count a pixel most responses are alike and their MAD says nothing.
        few = known & (level < 1.0)
        noise[few] = np.maximum(
            noise[few], np.sqrt(params.gain * np.maximum(level[few], 0)) * detect.KERNEL_NORM
        )
    least = float(np.nanmin(noise)) if known.any() else 0.0
    spread = np.maximum(detect.smooth_noise(spread), frame.finest)
    return BackgroundMap(
        grid,
        nodes,
        grid.nodes(np.where(np.isnan(noise), np.nan, noise), floor=0.5 * least),
        grid.nodes(spread, floor=0.5 * float(np.nanmin(spread))),
        lowest,
    )


def find_peaks(
    image: npt.NDArray[Any],
    params: PeakSearch = PeakSearch(),
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
    frame = _Pixels.of(image, params, usable)
    ground = _background_map(frame, params)
    excess = detect.poisson_excess(params.threshold_sigma, params.gain)
    centres, response, truncated = _maxima(frame, ground, params, excess)
    if len(centres) == 0:
        return empty_table(truncated)
    spots = _candidates(frame, ground, params, excess, centres, response)
    if len(spots.centres) == 0:
        return empty_table(truncated)
    fits, overlapping = _fit(frame, ground, params, spots)
    return _table(spots, fits, overlapping, params, truncated)


def _maxima(
    frame: _Pixels, ground: BackgroundMap, params: PeakSearch, excess: float
) -> tuple[npt.NDArray[np.int32], FloatArray, bool]:
    rows, columns = frame.image.shape
    room = ((rows + 1) // 2) * ((columns + 1) // 2)
    positions, responses = np.empty((room, 2), np.int32), np.empty(room, np.float32)
    n = detect.find_maxima(
        frame.image, frame.usable, frame.masked, ground.lowest, detect.LARGEST,
        ground.level, ground.grid.height_px, ground.grid.width_px,
        ground.response_noise, params.threshold_sigma, excess, positions, responses,
    )  # fmt: skip
    positions, responses = positions[:n], responses[:n]
    if n > params.max_peaks:
        strongest = np.sort(np.argsort(-responses, kind="stable")[: params.max_peaks])
        positions, responses = positions[strongest], responses[strongest]
    return np.ascontiguousarray(positions), responses.astype(np.float64), n > params.max_peaks


def _windows(
    frame: _Pixels, lowest: float, centres: npt.NDArray[np.int32], half: int
) -> npt.NDArray[np.float32]:
    out = np.empty((len(centres), 2 * half + 1, 2 * half + 1), np.float32)
    detect.gather_windows(frame.image, frame.usable, frame.masked, lowest, detect.LARGEST, centres, out)
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
    frame: _Pixels,
    ground: BackgroundMap,
    params: PeakSearch,
    excess: float,
    centres: npt.NDArray[np.int32],
    response: FloatArray,
) -> _Spots:
    """Judge maxima by their surroundings, join plateaus, drop bumps on stronger spots."""
    windows = _windows(frame, ground.lowest, centres, _WINDOW_HALF)
    local = ground.at(centres[:, ::-1].astype(np.float64))
    core = windows[:, _WINDOW_HALF - 1 : _WINDOW_HALF + 2, _WINDOW_HALF - 1 : _WINDOW_HALF + 2]
    saturated = (core >= frame.saturation).any(axis=(1, 2))
    judged = np.empty((len(centres), 4))
    fit.inspect(windows, response, local, params.threshold_sigma, excess, params.spike_ratio, judged)
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
    spots = _Spots(centres, windows, judged[:, :3].copy(), judged[:, 2] / detect.KERNEL_NORM, plateau).take(
        np.flatnonzero(keep)
    )
    n = len(spots.centres)
    stays = np.ones(n, np.uint8)
    about = np.column_stack([spots.judged[:, :2], spots.pixel_noise])
    by_row = np.arange(n)  # maxima come in reading order
    detect.suppress(
        spots.windows,
        spots.centres,
        about,
        by_row,
        params.separation_px,
        params.prominence_sigma,
        params.gain,
        stays,
    )
    return spots.take(np.flatnonzero(stays))


def _fit(
    frame: _Pixels, ground: BackgroundMap, params: PeakSearch, spots: _Spots
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Fit all spots; those with neighbours once more with the neighbours taken off."""
    n = len(spots.centres)
    start = np.empty((n, 5))
    start[:, 0], start[:, 1] = spots.judged[:, 0], spots.pixel_noise
    start[:, 2], start[:, 3], start[:, 4] = spots.centres[:, 1], spots.centres[:, 0], 0
    flat = spots.plateau[:, 2] > 0
    start[flat, 2], start[flat, 3] = spots.plateau[flat, 1], spots.plateau[flat, 0]
    start[flat, 4] = np.minimum(np.ceil(spots.plateau[flat, 3]) + _PLATEAU_WINGS_PX, _WIDEST_WINDOW_HALF)
    first, neighbours = fit.neighbour_lists(spots.centres, 2 * _WINDOW_HALF)
    out = np.zeros((n, fit.FIT_COLUMNS))
    out[:, fit.X], out[:, fit.Y] = start[:, 2], start[:, 3]
    large = start[:, 4] > _WINDOW_HALF
    crowded = np.diff(first) > 0
    for chosen, subtract in ((np.ones(n, np.bool_), False), (crowded, True)):
        models = out.copy()
        for half, group in ((_WINDOW_HALF, chosen & ~large), (_WIDEST_WINDOW_HALF, chosen & large)):
            which = np.flatnonzero(group)
            if len(which) == 0:
                continue
            windows = spots.windows[which]
            if half > _WINDOW_HALF:
                windows = _windows(frame, ground.lowest, spots.centres[which], half)
            fit.fit_windows(
                windows, which, spots.centres, start, first, neighbours, models,
                min(frame.saturation, detect.LARGEST), params.gain, params.box_px, subtract, out,
            )  # fmt: skip
    return out, fit.windows_meet(out, first, neighbours, params.box_px)


def _table(
    spots: _Spots, fits: FloatArray, overlapping: npt.NDArray[np.bool_], params: PeakSearch, truncated: bool
) -> PeakTable:
    fitted = fits[:, fit.STATUS] == fit.FITTED
    a, b, c = fits[:, fit.QA], fits[:, fit.QB], fits[:, fit.QC]
    # Variances along the axes: inverse eigenvalues of [[a, b], [b, c]].
    mean, half_gap = 0.5 * (a + c), np.hypot(0.5 * (a - c), b)
    major, minor = 1.0 / np.maximum(mean - half_gap, 1e-6), 1.0 / (mean + half_gap)
    tilt = np.degrees(0.5 * np.arctan2(-2.0 * b, c - a))
    tilt = np.where(tilt <= -90.0, tilt + 180.0, tilt)
    area = 2.0 * np.pi * np.sqrt(major * minor)
    intensity = np.where(fitted, fits[:, fit.A] * area, fits[:, fit.SIGNAL])
    fwhm = _FWHM * np.sqrt(np.maximum(np.stack([major, minor], axis=1) - 1.0 / 12.0, 0.0))
    flags = np.zeros(len(fits), np.uint8)
    flags[spots.plateau[:, 2] > 0] |= SATURATED
    flags[~fitted] |= FIT_FAILED
    flags[overlapping] |= OVERLAP
    core = spots.windows[:, _WINDOW_HALF - 2 : _WINDOW_HALF + 3, _WINDOW_HALF - 2 : _WINDOW_HALF + 3]
    flags[np.isnan(core).any(axis=(1, 2))] |= EDGE
    table = PeakTable(
        xy_px=fits[:, [fit.X, fit.Y]],
        intensity=intensity,
        amplitude=fits[:, fit.A].copy(),
        background=fits[:, fit.B].copy(),
        fwhm_px=fwhm,
        tilt_deg=tilt,
        sigma_px=np.sqrt(0.5 * (fits[:, fit.VAR_X] + fits[:, fit.VAR_Y])),
        snr=spots.judged[:, 1] / spots.judged[:, 2],
        flags=flags,
        truncated=truncated,
    )
    shape = fitted & (fwhm[:, 1] < params.min_fwhm_px) & (spots.plateau[:, 2] == 0)
    good = (intensity > 0) & (table.amplitude > 0) & ~shape
    order = np.lexsort((table.xy_px[:, 0], table.xy_px[:, 1], -intensity))
    return table.take(order[good[order]])
