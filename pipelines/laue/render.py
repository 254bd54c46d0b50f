"""Frames for simulation: a list of spots rendered as a detector would show it.

Spots are elliptical Gaussians integrated over the pixel, with an optional halo; background is a
level, a gradient and the bump of air scatter; noise is Poisson's plus read-out noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel
from pipelines.laue.peaks.rows import KERNEL_2D, KERNEL_NORM, poisson_excess

FloatArray = npt.NDArray[np.float64]

_FWHM = 2.0 * math.sqrt(2.0 * math.log(2.0))
_EXACT_BELOW = 30.0
"""Photons: below it the Poisson law is inverted exactly, above it expanded (see `_expose`)."""


@dataclass(frozen=True)
class Background:
    """What lies under the spots, counts; the read-out offset not included.

    Attributes
    ----------
    level : float
        At the middle of the frame.
    gradient : (float, float)
        Change per px along x and y.
    bump : float
        Height of the air-scatter bump, a Gaussian of revolution.
    bump_fwhm_px : float
    bump_xy_px : (float, float), optional
        Its centre; the middle of the frame when None.
    """

    level: float = 50.0
    gradient: tuple[float, float] = (0.0, 0.0)
    bump: float = 0.0
    bump_fwhm_px: float = 1000.0
    bump_xy_px: tuple[float, float] | None = None

    def at(self, xy_px: npt.ArrayLike, shape: tuple[int, int]) -> FloatArray:
        """Return the background at positions (..., 2) of a frame of that shape; never negative."""
        xy = np.asarray(xy_px, dtype=np.float64)
        return self._of(xy[..., 0], xy[..., 1], shape)

    def image(self, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Return it as a frame, (rows, columns) float32."""
        x = np.arange(shape[1], dtype=np.float32)[None, :]
        y = np.arange(shape[0], dtype=np.float32)[:, None]
        return np.ascontiguousarray(self._of(x, y, shape), dtype=np.float32)

    def _of(self, x: npt.NDArray[Any], y: npt.NDArray[Any], shape: tuple[int, int]) -> npt.NDArray[Any]:
        middle_x, middle_y = (shape[1] - 1) / 2, (shape[0] - 1) / 2
        value = self.level + self.gradient[0] * (x - middle_x) + self.gradient[1] * (y - middle_y)
        if self.bump != 0.0:
            cx, cy = self.bump_xy_px or (middle_x, middle_y)
            narrow = 0.5 * (_FWHM / self.bump_fwhm_px) ** 2
            # A product of two vectors: two thousand exponentials instead of four million.
            value = value + self.bump * np.exp(-narrow * (x - cx) ** 2) * np.exp(-narrow * (y - cy) ** 2)
        return np.asarray(np.maximum(value, 0.0))


@dataclass(frozen=True)
class Tail:
    """A halo around each spot: a Moffat profile ∝ (1 + r²/radius²)^−power that holds `fraction`.

    Attributes
    ----------
    fraction : float
        Of the spot's intensity, 0 to 1.
    radius_px, power : float
    reach_px : float
        The halo is cut there.
    """

    fraction: float = 0.1
    radius_px: float = 3.0
    power: float = 2.0
    reach_px: float = 40.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.fraction <= 1.0 and self.radius_px > 0 and self.power > 1 and self.reach_px > 0):
            raise ValueError(f"a halo needs 0 <= fraction <= 1, radius and reach > 0, power > 1: {self}")


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)
_NODES, _WEIGHTS = np.ascontiguousarray(0.5 * _NODES), np.ascontiguousarray(0.5 * _WEIGHTS)


