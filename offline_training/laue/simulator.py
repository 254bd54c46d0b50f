"""Peak lists with known classes, made as fast as a network learns from them.

The physics is that of `pipelines.laue.forward` (spectrum, structure factors, harmonics summed);
the loops over crystals and reflections are one kernel with a random generator of its own, so
that pattern number i of a seed is the same on every machine and in every order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offline_training.laue.domain import GeometryRange, PatternRange
from pipelines import rotations
from pipelines.kernels import kernel
from pipelines.laue.classes import ClassList
from pipelines.laue.features import FeatureMaker, Features
from pipelines.laue.forward import bending_magnet_spectrum
from pipelines.laue.geometry import HC_KEV_A, Calibration, DetectorArea
from pipelines.laue.indexing.match import land
from pipelines.laue.reflections import ReflectionList

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

_SPECTRUM_POINTS = 2048
_CAPACITY = 40_000
_TO_UNIT = 1.0 / 9007199254740992.0  # 2⁻⁵³


@dataclass(frozen=True, eq=False)
class LabelledSpots:
    """A peak list with its truth, the brightest first.

    Attributes
    ----------
    q : (n, 3) float64
        Unit scattering vectors as they would be computed from the measured positions.
    xy_px : (n, 2) float64
    intensity : (n,) float64
    crystal : (n,) int32
        −1 for a spurious peak.
    reflection : (n,) int32
        Row of the reflection list; −1 for a spurious peak.
    label : (n,) int32
        Class; 0 for spurious peaks and for spots without a class.
    """

    q: FloatArray
    xy_px: FloatArray
    intensity: FloatArray
    crystal: IntArray
    reflection: IntArray
    label: IntArray


class PatternSimulator:
    """Draws patterns of one material over ranges of geometry and conditions."""

    def __init__(
        self,
        reflections: ReflectionList,
        classes: ClassList,
        nominal: Calibration,
        geometry: GeometryRange | None = None,
        patterns: PatternRange | None = None,
        seed: int = 0,
        orientations: FloatArray | None = None,
    ) -> None:
        """Prepare the tables.

        Parameters
        ----------
        reflections, classes, nominal, geometry, patterns, seed
        orientations : (n, 3, 3) array, optional
            The only rotations that crystals have; by default every crystal has one of its own.
        """
        self.orientations = orientations
        self.reflections = reflections
        self.nominal = nominal
        self.geometry = geometry or GeometryRange()
        self.patterns = patterns or PatternRange()
        self.seed = seed
        self._labels = classes.of_reflections(reflections)
        self._usable = DetectorArea.of(nominal).usable
        low, high = reflections.energy_keV
        energies = np.linspace(low, high, _SPECTRUM_POINTS)
        flux = energies * bending_magnet_spectrum(energies) / reflections.material.volume_A3**2
        self._spectrum = np.ascontiguousarray(flux)
        self._g = np.ascontiguousarray(reflections.g)
        self._f2 = np.ascontiguousarray(reflections.f2)
        # Written by every pattern: one simulator serves one thread.
        self._xy = np.empty((_CAPACITY, 2))
        self._intensity = np.empty(_CAPACITY)
        self._crystal = np.empty(_CAPACITY, dtype=np.int32)
        self._reflection = np.empty(_CAPACITY, dtype=np.int32)

    def pattern(self, number: int) -> LabelledSpots:
        """Return pattern `number` of this seed."""
        rng = np.random.default_rng((self.seed, number))
        p = self.patterns
        calibration = self.geometry.draw(self.nominal, rng)
        m = int(rng.integers(p.crystals[0], p.crystals[1] + 1))
        if self.orientations is None:
            turns = rotations.to_matrix(rotations.random_rotations(m, rng))
        else:
            pool = len(self.orientations)
            turns = self.orientations[rng.choice(pool, m, replace=m > pool)]
        strain = rng.normal(0.0, 1.0, (m, 3, 3)) * (p.strain * rng.uniform(0.0, 1.0, (m, 1, 1)))
        strain = 0.5 * (strain + strain.transpose(0, 2, 1))
        matrices = np.ascontiguousarray(turns @ (np.eye(3) - strain))
        volumes = np.exp(rng.normal(0.0, p.log_volume, m)) if p.log_volume else np.ones(m)
        xy, intensity = self._xy, self._intensity
        crystal, reflection = self._crystal, self._reflection
        low, high = self.reflections.energy_keV
        n = _simulate(
            int(rng.integers(0, 1 << 62)),
            matrices,
            volumes,
            self._g,
            self._f2,
            self._spectrum,
            low,
            high,
            calibration.projection,
            self._usable,
            rng.uniform(*p.noise_px),
            rng.uniform(*p.missing),
            rng.uniform(*p.spurious),
            xy,
            intensity,
            crystal,
            reflection,
        )
        order = np.argsort(-intensity[:n], kind="stable")
        row = reflection[order]
        return LabelledSpots(
            q=np.ascontiguousarray(calibration.scattering_vectors(xy[order])),
            xy_px=xy[order],
            intensity=intensity[order],
            crystal=crystal[order],
            reflection=row,
            label=np.where(row >= 0, self._labels[np.maximum(row, 0)], 0).astype(np.int32),
        )

    def batch(
        self, first: int, count: int, maker: FeatureMaker, spots_each: int = 0
    ) -> tuple[Features, IntArray]:
        """Return the features and classes of spots of patterns `first` ... `first + count − 1`.

        Parameters
        ----------
        spots_each : int
            Spots taken from each pattern at random; 0 for all.
        """
        made, chosen = [], []
        for number in range(first, first + count):
            pattern = self.pattern(number)
            n = len(pattern.label)
            if n < 2:
                continue
            spots = np.arange(n, dtype=np.int32)
            if spots_each and n > spots_each:
                spots = np.random.default_rng((self.seed, number, 1)).choice(spots, spots_each, replace=False)
            made.append(pattern)
            chosen.append(spots)
        total = sum(len(spots) for spots in chosen)
        features = np.zeros((total, maker.spec.width), dtype=np.float32)
        labels = np.empty(total, dtype=np.int32)
        at = 0
        for pattern, spots in zip(made, chosen, strict=True):
            end = at + len(spots)
            maker.fill(pattern.q, spots, features[at:end])
            labels[at:end] = pattern.label[spots]
            at = end
        return features, labels


@kernel("float64(uint64[::1])", inline=True)
def _uniform(state: npt.NDArray[np.uint64]) -> float:
    # splitmix64 (Steele, Lea, Flood, OOPSLA 2014), the upper 53 bits.
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) * _TO_UNIT


@kernel(
    "int64(int64, float64[:, :, ::1], float64[::1], float64[:, ::1], float64[:, ::1], float64[::1], float64,"
    " float64, float64[:, ::1], uint8[:, ::1], float64, float64, float64, float64[:, ::1], float64[::1],"
    " int32[::1], int32[::1])"
)
def _simulate(
    seed: int,
    matrices: FloatArray,
    volumes: FloatArray,
    g: FloatArray,
    f2: FloatArray,
    spectrum: FloatArray,
    low: float,
    high: float,
    projection: FloatArray,
    usable: npt.NDArray[np.uint8],
    noise_px: float,
    missing: float,
    spurious: float,
    xy: FloatArray,
    intensity: FloatArray,
    crystal: IntArray,
    reflection: IntArray,
) -> int:
    # Fills the outputs, unsorted; returns the number of peaks.
    state = np.empty(1, dtype=np.uint64)
    state[0] = np.uint64(seed)
    rows, columns = usable.shape
    capacity = intensity.shape[0]
    n_orders = f2.shape[1]
    per_keV = (spectrum.shape[0] - 1) / (high - low)
    n = 0
    for c in range(matrices.shape[0]):
        m = matrices[c]
        first = n
        for r in range(g.shape[0]):
            qx = m[0, 0] * g[r, 0] + m[0, 1] * g[r, 1] + m[0, 2] * g[r, 2]
            if qx >= 0.0:
                continue
            qy = m[1, 0] * g[r, 0] + m[1, 1] * g[r, 1] + m[1, 2] * g[r, 2]
            qz = m[2, 0] * g[r, 0] + m[2, 1] * g[r, 1] + m[2, 2] * g[r, 2]
            q2 = qx * qx + qy * qy + qz * qz
            energy = -0.5 * HC_KEV_A * q2 / qx
            if energy > high:
                continue
            wavelength = -2.0 * qx / q2
            ux, uy, uz = 1.0 + wavelength * qx, wavelength * qy, wavelength * qz
            seen, px, py = land(ux, uy, uz, projection, usable)
            if not seen:
                continue
            total = 0.0
            for order in range(int(np.ceil(low / energy)), min(int(high / energy), n_orders) + 1):
                if f2[r, order - 1] > 0.0:
                    place = min(max((order * energy - low) * per_keV, 0.0), spectrum.shape[0] - 1.001)
                    at = int(place)
                    flux = spectrum[at] + (place - at) * (spectrum[at + 1] - spectrum[at])
                    total += flux * f2[r, order - 1] / (order * order)
            if total <= 0.0 or n == capacity:
                continue
            xy[n, 0] = px
            xy[n, 1] = py
            intensity[n] = volumes[c] * total * (1.0 - uy * uy) / q2
            crystal[n] = c
            reflection[n] = r
            n += 1
        # The peak search misses spots, four in five of them among the weakest 40 %.
        if n > first and missing > 0.0:
            limit = np.sort(intensity[first:n])[min(int(0.4 * (n - first)), n - first - 1)]
            kept = first
            for s in range(first, n):
                chance = min(1.0, missing * 2.0) if intensity[s] < limit else missing / 3.0
                if _uniform(state) >= chance:
                    xy[kept] = xy[s]
                    intensity[kept] = intensity[s]
                    crystal[kept] = c
                    reflection[kept] = reflection[s]
                    kept += 1
            n = kept
    real = n
    for s in range(real):
        # Box and Muller, Ann. Math. Stat. 29, 610 (1958).
        radius = noise_px * np.sqrt(-2.0 * np.log(1.0 - _uniform(state)))
        angle = 2.0 * np.pi * _uniform(state)
        xy[s, 0] += radius * np.cos(angle)
        xy[s, 1] += radius * np.sin(angle)
    wanted = min(int(spurious * real + 0.5), capacity - real)
    for _ in range(64 * wanted):
        if n == real + wanted:
            break
        px = _uniform(state) * columns - 0.5
        py = _uniform(state) * rows - 0.5
        if usable[min(int(py + 0.5), rows - 1), min(int(px + 0.5), columns - 1)] == 0:
            continue
        xy[n, 0] = px
        xy[n, 1] = py
        intensity[n] = intensity[int(_uniform(state) * real)] * (1.0 + 1e-9 * _uniform(state))
        crystal[n] = -1
        reflection[n] = -1
        n += 1
    return n
