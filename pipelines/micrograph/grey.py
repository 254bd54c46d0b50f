"""Images of any kind as 8-bit grey.

8-bit images stay as they are. All others are stretched linearly between two percentiles of their finite
pixels, so that a hot pixel does not decide over the contrast; what lies outside is clipped. What is lost
by that, the absolute brightness, is kept in `Grey.mean` and `Grey.std`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipelines.frame import BadFrame

ByteImage = npt.NDArray[np.uint8]

ONE_GREY: Final = "one_grey"
"""All pixels are equal."""
TWO_LEVELS: Final = "two_levels"
"""The image has two grey levels only: 1-bit, or thresholded before."""
TRUE_COLOUR: Final = "true_colour"
"""More than 0.1 % of the pixels are coloured: the luminance is used."""
NOT_FINITE: Final = "not_finite"
"""Some pixels are NaN, infinite or beyond 1e30: they are made black."""

#: Percentiles that become black and white, in images that are not 8-bit.
PERCENTILES: Final = (0.1, 99.9)
#: Larger images are refused unless the caller says otherwise.
MAX_PIXELS: Final = 1 << 27

_LARGEST: Final = 1e30  # no detector says more, and squares still have a value
_SAMPLE: Final = 1 << 20  # pixels that percentiles are taken from
_BAND: Final = 1 << 20  # pixels that are worked on at a time
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114  # luminance, Rec. ITU-R BT.601
_COLOURED_SHARE: Final = 1e-3
_COLOURED_LEVELS: Final = 6 / 255  # JPEG makes greys this coloured


@dataclass(frozen=True, slots=True, eq=False)
class Grey:
    """An image as 8-bit grey.

    Attributes
    ----------
    image : (rows, columns) uint8
    counts : (256,) int64
        Its histogram.
    mean, std : float
        Of the pixels as they came, as a share of `full_scale` of their type; where that is None, in their
        own unit. NaN where no pixel is finite.
    dark_share, bright_share : float
        Of pixels at the ends of what the detector could say: those of the type; 1023, 4095 or 16383 where
        that is the largest value of a 16-bit image; of other types the extremes of the image.
    flags : tuple of str
        The constants of this module.
    """

    image: ByteImage
    counts: npt.NDArray[np.int64]
    mean: float
    std: float
    dark_share: float
    bright_share: float
    flags: tuple[str, ...] = ()


def to_grey(
    pixels: npt.NDArray[Any],
    percentiles: tuple[float, float] = PERCENTILES,
    max_pixels: int = MAX_PIXELS,
    sample_rows: int | None = None,
) -> Grey:
    """Return an image as 8-bit grey; needs two to three bytes a pixel beside the input.

    Parameters
    ----------
    pixels : (rows, columns) or (rows, columns, channels) array
        Of booleans, integers or floats; one channel, grey and alpha, RGB, or RGB and alpha (alpha is left
        out).
    percentiles : (float, float)
        What becomes black and white in images that are not 8-bit.
    max_pixels : int
    sample_rows : int, optional
        So many rows at the top decide over the contrast; None for all.

    Raises
    ------
    BadFrame
        If it is no image of numbers, has no pixels, or more than `max_pixels`.
    """
    check_size(pixels, max_pixels)
    flat, flags = _one_channel(pixels)
    if not flat.dtype.isnative:
        flat = flat.astype(flat.dtype.newbyteorder("="))
    if flat.dtype == np.uint8:
        return _of_bytes(flat, flags)
    if flat.dtype == np.bool_:
        return _of_bytes(flat.astype(np.uint8) * np.uint8(255), flags)
    return _stretched(flat, percentiles, flags, sample_rows or len(flat))


def check_size(pixels: npt.NDArray[Any], max_pixels: int = MAX_PIXELS) -> None:
    """Refuse what is no image of numbers, has no pixels or too many.

    Raises
    ------
    BadFrame
        Naming which.
    """
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or not 1 <= channels <= 4:
        raise BadFrame(f"is no image: an array of shape {pixels.shape}, expected rows x columns (x channels)")
    if pixels.dtype.kind not in "buif":
        raise BadFrame(f"is no image: pixels of type {pixels.dtype}")
    rows, columns = pixels.shape[:2]
    if rows * columns == 0:
        raise BadFrame(f"is no image: {columns} x {rows} pixels")
    if rows * columns > max_pixels:
        raise BadFrame(f"image of {columns} x {rows} pixels is too large: more than {max_pixels} pixels")


def bands(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows that hold about a million pixels each."""
    step = max(1, _BAND // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def full_scale(dtype: np.dtype[Any]) -> float | None:
    """Return the largest value of a type that detectors fill: 8 and 16 bits without sign, or one bit.

    None for all others: floating-point images and wide integers hold counts, currents or heights, and nothing
    says how large these may get.
    """
    return {"b1": 1.0, "u1": 255.0, "u2": 65535.0}.get(dtype.str[1:])


def _one_channel(pixels: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], list[str]]:
    if pixels.ndim == 2:
        return pixels, []
    if pixels.shape[2] < 3:
        return pixels[:, :, 0], []
    rows, columns = pixels.shape[:2]
    tolerance: Any = 0.0
    if pixels.dtype.kind in "iu":
        tolerance = _COLOURED_LEVELS * np.iinfo(pixels.dtype).max
    elif pixels.dtype.kind == "f":
        largest = float(np.max(np.abs(pixels[..., :3]), initial=0.0, where=np.isfinite(pixels[..., :3])))
        tolerance = _COLOURED_LEVELS * largest
    coloured = 0
    for band in bands(rows, columns):
        red, green, blue = _channels(pixels[band])
        with np.errstate(invalid="ignore"):
            span = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
            coloured += int(np.count_nonzero(span > tolerance))
    if coloured <= _COLOURED_SHARE * rows * columns:
        return pixels[:, :, 1], []
    if pixels.dtype.kind == "b":
        pixels = pixels.view(np.uint8) * np.uint8(255)
    luminance = np.empty((rows, columns), dtype=pixels.dtype)
    for band in bands(rows, columns):
        red, green, blue = _channels(pixels[band])
        value = _RED * red + _GREEN * green + _BLUE * blue
        luminance[band] = value if pixels.dtype.kind == "f" else np.rint(value)
    return luminance, [TRUE_COLOUR]