@kernel("void(float32[:, ::1], float64[:, ::1], float64[:, ::1], float64[::1], float64[::1], float64[::1])")
def _add_spots(image: Any, spots: Any, shapes: Any, tail: Any, nodes: Any, weights: Any) -> None:
    """Add spots (x, y, intensity) of shape (a, b, c, reach), integrated over pixels by Gauss-Legendre."""
    rows, columns = image.shape
    fraction, radius, power, tail_reach = tail[0], tail[1], tail[2], tail[3]
    for i in range(spots.shape[0]):
        x, y, intensity = spots[i, 0], spots[i, 1], spots[i, 2]
        a, b, c, reach = shapes[i, 0], shapes[i, 1], shapes[i, 2], shapes[i, 3]
        if not (x == x and y == y):
            continue
        height = (1.0 - fraction) * intensity * np.sqrt(a * c - b * b) / (2.0 * np.pi)
        for r in range(max(int(np.ceil(y - reach)), 0), min(int(np.floor(y + reach)), rows - 1) + 1):
            for q in range(max(int(np.ceil(x - reach)), 0), min(int(np.floor(x + reach)), columns - 1) + 1):
                total = 0.0
                for u in range(nodes.size):
                    dy = r + nodes[u] - y
                    for v in range(nodes.size):
                        dx = q + nodes[v] - x
                        e = a * dx * dx + 2.0 * b * dx * dy + c * dy * dy
                        if e < 60.0:
                            total += weights[u] * weights[v] * np.exp(-0.5 * e)
                image[r, q] += np.float32(height * total)
        if fraction > 0.0:
            height = fraction * intensity * (power - 1.0) / (np.pi * radius * radius)
            for r in range(
                max(int(np.ceil(y - tail_reach)), 0), min(int(np.floor(y + tail_reach)), rows - 1) + 1
            ):
                for q in range(
                    max(int(np.ceil(x - tail_reach)), 0), min(int(np.floor(x + tail_reach)), columns - 1) + 1
                ):
                    d2 = (r - y) ** 2 + (q - x) ** 2
                    if d2 <= tail_reach * tail_reach:
                        image[r, q] += np.float32(height * (1.0 + d2 / (radius * radius)) ** (-power))


def _shapes(n: int, fwhm_px: npt.ArrayLike, tilt_deg: npt.ArrayLike) -> FloatArray:
    """Return (a, b, c, reach) of n spots: inverse covariance, and where the Gaussian has died out."""
    f = np.asarray(fwhm_px, dtype=np.float64)
    if f.ndim == 1:
        f = f[:, None]
    f = np.broadcast_to(f, (n, 2))
    if not (np.isfinite(f).all() and (f > 0).all()):
        raise ValueError("full widths at half maximum must be positive numbers")
    t = np.radians(np.broadcast_to(np.asarray(tilt_deg, dtype=np.float64), (n,)))
    u, v = (_FWHM / f[:, 0]) ** 2, (_FWHM / f[:, 1]) ** 2
    co, si = np.cos(t), np.sin(t)
    reach = 6.0 * f.max(axis=1) / _FWHM + 1.0
    return np.stack([u * co**2 + v * si**2, (u - v) * co * si, u * si**2 + v * co**2, reach], axis=1)


def expected_frame(
    shape: tuple[int, int],
    xy_px: npt.ArrayLike,
    intensity: npt.ArrayLike,
    fwhm_px: npt.ArrayLike,
    tilt_deg: npt.ArrayLike = 0.0,
    background: Background | None = Background(),
    psf_tail: Tail | None = None,
) -> npt.NDArray[np.float32]:
    """Return the noise-free frame, (rows, columns) float32 counts.

    Parameters
    ----------
    shape : (int, int)
        Rows, columns.
    xy_px : (n, 2)
        x (column) and y (row) from 0; spots outside the frame reach into it, NaN is left out.
    intensity : (n,)
        Integrated counts.
    fwhm_px : float, (n,) or (n, 2)
        Full widths at half maximum, along the major and minor axis when (n, 2).
    tilt_deg : float or (n,)
        From the x axis to the major axis, towards y.
    background : Background, optional
        None: no background.
    psf_tail : Tail, optional
    """
    xy = np.asarray(xy_px, dtype=np.float64).reshape(-1, 2)
    total = np.broadcast_to(np.asarray(intensity, dtype=np.float64), (len(xy),))
    image = np.zeros(shape, np.float32) if background is None else background.image(shape)
    tail = np.zeros(4) if psf_tail is None else np.array(
        [psf_tail.fraction, psf_tail.radius_px, psf_tail.power, psf_tail.reach_px]
    )  # fmt: skip
    if psf_tail is None:
        tail[1:3] = 1.0, 2.0
    _add_spots(
        image, np.column_stack([xy, total]), _shapes(len(xy), fwhm_px, tilt_deg), tail, _NODES, _WEIGHTS
    )
    return image


