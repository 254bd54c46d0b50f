"""Least squares of detector position and crystal orientation together, on pixel residuals.

Model: an unstrained crystal scatters along q = R g (g = B0 hkl), the beam leaves along
u = ki − 2 (q̂·ki) q̂ and hits (X, Y, 1) ~ P u, P the projection of `geometry`. Unknown are dd, xcen,
ycen, xbet, xgam and a small lab-frame rotation of R; a ninth parameter is the depth of `indexing.refine`.
Two of the three detector tilts are parameters; turning crystal and detector about the beam together
changes nothing, so the third is no unknown (LaueTools' convention sets it to zero).

The lattice is what makes this possible: it fixes all angles between the q. With a strained or wrongly
named crystal the same fit gives a wrong calibration, not a failure, hence the limit on residuals in
`calibration`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import fdtrc

from pipelines.laue.geometry import Calibration
from pipelines.laue.indexing.refine import STRAIN_BASIS, depth_shift

FloatArray = npt.NDArray[np.float64]

NAMES = ("dd_mm", "xcen_px", "ycen_px", "xbet_deg", "xgam_deg")
"""The parameters of a calibration, in the order of all vectors and matrices here."""

PARAMETERS = 8
"""Calibration (5) and rotation (3, radians, lab frame)."""

WITH_DEPTH = 9
"""The same and the depth at 15 keV, mm."""

CORE_MEDIANS = 3.0
"""Spots farther from their computed positions than this many medians are left out of a fit: one in 512 of
normal errors; overlapping and deformed spots lie beyond."""

CORE_VARIANCE = 1.0 - CORE_MEDIANS**2 * np.log(2.0) / (2.0**CORE_MEDIANS**2 - 1.0)
"""What the cut leaves of the variance of normal errors: distances follow Rayleigh's law, whose share beyond
m medians is 2^(−m²)."""

_RAD_PER_DEG = np.pi / 180.0
_LEAST_DIAGONAL = 1e-9  # of the normal matrix scaled to ones: below it a combination is undetermined


@dataclass(frozen=True, eq=False)
class Geometry:
    """What is refined: detector, R (3, 3) from the frame of B0 to the lab, depth at 15 keV."""

    calibration: Calibration
    rotation: FloatArray
    depth_mm: float = 0.0


@dataclass(frozen=True, eq=False)
class Prior:
    """What is believed before looking: a start (dd, xcen, ycen, xbet, xgam) and standard deviations, (5,).

    Keeps the first steps of a search sane, where few or wrong spots leave combinations undetermined;
    the last fit goes without it.
    """

    mean: FloatArray
    sigma: FloatArray

    @classmethod
    def about(cls, calibration: Calibration, sigma: npt.ArrayLike) -> Prior:
        """Centre it on a calibration."""
        return cls(vector_of(calibration), np.asarray(sigma, dtype=np.float64))


def vector_of(calibration: Calibration) -> FloatArray:
    """Return (dd_mm, xcen_px, ycen_px, xbet_deg, xgam_deg), px from 0."""
    return np.array([getattr(calibration, name) for name in NAMES])


def with_vector(calibration: Calibration, values: FloatArray) -> Calibration:
    """Return a copy with these five parameters; raises ValueError where no detector has them."""
    return calibration.with_parameters(**{n: float(v) for n, v in zip(NAMES, values, strict=True)})


class FittedDetector:
    """What every fit says of the detector, from one frame or from many."""

    calibration: Calibration
    start: Calibration
    covariance: FloatArray
    residual_px: FloatArray

    @property
    def mean_residual_px(self) -> float:
        """Mean distance of the fitted spots to their computed positions."""
        return float(np.mean(np.hypot(self.residual_px[:, 0], self.residual_px[:, 1])))

    @property
    def values(self) -> FloatArray:
        """The five parameters in the order of `NAMES`, px from 0."""
        return vector_of(self.calibration)

    @property
    def sigma(self) -> FloatArray:
        """Their standard deviations, (5,)."""
        return np.asarray(np.sqrt(np.diag(self.covariance)[:5]))

    @property
    def change(self) -> FloatArray:
        """What they moved from the start, (5,)."""
        return self.values - vector_of(self.start)


def projection_derivatives(calibration: Calibration) -> FloatArray:
    """Return ∂P/∂(dd, xcen, ycen, xbet, xgam), (5, 3, 3), per mm, px, px, deg, deg.

    With n' = ∂n/∂xbet = b and ∂b/∂xbet = −n in the notation of `geometry`.
    """
    c = calibration
    cb, sb = np.cos(c.xbet_deg * _RAD_PER_DEG), np.sin(c.xbet_deg * _RAD_PER_DEG)
    cg, sg = np.cos(c.xgam_deg * _RAD_PER_DEG), np.sin(c.xgam_deg * _RAD_PER_DEG)
    a, b, n = np.array([[1.0, 0.0, 0.0], [0.0, cb, -sb], [0.0, sb, cb]])
    scale = c.dd_mm / c.pixel_size_mm
    along_x, along_y = cg * a - sg * b, sg * a + cg * b
    zero = np.zeros(3)
    rows = np.array(
        [
            [along_x / c.pixel_size_mm, along_y / c.pixel_size_mm, zero],
            [n, zero, zero],
            [zero, n, zero],
            [scale * sg * n + c.xcen_px * b, -scale * cg * n + c.ycen_px * b, b],
            [-scale * along_y, scale * along_x, zero],
        ]
    )
    rows[3:] *= _RAD_PER_DEG
    to_camera = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    return np.asarray(rows @ to_camera)


def linearise(
    geometry: Geometry, g: FloatArray, energy_keV: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return computed positions and their derivatives.

    Parameters
    ----------
    g : (n, 3)
        B0 hkl.
    energy_keV : (n,), optional
        With it the depth is the ninth parameter, and moves the spots.

    Returns
    -------
    xy_px : (n, 2)
    jacobian : (n, 2, 8 or 9)
        By `NAMES`, ω (rad), depth (mm).
    """
    calibration = geometry.calibration
    q = g @ geometry.rotation.T
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    u = -2.0 * q[:, :1] * q
    u[:, 0] += 1.0
    h = u @ calibration.projection.T
    xy = h[:, :2] / h[:, 2:]
    # δq = ω × q has no component along q, so q stays a unit vector: δu = −2 (δq_x q + q_x δq).
    dq = np.zeros((3, len(q), 3))
    for axis, (plus, minus) in enumerate(((2, 1), (0, 2), (1, 0))):
        dq[axis, :, plus], dq[axis, :, minus] = q[:, minus], -q[:, plus]
    du = -2.0 * (dq[:, :, :1] * q + q[:, :1] * dq)
    dh = np.concatenate(
        [u @ projection_derivatives(calibration).swapaxes(1, 2), du @ calibration.projection.T]
    )
    jacobian = ((dh[:, :, :2] - xy * dh[:, :, 2:]) / h[:, 2:]).transpose(1, 2, 0)
    if energy_keV is not None:
        shift = depth_shift(xy, energy_keV, calibration.projection, calibration.dd_mm)
        # The shift itself varies so slowly with the other parameters that its derivative is nothing.
        xy = xy + geometry.depth_mm * shift
        jacobian = np.concatenate([jacobian, shift[:, :, None]], axis=2)
    return xy, np.ascontiguousarray(jacobian)