def _channels(pixels: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    # Differences of signed numbers overflow, and there are none of booleans.
    own = pixels.dtype.kind == "u"
    return [pixels[:, :, n] if own else pixels[:, :, n].astype(np.float64) for n in range(3)]


def _of_bytes(pixels: ByteImage, flags: list[str]) -> Grey:
    image = np.ascontiguousarray(pixels)
    counts = histogram(image)
    levels = np.flatnonzero(counts)
    share = counts / image.size
    mean = float(share @ np.arange(256))
    std = float(np.sqrt(max(share @ np.square(np.arange(256) - mean), 0.0)))
    dark, bright = float(share[0]), float(share[255])
    if len(levels) == 1:
        flags.append(ONE_GREY)
    elif len(levels) == 2:
        flags.append(TWO_LEVELS)
        # 0 and 1 of a 1-bit image that its reader made bytes of are black and white.
        image = np.where(image == levels[1], np.uint8(255), np.uint8(0))
        counts = histogram(image)
    return Grey(image, counts, mean / 255.0, std / 255.0, dark, bright, tuple(flags))


def _stretched(
    pixels: npt.NDArray[Any], percentiles: tuple[float, float], flags: list[str], sample_rows: int
) -> Grey:
    rows, columns = pixels.shape
    step = max(1, int(np.ceil(np.sqrt(pixels.size / _SAMPLE))))
    sample = pixels[:sample_rows:step, ::step].ravel()
    if pixels.dtype.kind == "f":
        sample = sample[np.abs(sample) <= _LARGEST].astype(np.float64)
    if not sample.size:
        image = np.zeros(pixels.shape, dtype=np.uint8)
        return Grey(image, histogram(image), np.nan, np.nan, 1.0, 0.0, (*flags, NOT_FINITE, ONE_GREY))
    black, white = _percentiles(sample, percentiles)
    centre = float(sample[0])  # sums of squares about a value that occurs lose no digits
    low, high, total, squares, finite = np.inf, -np.inf, 0.0, 0.0, 0
    for band in bands(rows, columns):
        values = pixels[band].astype(np.float64)
        values = values[np.abs(values) <= _LARGEST]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            finite += values.size
            values -= centre
            total += float(np.sum(values))
            squares += float(np.sum(np.square(values)))
    if white <= black:  # hardly any pixel differs from the rest
        black, white = low, high
    bottom, top = _ends(pixels.dtype, low, high)
    span = white - black if white > black else 1.0
    image = np.empty(pixels.shape, dtype=np.uint8)
    n_dark = n_bright = 0
    for band in bands(rows, columns):
        values = pixels[band].astype(np.float64)
        good = np.abs(values) <= _LARGEST
        values = np.where(good, values, black)
        n_dark += int(np.count_nonzero(good & (values <= bottom)))
        n_bright += int(np.count_nonzero(good & (values >= top)))
        image[band] = np.rint((np.clip(values, black, white) - black) / span * 255.0)
    if finite < pixels.size:
        flags.append(NOT_FINITE)
    counts = histogram(image)
    if low == high:
        flags.append(ONE_GREY)
    elif np.count_nonzero(counts) == 2:
        flags.append(TWO_LEVELS)
    full = full_scale(pixels.dtype) or 1.0
    shift = total / finite
    std = float(np.sqrt(max(squares / finite - shift * shift, 0.0)))
    return Grey(
        image, counts, (centre + shift) / full, std / full, n_dark / finite, n_bright / finite, tuple(flags)
    )


def _percentiles(sample: npt.NDArray[Any], shares: tuple[float, float]) -> tuple[float, float]:
    if sample.dtype.kind != "u" or sample.dtype.itemsize != 2:
        low, high = np.percentile(sample, shares)
        return float(low), float(high)
    # Counting 65536 values is eight times as fast as sorting, and gives the same.
    below = np.cumsum(np.bincount(sample, minlength=65536))
    place = np.array(shares) / 100.0 * (sample.size - 1)
    lower, upper = (np.searchsorted(below, rank(place), side="right") for rank in (np.floor, np.ceil))
    low, high = lower + (upper - lower) * (place - np.floor(place))
    return float(low), float(high)


def _ends(dtype: np.dtype[Any], low: float, high: float) -> tuple[float, float]:
    """Return the values at which a detector saturates."""
    if dtype != np.uint16:
        return low, high
    # Detectors of 10, 12 and 14 bits are stored as 16.
    return 0.0, high if high in (1023.0, 4095.0, 16383.0) else 65535.0


def histogram(image: ByteImage) -> npt.NDArray[np.int64]:
    """Return the number of pixels of each of the 256 grey levels."""
    counts = np.zeros(256, dtype=np.int64)
    for band in bands(*image.shape):
        counts += np.bincount(image[band].ravel(), minlength=256)
    return counts
