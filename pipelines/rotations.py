"""Rotations as unit quaternions (w, x, y, z), vectorised.

A quaternion q stands for the matrix R(q) with R(q) v = q v q* (Hamilton's product). An
orientation is the passive rotation of Bunge (1982), sample -> crystal: v_crystal = g v_sample
with g = Z(phi2) X(Phi) Z(phi1), and its quaternion is the one with R(q) = g. Crystal symmetry
then multiplies on the left: q and s q are the same crystal for every s of its point group.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_TIE = 1e-9
"""Two |w| closer than this are the same distance from the identity: on the zone's boundary."""


def multiply(p: npt.ArrayLike, q: npt.ArrayLike) -> FloatArray:
    """Return Hamilton's product p q, (..., 4); R(p q) = R(p) R(q). Leading axes broadcast."""
    a, b = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    w0, x0, y0, z0 = a[..., 0], a[..., 1], a[..., 2], a[..., 3]
    w1, x1, y1, z1 = b[..., 0], b[..., 1], b[..., 2], b[..., 3]
    return np.stack(
        [
            w0 * w1 - x0 * x1 - y0 * y1 - z0 * z1,
            w0 * x1 + x0 * w1 + y0 * z1 - z0 * y1,
            w0 * y1 - x0 * z1 + y0 * w1 + z0 * x1,
            w0 * z1 + x0 * y1 - y0 * x1 + z0 * w1,
        ],
        axis=-1,
    )


def conjugate(q: npt.ArrayLike) -> FloatArray:
    """Return q*, (..., 4): the inverse of a unit quaternion."""
    return np.asarray(np.asarray(q, dtype=np.float64) * [1.0, -1.0, -1.0, -1.0])


def rotate(q: npt.ArrayLike, v: npt.ArrayLike) -> FloatArray:
    """Return R(q) v, (..., 3), for vectors (..., 3). Leading axes broadcast."""
    return np.asarray(np.einsum("...ij,...j->...i", to_matrix(q), np.asarray(v, dtype=np.float64)))


def to_matrix(q: npt.ArrayLike) -> FloatArray:
    """Return R(q), (..., 3, 3), of unit quaternions (..., 4)."""
    a = np.asarray(q, dtype=np.float64)
    w, x, y, z = a[..., 0], a[..., 1], a[..., 2], a[..., 3]
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def from_matrix(matrix: npt.ArrayLike) -> FloatArray:
    """Return the unit quaternions (..., 4), w >= 0, of rotation matrices (..., 3, 3).

    Each of the four columns of q qᵀ follows from the matrix; the one with the largest diagonal
    element is normalised, so that no half turn loses digits (Shepperd, J. Guid. Control 1, 1978).
    """
    m = np.asarray(matrix, dtype=np.float64)
    a, b, c = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    wx, wy, wz = (
        m[..., 2, 1] - m[..., 1, 2],
        m[..., 0, 2] - m[..., 2, 0],
        m[..., 1, 0] - m[..., 0, 1],
    )
    xy, xz, yz = (
        m[..., 0, 1] + m[..., 1, 0],
        m[..., 0, 2] + m[..., 2, 0],
        m[..., 1, 2] + m[..., 2, 1],
    )
    outer = np.stack(  # 4 q qᵀ
        [
            np.stack([1 + a + b + c, wx, wy, wz], axis=-1),
            np.stack([wx, 1 + a - b - c, xy, xz], axis=-1),
            np.stack([wy, xy, 1 - a + b - c, yz], axis=-1),
            np.stack([wz, xz, yz, 1 - a - b + c], axis=-1),
        ],
        axis=-2,
    )
    best = np.argmax(np.diagonal(outer, axis1=-2, axis2=-1), axis=-1)
    q = np.take_along_axis(outer, best[..., None, None], axis=-2)[..., 0, :]
    return positive(q / np.linalg.norm(q, axis=-1, keepdims=True))


def positive(q: npt.ArrayLike) -> FloatArray:
    """Return q or −q, (..., 4), whichever has w > 0; where w = 0 the first other part is positive."""
    a = np.asarray(q, dtype=np.float64)
    signs = np.where(np.abs(a) > 1e-12, np.sign(a), 0.0)
    first = np.argmax(signs != 0, axis=-1)
    sign = np.take_along_axis(signs, first[..., None], axis=-1)
    flipped = a * np.where(sign < 0, -1.0, 1.0)
    flipped[..., 0] = np.abs(flipped[..., 0])  # a w within rounding of 0 must not come out negative
    return flipped


def from_euler_deg(euler_deg: npt.ArrayLike) -> FloatArray:
    """Return the quaternions (..., 4), w >= 0, of Bunge angles (phi1, Phi, phi2), (..., 3), degrees.

    g = Z(phi2) X(Phi) Z(phi1) with passive elementary rotations (Bunge, Texture Analysis in Materials
    Science, 1982, ch. 2).
    """
    half = np.radians(np.asarray(euler_deg, dtype=np.float64)) / 2
    total, difference, tilt = half[..., 0] + half[..., 2], half[..., 0] - half[..., 2], half[..., 1]
    q = [
        np.cos(tilt) * np.cos(total),
        -np.sin(tilt) * np.cos(difference),
        -np.sin(tilt) * np.sin(difference),
        -np.cos(tilt) * np.sin(total),
    ]
    return positive(np.stack(q, axis=-1))