def gauss_newton(
    geometry: Geometry,
    g: FloatArray,
    xy_px: FloatArray,
    *,
    energy_keV: FloatArray | None = None,
    weight: FloatArray | None = None,
    prior: Prior | None = None,
    noise_px: float = 1.0,
    iterations: int = 3,
) -> Geometry | None:
    """Improve a geometry on spots whose reflections are known.

    Parameters
    ----------
    g, xy_px, energy_keV
        See `linearise`; measured positions, (n, 2).
    weight : (n,), optional
        Of each spot, 1 by default.
    prior : Prior, optional
    noise_px : float
        What the prior is weighed against.
    iterations : int

    Returns
    -------
    Geometry or None
        None when the spots do not determine the parameters, or a step leaves what a detector can be.
    """
    w = np.ones(len(g)) if weight is None else weight
    for _ in range(iterations):
        computed, jacobian = linearise(geometry, g, energy_keV)
        normal = np.einsum("n,nik,nil->kl", w, jacobian, jacobian)
        rhs = np.einsum("n,nik,ni->k", w, jacobian, xy_px - computed)
        if prior is not None:
            pull = np.square(noise_px / prior.sigma)
            normal[np.arange(5), np.arange(5)] += pull
            rhs[:5] += pull * (prior.mean - vector_of(geometry.calibration))
        step = _solve(normal, rhs)
        if step is None:
            return None
        moved = _moved(geometry, step)
        if moved is None:
            return None
        geometry = moved
    return geometry


