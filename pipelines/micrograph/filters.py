"""Median filter and gradients of 8-bit images, in one pass and little memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel
from pipelines.micrograph.grey import ByteImage, bands


def median_filter(image: ByteImage, size_px: int) -> ByteImage:
    """Return an image whose pixels are the medians of squares around them; edges are repeated outwards.

    Parameters
    ----------
    image : (rows, columns) uint8
    size_px : int
        Side of the square, odd; 1 changes nothing.

    Raises
    ------
    ValueError
        If the size is even or less than 1.
    """
    if size_px < 1 or size_px % 2 == 0:
        raise ValueError(f"median_px: expected an odd number from 1, got {size_px}")
    if size_px == 1:
        return image
    out = np.empty_like(image, order="C")
    reach = size_px // 2
    rows, columns = image.shape
    for band in bands(rows, columns):
        block = image[max(band.start - reach, 0) : min(band.stop + reach, rows)]
        above = reach - (band.start - max(band.start - reach, 0))
        below = reach - (min(band.stop + reach, rows) - band.stop)
        padded = np.pad(block, ((above, below), (reach, reach)), mode="edge")
        if size_px == 3:
            out[band] = _median_of_nine(padded)
        else:
            out[band] = _median_of_square(padded, size_px)
    return out


def _median_of_nine(padded: ByteImage) -> ByteImage:
    # Columns of three are sorted; the median of nine is the median of the largest of their least, the median
    # of their middles, and the least of their largest (Paeth, in Graphics Gems, 1990).
    a, b, c = padded[:-2], padded[1:-1], padded[2:]
    low, high = np.minimum(a, b), np.maximum(a, b)
    middle = np.minimum(high, c)
    high = np.maximum(high, c)
    low, middle = np.minimum(low, middle), np.maximum(low, middle)
    largest_low = np.maximum(np.maximum(low[:, :-2], low[:, 1:-1]), low[:, 2:])
    least_high = np.minimum(np.minimum(high[:, :-2], high[:, 1:-1]), high[:, 2:])
    return _median_of_three(
        largest_low, _median_of_three(middle[:, :-2], middle[:, 1:-1], middle[:, 2:]), least_high
    )


def _median_of_three(a: ByteImage, b: ByteImage, c: ByteImage) -> ByteImage:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


@kernel("uint8[:, ::1](Array(uint8, 2, 'C', readonly=True), int64)")
def _median_of_square(padded: ByteImage, size: int) -> ByteImage:
    # A histogram moves along with the square; from pixel to pixel its median moves little (Huang, Yang &
    # Tang, IEEE Trans. Acoust. Speech Signal Process. 27, 13, 1979).
    rows, columns = padded.shape[0] - size + 1, padded.shape[1] - size + 1
    out = np.empty((rows, columns), dtype=np.uint8)
    half = size * size // 2
    counts = np.empty(256, dtype=np.int64)
    for row in range(rows):
        counts[:] = 0
        for down in range(size):
            for across in range(size):
                counts[padded[row + down, across]] += 1
        median = 0
        below = 0  # pixels darker than the median
        for column in range(columns):
            if column > 0:
                for down in range(size):
                    gone = padded[row + down, column - 1]
                    come = padded[row + down, column + size - 1]
                    counts[gone] -= 1
                    counts[come] += 1
                    below += int(come < median) - int(gone < median)
            while below > half:
                median -= 1
                below -= counts[median]
            while below + counts[median] <= half:
                below += counts[median]
                median += 1
            out[row, column] = median
    return out


@kernel("int64[::1](Array(uint8, 2, 'C', readonly=True))")
def gradient_histogram(image: ByteImage) -> npt.NDArray[np.int64]:
    """Count the gradients of an image: the larger difference to the next pixel right and below.

    Parameters
    ----------
    image : (rows, columns) uint8

    Returns
    -------
    (256,) int64
    """
    counts = np.zeros(256, dtype=np.int64)
    for row in range(image.shape[0] - 1):
        for column in range(image.shape[1] - 1):
            here = np.int64(image[row, column])
            right = abs(np.int64(image[row, column + 1]) - here)
            below = abs(np.int64(image[row + 1, column]) - here)
            counts[max(right, below)] += 1
    return counts
