"""Background and noise of a frame, from tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from pipelines.frame import BadFrame
from pipelines.laue.peaks import rows
from pipelines.laue.peaks.parameters import PeakSearch

FloatArray = npt.NDArray[np.float64]


class Grid(NamedTuple):
    """Tiles of equal (fractional) size: their number and the size of one, px."""

    n_rows: int
    n_columns: int
    height_px: float
    width_px: float

    @classmethod
    def of(cls, shape: tuple[int, int], tile_px: int) -> Grid:
        """Divide a frame into tiles of about `tile_px`."""
        n_rows, n_columns = (max(1, round(n / tile_px)) for n in shape)
        return cls(n_rows, n_columns, shape[0] / n_rows, shape[1] / n_columns)

    def nodes(self, tiles: FloatArray, floor: float | None = None) -> npt.NDArray[np.float32]:
        """Return values at tile centres with one extrapolated node around, float32.

        Tiles that are NaN take the mean of their known neighbours, from near to far. The outer
        nodes continue the slope, because a constant would leave a residual along the border;
        `floor` bounds them from below.
        """
        values = _fill_unknown(tiles)
        for axis in (0, 1):
            v = np.moveaxis(values, axis, 0)
            second, last_but_one = v[min(1, len(v) - 1)], v[max(len(v) - 2, 0)]
            padded = np.concatenate([[2 * v[0] - second], v, [2 * v[-1] - last_but_one]])
            values = np.moveaxis(padded, 0, axis)
        if floor is not None:
            values = np.maximum(values, floor)
        return np.ascontiguousarray(values, dtype=np.float32)

    def at(self, nodes: npt.NDArray[np.float32], xy_px: FloatArray) -> FloatArray:
        """Return bilinearly interpolated node values at positions (n, 2), px from 0."""
        u = (xy_px[:, 1] + 0.5) / self.height_px + 0.5
        v = (xy_px[:, 0] + 0.5) / self.width_px + 0.5
        i = np.clip(u.astype(np.intp), 0, self.n_rows)
        j = np.clip(v.astype(np.intp), 0, self.n_columns)
        fu, fv = u - i, v - j
        top = nodes[i, j] * (1 - fv) + nodes[i, j + 1] * fv
        bottom = nodes[i + 1, j] * (1 - fv) + nodes[i + 1, j + 1] * fv
        return np.asarray(top * (1 - fu) + bottom * fu, dtype=np.float64)


def _neighbours(tiles: FloatArray) -> FloatArray:
    """Return the 3 x 3 neighbourhoods of tiles, (9, rows, columns), NaN outside."""
    padded = np.pad(tiles, 1, constant_values=np.nan)
    rows, columns = tiles.shape
    return np.stack([padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)])


def _fill_unknown(tiles: FloatArray) -> FloatArray:
    """Replace NaN by the mean of known neighbours, ring by ring."""
    values = tiles.copy()
    while np.isnan(values).any() and not np.isnan(values).all():
        around = _neighbours(values)
        known = ~np.isnan(around)
        count = known.sum(axis=0)
        mean = np.where(known, around, 0.0).sum(axis=0) / np.maximum(count, 1)
        fill = np.isnan(values) & (count > 0)
        values[fill] = mean[fill]
    return values


def smooth_noise(tiles: FloatArray) -> FloatArray:
    """Return the median of each tile's 3 x 3 neighbourhood; unknown tiles stay out of it."""
    around = np.sort(_neighbours(tiles), axis=0)  # NaN sorts last
    count = np.sum(~np.isnan(around), axis=0)
    low = np.take_along_axis(around, np.maximum((count - 1) // 2, 0)[None], axis=0)[0]
    high = np.take_along_axis(around, np.maximum(count // 2, 0).clip(max=8)[None], axis=0)[0]
    return np.where(count > 0, 0.5 * (low + high), np.nan)


@dataclass(frozen=True)
class Pixels:
    """A frame as the kernels want it."""

    image: npt.NDArray[Any]
    usable: npt.NDArray[np.uint8]
    masked: bool
    saturation: float
    finest: float

    @classmethod
    def of(cls, image: npt.NDArray[Any], params: PeakSearch, usable: npt.NDArray[np.uint8] | None) -> Self:
        """Bring a frame into native byte order and C order, without a copy where it is already.

        Raises
        ------
        BadFrame
            If it is not 2-D, smaller than 16 pixels, not of real numbers, or not of the mask's shape.
        """
        if image.ndim != 2 or min(image.shape) < 16:
            raise BadFrame(
                f"an image of shape {image.shape} cannot be searched: 2-D, 16 pixels or more a side"
            )
        kind, dtype = image.dtype.kind, image.dtype.newbyteorder("=")
        if kind not in "biuf":
            raise BadFrame(f"pixels of type {image.dtype} are no real numbers")
        saturation = float(np.iinfo(dtype).max) if kind in "iu" else math.inf
        if params.saturation is not None:
            saturation = params.saturation
        saturation = float(np.float32(saturation))  # as the kernels compare
        if dtype.name not in rows.PIXEL_TYPES:
            dtype = np.dtype(np.int32 if dtype.itemsize <= 2 and kind != "f" else np.float64)
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

    grid: Grid
    level: npt.NDArray[np.float32]
    response_noise: npt.NDArray[np.float32]
    pixel_noise: npt.NDArray[np.float32]
    lowest: float

    def at(self, xy_px: FloatArray) -> FloatArray:
        """Return level, response noise and pixel noise at positions (n, 2): (n, 3)."""
        nodes = (self.level, self.response_noise, self.pixel_noise)
        return np.stack([self.grid.at(n, xy_px) for n in nodes], axis=1)


def _tiles(
    frame: Pixels, grid: Grid, lowest: float, level: npt.NDArray[np.float32] | None = None
) -> FloatArray:
    """Return level and standard deviation of each tile, (2, rows, columns): of pixels, or of responses.

    Responses need the nodes of the background, `level`.
    """
    n_tiles = grid.n_rows * grid.n_columns
    per_row = int(grid.width_px) + 2
    capacity = (int(grid.height_px) // (4 if level is None else 16) + 2) * (
        per_row // 2 if level is None else per_row
    )
    samples = np.empty((n_tiles, capacity), np.float32)
    counts = np.zeros(2 + n_tiles, np.int64)
    counts[:2] = grid.n_rows, grid.n_columns
    if level is None:
        ceiling = min(frame.saturation, rows.LARGEST)
        rows.sample_tiles(frame.image, frame.usable, frame.masked, lowest, ceiling, samples, counts)
        # Clip no finer than the spread of small counts.
        finest = 2.6 * frame.finest
    else:
        rows.sample_responses(
            frame.image, frame.usable, frame.masked, lowest, rows.LARGEST,
            level, grid.height_px, grid.width_px, samples, counts,
        )  # fmt: skip
        finest = frame.finest * rows.KERNEL_NORM
    out = np.empty((n_tiles, 2))
    rows.tile_statistics(samples, counts[2:], finest, out)
    return np.ascontiguousarray(out.T).reshape(2, grid.n_rows, grid.n_columns)


def background_map(
    image: npt.NDArray[Any], params: PeakSearch, usable: npt.NDArray[np.uint8] | None = None
) -> BackgroundMap:
    """Return background and noise as the search sees them; arguments as in `find_peaks`."""
    return map_background(Pixels.of(image, params, usable), params)


def map_background(frame: Pixels, params: PeakSearch) -> BackgroundMap:
    """Return background and noise of a frame.

    Raises
    ------
    BadFrame
        If no pixel can be used, or all are zero.
    """
    shape = frame.image.shape
    grid = Grid.of((shape[0], shape[1]), params.tile_px)
    # Where the background stands clear of zero, a zero is a pixel without a reading: outside a
    # round detector, in a gap, dead.
    lowest = 0.0
    level, spread = _tiles(frame, grid, lowest)
    known = ~np.isnan(level)
    if not known.any() or np.median(level[known] / np.maximum(spread[known], 1e-30)) < 4.0:
        lowest = -rows.LARGEST
        level, spread = _tiles(frame, grid, lowest)
        known = ~np.isnan(level)
    if not known.any():
        raise BadFrame(
            f"no pixel can be used: all are saturated (>= {frame.saturation:g}), masked or not a number"
        )
    if not level[known].any() and not frame.image.any():
        raise BadFrame("all pixels are zero: shutter closed, or the detector gave no data")
    nodes = grid.nodes(level)
    spread = np.maximum(smooth_noise(spread), frame.finest)
    noise = smooth_noise(_tiles(frame, grid, lowest, nodes)[1])
    # Too few samples in a whole neighbourhood: as for white noise.
    noise = np.where(np.isnan(noise), spread * rows.KERNEL_NORM, noise)
    noise = np.maximum(noise, frame.finest * rows.KERNEL_NORM)
    if frame.image.dtype.kind in "iu":
        # Below one count a pixel most responses are alike, and clipping would take the rest away.
        photons = np.sqrt(params.gain * np.maximum(level, 0.0)) * rows.KERNEL_NORM
        noise = np.where(level < 1.0, np.maximum(noise, photons), noise)
    return BackgroundMap(
        grid,
        nodes,
        grid.nodes(noise, floor=0.5 * float(np.nanmin(noise))),
        grid.nodes(spread, floor=0.5 * float(np.nanmin(spread))),
        lowest,
    )
