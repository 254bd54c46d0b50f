"""Every direction in which a crystal can reflect within an energy band, computed once.

A Laue spot belongs to a direction, not to a reflection: hkl, 2(hkl), 3(hkl) ... reflect into the
same place at once, twice, three times the energy. The list therefore holds coprime triples, and
beside each the orders that the structure allows. Extinction is judged on real orders: (1 0 0) of
an fcc metal is a direction because (2 0 0) reflects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipelines.laue.crystal import Material
from pipelines.laue.geometry import HC_KEV_A

FloatArray = npt.NDArray[np.float64]

MAX_ORDER = 63
"""Orders are bits of a 64-bit word; a direction of a very large cell has no visible one beyond."""

_MAX_REFLECTIONS = 4_000_000

_ROUNDING = 1e-12
"""|F|² of an absent reflection, relative, stays below this."""


@dataclass(frozen=True, eq=False)
class ReflectionList:
    """The directions of one material in one energy band, sorted by |g|, then h, k, l.

    Attributes
    ----------
    material : Material
    energy_keV : (float, float)
    max_two_theta_deg : float
    hkl : (n, 3) int16
        Coprime triples; hkl and −hkl are two directions.
    g : (n, 3) float64
        B0 @ hkl of the coprime triple, 1/angstrom without 2 pi, in the B0 frame.
    g_norm : (n,) float64
        |g|, not decreasing; bit-identical for directions of the same length.
    g_unit : (n, 3) float64, C order
    orders : (n,) uint64
        Bit k is set where order k (the reflection k·hkl) is allowed and can lie in the band.
        Bit 0 is never set.
    f2 : (n, max_order) float64
        |F(k·hkl)|² in column k − 1, electrons²; 0 where order k is not allowed.
    family : (n,) int32
        Number of the set of directions equivalent under the Laue group (Friedel mates together),
        in order of |g|.
    """

    material: Material
    energy_keV: tuple[float, float]
    max_two_theta_deg: float
    hkl: npt.NDArray[np.int16] = field(repr=False)
    g: FloatArray = field(repr=False)
    g_norm: FloatArray = field(repr=False)
    g_unit: FloatArray = field(repr=False)
    orders: npt.NDArray[np.uint64] = field(repr=False)
    f2: FloatArray = field(repr=False)
    family: npt.NDArray[np.int32] = field(repr=False)

    def __len__(self) -> int:
        """Return the number of directions."""
        return len(self.hkl)

    @property
    def max_order(self) -> int:
        """Highest order in the list."""
        return int(self.f2.shape[1])

    @cached_property
    def strength(self) -> FloatArray:
        """Relative visibility (n,), 0 to 1: the largest |F|² over the allowed orders.

        Says which directions reflect strongly at all; how bright a spot is in one pattern depends
        on its energy too (`pipelines.laue.forward`).
        """
        best = self.f2.max(axis=1)
        return np.asarray(best / best.max())

    @cached_property
    def lowest_order(self) -> npt.NDArray[np.int64]:
        """The lowest allowed order (n,)."""
        return np.asarray(np.argmax(self.f2 > 0, axis=1) + 1)

    def families(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return one member of each family and the family's size.

        Returns
        -------
        representatives : (m,) int array
            Index into the list of the member with the largest h, then k, then l.
        multiplicity : (m,) int array
        """
        # The list is sorted by |g| and then by h, k, l: the last member of a family is the largest.
        representatives = np.zeros(int(self.family.max()) + 1, dtype=np.int64)
        np.maximum.at(representatives, self.family, np.arange(len(self)))
        return representatives, np.bincount(self.family)