def covariance_of(
    geometry: Geometry, g: FloatArray, xy_px: FloatArray, energy_keV: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return the covariance (p, p), scaled by the residuals that remain, and the residuals (n, 2).

    Raises
    ------
    ValueError
        If there are no more observations than parameters, or they leave some undetermined.
    """
    computed, jacobian = linearise(geometry, g, energy_keV)
    residual = xy_px - computed
    p = jacobian.shape[2]
    freedom = 2 * len(g) - p
    if freedom <= 0:
        raise ValueError(f"{len(g)} spots do not determine {p} parameters")
    normal = np.einsum("nik,nil->kl", jacobian, jacobian)
    scale = 1.0 / np.sqrt(np.diag(normal))
    if _is_singular(normal * np.outer(scale, scale)):
        raise ValueError(f"{len(g)} spots do not determine {p} parameters: they lie too close together")
    inverse = np.linalg.inv(normal * np.outer(scale, scale)) * np.outer(scale, scale)
    return np.asarray(inverse * (np.sum(np.square(residual)) / freedom)), residual


def strain_left(
    geometry: Geometry, g: FloatArray, xy_px: FloatArray, energy_keV: FloatArray | None = None
) -> tuple[FloatArray, FloatArray, float]:
    """Return the deviatoric strain that fitted detector and orientation leave room for.

    A detector takes up much of a strain, so the strain is solved for together with all that was fitted.

    Parameters
    ----------
    geometry, g, xy_px, energy_keV
        A fit that converged, and its spots.

    Returns
    -------
    strain, sigma : (3, 3) float64
        In the frame of B0, as `indexing.refine` has it; NaN where it cannot be told from the detector.
    probability : float
        Of an unstrained crystal to improve the fit as much by a strain (F test of five parameters).
    """
    computed, jacobian = linearise(geometry, g, energy_keV)
    q = g @ geometry.rotation.T
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    u = -2.0 * q[:, :1] * q
    u[:, 0] += 1.0
    dq = -q @ STRAIN_BASIS  # (5, n, 3); a length moves no spot
    dq -= np.sum(dq * q, axis=2, keepdims=True) * q
    dh = -2.0 * (dq[:, :, :1] * q + q[:, :1] * dq) @ geometry.calibration.projection.T
    h = u @ geometry.calibration.projection.T
    by_strain = ((dh[:, :, :2] - h[:, :2] / h[:, 2:] * dh[:, :, 2:]) / h[:, 2:]).transpose(1, 2, 0)
    design = np.concatenate([jacobian, by_strain], axis=2).reshape(2 * len(g), -1)
    residual = (xy_px - computed).ravel()
    scale = 1.0 / np.linalg.norm(design, axis=0)
    freedom = len(design) - design.shape[1]
    unit = (design * scale).T @ (design * scale)
    if freedom <= 0 or _is_singular(unit):
        return np.full((3, 3), np.nan), np.full((3, 3), np.nan), 1.0
    solution = np.linalg.solve(unit, (design * scale).T @ residual) * scale
    remaining = float(np.sum(np.square(residual - design @ solution)))
    covariance = np.linalg.inv(unit) * np.outer(scale, scale) * (remaining / freedom)
    gain = float(np.sum(np.square(residual))) - remaining
    probability = float(fdtrc(5.0, float(freedom), max(gain, 0.0) / 5.0 / (remaining / freedom)))
    basis = geometry.rotation.T @ STRAIN_BASIS @ geometry.rotation
    strain = np.einsum("k,kab->ab", solution[-5:], basis)
    variance = np.einsum("kl,kab,lab->ab", covariance[-5:, -5:], basis, basis)
    return np.asarray(strain), np.asarray(np.sqrt(variance)), probability


def rotation_of(vector: FloatArray) -> FloatArray:
    """Return the rotation (3, 3) by |ω| radians about ω (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    # sinc(t/π) = sin t / t, also at 0.
    first, second = np.sinc(angle / np.pi), 0.5 * np.sinc(0.5 * angle / np.pi) ** 2
    return np.asarray(np.eye(3) + first * cross + second * cross @ cross)


def _is_singular(unit_normal: FloatArray) -> bool:
    # `unit_normal` has a diagonal of ones, so its eigenvalues compare parameters of any unit.
    if not np.all(np.isfinite(unit_normal)):
        return True
    return bool(np.linalg.eigvalsh(unit_normal)[0] < _LEAST_DIAGONAL)


def _solve(normal: FloatArray, rhs: FloatArray) -> FloatArray | None:
    diagonal = np.diag(normal)
    if not np.all(diagonal > 0):
        return None
    scale = 1.0 / np.sqrt(diagonal)
    unit = normal * np.outer(scale, scale)
    if _is_singular(unit):
        return None
    return np.asarray(np.linalg.solve(unit, rhs * scale) * scale)


def _moved(geometry: Geometry, step: FloatArray) -> Geometry | None:
    try:
        calibration = with_vector(geometry.calibration, vector_of(geometry.calibration) + step[:5])
    except ValueError:
        return None
    depth = geometry.depth_mm + (float(step[8]) if len(step) == WITH_DEPTH else 0.0)
    return Geometry(calibration, rotation_of(step[5:8]) @ geometry.rotation, depth)