@kernel("void(float32[:, ::1], float32[:, ::1], float64, float64)")
def _expose(expected: Any, normal: Any, gain: float, readout: float) -> None:
    """Replace expected counts by noisy ones; `normal` holds one standard normal number a pixel.

    Below `_EXACT_BELOW` photons the Poisson law is inverted at Φ(z). Above, the Cornish-Fisher
    expansion μ + √μ z + (z² − 1)/6 is off by less than 0.03 √μ within 5 sigma; the read-out
    noise enters through the variance there, and is left to the caller below.
    """
    variance = readout * readout
    rows, columns = expected.shape
    for r in range(rows):
        for c in range(columns):
            counts, z = float(expected[r, c]), float(normal[r, c])
            photons = counts / gain
            if photons >= 30.0:
                s2 = gain * counts + variance
                value = counts + np.sqrt(s2) * z + gain * gain * counts / s2 * (z * z - 1.0) / 6.0 * gain
                if variance == 0.0:
                    value = max(gain * np.rint(value / gain), 0.0)
                expected[r, c] = np.float32(value)
            elif photons > 0.0:
                u = 0.5 * math.erfc(-z / math.sqrt(2.0))
                term = math.exp(-photons)
                below, k = term, 0
                while below < u and k < 200:
                    k += 1
                    term *= photons / k
                    below += term
                expected[r, c] = np.float32(gain * k)


@kernel("void(float32[:, ::1], float32[:, ::1], float32[:, ::1], float64, float64)")
def _read_out(exposed: Any, expected: Any, normal: Any, gain: float, readout: float) -> None:
    """Add read-out noise where `_expose` has not."""
    for r in range(exposed.shape[0]):
        for c in range(exposed.shape[1]):
            if expected[r, c] < np.float32(30.0 * gain):
                exposed[r, c] += np.float32(readout) * normal[r, c]


def add_noise(
    expected: npt.NDArray[np.float32],
    rng: np.random.Generator,
    *,
    gain: float = 1.0,
    readout_noise: float = 0.0,
    offset: float = 0.0,
    dtype: npt.DTypeLike = np.uint16,
    saturation: float | None = None,
) -> npt.NDArray[Any]:
    """Return a frame as read out.

    Parameters
    ----------
    expected : (rows, columns) float32
        Counts; not changed.
    gain : float
        Counts per photon: the variance of a pixel is gain * counts + readout_noise².
    readout_noise : float
        Standard deviation, counts.
    offset : float
        Added after the noise: the detector's pedestal.
    saturation : float, optional
        Values are cut there; by default at the largest value of an integer type.
    """
    if not (gain > 0 and readout_noise >= 0):
        raise ValueError(f"gain ({gain}) must be positive, readout_noise ({readout_noise}) 0 or more")
    kind = np.dtype(dtype)
    image = expected.copy()
    _expose(image, rng.standard_normal(image.shape, dtype=np.float32), gain, readout_noise)
    if readout_noise > 0 and float(expected.min()) < _EXACT_BELOW * gain:
        normal = rng.standard_normal(image.shape, dtype=np.float32)
        _read_out(image, expected, normal, gain, readout_noise)
    if offset:
        image += np.float32(offset)
    highest = float(np.iinfo(kind).max) if kind.kind in "iu" else math.inf
    lowest = float(np.iinfo(kind).min) if kind.kind in "iu" else -math.inf
    highest = highest if saturation is None else min(saturation, highest)
    if kind.kind in "iu":
        np.rint(image, out=image)
        # float32 cannot hold the largest 32-bit integers; the cast must not run over.
        highest = min(
            highest, float(np.nextafter(np.float32(highest), np.float32(0))) if highest > 2**24 else highest
        )
    np.clip(image, np.float32(lowest), np.float32(highest), out=image)
    return image.astype(kind, copy=False)


