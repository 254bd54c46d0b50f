"""Scan grids: which grid point a frame belongs to, from its number or from its position.

A grid index is (ix, iy[, iz]) and x is fastest. With `snake` every second line, counted through
all planes, runs backwards in x; y and z always step forwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class NotAGrid(ValueError):
    """Positions that do not lie on a regular grid; the message says on which axis and by how much."""


@dataclass(frozen=True)
class ScanGrid:
    """A regular grid that the frames of a series walk over.

    Attributes
    ----------
    shape : tuple of int
        (nx[, ny[, nz]]).
    step_um : tuple of float
        Distance between grid points along each axis, um; empty when unknown.
    snake : bool
        Every second line runs backwards.
    first_frame : int
        Number of the frame at grid index (0, 0[, 0]).
    origin_um : tuple of float
        Position of grid index (0, 0[, 0]), um; empty when unknown.
    """

    shape: tuple[int, ...]
    step_um: tuple[float, ...] = ()
    snake: bool = False
    first_frame: int = 0
    origin_um: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise ValueError(f"scan shape {self.shape}: expected 1 to 3 positive whole numbers")
        for name, values in (("step_um", self.step_um), ("origin_um", self.origin_um)):
            if values and len(values) != len(self.shape):
                raise ValueError(
                    f"scan {name} {values}: expected {len(self.shape)} numbers, one for each axis"
                )

    @property
    def size(self) -> int:
        """Number of grid points."""
        return math.prod(self.shape)

    def index(self, frame: int) -> tuple[int, ...]:
        """Return the grid index of one frame; see `indices`."""
        return tuple(int(i) for i in self.indices(np.array([frame]))[0])

    def frame(self, index: tuple[int, ...]) -> int:
        """Return the number of the frame at one grid index; see `frames`."""
        return int(self.frames(np.array([index]))[0])

    def indices(self, frames: npt.ArrayLike) -> IntArray:
        """Return the grid indices of frame numbers.

        Parameters
        ----------
        frames : (n,) int array

        Returns
        -------
        (n, d) int array

        Raises
        ------
        ValueError
            If a number lies outside the scan.
        """
        n = np.asarray(frames, dtype=np.int64) - self.first_frame
        outside = (n < 0) | (n >= self.size)
        if outside.any():
            bad = int(np.asarray(frames)[outside][0])
            last = self.first_frame + self.size - 1
            raise ValueError(
                f"frame {bad} lies outside the scan of {self._words()} points "
                f"(frames {self.first_frame} to {last})"
            )
        out = np.stack(np.unravel_index(n, self.shape, order="F"), axis=-1).astype(np.int64)
        if self.snake:
            back = (n // self.shape[0]) % 2 == 1
            out[back, 0] = self.shape[0] - 1 - out[back, 0]
        return out

    def frames(self, indices: npt.ArrayLike) -> IntArray:
        """Return the frame numbers of grid indices (n, d): inverse of `indices`.

        Raises
        ------
        ValueError
            If an index lies outside the grid.
        """
        index = np.array(indices, dtype=np.int64)
        if index.ndim != 2 or index.shape[1] != len(self.shape):
            raise ValueError(f"grid indices of shape {index.shape}: expected (n, {len(self.shape)})")
        outside = ((index < 0) | (index >= np.array(self.shape))).any(axis=1)
        if outside.any():
            bad = tuple(int(i) for i in index[outside][0])
            raise ValueError(f"grid index {bad} lies outside the scan of {self._words()} points")
        if self.snake:
            line = np.zeros(len(index), dtype=np.int64)
            if len(self.shape) > 1:
                line = np.ravel_multi_index(tuple(index.T[1:]), self.shape[1:], order="F").astype(np.int64)
            back = line % 2 == 1
            index[back, 0] = self.shape[0] - 1 - index[back, 0]
        flat = np.ravel_multi_index(tuple(index.T), self.shape, order="F")
        return np.asarray(flat + self.first_frame, dtype=np.int64)

    def positions_um(self, indices: npt.ArrayLike) -> FloatArray:
        """Return the positions of grid indices (n, d), um.

        Raises
        ------
        ValueError
            If the step is unknown.
        """
        if not self.step_um:
            raise ValueError("positions need the step of the scan: set step_um")
        origin = np.array(self.origin_um or (0.0,) * len(self.shape))
        return np.asarray(origin + np.asarray(indices, dtype=np.float64) * np.array(self.step_um))

    def nearest(self, positions_um: npt.ArrayLike, tolerance: float = 0.25) -> IntArray:
        """Return the grid indices of positions.

        Parameters
        ----------
        positions_um : (n, d) array
        tolerance : float
            Largest accepted distance from a grid point along each axis, in steps.

        Returns
        -------
        (n, d) int array

        Raises
        ------
        NotAGrid
            If a position lies between grid points or outside the grid.
        ValueError
            If step or origin are unknown.
        """
        if not self.step_um or not self.origin_um:
            raise ValueError("grid indices of positions need step_um and origin_um of the scan")
        xyz = np.asarray(positions_um, dtype=np.float64)
        steps = (xyz - np.array(self.origin_um)) / np.array(self.step_um)
        if not np.isfinite(steps).all():
            raise NotAGrid("a position is not a number")
        index: IntArray = np.rint(steps).astype(np.int64)
        bad = (np.abs(steps - index) > tolerance) | (index < 0) | (index >= np.array(self.shape))
        if bad.any():
            row, axis = (int(i) for i in np.argwhere(bad)[0])
            raise NotAGrid(
                f"position {_tuple(xyz[row])} um is no point of the grid: axis {'xyz'[axis]} is at "
                f"{steps[row, axis]:.2f} steps of {self.step_um[axis]:g} um, 0 to {self.shape[axis] - 1}"
            )
        return index

    def _words(self) -> str:
        return " x ".join(str(n) for n in self.shape)


def infer_grid(positions_um: npt.ArrayLike, tolerance: float = 0.25) -> tuple[ScanGrid, IntArray]:
    """Find the regular grid that positions lie on.

    Each axis is sorted and cut into levels at the gaps. Of the cuts that give equidistant
    levels, the finest whose levels are at least half occupied wins, so that jitter is not taken
    for a step and missing lines do not widen it. An axis stands still when the longer axes tell
    all positions apart without it and it moves by less than half of the smallest conceivable
    step of the longest axis.

    Parameters
    ----------
    positions_um : (n, d) array, d = 1 to 3
        In any order, with holes and jitter.
    tolerance : float
        Largest accepted jitter, in steps.

    Returns
    -------
    grid : ScanGrid
        Its origin is the corner with the smallest coordinates; the step of an axis that stands still is 0.
    indices : (n, d) int array

    Raises
    ------
    NotAGrid
        If an axis is not equidistant, or two positions fall on the same grid point.
    """
    xyz = np.asarray(positions_um, dtype=np.float64)
    if xyz.ndim != 2 or not 1 <= xyz.shape[1] <= 3 or len(xyz) == 0:
        raise NotAGrid(f"positions of shape {xyz.shape}: expected (n, 1), (n, 2) or (n, 3), n > 0")
    if not np.isfinite(xyz).all():
        raise NotAGrid("a position is not a number")
    extent = np.ptp(xyz, axis=0)
    still = 0.5 * float(extent.max()) / max(len(xyz) - 1, 1)
    origin, step = xyz.mean(axis=0), np.zeros(xyz.shape[1])
    indices = np.zeros(xyz.shape, dtype=np.int64)
    for axis in np.argsort(-extent, kind="stable"):
        apart = len(np.unique(indices, axis=0)) == len(xyz)
        if extent[axis] == 0 or (apart and extent[axis] <= still):
            continue
        found = _equidistant(xyz[:, axis], tolerance)
        if found is None:
            raise NotAGrid(
                f"axis {'xyz'[axis]}: {len(xyz)} positions from {xyz[:, axis].min():g} to "
                f"{xyz[:, axis].max():g} um are not equidistant within {tolerance:g} steps"
            )
        origin[axis], step[axis], indices[:, axis] = found
    unique, counts = np.unique(indices, axis=0, return_counts=True)
    if counts.max() > 1:
        twice = _tuple(unique[int(counts.argmax())])
        raise NotAGrid(f"{counts.max()} positions fall on the same grid point {twice}")
    shape = tuple(int(n) + 1 for n in indices.max(axis=0))
    return ScanGrid(shape, _tuple(step), origin_um=_tuple(origin)), indices


def _equidistant(values: FloatArray, tolerance: float) -> tuple[float, float, IntArray] | None:
    """Return (origin, step, index (n,)) of values on equidistant levels, or None."""
    order = np.sort(values)
    gaps = np.diff(order)
    sizes = np.unique(gaps[gaps > 1e-9 * float(order[-1] - order[0])])
    # A cut lies where the sorted gaps jump; the finest cut separates all distinct values.
    jumps = np.flatnonzero(sizes[1:] > 1.5 * sizes[:-1])
    for cut in [0.5 * sizes[0], *np.sqrt(sizes[jumps] * sizes[jumps + 1])]:
        starts = np.concatenate([[0], np.flatnonzero(gaps > cut) + 1])
        counts = np.diff(np.concatenate([starts, [len(order)]]))
        levels = np.add.reduceat(order, starts) / counts
        between = np.diff(levels)
        if len(between) == 0:
            continue
        # One step by those that are about as long as the shortest, which jitter may have made short.
        unit = float(np.median(between[between < 1.5 * between.min()]))
        ordinal = np.concatenate([[0.0], np.cumsum(np.rint(between / unit))])
        if len(ordinal) < 0.5 * (ordinal[-1] + 1):
            continue
        step, origin = np.polyfit(ordinal, levels, 1) if len(ordinal) > 2 else (between[0], levels[0])
        index = np.rint((values - origin) / step)
        index -= index.min()
        origin = float(np.mean(values - step * index))
        if np.abs(values - origin - step * index).max() <= tolerance * step:
            return origin, float(step), index.astype(np.int64)
    return None


def _tuple(row: npt.NDArray[np.number]) -> tuple[float, ...]:
    return tuple(row.tolist())