def to_euler_deg(q: npt.ArrayLike) -> FloatArray:
    """Return Bunge angles (..., 3), degrees: phi1 and phi2 in [0, 360), Phi in [0, 180].

    Where Phi is 0 or 180 only one combination of phi1 and phi2 is defined; phi2 is 0 then.
    """
    a = np.asarray(q, dtype=np.float64)
    w, x, y, z = a[..., 0], a[..., 1], a[..., 2], a[..., 3]
    cosine, sine = np.hypot(w, z), np.hypot(x, y)
    total, difference = np.arctan2(-z, w), np.arctan2(-y, -x)
    flat, inverted = sine < 1e-12, cosine < 1e-12
    phi1 = np.where(flat, 2 * total, np.where(inverted, 2 * difference, total + difference))
    phi2 = np.where(flat | inverted, 0.0, total - difference)
    turns = np.degrees(np.stack([phi1, phi2], axis=-1)) % 360.0
    turns = np.where(turns >= 360.0, 0.0, turns)  # -1e-20 % 360 is 360
    return np.stack([turns[..., 0], np.degrees(2 * np.arctan2(sine, cosine)), turns[..., 1]], axis=-1)


def angle_deg(q: npt.ArrayLike) -> FloatArray:
    """Return the rotation angles (...), degrees in [0, 180], of unit quaternions (..., 4)."""
    a = np.asarray(q, dtype=np.float64)
    return np.asarray(np.degrees(2 * np.arctan2(np.linalg.norm(a[..., 1:], axis=-1), np.abs(a[..., 0]))))


def misorientation_deg(p: npt.ArrayLike, q: npt.ArrayLike, group: npt.ArrayLike) -> FloatArray:
    """Return the smallest angle between two orientations of crystals with the same symmetry.

    Parameters
    ----------
    p, q : (..., 4) arrays
        Orientations, sample -> crystal. Leading axes broadcast.
    group : (n, 4) array
        Proper rotations of the point group in the crystal frame.

    Returns
    -------
    (...) array
        min over s of the angle of s p q*, degrees. One operator is enough: the angle of s p q* s'
        is that of s' s p q*.
    """
    between = multiply(p, conjugate(q))
    return np.asarray(angle_deg(multiply(np.asarray(group), between[..., None, :])).min(axis=-1))


def to_fundamental_zone(q: npt.ArrayLike, group: npt.ArrayLike) -> FloatArray:
    """Return the equivalent nearest to the identity, w >= 0.

    Parameters
    ----------
    q : (..., 4) array
        Orientations, sample -> crystal.
    group : (n, 4) array
        Proper rotations of the point group in the crystal frame.

    Returns
    -------
    (..., 4) array
        On the zone's boundary, where several are equally near, the one with the largest x, then
        y, then z, so that equivalent orientations come out equal.
    """
    equivalents = positive(multiply(np.asarray(group), np.asarray(q, dtype=np.float64)[..., None, :]))
    candidate = equivalents[..., 0] >= equivalents[..., 0].max(axis=-1, keepdims=True) - _TIE
    for part in range(1, 4):
        value = np.where(candidate, equivalents[..., part], -np.inf)
        candidate &= value >= value.max(axis=-1, keepdims=True) - _TIE
    chosen = np.argmax(candidate, axis=-1)
    return np.take_along_axis(equivalents, chosen[..., None, None], axis=-2)[..., 0, :]


def nearest_equivalent(q: npt.ArrayLike, reference: npt.ArrayLike, group: npt.ArrayLike) -> FloatArray:
    """Return the s q or −s q, (..., 4), that lies nearest to `reference` (..., 4) on the sphere."""
    equivalents = multiply(np.asarray(group), np.asarray(q, dtype=np.float64)[..., None, :])
    cosine = np.einsum("...si,...i->...s", equivalents, np.asarray(reference, dtype=np.float64))
    best = np.argmax(np.abs(cosine), axis=-1)[..., None]
    sign = np.where(np.take_along_axis(cosine, best, axis=-1) < 0, -1.0, 1.0)
    return np.asarray(np.take_along_axis(equivalents, best[..., None], axis=-2)[..., 0, :] * sign)


def mean(q: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> FloatArray:
    """Return the mean rotation (4,), w >= 0, of quaternions (n, 4).

    The eigenvector of sum w q qᵀ with the largest eigenvalue (Markley et al., J. Guid. Control
    Dyn. 30, 1193, 2007); q and −q weigh alike. Bring crystals to one symmetry equivalent first
    (`nearest_equivalent`).
    """
    a = np.asarray(q, dtype=np.float64)
    w = np.ones(len(a)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(a) == 0 or w.shape != (len(a),) or not w.sum() > 0:
        raise ValueError(f"mean of {len(a)} quaternions with weights of shape {w.shape} is undefined")
    _, vectors = np.linalg.eigh((a * w[:, None]).T @ a)
    return positive(vectors[:, -1])


def random_rotations(n: int, rng: np.random.Generator) -> FloatArray:
    """Return n quaternions (n, 4), w >= 0, uniform on SO(3).

    Normal deviates have no direction in four dimensions (Marsaglia, Ann. Math. Stat. 43, 645, 1972).
    """
    q = rng.standard_normal((n, 4))
    return positive(q / np.linalg.norm(q, axis=1, keepdims=True))
