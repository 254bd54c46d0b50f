"""Find the crystal of a frame while the detector's position is known only roughly.

A wrong detector distorts the pattern: 1 mm, 10 px and 0.5 deg change angles between scattering vectors
by some tenths of a degree, and computed spots come out up to 20 px beside the measured ones. So the
votes of angles get a wide tolerance, candidates are ranked by what they match within a wide radius, and
each of the best is led to the spots by refining detector and orientation together at a falling radius.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from pipelines.laue.calibration_fit import CORE_MEDIANS, Geometry, Prior, gauss_newton
from pipelines.laue.geometry import Calibration
from pipelines.laue.indexing.evidence import SpotDensity, log_binomial_tail, log_trials
from pipelines.laue.indexing.match import Scene, SpotGrid, predict, score
from pipelines.laue.indexing.parameters import Phase
from pipelines.laue.indexing.refine import decompose, depth_shift
from pipelines.laue.indexing.vote import candidates

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_SCORE_RADIUS_PX = 14.0
_CANDIDATES_OF_A_SEED = 12
_FALLING_PX = (30.0, 30.0, 20.0, 14.0, 9.0, 6.0, 4.0, 2.5, 1.5, 1.5)
_JUDGED_AT_PX = 1.5
_FEWEST = 6
_CALIBRATION_CELLS = 5.0 * math.log(30.0)
"""ln of how many distinct detectors a search can choose from: about 30 steps of the match radius in each
of five parameters."""


@dataclass(frozen=True, eq=False)
class Matches:
    """Computed spots with a measured one near.

    Attributes
    ----------
    reflection : (k,) int
        Rows of the reflection list.
    order : (k,) int
        Lowest order in the band.
    energy_keV : (k,) float64
        Its energy.
    spot : (k,) int
        Measured spot of each, none twice.
    distance_px : (k,) float64
    computed_px : (m, 2) float64
        All the spots that the crystal can put on the detector.
    """

    reflection: IntArray
    order: IntArray
    energy_keV: FloatArray
    spot: IntArray
    distance_px: FloatArray
    computed_px: FloatArray

    def __len__(self) -> int:
        return len(self.spot)

    def take(self, keep: npt.NDArray[np.bool_]) -> Matches:
        """Return some of the pairs."""
        return Matches(
            self.reflection[keep],
            self.order[keep],
            self.energy_keV[keep],
            self.spot[keep],
            self.distance_px[keep],
            self.computed_px,
        )

    def core(self) -> Matches:
        """Return the pairs without those that lie too far out, see `CORE_MEDIANS`."""
        if len(self) == 0:
            return self
        return self.take(self.distance_px <= CORE_MEDIANS * float(np.median(self.distance_px)) + 1e-6)


class Sky:
    """The measured spots of a frame and the reflections that may have made them.

    Parameters
    ----------
    phase : Phase
        Made with any calibration of this detector.
    xy_px : (n, 2)
        The brightest first.
    """

    def __init__(self, phase: Phase, xy_px: FloatArray) -> None:
        self.phase = phase
        self.xy = np.ascontiguousarray(xy_px)
        self.shape = phase.scene.calibration.shape
        self._tree = cKDTree(self.xy)
        self._density = SpotDensity(self.xy, self.shape)

    def g(self, matches: Matches) -> FloatArray:
        """Return B0 hkl of each match, (k, 3)."""
        return self.phase.scene.reflections.g[matches.reflection]

    def match(self, geometry: Geometry, radius_px: float) -> Matches:
        """Pair computed and measured spots that are each other's nearest, within a radius."""
        scene = self._scene(geometry.calibration)
        computed = predict(scene, geometry.rotation)
        xy = computed.xy_px
        if geometry.depth_mm:
            c = geometry.calibration
            shift = depth_shift(xy, computed.energy_keV, c.projection, c.dd_mm)
            xy = xy + geometry.depth_mm * shift
        distance, spot = self._tree.query(xy, distance_upper_bound=radius_px)
        found = np.flatnonzero(np.isfinite(distance))
        # Of the computed spots that want the same measured one the nearest gets it.
        found = found[np.argsort(distance[found], kind="stable")]
        _, first = np.unique(spot[found], return_index=True)
        kept = np.sort(found[first])
        return Matches(
            computed.index[kept].astype(np.int64),
            computed.order[kept].astype(np.int64),
            computed.energy_keV[kept],
            spot[kept].astype(np.int64),
            distance[kept],
            xy,
        )

    def log_false(self, geometry: Geometry, matches: Matches, radius_px: float) -> float:
        """Return ln of the expected number of chance crystals as good, over all detectors searched."""
        expected = len(matches.computed_px)
        if expected == 0:
            return math.inf
        chance = float(self._density.chance(matches.computed_px, radius_px).mean())
        c = geometry.calibration
        radius_rad = 0.5 * radius_px * c.pixel_size_mm / c.dd_mm
        trials = log_trials(radius_rad, len(matches), self.phase.symmetry_order)
        return log_binomial_tail(len(matches), expected, chance) + trials + _CALIBRATION_CELLS

    def follow(
        self, start: Geometry, prior: Prior | None, radii_px: Iterable[float] = _FALLING_PX
    ) -> Geometry | None:
        """Lead a rough geometry to the spots: match, fit, and again at a smaller radius."""
        geometry = start
        for radius in radii_px:
            matches = self.match(geometry, radius)
            if len(matches) < _FEWEST:
                return None
            # Wrong pairs fill the radius, right ones its centre.
            core = radius / 3.0
            weight = 1.0 / (1.0 + np.square(matches.distance_px / core))
            fitted = gauss_newton(
                geometry,
                self.g(matches),
                self.xy[matches.spot],
                weight=weight,
                prior=prior,
                noise_px=core,
                iterations=2,
            )
            if fitted is None:
                return None
            geometry = fitted
        return geometry

    def proposals(
        self, calibration: Calibration, seeds: Sequence[int], voters: int, tolerance_deg: float, keep: int
    ) -> list[tuple[float, Geometry]]:
        """Return the orientations that a wrong detector still lets shine through, best first.

        Returns
        -------
        list of (quality, Geometry)
            Matches beyond those of chance, in their standard deviations.
        """
        q = np.ascontiguousarray(calibration.scattering_vectors(self.xy))
        partners = np.arange(min(voters, len(self.xy)), dtype=np.int32)
        found = [
            candidates(self.phase.angles, q, seed, partners, tolerance_deg, _CANDIDATES_OF_A_SEED)[0]
            for seed in seeds
        ]
        matrices = np.concatenate(found) if found else np.empty((0, 3, 3))
        if len(matrices) == 0:
            return []
        scene = self._scene(calibration)
        grid = SpotGrid.of(self.xy, self.shape)
        matched, expected = score(scene, grid, matrices, _SCORE_RADIUS_PX, self.phase.n_search)
        rate = -math.expm1(-math.pi * _SCORE_RADIUS_PX**2 * len(self.xy) / (self.shape[0] * self.shape[1]))
        by_chance = rate * expected
        quality = (matched - by_chance) / np.sqrt(by_chance * (1.0 - rate) + 1.0)
        order = np.argsort(-quality, kind="stable")[:keep]
        return [(float(quality[i]), Geometry(calibration, decompose(matrices[i])[0])) for i in order]

    def _scene(self, calibration: Calibration) -> Scene:
        own = self.phase.scene
        return Scene(own.reflections, calibration, own.area, own.energy_keV)
