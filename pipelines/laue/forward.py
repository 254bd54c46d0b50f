"""Forward simulation: which spots a crystal gives, where, and how bright.

Kinematic theory for a small crystal in a white beam. With I(λ) photons per unit of wavelength
the reflection h diffracts I(λ) r_e² λ⁴ |F|² P / (2 V² sin²θ) photons per unit volume: the
integrated reflectivity of a rotating crystal, λ³ |F|² P / (V² sin 2θ), times dλ = λ cot θ dθ
(Zachariasen, Theory of X-ray Diffraction in Crystals, 1945, ch. III; Buras & Gerward, Acta
Cryst. A31, 372, 1975). With S(E) = I(λ) λ²/hc photons per unit of energy, sin θ = λ|g|/2, and
a detector that sums energy, the signal of order n is

    E_n S(E_n) |F(n hkl)|² P / (V² n² |g|²)        up to a constant.

P = 1 − u_y² for a beam polarised along y (a bending magnet, detector above the sample), with u
the diffracted beam. Absorption, extinction and the mirror's reflectivity are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.special import kv

from pipelines.laue.geometry import HC_KEV_A, Calibration, DetectorArea, beams_of
from pipelines.laue.reflections import ReflectionList

FloatArray = npt.NDArray[np.float64]
Spectrum = Callable[[FloatArray], FloatArray]
"""Photons per unit of energy, arbitrary scale, at energies in keV (any shape)."""

_WEAK_SHARE = 0.8
"""Of the spots that a peak search misses, the share that is taken from the weakest ones."""


def bending_magnet_spectrum(
    energy_keV: npt.ArrayLike, critical_keV: float = 20.0, filter_keV: float = 5.0
) -> FloatArray:
    """Return the on-axis spectrum of a bending magnet behind windows and air.

    Photons per unit relative bandwidth go as y² K_{2/3}(y/2)², y = E/Ec (Schwinger, Phys. Rev.
    75, 1912, 1949; H2 of the X-ray Data Booklet, sec. 2.1); divided by E they count per unit of
    energy. Windows and air transmit exp(−(E_filter/E)³), the photoelectric law.

    Parameters
    ----------
    energy_keV : array
    critical_keV : float
        Critical energy of the magnet; about 20 keV at the ESRF.
    filter_keV : float
        Energy at which windows and air transmit 1/e.

    Returns
    -------
    array of the same shape, largest possible value of order 1
    """
    energy = np.asarray(energy_keV, dtype=np.float64)
    y = energy / critical_keV
    return np.asarray(y * kv(2 / 3, y / 2) ** 2 * np.exp(-((filter_keV / energy) ** 3)))


@dataclass(frozen=True, eq=False)
class Spots:
    """The spots of one or several crystals on a detector; harmonics are one spot.

    Attributes
    ----------
    crystal : (n,) int32
        Which of the simulated UB; not decreasing.
    reflection : (n,) int32
        Row of the reflection list; increasing for each crystal.
    hkl : (n, 3) int16
        Lowest allowed order in the band.
    energy_keV : (n,) float64
        Its energy.
    xy_px : (n, 2) float64
        x (column), y (row) from 0.
    intensity : (n,) float64
        Sum over the orders in the band, arbitrary units (module docstring).
    n_orders : (n,) int32
        How many orders that are.
    """

    crystal: npt.NDArray[np.int32]
    reflection: npt.NDArray[np.int32]
    hkl: npt.NDArray[np.int16]
    energy_keV: FloatArray
    xy_px: FloatArray
    intensity: FloatArray
    n_orders: npt.NDArray[np.int32]

    def __len__(self) -> int:
        """Return the number of spots."""
        return len(self.crystal)


def simulate_spots(
    ub: npt.ArrayLike,
    reflections: ReflectionList,
    calibration: Calibration,
    area: DetectorArea,
    energy_keV: tuple[float, float] | None = None,
    spectrum: Spectrum = bending_magnet_spectrum,
) -> Spots:
    """Return the spots of crystals of one material.

    Parameters
    ----------
    ub : (3, 3) or (m, 3, 3) array, 1/angstrom
        q = ub @ hkl in the lab frame; strain included.
    reflections : ReflectionList
    calibration : Calibration
    area : DetectorArea
        Where a spot can be seen.
    energy_keV : (float, float), optional
        A band inside that of the list; the list's own by default.
    spectrum : callable
        Photons per unit of energy.

    Raises
    ------
    ValueError
        If the band reaches beyond that of the list.
    """
    low, high = reflections.energy_keV if energy_keV is None else energy_keV
    if not reflections.energy_keV[0] <= low < high <= reflections.energy_keV[1]:
        raise ValueError(f"band {low}-{high} keV is not inside the list's {reflections.energy_keV} keV")
    ubs = np.asarray(ub, dtype=np.float64).reshape(-1, 3, 3)
    q = np.einsum("mij,nj->mni", ubs, reflections.hkl.astype(np.float64))
    # Cheap tests first: a reflecting q lies upstream, and order 1 is not above the band.
    crystal, row = np.nonzero(-2 * q[..., 0] * high >= HC_KEV_A * np.einsum("mni,mni->mn", q, q))
    q = q[crystal, row]
    u, wavelength = beams_of(q)
    xy = calibration.pixels(u)
    seen = area.contains(xy)
    crystal, row, q, u, xy = crystal[seen], row[seen], q[seen], u[seen], xy[seen]

    order = np.arange(1, reflections.max_order + 1)
    energies = HC_KEV_A / wavelength[seen][:, None] * order
    f2 = reflections.f2[row]
    excited = (f2 > 0) & (energies >= low) & (energies <= high)
    lit = excited.any(axis=1)
    crystal, row, q, u, xy = crystal[lit], row[lit], q[lit], u[lit], xy[lit]
    energies, f2, excited = energies[lit], f2[lit], excited[lit]

    # S is evaluated inside the band only: it may be undefined elsewhere.
    flux = np.zeros_like(energies)
    flux[excited] = spectrum(energies[excited]) * energies[excited]
    g2 = np.einsum("ni,ni->n", q, q) * reflections.material.volume_A3**2
    intensity = np.sum(flux * f2 / order**2, axis=1) * (1 - u[:, 1] ** 2) / g2
    lowest = np.argmax(excited, axis=1)
    return Spots(
        crystal=crystal.astype(np.int32),
        reflection=row.astype(np.int32),
        hkl=(reflections.hkl[row] * (lowest + 1)[:, None]).astype(np.int16),
        energy_keV=np.take_along_axis(energies, lowest[:, None], axis=1)[:, 0],
        xy_px=xy,
        intensity=intensity,
        n_orders=np.count_nonzero(excited, axis=1).astype(np.int32),
    )


@dataclass(frozen=True, eq=False)
class Pattern:
    """A peak list as a peak search would hand it over, and the truth about it.

    Attributes
    ----------
    xy_px : (n, 2) float64
        Brightest first.
    intensity : (n,) float64
    crystal : (n,) int32
        Number of the crystal that made the peak, −1 for a spurious one.
    hkl : (n, 3) int16
        Lowest order in the band; 0 0 0 for a spurious peak.
    ubs : (m, 3, 3) float64
        The crystals.
    materials : tuple of str
        Name of each one's material.
    spots_expected : (m,) int32
        Spots of each crystal on the detector before some were lost.
    """

    xy_px: FloatArray
    intensity: FloatArray
    crystal: npt.NDArray[np.int32]
    hkl: npt.NDArray[np.int16]
    ubs: FloatArray = field(repr=False)
    materials: tuple[str, ...]
    spots_expected: npt.NDArray[np.int32]

    def __len__(self) -> int:
        """Return the number of peaks."""
        return len(self.xy_px)


def random_positions(n: int, area: DetectorArea, rng: np.random.Generator) -> FloatArray:
    """Return n positions (n, 2) in px from 0, uniform on the usable pixels."""
    usable = np.flatnonzero(area.usable)
    if n and not len(usable):
        raise ValueError("the detector has no usable pixel")
    row, column = np.divmod(rng.choice(usable, n), area.shape[1]) if n else (np.empty(0), np.empty(0))
    return np.stack([column, row], axis=1) + rng.uniform(-0.5, 0.5, (n, 2))


def simulate_pattern(
    reflections: Sequence[ReflectionList],
    ubs: npt.ArrayLike,
    calibration: Calibration,
    area: DetectorArea,
    rng: np.random.Generator,
    *,
    noise_px: float = 0.2,
    missing_fraction: float = 0.2,
    missing_from_weakest_fraction: float = 0.4,
    spurious_fraction: float = 0.1,
    volumes: npt.ArrayLike | None = None,
    energy_keV: tuple[float, float] | None = None,
    spectrum: Spectrum = bending_magnet_spectrum,
) -> Pattern:
    """Simulate the peak list of several crystals, of one or several materials.

    Parameters
    ----------
    reflections : sequence of m ReflectionList
        One for each crystal; the same object for crystals of one material.
    ubs : (m, 3, 3) array, 1/angstrom
    calibration, area
    rng : numpy.random.Generator
    noise_px : float
        Standard deviation of the position error in x and in y.
    missing_fraction : float
        Share of each crystal's spots that is lost.
    missing_from_weakest_fraction : float
        Four in five of the lost ones are among this share of the crystal's spots, the weakest;
        the others anywhere above.
    spurious_fraction : float
        Spurious peaks for each peak that is left: uniform on the area, intensities drawn from the
        pattern's own.
    volumes : (m,) array, optional
        Relative diffracting volumes; equal by default.
    energy_keV, spectrum
        As in `simulate_spots`.

    Raises
    ------
    ValueError
        If a fraction is not between 0 and 1 (spurious: below 0) or the numbers of crystals differ.
    """
    matrices = np.asarray(ubs, dtype=np.float64).reshape(-1, 3, 3)
    volume = np.ones(len(matrices)) if volumes is None else np.asarray(volumes, dtype=np.float64)
    if not len(reflections) == len(matrices) == len(volume):
        raise ValueError(f"{len(reflections)} reflection lists, {len(matrices)} UB, {len(volume)} volumes")
    if not (0 <= missing_fraction <= 1 and 0 <= missing_from_weakest_fraction <= 1):
        raise ValueError(
            f"missing fractions {missing_fraction}, {missing_from_weakest_fraction}: expected 0 to 1"
        )
    if spurious_fraction < 0 or noise_px < 0:
        raise ValueError(
            f"spurious_fraction {spurious_fraction} and noise_px {noise_px} must not be negative"
        )

    xy, intensity, label, hkl = [np.empty((0, 2))], [np.empty(0)], [np.empty(0, np.int32)], []
    hkl.append(np.empty((0, 3), np.int16))
    expected = np.zeros(len(matrices), dtype=np.int32)
    for i, (listed, matrix) in enumerate(zip(reflections, matrices, strict=True)):
        spots = simulate_spots(matrix, listed, calibration, area, energy_keV, spectrum)
        expected[i] = len(spots)
        kept = _survivors(spots.intensity, missing_fraction, missing_from_weakest_fraction, rng)
        xy.append(spots.xy_px[kept])
        intensity.append(spots.intensity[kept] * volume[i])
        label.append(np.full(len(kept), i, dtype=np.int32))
        hkl.append(spots.hkl[kept])
    true_intensity = np.concatenate(intensity)
    true_xy = np.concatenate(xy)
    true_xy = true_xy + rng.normal(0.0, noise_px, true_xy.shape)

    n_spurious = round(spurious_fraction * len(true_intensity))
    spurious_intensity = rng.choice(true_intensity, n_spurious) if n_spurious else np.empty(0)
    all_xy = np.concatenate([true_xy, random_positions(n_spurious, area, rng)])
    all_intensity = np.concatenate([true_intensity, spurious_intensity])
    all_label = np.concatenate([*label, np.full(n_spurious, -1, dtype=np.int32)])
    all_hkl = np.concatenate([*hkl, np.zeros((n_spurious, 3), dtype=np.int16)])
    # The tie-break is random: a spurious peak has the very intensity of a true one.
    sequence = np.lexsort((rng.random(len(all_intensity)), -all_intensity))
    return Pattern(
        xy_px=all_xy[sequence],
        intensity=all_intensity[sequence],
        crystal=all_label[sequence],
        hkl=all_hkl[sequence],
        ubs=matrices,
        materials=tuple(listed.material.name for listed in reflections),
        spots_expected=expected,
    )


def _survivors(
    intensity: FloatArray, missing: float, weakest: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Indices of the spots that are not lost, increasing."""
    n = len(intensity)
    by_strength = np.argsort(intensity, kind="stable")
    n_weak, n_lost = round(weakest * n), round(missing * n)
    from_weak = min(round(_WEAK_SHARE * n_lost), n_weak)
    from_strong = min(n_lost - from_weak, n - n_weak)
    from_weak = n_lost - from_strong  # whatever the strong ones cannot supply
    lost = np.concatenate(
        [
            rng.choice(by_strength[:n_weak], from_weak, replace=False),
            rng.choice(by_strength[n_weak:], from_strong, replace=False),
        ]
    )
    return np.setdiff1d(np.arange(n), lost)
