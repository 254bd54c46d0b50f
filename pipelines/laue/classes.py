"""What a network can call a spot: families of directions, and class 0 for everything else.

A class is a coprime hkl family under the Laue group: Laue spots cannot tell harmonics or
equivalents apart. Extinction is judged on real orders, as in `pipelines.laue.reflections`.
Most families of a low-symmetry crystal are rarely bright enough to be seen; the classes are those
that are, and what is left (and every spurious peak) has class 0, so that a network can say so
instead of guessing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from pipelines import rotations
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.reflections import ReflectionList

IntArray = npt.NDArray[np.int32]

REJECT = 0
"""Class of spurious peaks and of spots whose family has no class of its own."""

_LARGEST_INDEX = 1000

_FEWEST_SPOTS = 5
"""Of a crystal, on average: with fewer, no spot has neighbours that name it."""

_BRIGHT = 0.6
"""Share of a crystal's spots, the brightest, that count double when classes are chosen."""


@dataclass(frozen=True, eq=False)
class ClassList:
    """The classes of one material.

    Attributes
    ----------
    hkl : (n, 3) int16
        One member of the family of class 1 ... n; class 0 is the reject class.
    share : (n,) float64
        Share of all spots on the detector that belong to each class.
    """

    hkl: npt.NDArray[np.int16] = field(repr=False)
    share: npt.NDArray[np.float64] = field(repr=False)

    def __len__(self) -> int:
        """Return the number of classes, the reject class included."""
        return len(self.hkl) + 1

    @property
    def coverage(self) -> float:
        """Share of the spots on the detector that have a class."""
        return float(self.share.sum())

    def of_reflections(self, reflections: ReflectionList) -> IntArray:
        """Return the class (m,) of every direction of a list of the same material.

        Raises
        ------
        ValueError
            If the list lacks a class: it is of another material, or of a narrower band.
        """
        row_of = {tuple(hkl): row for row, hkl in enumerate(reflections.hkl.tolist())}
        of_family = np.zeros(int(reflections.family.max()) + 1, dtype=np.int32)
        for number, hkl in enumerate(self.hkl.tolist(), start=1):
            row = row_of.get(tuple(hkl))
            if row is None:
                low, high = reflections.energy_keV
                raise ValueError(
                    f"class {number}, hkl {tuple(hkl)}, does not reflect in {reflections.material.name}"
                    f" between {low:g} and {high:g} keV: the classes are of another material or band"
                )
            of_family[reflections.family[row]] = number
        return np.asarray(of_family[reflections.family], dtype=np.int32)

    def save(self, path: Path | BinaryIO) -> None:
        """Write an .npz without pickles."""
        np.savez(path, hkl=self.hkl, share=self.share)

    @classmethod
    def load(cls, path: Path | BinaryIO) -> ClassList:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            If the file holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                if set(stored.files) != {"hkl", "share"}:
                    raise ValueError(f"expected the arrays hkl and share, found {sorted(stored.files)}")
                hkl, share = stored["hkl"], stored["share"]
        except (AttributeError, EOFError, BadZipFile, zlib.error) as error:
            raise ValueError(f"class list: is no .npz file of arrays: {error}") from error
        except ValueError as error:
            raise ValueError(f"class list: {error}") from error
        if hkl.ndim != 2 or hkl.shape[1] != 3 or len(hkl) == 0 or share.shape != (len(hkl),):
            raise ValueError(
                f"class list: hkl of shape {hkl.shape} and share of shape {share.shape} do not fit"
            )
        if hkl.dtype.kind not in "iu" or np.abs(hkl.astype(np.int64)).max() > _LARGEST_INDEX:
            raise ValueError(f"class list: hkl are no whole numbers up to {_LARGEST_INDEX}")
        if len(np.unique(hkl, axis=0)) < len(hkl) or not (np.gcd.reduce(hkl, axis=1) == 1).all():
            raise ValueError("class list: hkl are not all coprime and different")
        if share.dtype.kind != "f" or not ((share >= 0).all() and share.sum() <= 1 + 1e-6):
            raise ValueError("class list: shares are not between 0 and 1 together")
        return cls(hkl.astype(np.int16), share.astype(np.float64))


def choose_classes(
    reflections: ReflectionList,
    calibrations: Sequence[Calibration],
    rng: np.random.Generator,
    coverage: float,
    max_classes: int = 1200,
) -> ClassList:
    """Choose families until enough spots on the detector have a class.

    Parameters
    ----------
    reflections : ReflectionList
    calibrations : sequence of Calibration
        One random crystal is simulated on each; the range that the classes are meant for.
    rng : numpy.random.Generator
    coverage : float
        Share of the spots on the detector that are to have a class, 0 to 1.
    max_classes : int
        Most classes, the reject class included.

    Raises
    ------
    ValueError
        If hardly a spot reaches the detector, or `coverage` takes more than `max_classes`.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage {coverage}: expected between 0 and 1")
    n_families = int(reflections.family.max()) + 1
    seen, weight = np.zeros(n_families), np.zeros(n_families)
    turns = rotations.to_matrix(rotations.random_rotations(len(calibrations), rng))
    areas: dict[tuple[str, tuple[int, int], float], DetectorArea] = {}
    for calibration, turn in zip(calibrations, turns, strict=True):
        key = (calibration.label, calibration.shape, calibration.pixel_size_mm)
        area = areas.setdefault(key, DetectorArea.of(calibration))
        spots = simulate_spots(turn @ reflections.material.B0, reflections, calibration, area)
        family = reflections.family[spots.reflection]
        np.add.at(seen, family, 1.0)
        np.add.at(weight, family, 1.0)
        bright = np.argsort(-spots.intensity, kind="stable")[: round(_BRIGHT * len(spots))]
        np.add.at(weight, family[bright], 1.0)
    spots = seen.sum() / max(len(calibrations), 1)
    if spots < _FEWEST_SPOTS:
        low, high = reflections.energy_keV
        raise ValueError(
            f"{reflections.material.name} puts {spots:.2g} spots on the detector between {low:g} and {high:g}"
            f" keV, at least {_FEWEST_SPOTS} are needed to name one: check energy band and calibration"
        )
    share = seen / seen.sum()
    ranked = np.argsort(-weight, kind="stable")
    count = int(np.searchsorted(np.cumsum(share[ranked]), coverage)) + 1
    if count + 1 > max_classes:
        raise ValueError(
            f"{reflections.material.name}: {count + 1} classes are needed so that {100 * coverage:.0f} % of"
            f" the spots have one, more than {max_classes}: ask for less coverage"
        )
    chosen = np.sort(ranked[:count])  # in order of |g|, as families are numbered
    representatives, _ = reflections.families()
    return ClassList(reflections.hkl[representatives[chosen]], share[chosen])
