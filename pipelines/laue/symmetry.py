"""Operations of a space group on coordinates, and the cells that a group allows."""

from __future__ import annotations

from dataclasses import dataclass

import gemmi
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

SAME_SITE_A = 0.1
"""Images of an atom nearer than this are one atom on a special position (CIFs round 1/3 to 0.333)."""

METRIC_TOLERANCE = 4e-3
"""How far an operation may change the square of a length, relative, before cell and group contradict."""

_CELLS = {
    "monoclinic": "two angles of 90 deg, the third at the unique axis",
    "orthorhombic": "angles of 90 deg",
    "tetragonal": "a = b, angles of 90 deg",
    "trigonal": "a = b, angles of 90, 90, 120 deg",
    "hexagonal": "a = b, angles of 90, 90, 120 deg",
    "cubic": "a = b = c, angles of 90 deg",
}


@dataclass(frozen=True, eq=False)
class Operations:
    """The operations of a space group, centring included: x -> rotation @ x + translation.

    Attributes
    ----------
    rotation : (n, 3, 3) float64
    translation : (n, 3) float64
    """

    rotation: FloatArray
    translation: FloatArray

    @classmethod
    def of(cls, group: gemmi.SpaceGroup) -> Operations:
        """Return those of a group."""
        listed = list(group.operations())
        return cls(
            np.array([op.rot for op in listed], dtype=np.float64) / gemmi.Op.DEN,
            np.array([op.tran for op in listed], dtype=np.float64) / gemmi.Op.DEN,
        )

    def __len__(self) -> int:
        """Return their number."""
        return len(self.rotation)

    def images(self, xyz: npt.ArrayLike) -> FloatArray:
        """Return the images (n, 3) of a point."""
        return np.asarray(self.rotation @ np.asarray(xyz, dtype=np.float64) + self.translation)

    def fixing(self, xyz: npt.ArrayLike, basis: FloatArray) -> int:
        """Return how many operations leave a point where it is, within `SAME_SITE_A`."""
        return int(np.count_nonzero(lattice_distances_A(self.images(xyz), xyz, basis) < SAME_SITE_A))


def lattice_distances_A(points: FloatArray, to: npt.ArrayLike, basis: FloatArray) -> FloatArray:
    """Return distances (...) of points (..., 3), fractional, from the lattice copies of another one.

    Exact where they are below half of the smallest lattice spacing, and not too small elsewhere.

    Parameters
    ----------
    points : (..., 3) float64
    to : 3 numbers
    basis : (3, 3) float64
        Columns a, b, c in angstrom.
    """
    shift = points - np.asarray(to, dtype=np.float64)
    return np.asarray(np.linalg.norm((shift - np.rint(shift)) @ basis.T, axis=-1))


def metric_misfit(rotation: FloatArray, basis: FloatArray) -> float:
    """Return by how much operations (n, 3, 3) change squares of lengths at most, relative; 0 for none."""
    operators = basis @ rotation @ np.linalg.inv(basis)
    return float(np.abs(np.swapaxes(operators, 1, 2) @ operators - np.eye(3)).max())


def contradiction(group: gemmi.SpaceGroup, cell_A_deg: tuple[float, ...]) -> str:
    """Return what a cell that contradicts its group is told."""
    system = str(group.crystal_system_str())
    rule = "a = b = c, equal angles" if group.ext == "R" else _CELLS.get(system, "any cell")
    cell = ", ".join(f"{v:g}" for v in cell_A_deg)
    return f"cell ({cell}) contradicts space group {group.xhm()}, which is {system}: expected {rule}"
