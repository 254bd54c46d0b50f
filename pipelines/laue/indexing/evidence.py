"""The probability that chance alone puts a crystal this good into a frame.

The measured spots are taken as scattered at random with their local density, so that a computed
spot finds a neighbour within r with probability p = 1 − exp(−π r² ρ). A given orientation then
matches k of n with a binomial tail; the number of different orientations (and strains) that a
search can choose from multiplies it. No peer reports such a number: LaueTools and LaueNN show the
match rate, whose chance level runs from 0.3 % to 70 % with material, grains and tolerance.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel

FloatArray = npt.NDArray[np.float64]

_TILE_PX = 256.0


class SpotDensity:
    """Local density of measured spots, per px², on tiles smoothed over their neighbours."""

    def __init__(self, xy_px: FloatArray, detector_shape: tuple[int, int]) -> None:
        ny, nx = (max(1, round(n / _TILE_PX)) for n in detector_shape)
        self._scale = (nx / detector_shape[1], ny / detector_shape[0])
        self._limit = (nx - 1, ny - 1)
        counts = np.zeros((ny + 2, nx + 2))
        ix, iy = self._tile(xy_px)
        np.add.at(counts, (iy + 1, ix + 1), 1.0)
        area = np.zeros_like(counts)
        area[1:-1, 1:-1] = detector_shape[0] * detector_shape[1] / (nx * ny)
        overall = len(xy_px) / (detector_shape[0] * detector_shape[1])
        # Half the weight to the frame as a whole keeps an empty neighbourhood from meaning "impossible".
        near, near_area = (
            sum(a[1 + dy : ny + 1 + dy, 1 + dx : nx + 1 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1))
            for a in (counts, area)
        )
        self._density = np.maximum(near / near_area, 0.5 * overall)

    def _tile(self, xy_px: FloatArray) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        ix = np.clip((xy_px[:, 0] * self._scale[0]).astype(np.intp), 0, self._limit[0])
        iy = np.clip((xy_px[:, 1] * self._scale[1]).astype(np.intp), 0, self._limit[1])
        return ix, iy

    def chance(self, xy_px: FloatArray, radius_px: float) -> FloatArray:
        """Return the probability that a spot lies within `radius_px` of each position by chance."""
        ix, iy = self._tile(xy_px)
        return np.asarray(-np.expm1(-math.pi * radius_px**2 * self._density[iy, ix]))


@kernel("float64(int64, int64, float64)")
def log_binomial_tail(k: int, n: int, p: float) -> float:
    """Return ln P(X >= k) of a binomial variable, exact in the far tail.

    Parameters
    ----------
    k, n : int
        0 <= k <= n.
    p : float
        Probability of one success. A sum of unequal probabilities with the same mean has a
        thinner tail (Hoeffding 1956), so the mean may be given for them.
    """
    if k <= 0:
        return 0.0
    if p <= 0.0:
        return -np.inf
    if p >= 1.0:
        return 0.0
    log_term = (
        math.lgamma(n + 1.0)
        - math.lgamma(k + 1.0)
        - math.lgamma(n - k + 1.0)
        + k * math.log(p)
        + (n - k) * math.log1p(-p)
    )
    ratio = p / (1.0 - p)
    term = 1.0
    total = 1.0
    for i in range(k, n):
        term *= ratio * (n - i) / (i + 1.0)
        total += term
        if term < 1e-17 * total and i > n * p:
            break
    return min(0.0, log_term + math.log(total))


def log_trials(radius_rad: float, matched: int, symmetry_order: int, max_strain: float = 0.0) -> float:
    """Return ln of how many different crystals a search can choose from.

    Parameters
    ----------
    radius_rad : float
        Match radius as an angle on q.
    matched : int
        Spots matched: the crystal that matches k spots can be moved until one of them leaves, so a
        search sees of the order of k more crystals per dimension than cells of the radius.
    symmetry_order : int
        Proper rotations of the Laue group.
    max_strain : float
        Largest strain component that is searched; 0 for orientations only.

    Notes
    -----
    The volume of SO(3) is 8 pi² in the measure of small rotation vectors.
    """
    k = max(matched, 1)
    trials = math.log(8.0 * math.pi**2 / symmetry_order) + 3.0 * math.log(k / (2.0 * radius_rad))
    if max_strain > 0.0:
        trials += 5.0 * max(0.0, math.log(k * max_strain / radius_rad))
    return trials


def false_probability(log_expected: float) -> float:
    """Return 1 − exp(−E): the probability of at least one chance crystal, with ln E given."""
    if log_expected > 5.0:
        return 1.0
    return -math.expm1(-math.exp(log_expected))
