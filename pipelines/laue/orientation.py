"""From UB to the orientation that is published.

UB is active, crystal to lab, beside LaueTools' B0 frame; an orientation is Bunge's passive
rotation from the sample to the crystal frame e1 || a, e3 || c*.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from pipelines import rotations
from pipelines.laue.crystal import Material

FloatArray = npt.NDArray[np.float64]


def _about_y(angle_deg: float) -> FloatArray:
    """Active rotation about y, (3, 3)."""
    c, s = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


SAMPLE_FRAMES: Mapping[str, FloatArray] = MappingProxyType({"lab": np.eye(3), "tilt40": _about_y(-40.0).T})
"""Named `sample_rotation`s R, v_sample = R @ v_lab.

"lab" is the lab frame. "tilt40" is the frame of a sample whose surface is inclined by 40 deg to
the beam: its axes are the lab axes turned by −40 deg about y, so that the surface normal z leans
against the beam, (−sin 40, 0, cos 40) in the lab, as LaueTools has it.
"""


def lattice_rotation(ub: npt.ArrayLike, material: Material) -> FloatArray:
    """Return U, the rotation in UB, (..., 3, 3): lab <- B0 frame.

    UB B0⁻¹ = U S with S symmetric (polar decomposition): of all rotations U is the nearest, so
    that a strained crystal has a rotation at all.

    Raises
    ------
    ValueError
        If UB is singular, not finite or left-handed.
    """
    deformed = np.asarray(ub, dtype=np.float64) @ np.linalg.inv(material.B0)
    if not np.all(np.isfinite(deformed)) or not np.all(np.linalg.det(deformed) > 1e-6):
        raise ValueError(
            f"UB of {material.name} is singular, left-handed or not finite (UB B0⁻¹ = {deformed.tolist()})"
        )
    left, _, right = np.linalg.svd(deformed)
    return np.asarray(left @ right)


def orientation_of(
    ub: npt.ArrayLike, material: Material, sample_rotation: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Return the orientation of crystals from their UB.

    Parameters
    ----------
    ub : (..., 3, 3) array, 1/angstrom
        q = UB @ hkl in the lab frame.
    material : Material
    sample_rotation : (3, 3) array
        R with v_sample = R @ v_lab, see `SAMPLE_FRAMES`.

    Returns
    -------
    quaternion : (..., 4) array
        Bunge passive, sample -> crystal (e1 || a, e3 || c*), w >= 0, in the fundamental zone of
        the proper point group of the Laue class.
    U : (..., 3, 3) array
        The rotation in UB, B0 frame -> lab, of the crystal as it was indexed.
    """
    u = lattice_rotation(ub, material)
    passive = material.crystal_frame @ np.swapaxes(u, -1, -2) @ _checked_rotation(sample_rotation).T
    return rotations.to_fundamental_zone(rotations.from_matrix(passive), material.proper_point_group), u


def lattice_rotation_of(
    quaternion: npt.ArrayLike, material: Material, sample_rotation: npt.ArrayLike
) -> FloatArray:
    """Return U, (..., 3, 3), B0 frame -> lab, of orientations (..., 4): inverse of `orientation_of`.

    U @ B0 is the UB of the unstrained crystal, one of the equivalents.
    """
    active = np.swapaxes(rotations.to_matrix(quaternion), -1, -2)
    return np.asarray(_checked_rotation(sample_rotation).T @ active @ material.crystal_frame)


def _checked_rotation(matrix: npt.ArrayLike) -> FloatArray:
    r = np.asarray(matrix, dtype=np.float64)
    if r.shape != (3, 3) or not np.allclose(r @ r.T, np.eye(3), atol=1e-6) or np.linalg.det(r) < 0:
        raise ValueError(f"sample rotation is not a rotation matrix: {r.tolist()}")
    return r
