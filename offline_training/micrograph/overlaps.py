"""Images that show partly the same place: one held out beside another that was trained on says nothing.

Files of one session often overlap, and their names seldom say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

ByteImage = npt.NDArray[np.uint8]
FloatImage = npt.NDArray[np.float32]

MOST_IMAGES: Final = 400
"""All pairs are compared: 400 images take two minutes."""
_SIDE_PX = 160
_SHADING_PX = 8.0
_LEAST_SHARE = 0.25
_ALIKE = 0.5
"""Unrelated micrographs of steel reach 0.35, overlapping ones 0.58 to 0.82."""
_SIGMAS = 6.0
"""What few and coarse structures reach by chance, over all shifts, stays below so many deviations."""


def overlapping(images: Sequence[ByteImage]) -> list[tuple[int, int]]:
    """Return pairs of images that share a quarter of the smaller one or more, as the correlation says.

    Images are made smaller (the longer side of a usual one 160 px), their shading is taken away, and they
    are compared at all shifts. Turned images and other magnifications are not found.

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
    rows, columns = (2 * max(image.shape[axis] for image in small) for axis in (0, 1))
    shape = (fft.next_fast_len(rows, real=True), fft.next_fast_len(columns, real=True))
    spectra = [fft.rfft2(image, shape) for image in small]
    # Bartlett: a correlation over n pixels deviates by √(Σ ρ² / n) by chance, ρ of an image with itself.
    grain = [
        math.sqrt(float(np.square(fft.irfft2(np.square(np.abs(f)), shape) / one.size).sum()))
        for f, one in zip(spectra, small, strict=True)
    ]
    shared = {size: fft.rfft2(np.ones(size, np.float32), shape) for size in {image.shape for image in small}}
    areas: dict[tuple[tuple[int, ...], tuple[int, ...]], FloatImage] = {}
    found = []
    for i, one in enumerate(small):
        for j, other in enumerate(small[:i]):
            sizes = (one.shape, other.shape)
            if sizes not in areas:
                area = np.rint(fft.irfft2(shared[sizes[0]] * shared[sizes[1]].conj(), shape))
                least = _LEAST_SHARE * min(one.size, other.size)
                areas[sizes] = np.where(area >= least, area, np.inf).astype(np.float32)
            area = areas[sizes]
            alike = fft.irfft2(spectra[i] * spectra[j].conj(), shape) / area
            by_chance = _SIGMAS * math.sqrt(grain[i] * grain[j]) / np.sqrt(area)
            if np.any(alike > np.maximum(by_chance, _ALIKE)):
                found.append((j, i))
    return found


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
    cut = image[: rows * step, : columns * step].reshape(rows, step, columns, step)
    small = cut.mean((1, 3), dtype=np.float32)
    flat: FloatImage = small - ndimage.gaussian_filter(small, _SHADING_PX)
    return flat / np.float32(max(float(flat.std()), 1e-6))
