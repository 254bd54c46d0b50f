"""Sub-pixel positions: an elliptical Gaussian on a constant background, in a small window.

Model, px from the window's centre: A exp(−(a dx² + 2 b dx dy + c dy²)/2) + B. Least squares with
equal weights by Levenberg-Marquardt (Marquardt, SIAM J. Appl. Math. 11 (1963) 431): equal weights
let the core decide where a real spot, which is no Gaussian, has wings. The uncertainty does not
assume equal weights: cov = (JᵀJ)⁻¹ Jᵀ V J (JᵀJ)⁻¹ with V = noise² + gain (signal) (White,
Econometrica 48 (1980) 817), enlarged by the reduced chi square where that exceeds 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel
from pipelines.laue.peaks.rows import select

FloatArray = npt.NDArray[np.float64]

FIT_COLUMNS = 13
"""Columns of a fit: A, x, y, a, b, c, B, variance of x, of y, reduced chi square, status, half, signal."""

HEIGHT, X, Y, QA, QB, QC, LEVEL, VAR_X, VAR_Y, CHI2, STATUS, HALF, SIGNAL = range(FIT_COLUMNS)

FITTED, ROUND, FAILED, REJECTED = 1.0, 0.5, 0.0, -1.0
"""States of a fit: all parameters free; a round spot of standard deviation 1 px; none; not tried."""

_STEEPEST = 8.0  # a, c of a spot of standard deviation 0.35 px: all of it in one pixel or two
_WIDEST = 0.75  # standard deviation in half windows beyond which background and spot are one
_MIN_PIXELS = 12
_FROZEN = 1e40  # a curvature that lets a parameter make no step
WINGS_PX = 5
"""Pixels looked at around a saturated area."""
_PAIR = 1.4  # two bright pixels side by side give 8.5 times the response, a spot of 0.9 px at most 7.0


@kernel("boolean(float64[:, ::1], float64[::1], int64)")
def solve_positive(matrix: Any, vector: Any, n: int) -> bool:
    """Solve matrix @ x = vector in place by Cholesky; False if not positive definite.

    The lower triangle of `matrix` becomes the factor, `vector` the solution.
    """
    for j in range(n):
        d = matrix[j, j]
        for k in range(j):
            d -= matrix[j, k] * matrix[j, k]
        if not d > 1e-30:
            return False
        d = np.sqrt(d)
        matrix[j, j] = d
        for i in range(j + 1, n):
            s = matrix[i, j]
            for k in range(j):
                s -= matrix[i, k] * matrix[j, k]
            matrix[i, j] = s / d
    for i in range(n):
        s = vector[i]
        for k in range(i):
            s -= matrix[i, k] * vector[k]
        vector[i] = s / matrix[i, i]
    for i in range(n - 1, -1, -1):
        s = vector[i]
        for k in range(i + 1, n):
            s -= matrix[k, i] * vector[k]
        vector[i] = s / matrix[i, i]
    return True


@kernel("float64(float64[::1], float64[::1])", fastmath=True)
def _dot(u: Any, v: Any) -> float:
    """Return the scalar product; re-association lets it run in vector registers."""
    total = 0.0
    for k in range(u.size):
        total += u[k] * v[k]
    return total


@kernel("float64(float64[:, ::1], float64[:, ::1], float64[::1], float64[:, ::1], float64[::1])")
def linearise(pixels: Any, jacobian: Any, p: Any, normal: Any, gradient: Any) -> float:
    """Fill Jᵀ (7, n), JᵀJ (lower triangle) and Jᵀr; return the sum of squared residuals.

    `pixels` holds dx, dy and value of n pixels and has a fourth row for the residuals.
    """
    x, y, value, residual = pixels[0], pixels[1], pixels[2], pixels[3]
    e, jx, jy, ja, jb, jc = jacobian[0], jacobian[1], jacobian[2], jacobian[3], jacobian[4], jacobian[5]
    for k in range(x.size):
        dx, dy = x[k] - p[1], y[k] - p[2]
        e[k] = np.exp(-0.5 * (p[3] * dx * dx + 2.0 * p[4] * dx * dy + p[5] * dy * dy))
    for k in range(x.size):
        dx, dy = x[k] - p[1], y[k] - p[2]
        g = p[0] * e[k]
        jx[k] = g * (p[3] * dx + p[4] * dy)
        jy[k] = g * (p[4] * dx + p[5] * dy)
        ja[k] = -0.5 * g * dx * dx
        jb[k] = -g * dx * dy
        jc[k] = -0.5 * g * dy * dy
        residual[k] = value[k] - g - p[6]
    jacobian[6, :] = 1.0
    for u in range(7):
        gradient[u] = _dot(jacobian[u], residual)
        for v in range(u + 1):
            normal[u, v] = _dot(jacobian[u], jacobian[v])
    return float(_dot(residual, residual))


@kernel("boolean(float64[::1], float64)")
def plausible(p: Any, least_curvature: float) -> bool:
    """Return whether the shape is an ellipse that does not fill the window."""
    if not (p[0] > 0.0 and p[3] > 0.0 and p[5] > 0.0):
        return False
    # Smaller eigenvalue of [[a, b], [b, c]].
    gap = np.sqrt(0.25 * (p[3] - p[5]) ** 2 + p[4] * p[4])
    return bool(0.5 * (p[3] + p[5]) - gap > least_curvature)


@kernel(
    "boolean(float64[:, ::1], float64[:, ::1], float64[::1], float64[:, :, ::1], float64, float64, boolean)"
)
def levenberg(
    pixels: Any, jacobian: Any, p: Any, work: Any, reach: float, least_curvature: float, rigid: bool
) -> bool:
    """Fit the parameters in place; False unless it converges within `reach` px of the start.

    With `rigid` the shape a, b, c stays as it is.

    `work` is (3, 8, 7): normal matrix and gradient of the accepted and of the tried parameters,
    and the damped matrix. On return work[0] and `jacobian` belong to the last accepted step.
    """
    step, trial = np.empty(7), np.empty(7)
    damped = work[2, :7]
    x0, y0 = p[1], p[2]
    damping, now = 1e-3, 0
    cost = linearise(pixels, jacobian, p, work[now, :7], work[now, 7])
    for _ in range(30):
        for u in range(7):
            step[u] = work[now, 7, u]
            for v in range(u + 1):
                damped[u, v] = work[now, u, v]
            damped[u, u] = work[now, u, u] * (1.0 + damping) + 1e-12
            if rigid and 3 <= u <= 5:
                damped[u, u] = _FROZEN
        accepted = False
        if solve_positive(damped, step, 7):
            for u in range(7):
                trial[u] = p[u] + step[u]
            # Spots inside one or two pixels have no finite steepness; their position still is good.
            trial[3], trial[5] = min(trial[3], _STEEPEST), min(trial[5], _STEEPEST)
            if (
                plausible(trial, least_curvature)
                and abs(trial[1] - x0) < reach
                and abs(trial[2] - y0) < reach
            ):
                tried = linearise(pixels, jacobian, trial, work[1 - now, :7], work[1 - now, 7])
                accepted = tried <= cost * (1.0 + 1e-12)
                if accepted:
                    cost = tried
        if not accepted:
            damping *= 8.0
            if damping > 1e7:
                return False
            continue
        now = 1 - now
        p[:] = trial
        damping = max(damping * 0.1, 1e-9)
        # The steps of an undamped fit shrink quadratically: the next would be negligible.
        if abs(step[1]) < 3e-3 and abs(step[2]) < 3e-3 and abs(step[0]) < 3e-3 * p[0] and damping < 0.1:
            work[0, :, :] = work[now, :, :]
            if rigid:
                for u in range(3, 6):
                    work[0, u, u] = _FROZEN
            return True
    return False


@kernel(
    "void(float64[:, ::1], float64[:, ::1], float64[::1], float64[:, :, ::1], float64, float64, float64[::1])"
)
def uncertainty(pixels: Any, jacobian: Any, p: Any, work: Any, noise: float, gain: float, out: Any) -> None:
    """Write variance of x, variance of y and reduced chi square of a fit; NaN if it is degenerate."""
    rows = np.zeros((2, 7))
    damped = work[2, :7]
    for u in range(2):
        damped[:, :] = work[0, :7]
        rows[u, 1 + u] = 1.0
        if not solve_positive(damped, rows[u], 7):
            out[:] = np.nan
            return
    chi2, var_x, var_y = 0.0, 0.0, 0.0
    n = pixels.shape[1]
    for k in range(n):
        variance = noise * noise + gain * p[0] * jacobian[0, k]
        chi2 += pixels[3, k] * pixels[3, k] / variance
        sx, sy = 0.0, 0.0
        for u in range(7):
            sx += rows[0, u] * jacobian[u, k]
            sy += rows[1, u] * jacobian[u, k]
        var_x += sx * sx * variance
        var_y += sy * sy * variance
    chi2 /= max(n - 7, 1)
    out[0], out[1], out[2] = var_x * max(chi2, 1.0), var_y * max(chi2, 1.0), chi2


@kernel("int64(float32[:, ::1], int64, float64, float64, float32[::1], float64[::1])")
def ring_background(window: Any, centre: int, inner: float, outer: float, buffer: Any, out: Any) -> int:
    """Write median and 1.4826 MAD of the ring inner <= r <= outer; return its number of pixels."""
    n = 0
    for a in range(window.shape[0]):
        for b in range(window.shape[1]):
            r2 = float((a - centre) ** 2 + (b - centre) ** 2)
            v = window[a, b]
            if inner * inner <= r2 <= outer * outer and v == v:
                buffer[n] = v
                n += 1
    if n < 8:
        return 0
    median = select(buffer, n, n >> 1)
    for k in range(n):
        buffer[k] = abs(buffer[k] - median)
    out[0], out[1] = median, 1.4826 * select(buffer, n, n >> 1)
    return n


@kernel(
    "void(float32[:, :, ::1], float64[::1], float64[:, ::1], float64, float64, float64, float64, "
    "float64[:, ::1])"
)
def inspect(
    windows: Any,
    responses: Any,
    local: Any,
    saturation: float,
    threshold_sigma: float,
    excess: float,
    sharpest: float,
    out: Any,
) -> None:
    """Judge candidates by what lies around them.

    Parameters
    ----------
    windows : (n, w, w) float32
        Pixels around the maximum, NaN where unusable.
    responses : (n,)
    local : (n, 3)
        Tile background, response sigma, pixel sigma at the place.
    sharpest : float
        `PeakSearch.max_sharpness`.
    out : (n, 4)
        Local background, response above it, its sigma, status (1 good, −1 rejected).
    """
    size = windows.shape[1]
    centre = size // 2
    buffer, ring = np.empty(size * size, np.float32), np.empty(2)
    for i in range(windows.shape[0]):
        window = windows[i]
        level, noise, pixel_noise = local[i, 0], local[i, 1], local[i, 2]
        response = responses[i]
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = level, response, noise, FITTED
        flat = False
        for a in range(centre - 1, centre + 2):
            for b in range(centre - 1, centre + 2):
                flat |= float(window[a, b]) >= saturation
        # A saturated spot may be wider than the ring.
        n = 0 if flat else ring_background(window, centre, 5.0, float(centre), buffer, ring)
        if n > 0:
            # Only what the ring shows beyond its own error counts: the tile knows better otherwise.
            excess_level = ring[0] - level
            error = 2.5 * 1.2533 * pixel_noise / np.sqrt(n)
            offset = max(excess_level - error, 0.0)
            if abs(excess_level) > error:
                out[i, 0] = ring[0]
            out[i, 1] = response - offset
            # Texture, flanks of bright spots and shadow edges are rougher than noise.
            out[i, 2] = noise * max(1.0, ring[1] / (1.5 * pixel_noise))
        if out[i, 1] < threshold_sigma * out[i, 2] + excess:
            out[i, 3] = REJECTED
            continue
        # How much of the spot lies in its brightest one and two pixels tells spikes from spots.
        top, second = -np.inf, -np.inf
        for a in range(centre - 1, centre + 2):
            for b in range(centre - 1, centre + 2):
                v = float(window[a, b])
                if v > top:
                    top, second = v, top
                elif v > second:
                    second = v
        top, pair = top - out[i, 0], top + second - 2.0 * out[i, 0]
        if top > sharpest * out[i, 1] or pair > _PAIR * sharpest * out[i, 1]:
            out[i, 3] = REJECTED


@kernel(
    "void(float32[:, :, ::1], int64[::1], int32[:, ::1], float64[:, ::1], int64[::1], int32[::1], "
    "float64[:, ::1], float64, float64, int64, boolean, float64[:, ::1])"
)
def fit_windows(
    windows: Any,
    which: Any,
    centres: Any,
    start: Any,
    first: Any,
    neighbours: Any,
    models: Any,
    saturation: float,
    gain: float,
    fit_radius: int,
    subtract: bool,
    out: Any,
) -> None:
    """Fit some of the spots, one by one.

    Parameters
    ----------
    windows : (m, w, w) float32
        Pixels, NaN where unusable.
    which : (m,)
        The spots that the windows show: rows of the arrays below.
    centres : (n, 2) int32
        Row, column of the middle of each window.
    start : (n, 5)
        Local background, noise of a pixel, x and y where the fit starts, half extent of the
        saturated area (−1: none).
    first : (n + 1,), neighbours : (k,)
        Neighbours of spot i: rows neighbours[first[i] : first[i + 1]] of `models`.
    models : (n, FIT_COLUMNS)
        All spots, x and y absolute. With `subtract` the fitted neighbours are taken off the
        window; otherwise pixels nearer to a neighbour than to the spot do not count.
    saturation : float
        Pixels at or above it do not count.
    fit_radius : int
        Smallest half size of the fitted part of the window, px.
    out : (n, FIT_COLUMNS)
        x and y absolute; where the status is FAILED the position is the centroid.
    """
    size = windows.shape[1]
    centre = size // 2
    p, spread, work = np.empty(7), np.empty(3), np.zeros((3, 8, 7))
    pixel_room, jacobian_room = np.empty(4 * size * size), np.empty(7 * size * size)
    clean = np.empty((size, size))
    for k in range(windows.shape[0]):
        i = which[k]
        row, column = centres[i, 0], centres[i, 1]
        level, noise, x0, y0, extent = start[i, 0], start[i, 1], start[i, 2], start[i, 3], start[i, 4]
        for a in range(size):
            for b in range(size):
                v = float(windows[k, a, b])
                clean[a, b] = v if v < saturation else np.nan
                if not v < saturation:
                    continue
                x, y = column + b - centre, row + a - centre
                own = (x - x0) ** 2 + (y - y0) ** 2
                for q in range(first[i], first[i + 1]):
                    m = models[neighbours[q]]
                    dx, dy = x - m[X], y - m[Y]
                    if subtract and m[STATUS] > FAILED:
                        e = m[QA] * dx * dx + 2.0 * m[QB] * dx * dy + m[QC] * dy * dy
                        clean[a, b] -= m[HEIGHT] * np.exp(-0.5 * e)
                    elif dx * dx + dy * dy < own:
                        clean[a, b] = np.nan
        # Start: width from the ratio of sum to height, position from the centroid of the core.
        flat = extent >= 0.0
        top, total, sx, sy, positive = 0.0, 0.0, 0.0, 0.0, 0.0
        ca, cb = int(np.rint(y0 - row)) + centre, int(np.rint(x0 - column)) + centre
        core = 2 + (int(np.ceil(extent)) if flat else 0)
        for a in range(max(ca - core, 0), min(ca + core + 1, size)):
            for b in range(max(cb - core, 0), min(cb + core + 1, size)):
                v = clean[a, b] - level
                if flat and float(windows[k, a, b]) >= saturation:
                    v = saturation - level
                if v == v:
                    total += v
                    if abs(a - ca) <= 1 and abs(b - cb) <= 1:
                        top = max(top, v)
                    if v > 0:
                        positive += v
                        sx += v * b
                        sy += v * a
        out[i, :] = 0.0
        out[i, LEVEL], out[i, VAR_X], out[i, VAR_Y] = level, 1.0, 1.0
        xc, yc = x0 - column + centre, y0 - row + centre
        if positive > 0.0:
            xc, yc = sx / positive, sy / positive
        out[i, HEIGHT], out[i, SIGNAL] = top, total
        out[i, X], out[i, Y] = xc - centre + column, yc - centre + row
        width2 = 1.0
        if top > 0.0:
            width2 = min(max(total / (2.0 * np.pi * top), 0.3), 4.0)
        out[i, QA], out[i, QC] = 1.0 / width2, 1.0 / width2
        half = min(max(fit_radius, int(np.ceil(2.6 * np.sqrt(width2) + 0.5))), centre)
        if flat:
            # The plateau hides the core: start from a Gaussian 1.5 times as high as the plateau
            # that is as wide there, and have its wings inside.
            top *= 1.5
            width2 = (extent + 0.5) ** 2 / (2.0 * np.log(1.5)) + 0.3
            half = min(int(np.ceil(extent)) + WINGS_PX, centre)
        again = subtract and models[i, STATUS] == FITTED
        if again:
            half = int(models[i, HALF])
        for _ in range(2):
            n = 0
            for a in range(max(ca - half, 0), min(ca + half + 1, size)):
                for b in range(max(cb - half, 0), min(cb + half + 1, size)):
                    if clean[a, b] == clean[a, b]:
                        n += 1
            pixels, jacobian = pixel_room[: 4 * n].reshape(4, n), jacobian_room[: 7 * n].reshape(7, n)
            n = 0
            for a in range(max(ca - half, 0), min(ca + half + 1, size)):
                for b in range(max(cb - half, 0), min(cb + half + 1, size)):
                    v = clean[a, b]
                    if v == v:
                        pixels[0, n], pixels[1, n], pixels[2, n] = b, a, v
                        n += 1
            if n < _MIN_PIXELS:
                break
            p[0], p[1], p[2], p[6] = max(top, noise), xc, yc, level
            p[3], p[4], p[5] = 1.0 / width2, 0.0, 1.0 / width2
            if again:
                p[:] = models[i, :7]
                p[X] += centre - column
                p[Y] += centre - row
            reach = 2.0 + 0.5 * max(extent, 0.0)
            status, least_curvature = FITTED, 1.0 / (_WIDEST * half) ** 2
            if not levenberg(pixels, jacobian, p, work, reach, least_curvature, False):
                if flat or out[i, STATUS] == FITTED:
                    break
                status = ROUND
                p[0], p[1], p[2], p[6] = max(top, noise), xc, yc, level
                p[3], p[4], p[5] = 1.0, 0.0, 1.0
                if not levenberg(pixels, jacobian, p, work, reach, least_curvature, True):
                    break
            uncertainty(pixels, jacobian, p, work, noise, gain, spread)
            if not (spread[0] > 0.0 and spread[1] > 0.0):
                break
            out[i, :7] = p
            out[i, X], out[i, Y] = p[X] - centre + column, p[Y] - centre + row
            out[i, VAR_X], out[i, VAR_Y], out[i, CHI2] = spread[0], spread[1], spread[2]
            out[i, STATUS], out[i, HALF] = status, half
            if status == ROUND:
                break
            # Grow once when the spot is larger than the window was made for.
            trace, det = p[3] + p[5], p[3] * p[5] - p[4] * p[4]
            smallest = 0.5 * (trace - np.sqrt(max(trace * trace - 4.0 * det, 0.0)))
            wanted = min(int(np.ceil(2.6 / np.sqrt(max(smallest, 1e-3)))), centre)
            if wanted <= half:
                break
            half = wanted


@kernel("int64(int32[:, ::1], int64, int64[::1], int32[::1], boolean)")
def _neighbours(centres: Any, reach: int, first: Any, found: Any, write: bool) -> int:
    """Count, then list, spots within `reach` px along both axes; centres are in reading order."""
    n, m = centres.shape[0], 0
    for i in range(n):
        first[i] = m
        for direction in (-1, 1):
            j = i + direction
            while 0 <= j < n and abs(centres[j, 0] - centres[i, 0]) <= reach:
                if abs(centres[j, 1] - centres[i, 1]) <= reach:
                    if write:
                        found[m] = j
                    m += 1
                j += direction
    first[n] = m
    return m


def neighbour_lists(
    centres: npt.NDArray[np.int32], reach_px: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return neighbours of each spot: those of i are found[first[i] : first[i + 1]]."""
    first = np.empty(len(centres) + 1, np.int64)
    n = _neighbours(centres, reach_px, first, np.empty(0, np.int32), False)
    found = np.empty(n, np.int32)
    _neighbours(centres, reach_px, first, found, True)
    return first, found


def windows_meet(
    fits: FloatArray, first: npt.NDArray[np.int64], neighbours: npt.NDArray[np.int32], least_half_px: int
) -> npt.NDArray[np.bool_]:
    """Return which spots' fitted windows meet that of a neighbour, (n,)."""
    spot = np.repeat(np.arange(len(fits)), np.diff(first))
    half = np.maximum(fits[:, HALF], least_half_px)
    apart = np.maximum(abs(fits[spot, X] - fits[neighbours, X]), abs(fits[spot, Y] - fits[neighbours, Y]))
    meet = apart <= half[spot] + half[neighbours]
    return np.bincount(spot[meet], minlength=len(fits)) > 0
