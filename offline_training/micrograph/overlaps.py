"""Images that show partly the same place: one held out beside another that was trained on says nothing.

Files of one session often overlap, and their names seldom say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

ByteImage = npt.NDArray[np.uint8]
FloatImage = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MOST_IMAGES: Final = 400
"""All pairs are compared: 400 images take two minutes."""
_SIDE_PX = 160
_MOST_SIDE_PX = 320
_SHADING_PX = 8.0
_LEAST_SHARE = 0.25
_ALIKE = 0.5
"""Micrographs of steel that overlap reach 0.58 to 0.85; unrelated pale ones with the same scale bar, 0.32."""
_DEVIATIONS = 3.0
_SIGMAS = 6.0
"""What few and coarse structures reach by chance, over all shifts, stays below so many deviations."""
_SURE = 0.9
"""So much is asked for at most, but of what repeats itself.

Lamellae whose places wander by 0.05 periods resemble other ones, shifted by whole periods, up to 0.98.
"""


def overlapping(images: Sequence[ByteImage]) -> list[tuple[int, int]]:
    """Return pairs of images that share a quarter of the smaller one or more, as the correlation says.

    Images are made smaller (the longer side of a usual one 160 px; of those that stay larger than 320 px the
    middle is taken), their shading is taken away, and they are compared at all shifts. Turned images and
    other magnifications are not found. Neither are places of what repeats itself throughout (a grating): one
    looks like any other.

    Parameters
    ----------
    images : sequence of (rows, columns) uint8 arrays
        At most `MOST_IMAGES`.

    Raises
    ------
    ValueError
        If there are more.
    """
    if len(images) > MOST_IMAGES:
        raise ValueError(f"{len(images)} images: expected {MOST_IMAGES} at most")
    if len(images) < 2:
        return []
    # All by the same step: a pixel has to stay the same length.
    longest = sorted(max(image.shape) for image in images)
    step = max(1, longest[len(longest) // 2] // _SIDE_PX)
    small = [_small(image, min(step, *image.shape)) for image in images]
    rows, columns = (
        fft.next_fast_len(2 * max(image.shape[axis] for image in small), real=True) for axis in (0, 1)
    )
    spectra = [fft.rfft2(image, (rows, columns)) for image in small]
    # Bartlett: a correlation over n pixels deviates by √(Σ ρ² / n) by chance, ρ of an image with itself.
    grain = [
        math.sqrt(
            max(1.0, float(np.square(fft.irfft2(np.square(np.abs(f)), (rows, columns)) / one.size).sum()))
        )
        for f, one in zip(spectra, small, strict=True)
    ]
    found = []
    for i, one in enumerate(small):
        for j, other in enumerate(small[:i]):
            area = np.outer(
                _shared(one.shape[0], other.shape[0], rows), _shared(one.shape[1], other.shape[1], columns)
            )
            area[area < _LEAST_SHARE * min(one.size, other.size)] = np.inf
            alike = fft.irfft2(spectra[i] * spectra[j].conj(), (rows, columns)) / area
            least = np.maximum(_by_chance(area / (grain[i] * grain[j])), _ALIKE)
            at = np.nonzero(alike > least)
            if not len(at[0]):
                continue
            # Where shared parts have more contrast than the whole images that was too much, up to above 1.
            shifts = _signed(at[0], rows), _signed(at[1], columns)
            if np.any(_of_shared(one, other, shifts, alike[at]) > least[at]):
                found.append((j, i))
    return found


def _by_chance(independent: FloatImage) -> FloatImage:
    """Return the correlation that chance does not reach over so many independent values.

    Deviations say it, as long as there are many values. A correlation is 1 at most, so where there are few
    (stripes, rolled sheet) they say nothing; artanh of it deviates by 1 / √(n − 3) (Fisher, Metron 1, 1921).
    """
    least: FloatImage = np.divide(_SIGMAS, np.sqrt(independent), dtype=np.float32)
    few = least > _SURE
    fisher = np.tanh(_SIGMAS / np.sqrt(np.maximum(independent[few] - 3.0, 1e-6)))
    least[few] = np.minimum(least[few], np.maximum(fisher, _SURE))
    return least


def _of_shared(
    one: FloatImage, other: FloatImage, shifts: tuple[IntArray, IntArray], products: FloatArray
) -> FloatArray:
    """Return the correlation coefficients of what two images share, at some shifts (down, across).

    Parameters
    ----------
    one, other : (rows, columns) float32
    shifts : two of (k,) int64
        Of `other`; may be negative.
    products : (k,) float
        Mean products of what they share.

    Returns
    -------
    (k,) float64
        −1 to 1.
    """
    down, across = shifts
    mean, variance = _moments(one, other.shape, down, across)
    other_mean, other_variance = _moments(other, one.shape, -down, -across)
    deviations = np.sqrt(np.maximum(variance, 1e-6) * np.maximum(other_variance, 1e-6))
    return np.asarray((products - mean * other_mean) / deviations, dtype=np.float64)


def _moments(
    image: FloatImage, beside: tuple[int, ...], down: IntArray, across: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Return mean and variance, (k,), of the parts of an image that one of another shape lies over."""
    top, left = np.maximum(0, down), np.maximum(0, across)
    bottom = np.minimum(image.shape[0], beside[0] + down)
    right = np.minimum(image.shape[1], beside[1] + across)
    means = []
    for values in (image, np.square(image)):
        table = np.zeros((image.shape[0] + 1, image.shape[1] + 1))
        table[1:, 1:] = values.cumsum(0, dtype=np.float64).cumsum(1)
        total = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
        means.append(total / ((bottom - top) * (right - left)))
    return means[0], means[1] - np.square(means[0])


def _signed(shift: IntArray, around: int) -> IntArray:
    """Return shifts as a Fourier transform of this length counts them, those of its second half negative."""
    return np.where(shift > around // 2, shift - around, shift)


@cache
def _shared(one: int, other: int, around: int) -> FloatImage:
    """Return how much of two lengths lies over each other at each shift, (around,); negative ones last."""
    shift = _signed(np.arange(around), around)
    shared: FloatImage = np.clip(np.minimum(one, other + shift) - np.maximum(0, shift), 0, None)
    return shared.astype(np.float32)


def joined(groups: Sequence[str], pairs: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Return the groups with those of each pair made one, called as the first of them."""
    home = {group: group for group in groups}

    def root(group: str) -> str:
        while home[group] != group:
            group = home[group]
        return group

    for one, other in pairs:
        first, second = sorted((root(groups[one]), root(groups[other])))
        home[second] = first
    return tuple(root(group) for group in groups)


def _small(image: ByteImage, step: int) -> FloatImage:
    rows, columns = (n // step for n in image.shape)
    top, left = (max(0, n - _MOST_SIDE_PX) // 2 for n in (rows, columns))
    rows, columns = min(rows, _MOST_SIDE_PX), min(columns, _MOST_SIDE_PX)
    cut = image[top * step : (top + rows) * step, left * step : (left + columns) * step]
    small = cut.reshape(rows, step, columns, step).mean((1, 3), dtype=np.float32)
    flat = small - ndimage.gaussian_filter(small, _SHADING_PX)
    # Saturated spots and what is burned in would decide alone.
    most = np.float32(_DEVIATIONS * 1.4826 * max(float(np.median(np.abs(flat))), 1e-6))
    flat = np.clip(flat, -most, most)
    even: FloatImage = flat / np.float32(max(float(flat.std()), 1e-6))
    return even
