"""The spots of a frame as the indexer looks at them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pipelines.laue.geometry import Calibration
from pipelines.laue.indexing.evidence import SpotDensity
from pipelines.laue.indexing.match import SpotGrid

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


class FrameSpots:
    """The spots of a frame, and what follows from them alone."""

    def __init__(self, xy: FloatArray, sigma: FloatArray | None, calibration: Calibration) -> None:
        self.xy = xy
        self.sigma = sigma
        self.q = np.ascontiguousarray(calibration.scattering_vectors(xy))
        self.shape = calibration.shape
        self.grid = SpotGrid.of(xy, calibration.shape)
        self.density = SpotDensity(xy, calibration.shape)


class View:
    """The spots that are not explained yet: their grid, and their numbers in the frame."""

    def __init__(self, frame: FrameSpots, explained: npt.NDArray[np.bool_]) -> None:
        self.grid, self.kept = frame.grid.without(explained)
        self._per_px2 = len(self.kept) / (frame.shape[0] * frame.shape[1])

    def density_rate(self, radius_px: float) -> float:
        """Mean chance that a position has a spot within the radius."""
        return -math.expm1(-math.pi * radius_px**2 * self._per_px2)

    def original(self, spot: IntArray) -> IntArray:
        """Translate numbers in this view to numbers in the frame; -1 stays."""
        return np.where(spot >= 0, self.kept[np.maximum(spot, 0)], -1).astype(np.int32)
