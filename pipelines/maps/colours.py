"""Inverse pole figure colours: which crystal direction lies along a direction of the sample.

The scheme. The mirror planes of a lattice's highest symmetry (m-3m, 6/mmm, 4/mmm, mmm) cut the
sphere into triangles. A direction is folded into one of them; with n_i the normal of the edge
opposite to corner c_i, its weights are w_i = (n_i . v)/(n_i . c_i): 1 at corner i, 0 on the edge
opposite. Red, green and blue are the weights, divided by the largest, to the power of one half:
corners are pure, edges saturated, the middle is white. This is the customary key of EBSD.

    cubic         001 red, 101 green, 111 blue
    hexagonal     0001 red, 2-1-10 (a) green, 10-10 blue; also for trigonal crystals
    tetragonal    001 red, 100 green, 110 blue
    others        e3 red, e1 green, e2 blue (e1 || a, e3 || c*)

A Laue group of lower symmetry than its lattice tells apart directions that share a triangle.
Those that the group takes into the triangle itself keep their colour; the others darken to black
in the middle where these pale to white (G. Nolze & R. Hielscher, J. Appl. Cryst. 49, 1786, 2016,
do the same for groups whose sector is not bounded by mirrors). As the edges are saturated in
both, the colours are continuous. So m-3, 6/m, -3m, 4/m and 2/m have one colour for each set of
equivalent directions. -3 and -1 have four triangles and two kinds of colour: three of the four
share the dark one. A Laue group contains the inversion, so no key tells a direction from its
opposite: for low symmetry a colour says which axis, in which half of the sphere remains open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from pipelines.rotations import rotate

FloatArray = npt.NDArray[np.float64]

DIRECTIONS = {"x": (1.0, 0.0, 0.0), "y": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0)}
"""Directions of the sample that a map is drawn along."""

_EDGE = 1e-9
_HALF = math.sqrt(0.5)
_THIRD = math.sqrt(1.0 / 3.0)
_CORNERS = {
    "m-3m": ((0.0, 0.0, 1.0), (_HALF, 0.0, _HALF), (_THIRD, _THIRD, _THIRD)),
    "6/mmm": ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (math.sqrt(0.75), 0.5, 0.0)),
    "4/mmm": ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (_HALF, _HALF, 0.0)),
    "mmm": ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
}
_LABELS = {
    "m-3m": ("001", "101", "111"),
    "6/mmm": ("0001", "2$\\bar{1}\\bar{1}$0", "10$\\bar{1}$0"),
    "4/mmm": ("001", "100", "110"),
    "mmm": ("c*", "a", "b"),
}


@dataclass(frozen=True, eq=False)
class ColourKey:
    """The colour key of one Laue group.

    Attributes
    ----------
    operators : (n, 4) array
        Proper rotations of the group, crystal frame e1 || a, e3 || c*.
    lattice : str
        Symmetry of the triangle: "m-3m", "6/mmm", "4/mmm" or "mmm".
    """

    operators: FloatArray
    lattice: str

    @classmethod
    def of(cls, operators: npt.ArrayLike) -> Self:
        """Return the key of a group given by its proper rotations (`Material.proper_point_group`).

        Raises
        ------
        ValueError
            If an axis of the group is not where the crystal frame has it.
        """
        q = np.asarray(operators, dtype=np.float64).reshape(-1, 4)
        angle = np.degrees(2 * np.arccos(np.clip(np.abs(q[:, 0]), 0.0, 1.0)))
        along_c = np.hypot(q[:, 1], q[:, 2]) < 1e-6
        threefold = np.isclose(angle, 120.0, atol=1e-3)
        fourfold = np.isclose(angle, 90.0, atol=1e-3)
        if (threefold & ~along_c).any():
            lattice = "m-3m"
        elif (threefold & along_c).any():
            lattice = "6/mmm"
        elif fourfold.any():
            lattice = "4/mmm"
        else:
            lattice = "mmm"
        key = cls(q, lattice)
        corners = key.corners
        # Each corner of a group must be a corner of its lattice, or the triangle is not its own.
        moved = key._fold(rotate(q[:, None, :], corners[None]).reshape(-1, 3))
        if not np.allclose(moved, np.tile(corners, (len(q), 1)), atol=1e-6):
            raise ValueError(f"the axes of this group of order {len(q)} are not those of a {lattice} lattice")
        return key

    @property
    def corners(self) -> FloatArray:
        """Unit vectors, (3, 3): the red, the green and the blue corner."""
        return np.array(_CORNERS[self.lattice])

    @property
    def labels(self) -> tuple[str, str, str]:
        """Names of the corners."""
        return _LABELS[self.lattice]

    @property
    def triangles(self) -> int:
        """How many triangles make up the sector of the group: 1 for the highest symmetry."""
        order = {"m-3m": 24, "6/mmm": 12, "4/mmm": 8, "mmm": 4}[self.lattice]
        return order // len(self.operators)

    def weights(self, directions: npt.ArrayLike) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """Fold directions into the triangle.

        Parameters
        ----------
        directions : (..., 3) array
            Unit vectors in the crystal frame.

        Returns
        -------
        weights : (..., 3) array
            0 to 1, of the red, green and blue corner.
        own : (...) bool array
            The group itself takes the direction into the triangle.
        """
        v = np.asarray(directions, dtype=np.float64)
        weights = self._fold(v) @ self._edges.T
        own = np.ones(v.shape[:-1], dtype=np.bool_)
        if self.triangles > 1:
            turned = rotate(self.operators, v[..., None, :]) @ self._edges.T
            inside = (turned >= -_EDGE).all(axis=-1) | (turned <= _EDGE).all(axis=-1)
            own = np.asarray(inside.any(axis=-1))
        return np.clip(weights, 0.0, 1.0), own

    def colours(self, directions: npt.ArrayLike) -> FloatArray:
        """Return the colours of crystal directions.

        Parameters
        ----------
        directions : (..., 3) array
            Unit vectors in the crystal frame.

        Returns
        -------
        (..., 3) array
            Red, green, blue, 0 to 1; NaN for NaN.
        """
        weights, own = self.weights(directions)
        rgb = np.sqrt(weights / weights.max(axis=-1, keepdims=True))
        return np.asarray(np.where(own[..., None], rgb, rgb - rgb.min(axis=-1, keepdims=True)))

    def orientation_colours(self, orientations: npt.ArrayLike, direction: str = "z") -> FloatArray:
        """Return the colours (..., 3) of orientations (..., 4), sample -> crystal, along x, y or z."""
        return self.colours(rotate(orientations, np.array(DIRECTIONS[direction])))

    @cached_property
    def _edges(self) -> FloatArray:
        """Rows n_i / (n_i . c_i): weights are rows times a direction."""
        return np.asarray(np.linalg.inv(self.corners.T))

    def _fold(self, v: FloatArray) -> FloatArray:
        """Return the equivalents of directions (..., 3) in the triangle, by all mirrors of the lattice."""
        a = np.abs(v)
        if self.lattice == "m-3m":
            low, middle, high = np.moveaxis(np.sort(a, axis=-1), -1, 0)
            return np.stack([middle, low, high], axis=-1)
        if self.lattice == "mmm":
            return a
        radius, azimuth = np.hypot(a[..., 0], a[..., 1]), np.arctan2(a[..., 1], a[..., 0])
        sector = math.pi / (6 if self.lattice == "6/mmm" else 4)
        azimuth = sector - np.abs(sector - azimuth % (2 * sector))
        return np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), a[..., 2]], axis=-1)