def build_reflections(
    material: Material,
    energy_keV: tuple[float, float] = (5.0, 22.0),
    max_two_theta_deg: float = 160.0,
    f2_threshold: float = 1e-4,
) -> ReflectionList:
    """List the directions that some orientation brings into the band below a scattering angle.

    Order n of a direction can be excited where n |g| <= 2 sin(theta_max) Emax / hc (Bragg).

    Parameters
    ----------
    material : Material
    energy_keV : (float, float)
        Lowest and highest energy of the beam.
    max_two_theta_deg : float
        Largest scattering angle that the detector sees; up to 180.
    f2_threshold : float
        An order is allowed when |F|² exceeds this fraction of what the same atoms would give if
        all scattered in phase at the same |g|, so that the fall-off of form factors and thermal
        motion extinguishes nothing. At 0 only what symmetry forbids is left out.

    Raises
    ------
    ValueError
        If the band or the angle is impossible, or nothing can reflect.
    """
    low, high = energy_keV
    if not (math.isfinite(high) and 0 < low < high):
        raise ValueError(f"energy band {energy_keV} keV: expected 0 < lowest < highest")
    if not 0 < max_two_theta_deg <= 180:
        raise ValueError(f"max_two_theta_deg = {max_two_theta_deg}: expected above 0, up to 180")
    if not 0 <= f2_threshold < 1:
        raise ValueError(f"f2_threshold = {f2_threshold}: expected 0 to 1")
    g_max = 2 * math.sin(math.radians(max_two_theta_deg / 2)) * high / HC_KEV_A
    expected = 4 / 3 * math.pi * g_max**3 * material.volume_A3
    if expected > _MAX_REFLECTIONS:
        raise ValueError(
            f"{material.name}: about {expected:.0f} reflections up to {high:g} keV are too many"
            f" (up to {_MAX_REFLECTIONS}); lower the highest energy"
        )

    real = _half_sphere(material, g_max)
    f2 = np.abs(material.structure_factors(real)) ** 2
    norm = np.linalg.norm(real @ material.B0.T, axis=1)
    order = np.gcd.reduce(real, axis=1)
    allowed = (f2 > max(f2_threshold, _ROUNDING) * material.largest_structure_factors(norm) ** 2) & (
        order <= MAX_ORDER
    )

    if not allowed.any():
        raise ValueError(
            f"{material.name} reflects nothing in {low:g}-{high:g} keV below {max_two_theta_deg:g} deg:"
            " check the energy band"
        )
    real, f2, order = real[allowed], f2[allowed], order[allowed]

    coprime = real // order[:, None]
    span = 2 * int(np.abs(coprime).max()) + 1
    _, first, row = np.unique(_code(coprime, span), return_index=True, return_inverse=True)
    half_hkl = coprime[first]
    half_f2 = np.zeros((len(half_hkl), int(order.max())))
    half_f2[row, order - 1] = f2

    hkl = np.concatenate([half_hkl, -half_hkl])
    both_f2 = np.concatenate([half_f2, half_f2])  # without dispersion Friedel's law is exact
    key = _family_code(material, hkl)
    _, representative, member = np.unique(key, return_index=True, return_inverse=True)
    # One value for all directions of the same length, so that rounding does not shuffle them.
    g_norm = np.linalg.norm(hkl[representative] @ material.B0.T, axis=1)[member]
    _, first, tie = np.unique(np.rint(g_norm * 1e10), return_index=True, return_inverse=True)
    g_norm = g_norm[first][tie]
    sequence = np.lexsort((hkl[:, 2], hkl[:, 1], hkl[:, 0], g_norm))
    hkl, both_f2, member = hkl[sequence], both_f2[sequence], member[sequence]
    _, first_seen = np.unique(member, return_index=True)
    number = np.empty(len(first_seen), dtype=np.int32)
    number[np.argsort(first_seen)] = np.arange(len(first_seen), dtype=np.int32)

    g = hkl @ material.B0.T
    bits = np.uint64(1) << np.arange(1, both_f2.shape[1] + 1, dtype=np.uint64)
    return ReflectionList(
        material=material,
        energy_keV=(float(low), float(high)),
        max_two_theta_deg=float(max_two_theta_deg),
        hkl=hkl.astype(np.int16),
        g=np.ascontiguousarray(g),
        g_norm=g_norm[sequence],
        g_unit=np.ascontiguousarray(g / np.linalg.norm(g, axis=1, keepdims=True)),
        orders=np.where(both_f2 > 0, bits, np.uint64(0)).sum(axis=1, dtype=np.uint64),
        f2=both_f2,
        family=number[member],
    )


def _half_sphere(material: Material, g_max: float) -> npt.NDArray[np.int64]:
    """All hkl with 0 < |g| <= g_max, one of each Friedel pair, (n, 3)."""
    # h = a·g, so |h| <= |a| g_max.
    limits = np.floor(np.linalg.norm(material.direct_basis, axis=0) * g_max + 1e-9).astype(np.int64)
    h, k, l_ = (np.arange(-limit, limit + 1) for limit in limits)
    grid = np.stack(np.meshgrid(h[h >= 0], k, l_, indexing="ij"), axis=-1).reshape(-1, 3)
    positive = (grid[:, 0] > 0) | (
        (grid[:, 0] == 0) & ((grid[:, 1] > 0) | ((grid[:, 1] == 0) & (grid[:, 2] > 0)))
    )
    grid = grid[positive]
    inside = np.linalg.norm(grid @ material.B0.T, axis=1) <= g_max * (1 + 1e-12)
    return np.asarray(grid[inside])


def _code(hkl: npt.NDArray[np.int64], span: int) -> npt.NDArray[np.int64]:
    """One integer for each triple with |index| < span / 2; larger h, k, l give larger codes."""
    return np.asarray((hkl[:, 0] * span + hkl[:, 1]) * span + hkl[:, 2])


def _family_code(material: Material, hkl: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The largest code among the equivalents of each triple under the Laue group."""
    span = 4 * int(np.abs(hkl).max()) + 1  # a hexagonal operator can double an index
    codes = [_code(hkl @ w, span) for w in material.hkl_operators]
    return np.asarray(np.max([np.abs(code) for code in codes], axis=0))  # −hkl has the code −code
