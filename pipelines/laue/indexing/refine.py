"""Refine orientation and deviatoric strain of a crystal on pixel residuals, with covariance.

Model: q = M g, M = R (I + ε)⁻¹, with R the rotation from the Cartesian frame of B0 to the lab and ε
the lattice strain (direct lattice vectors become R (I + ε) a). A scale of M moves no Laue spot, so
ε has no trace: five components. The normal equations of

    minimise Σ_j |P(M g_j) − x_j|² / σ_j²

are built with the analytic derivative of the spot position by a small lab-frame deformation,
q → (I + [ω]× − η) q (Chung & Ice, J. Appl. Phys. 86 (1999) 5249, refine the same eight
parameters by angles), and solved by Gauss-Newton.

Depth. In a thick crystal of light elements hard photons scatter from deeper down, that is farther
downstream: the source of a spot lies at z(E) = z_ref ((E/E_ref)³ − 1) along the beam (photoelectric
absorption falls as E⁻³; the calibration has absorbed the mean). In Si this moves spots by up to a
pixel. It is the ninth parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel

FloatArray = npt.NDArray[np.float64]

ROTATION = 3
"""Parameters of an orientation."""

ROTATION_AND_STRAIN = 8
"""Parameters of an orientation and a deviatoric strain."""

ROTATION_STRAIN_DEPTH = 9
"""The same and the depth of penetration."""

DEPTH_REFERENCE_KEV = 15.0
"""Energy at which a depth is stated."""

# η = Σ p_k E_k: 11, 22 (both against 33), 23, 13, 12.
STRAIN_BASIS = np.array(
    [
        [[1, 0, 0], [0, 0, 0], [0, 0, -1]],
        [[0, 0, 0], [0, 1, 0], [0, 0, -1]],
        [[0, 0, 0], [0, 0, 1], [0, 1, 0]],
        [[0, 0, 1], [0, 0, 0], [1, 0, 0]],
        [[0, 1, 0], [1, 0, 0], [0, 0, 0]],
    ],
    dtype=np.float64,
)


@dataclass(frozen=True, eq=False)
class Fit:
    """Outcome of a refinement.

    Attributes
    ----------
    matrix : (3, 3) float64
        M, scaled so that ε has no trace.
    covariance : (p, p) float64
        Of (ω_x, ω_y, ω_z[, η_11, η_22, η_23, η_13, η_12[, z_ref]]) in the lab frame; rad, strain, mm.
        NaN with fewer observations than needed.
    residual_px : (n,) float64
        Distance of each spot to its computed position.
    depth_mm : float
        z_ref, 0 where it was not refined.
    """

    matrix: FloatArray
    covariance: FloatArray
    residual_px: FloatArray
    depth_mm: float = 0.0


@kernel(
    "boolean("
    "float64[:, ::1], float64[:, ::1], float64[:, ::1], float64[::1], float64[:, ::1], float64[:, ::1],"
    " int64, int64, float64[:, ::1], float64[::1], float64[::1])"
)
def _gauss_newton(
    m: FloatArray,
    g: FloatArray,
    xy: FloatArray,
    weight: FloatArray,
    shift: FloatArray,
    projection: FloatArray,
    n_par: int,
    iterations: int,
    normal_out: FloatArray,
    residual: FloatArray,
    depth: FloatArray,
) -> bool:
    # Improves m and depth[0] in place. False when the normal equations are singular.
    n = g.shape[0]
    jx = np.empty(9)
    jy = np.empty(9)
    dq = np.empty((8, 3))
    normal = np.empty((9, 9))
    rhs = np.empty(9)
    step = np.empty(9)
    low = np.empty((9, 9))
    new = np.empty((3, 3))
    for iteration in range(iterations + 1):
        for a in range(n_par):
            rhs[a] = 0.0
            for b in range(n_par):
                normal[a, b] = 0.0
        for i in range(n):
            q0 = m[0, 0] * g[i, 0] + m[0, 1] * g[i, 1] + m[0, 2] * g[i, 2]
            q1 = m[1, 0] * g[i, 0] + m[1, 1] * g[i, 1] + m[1, 2] * g[i, 2]
            q2 = m[2, 0] * g[i, 0] + m[2, 1] * g[i, 1] + m[2, 2] * g[i, 2]
            norm = np.sqrt(q0 * q0 + q1 * q1 + q2 * q2)
            q0 /= norm
            q1 /= norm
            q2 /= norm
            ux = 1.0 - 2.0 * q0 * q0
            uy = -2.0 * q0 * q1
            uz = -2.0 * q0 * q2
            hx = projection[0, 0] * ux + projection[0, 1] * uy + projection[0, 2] * uz
            hy = projection[1, 0] * ux + projection[1, 1] * uy + projection[1, 2] * uz
            hz = projection[2, 0] * ux + projection[2, 1] * uy + projection[2, 2] * uz
            x = hx / hz
            y = hy / hz
            rx = xy[i, 0] - x - depth[0] * shift[i, 0]
            ry = xy[i, 1] - y - depth[0] * shift[i, 1]
            residual[i] = np.sqrt(rx * rx + ry * ry)
            # ω × q and −E_k q, in the order of the parameters.
            dq[0, 0] = 0.0
            dq[0, 1] = -q2
            dq[0, 2] = q1
            dq[1, 0] = q2
            dq[1, 1] = 0.0
            dq[1, 2] = -q0
            dq[2, 0] = -q1
            dq[2, 1] = q0
            dq[2, 2] = 0.0
            if n_par >= 8:
                dq[3, 0] = -q0
                dq[3, 1] = 0.0
                dq[3, 2] = q2
                dq[4, 0] = 0.0
                dq[4, 1] = -q1
                dq[4, 2] = q2
                dq[5, 0] = 0.0
                dq[5, 1] = -q2
                dq[5, 2] = -q1
                dq[6, 0] = -q2
                dq[6, 1] = 0.0
                dq[6, 2] = -q0
                dq[7, 0] = -q1
                dq[7, 1] = -q0
                dq[7, 2] = 0.0
            for a in range(min(n_par, 8)):
                along = q0 * dq[a, 0] + q1 * dq[a, 1] + q2 * dq[a, 2]
                d0 = dq[a, 0] - along * q0
                d1 = dq[a, 1] - along * q1
                d2 = dq[a, 2] - along * q2
                ex = -4.0 * q0 * d0
                ey = -2.0 * (d0 * q1 + q0 * d1)
                ez = -2.0 * (d0 * q2 + q0 * d2)
                dz = projection[2, 0] * ex + projection[2, 1] * ey + projection[2, 2] * ez
                jx[a] = (projection[0, 0] * ex + projection[0, 1] * ey + projection[0, 2] * ez - x * dz) / hz
                jy[a] = (projection[1, 0] * ex + projection[1, 1] * ey + projection[1, 2] * ez - y * dz) / hz
            jx[8] = shift[i, 0]
            jy[8] = shift[i, 1]
            w = weight[i]
            for a in range(n_par):
                rhs[a] += w * (jx[a] * rx + jy[a] * ry)
                for b in range(a + 1):
                    normal[a, b] += w * (jx[a] * jx[b] + jy[a] * jy[b])
        for a in range(n_par):
            for b in range(a + 1):
                normal_out[a, b] = normal[a, b]
                normal_out[b, a] = normal[a, b]
        if iteration == iterations:
            return True
        # Cholesky; columns that the data do not determine make it fail.
        for a in range(n_par):
            for b in range(a + 1):
                value = normal[a, b]
                for c in range(b):
                    value -= low[a, c] * low[b, c]
                if a == b:
                    if value <= 1e-10 * normal[a, a] or not np.isfinite(value):
                        return False
                    low[a, a] = np.sqrt(value)
                else:
                    low[a, b] = value / low[b, b]
        for a in range(n_par):
            value = rhs[a]
            for c in range(a):
                value -= low[a, c] * step[c]
            step[a] = value / low[a, a]
        for a in range(n_par - 1, -1, -1):
            value = step[a]
            for c in range(a + 1, n_par):
                value -= low[c, a] * step[c]
            step[a] = value / low[a, a]
        w0, w1, w2 = step[0], step[1], step[2]
        t = np.sqrt(w0 * w0 + w1 * w1 + w2 * w2)
        s1 = 1.0
        s2 = 0.5
        if t > 1e-9:
            s1 = np.sin(t) / t
            s2 = (1.0 - np.cos(t)) / (t * t)
        r00 = 1.0 - s2 * (w1 * w1 + w2 * w2)
        r11 = 1.0 - s2 * (w0 * w0 + w2 * w2)
        r22 = 1.0 - s2 * (w0 * w0 + w1 * w1)
        r01 = -s1 * w2 + s2 * w0 * w1
        r10 = s1 * w2 + s2 * w0 * w1
        r02 = s1 * w1 + s2 * w0 * w2
        r20 = -s1 * w1 + s2 * w0 * w2
        r12 = -s1 * w0 + s2 * w1 * w2
        r21 = s1 * w0 + s2 * w1 * w2
        for b in range(3):
            c0, c1, c2 = m[0, b], m[1, b], m[2, b]
            if n_par >= 8:
                n0 = c0 - (step[3] * c0 + step[7] * c1 + step[6] * c2)
                n1 = c1 - (step[7] * c0 + step[4] * c1 + step[5] * c2)
                n2 = c2 - (step[6] * c0 + step[5] * c1 - (step[3] + step[4]) * c2)
                c0, c1, c2 = n0, n1, n2
            new[0, b] = r00 * c0 + r01 * c1 + r02 * c2
            new[1, b] = r10 * c0 + r11 * c1 + r12 * c2
            new[2, b] = r20 * c0 + r21 * c1 + r22 * c2
        for a in range(3):
            for b in range(3):
                m[a, b] = new[a, b]
        if n_par == 9:
            depth[0] += step[8]
    return True


def refine(
    matrix: FloatArray,
    g: FloatArray,
    xy_px: FloatArray,
    projection: FloatArray,
    parameters: int = ROTATION_AND_STRAIN,
    sigma_px: FloatArray | None = None,
    iterations: int = 4,
    shift_px_per_mm: FloatArray | None = None,
    depth_mm: float = 0.0,
) -> Fit | None:
    """Refine a crystal on spots whose reflections are known.

    Parameters
    ----------
    matrix : (3, 3)
        M to start from.
    g : (n, 3)
        B0 hkl of each spot.
    xy_px : (n, 2)
        Measured positions.
    projection : (3, 3)
        `Calibration.projection`.
    parameters : int
        `ROTATION`, `ROTATION_AND_STRAIN` or `ROTATION_STRAIN_DEPTH`.
    sigma_px : (n,), optional
        Relative position uncertainties; the covariance is scaled by the residuals that remain.
    shift_px_per_mm : (n, 2), optional
        What a depth does to each spot (`depth_shift`).
    depth_mm : float
        Depth to start from, or to keep where it is no parameter.

    Returns
    -------
    Fit or None
        None when the spots do not determine the parameters.
    """
    n = len(g)
    if 2 * n < parameters:
        return None
    m = np.array(matrix, dtype=np.float64, order="C")
    weight = np.ones(n) if sigma_px is None else 1.0 / np.square(sigma_px)
    normal = np.zeros((9, 9))
    residual = np.empty(n)
    depth = np.array([depth_mm])
    shift = np.zeros((n, 2)) if shift_px_per_mm is None else np.ascontiguousarray(shift_px_per_mm)
    good = _gauss_newton(
        m,
        np.ascontiguousarray(g),
        np.ascontiguousarray(xy_px),
        np.ascontiguousarray(weight),
        shift,
        projection,
        parameters,
        iterations,
        normal,
        residual,
        depth,
    )
    if not good or not np.all(np.isfinite(m)):
        return None
    freedom = 2 * n - parameters
    if freedom > 2:
        # The variance is itself estimated: the parameters follow Student's t, whose variance this is.
        scale = float(np.sum(weight * np.square(residual))) / (freedom - 2)
        covariance = np.asarray(np.linalg.inv(normal[:parameters, :parameters]) * scale, dtype=np.float64)
    else:
        covariance = np.full((parameters, parameters), np.nan)
    return Fit(m, covariance, residual, float(depth[0]))


def depth_shift(
    xy_px: FloatArray, energy_keV: FloatArray, projection: FloatArray, dd_mm: float
) -> FloatArray:
    """Return by how much spots move for a depth z_ref of 1 mm, (n, 2) px/mm.

    A source displaced by z along the beam x moves the spot at (X, Y) by
    z (P₀₀ − X P₂₀, P₁₀ − Y P₂₀) / dd, with P the projection.

    Parameters
    ----------
    xy_px : (n, 2)
    energy_keV : (n,)
        Of the lowest order, which is nearly always the brightest.
    projection : (3, 3)
    dd_mm : float
    """
    along_beam = (projection[:2, 0] - xy_px * projection[2, 0]) / dd_mm
    weight = (energy_keV / DEPTH_REFERENCE_KEV) ** 3 - 1.0
    return np.asarray(along_beam * weight[:, None])


def decompose(matrix: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Split M into rotation and strain.

    Returns
    -------
    rotation : (3, 3)
        R, proper, from the Cartesian frame of B0 to the lab.
    strain : (3, 3)
        ε in the Cartesian frame of B0, symmetric, without trace: M ~ R (I + ε)⁻¹.
    """
    left, stretch, right = np.linalg.svd(matrix)
    rotation = left @ right
    inverse = right.T @ np.diag(1.0 / stretch) @ right
    return rotation, inverse / (np.trace(inverse) / 3.0) - np.eye(3)


def strain_sigma(covariance: FloatArray, lab_to_frame: FloatArray) -> FloatArray:
    """Standard deviations of the strain components in a frame.

    Parameters
    ----------
    covariance : (8, 8) or (9, 9)
        As in `Fit`.
    lab_to_frame : (3, 3)
        Rotation Q: v_frame = Q v_lab.

    Returns
    -------
    (3, 3) float64
    """
    basis = lab_to_frame @ STRAIN_BASIS @ lab_to_frame.T
    variance = np.einsum("kl,kab,lab->ab", covariance[3:8, 3:8], basis, basis)
    return np.asarray(np.sqrt(variance))
