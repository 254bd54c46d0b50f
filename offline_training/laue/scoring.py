"""What an indexer returned against the truth, and the time it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipelines import rotations
from pipelines.laue.crystal import Material
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.orientation import lattice_rotation

FloatArray = npt.NDArray[np.float64]

FOUND_WITHIN_DEG = 0.2


@dataclass(frozen=True)
class Score:
    """Crystals that were returned for one pattern, against the truth.

    Attributes
    ----------
    found, truths, returned : int
        Each true crystal counts once, however often it was returned.
    misorientation_deg : tuple of float
        Of each one found, against the truth it stands for.
    """

    found: int
    truths: int
    returned: int
    misorientation_deg: tuple[float, ...]

    @property
    def false(self) -> int:
        """Returned crystals that are no true one, repeats of a true one among them."""
        return self.returned - self.found


@dataclass
class Tally:
    """Times and scores of one indexer on one condition."""

    times_s: list[float] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    def add(self, indexer: Indexer, xy_px: FloatArray, truth: FloatArray) -> None:
        """Index a peak list and score what comes of it; `truth` holds UB (n, 3, 3)."""
        start = time.perf_counter()
        found = indexer.index(xy_px)
        self.times_s.append(time.perf_counter() - start)
        material = indexer.phases[0].material
        ubs = np.array([c.matrix @ material.B0 for c in found]).reshape(-1, 3, 3)
        self.scores.append(score(ubs, truth, material))

    @property
    def found(self) -> int:
        """True crystals that were found."""
        return sum(s.found for s in self.scores)

    @property
    def truths(self) -> int:
        """True crystals."""
        return sum(s.truths for s in self.scores)

    @property
    def false(self) -> int:
        """Crystals that were returned and are not there."""
        return sum(s.false for s in self.scores)


def score(returned_ubs: npt.ArrayLike, truth_ubs: npt.ArrayLike, material: Material) -> Score:
    """Compare returned UB (n, 3, 3) with true ones (m, 3, 3) of the same material, pairs nearest first."""
    returned, truth = (
        np.asarray(ubs, dtype=np.float64).reshape(-1, 3, 3) for ubs in (returned_ubs, truth_ubs)
    )
    angles = _misorientations_deg(returned, truth, material)
    close = np.argwhere(angles <= FOUND_WITHIN_DEG)
    found: dict[int, float] = {}
    used: set[int] = set()
    for i, j in sorted(close.tolist(), key=lambda pair: float(angles[pair[0], pair[1]])):
        if i not in used and j not in found:
            used.add(i)
            found[j] = float(angles[i, j])
    return Score(len(found), len(truth), len(returned), tuple(found.values()))


def _misorientations_deg(returned: FloatArray, truth: FloatArray, material: Material) -> FloatArray:
    """Smallest rotation angle between the lattices, (n, m)."""
    between = np.einsum(
        "nji,mjk->nmik", lattice_rotation(returned, material), lattice_rotation(truth, material)
    )
    turned = np.einsum("nmij,sjk->nmsik", between, material.lattice_rotations)
    return np.asarray(rotations.angle_deg(rotations.from_matrix(turned)).min(axis=-1))