def render_frame(
    shape: tuple[int, int],
    xy_px: npt.ArrayLike,
    intensity: npt.ArrayLike,
    fwhm_px: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    tilt_deg: npt.ArrayLike = 0.0,
    background: Background | None = Background(),
    psf_tail: Tail | None = None,
    gain: float = 1.0,
    readout_noise: float = 0.0,
    offset: float = 0.0,
    dtype: npt.DTypeLike = np.uint16,
    saturation: float | None = None,
) -> npt.NDArray[Any]:
    """Render spots into a frame with noise: `expected_frame`, then `add_noise`."""
    expected = expected_frame(shape, xy_px, intensity, fwhm_px, tilt_deg, background, psf_tail)
    return add_noise(
        expected,
        rng,
        gain=gain,
        readout_noise=readout_noise,
        offset=offset,
        dtype=dtype,
        saturation=saturation,
    )


def _alone(
    xy_px: npt.ArrayLike, intensity: npt.ArrayLike, fwhm_px: npt.ArrayLike, tilt_deg: npt.ArrayLike
) -> FloatArray:
    """Return the middle 7 x 7 expected pixels of each spot by itself, (n, 7, 7)."""
    xy = np.asarray(xy_px, dtype=np.float64).reshape(-1, 2)
    n, half = len(xy), 12
    step = 2 * half + 1
    # Side by side on a strip, each at its own phase within the pixel.
    where = xy - np.rint(xy) + np.stack([half + step * np.arange(n), np.full(n, half)], axis=1)
    strip = expected_frame((step, max(step * n, 1)), where, intensity, fwhm_px, tilt_deg, None)
    cells = strip[:, : step * n].reshape(step, n, step).transpose(1, 0, 2).astype(np.float64)
    return np.asarray(cells[:, half - 3 : half + 4, half - 3 : half + 4])


def spot_snr(
    xy_px: npt.ArrayLike,
    intensity: npt.ArrayLike,
    fwhm_px: npt.ArrayLike,
    background_counts: npt.ArrayLike,
    *,
    tilt_deg: npt.ArrayLike = 0.0,
    gain: float = 1.0,
    readout_noise: float = 0.0,
) -> FloatArray:
    """Return each spot's expected signal-to-noise ratio in the sense of the peak search, (n,).

    The spot alone, without noise, through the search's filter, at the pixel where the response
    is largest, over the standard deviation of the response of background without spots,
    KERNEL_NORM sqrt(gain * background + readout_noise²).

    Parameters
    ----------
    background_counts : float or (n,)
        Background under the spot (`Background.at`).
    """
    cells = _alone(xy_px, intensity, fwhm_px, tilt_deg)
    views = np.lib.stride_tricks.sliding_window_view(cells, (5, 5), axis=(1, 2))
    response = np.einsum("nijab,ab->nij", views, KERNEL_2D).max(axis=(1, 2))
    noise = KERNEL_NORM * np.sqrt(gain * np.asarray(background_counts, dtype=np.float64) + readout_noise**2)
    return np.asarray(response / noise)


def spot_height_sigma(
    xy_px: npt.ArrayLike,
    intensity: npt.ArrayLike,
    fwhm_px: npt.ArrayLike,
    background_counts: npt.ArrayLike,
    *,
    tilt_deg: npt.ArrayLike = 0.0,
    gain: float = 1.0,
    readout_noise: float = 0.0,
) -> FloatArray:
    """Return each spot's expected height in standard deviations of a background pixel, (n,).

    What thresholds on raw pixels mean by sigma: counts above the background in the brightest
    pixel over sqrt(gain * background + readout_noise²). A spot of 2.4 px full width that is 5
    sigma high has a `spot_snr` of 9.
    """
    height = _alone(xy_px, intensity, fwhm_px, tilt_deg).max(axis=(1, 2))
    noise = np.sqrt(gain * np.asarray(background_counts, dtype=np.float64) + readout_noise**2)
    return np.asarray(height / noise)


def least_snr(
    threshold_sigma: float, background_counts: npt.ArrayLike, *, gain: float = 1.0, readout_noise: float = 0.0
) -> FloatArray:
    """Return the `spot_snr` at which the search's threshold lies, (...).

    `threshold_sigma` plus the allowance for the skewness of Poisson noise (`poisson_excess`).
    """
    counts = np.asarray(background_counts, dtype=np.float64)
    sigma = KERNEL_NORM * np.sqrt(gain * counts + readout_noise**2)
    return np.asarray(threshold_sigma + poisson_excess(threshold_sigma, gain) / sigma)
