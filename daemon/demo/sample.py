"""A copper foil on a scanning stage: which grains the beam meets where, and what the detector shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from pipelines.laue.crystal import Material, load_material
from pipelines.laue.forward import Spots, simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.orientation import SAMPLE_FRAMES, lattice_rotation_of
from pipelines.laue.reflections import build_reflections
from pipelines.laue.render import Background, render_frame
from pipelines.maps.grid import ScanGrid
from pipelines.maps.polycrystal import voronoi
from pipelines.rotations import random_rotations

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

DETECTOR: Final = Calibration(70.0, 511.0, 540.0, 0.4, -0.3, 0.15, (1024, 1024), "simulated")
SAMPLE_FRAME: Final = "tilt40"
MATERIAL: Final = "Cu"
STEP_UM: Final = 2.0
#: Full width at half maximum of the beam on the sample, in steps of the scan.
BEAM_STEPS: Final = 0.8
#: Grid points to a grain, on average.
POINTS_A_GRAIN: Final = 16
#: Grains with a smaller part of the beam are not drawn.
LEAST_SHARE: Final = 0.02

_FINE: Final = 8  # pixels of the mosaic to a step
_AIR: Final = Background(10.0, bump=10.0, bump_fwhm_px=600.0)
_AIR_FIELDS: Final = 6
_STRONG: Final = 3e5  # counts in a spot that is stronger than 98 of 100, of a grain that fills the beam
_SPOT_FWHM_PX: Final = 2.0


@dataclass(frozen=True, eq=False)
class Sample:
    """The truth about a scan.

    Attributes
    ----------
    grid : ScanGrid
    shares : (nx, ny, n) float64
        Which part of the beam falls on which grain, at each grid point.
    orientations : (n, 4) float64
        Of the grains, sample -> crystal.
    """

    grid: ScanGrid
    shares: FloatArray
    orientations: FloatArray

    @classmethod
    def make(cls, shape: tuple[int, int], seed: int) -> Self:
        """Return the sample that belongs to a seed."""
        rng = np.random.default_rng(seed)
        n = max(2, round(shape[0] * shape[1] / POINTS_A_GRAIN))
        mosaic = voronoi((shape[0] * _FINE, shape[1] * _FINE), n, rng)
        grid = ScanGrid(shape, (STEP_UM, STEP_UM), snake=True)
        return cls(grid, _shares(mosaic, shape, n), random_rotations(n, rng))

    @property
    def labels(self) -> IntArray:
        """The grain that has most of the beam, (nx, ny)."""
        return np.asarray(np.argmax(self.shares, axis=2))

    @property
    def n_grains(self) -> int:
        """How many grains have most of the beam at some grid point."""
        return len(np.unique(self.labels))

    @property
    def positions_um(self) -> list[tuple[float, float]]:
        """Where the stage is for each frame."""
        at = self.grid.positions_um(self.grid.indices(np.arange(self.grid.size)))
        return [(float(x), float(y)) for x, y in at]

    @cached_property
    def material(self) -> Material:
        """What the foil is made of."""
        return load_material(MATERIAL)

    def frames(self, seed: int) -> Iterator[npt.NDArray[np.uint16]]:
        """Render the frames of the scan one after the other, (rows, columns) uint16.

        The counts of a frame are those of the air and those of the spots: two Poisson numbers,
        whose sum is a Poisson number of the summed expectation. So the air's, which are the
        costly ones, are drawn for a few fields only, and these moved about.
        """
        rng = np.random.default_rng(seed)
        nothing = np.empty((0, 2))
        air = [
            render_frame(DETECTOR.shape, nothing, np.empty(0), nothing, rng, background=_AIR, dtype=np.uint32)
            for _ in range(_AIR_FIELDS)
        ]
        spots = self._spots()
        strong = float(np.quantile(np.concatenate([s.intensity for s in spots]), 0.98))
        for number in range(self.grid.size):
            shares = self.shares[self.grid.index(number)]
            seen = np.flatnonzero(shares >= LEAST_SHARE)
            xy = np.concatenate([spots[g].xy_px for g in seen])
            counts = np.concatenate([spots[g].intensity * shares[g] for g in seen]) * (_STRONG / strong)
            width = np.full((len(xy), 2), _SPOT_FWHM_PX)
            lit = render_frame(DETECTOR.shape, xy, counts, width, rng, background=None, dtype=np.uint32)
            # The air's bump is wide: moved by a few pixels it is the same.
            field = np.roll(air[rng.integers(_AIR_FIELDS)], rng.integers(-40, 41, 2), axis=(0, 1))
            yield np.minimum(lit + field, 65535).astype(np.uint16)

    def _spots(self) -> list[Spots]:
        listed = build_reflections(self.material)
        area = DetectorArea.rectangle(DETECTOR.shape)
        to_lab = [
            lattice_rotation_of(q, self.material, SAMPLE_FRAMES[SAMPLE_FRAME]) for q in self.orientations
        ]
        return [simulate_spots(turn @ self.material.B0, listed, DETECTOR, area) for turn in to_lab]


def _shares(mosaic: IntArray, shape: tuple[int, int], n: int) -> FloatArray:
    """Weigh the grains under a Gaussian beam at each grid point, (nx, ny, n); they sum to 1."""
    sigma = BEAM_STEPS / np.sqrt(8 * np.log(2)) * _FINE
    x, y = (np.arange(m * _FINE) for m in shape)
    shares = np.empty((*shape, n))
    for i, j in np.ndindex(shape):
        ex, ey = (np.exp(-0.5 * ((a - (k + 0.5) * _FINE + 0.5) / sigma) ** 2) for a, k in ((x, i), (y, j)))
        shares[i, j] = np.bincount(mosaic.ravel(), np.outer(ex, ey).ravel(), n)
    return np.asarray(shares / shares.sum(axis=2, keepdims=True))
