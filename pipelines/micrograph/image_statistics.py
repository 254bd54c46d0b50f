"""Numbers that show how an image was taken rather than what it shows, and what is wrong with it.

They are taken before the histogram is matched, which would hide every change of brightness and contrast.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from pipelines.micrograph.filters import gradient_histogram
from pipelines.micrograph.grey import ByteImage, Grey, histogram

SATURATED: Final = "saturated"
"""Too large a share of the pixels is at an end of what the detector can say."""
OUT_OF_FOCUS: Final = "out_of_focus"
"""The sharpest edges are wide: out of focus, or astigmatic, or magnified without detail."""
TOO_SMALL: Final = "too_small"
"""Not even one patch fits into the image."""

_SHARPEST: Final = 0.995
_CONTRAST: Final = (0.01, 0.99)


@dataclass(frozen=True, slots=True)
class DriftStatistics:
    """How bright, how contrasted, how sharp an image is.

    Attributes
    ----------
    mean, std : float
        Of the pixels as they came; a share of full scale, or in the pixels' own unit where they have none
        (see `pipelines.micrograph.grey.Grey`).
    entropy_bits : float
        Of the histogram of 256 greys (Shannon): 0 to 8.
    sharpness : float
        Per pixel: the 99.5th percentile of the gradient over the contrast (1st to 99th percentile of the
        greys), after the median filter; 1 / sharpness is about the width of sharp edges in pixels. 0 for an
        image of one grey. Sharp SEM images have 0.19 to 0.85; blurred with a Gaussian of 5 px 0.02 to 0.12.
        Noise that the median filter leaves counts as edges.
    dark_share, bright_share : float
        Of pixels at the ends of what the detector could say; without a full scale, at those of the image.
    """

    mean: float
    std: float
    entropy_bits: float
    sharpness: float
    dark_share: float
    bright_share: float

    def vector(self) -> npt.NDArray[np.float64]:
        """Return them in this order, (6,) float64, for a drift alarm."""
        return np.array(astuple(self))


STATISTICS: Final = tuple(field.name for field in fields(DriftStatistics))
"""Names of what `DriftStatistics.vector` holds."""


@dataclass(frozen=True, slots=True)
class AcquisitionLimits:
    """From where on an image is flagged.

    Attributes
    ----------
    saturated_share : float
        `SATURATED` above it, at either end. Of 150 published SEM images of etched steel 1 in 15 is above.
    least_sharpness : float
        `OUT_OF_FOCUS` below it. All of 168 published SEM images are above 0.18; blurred with a Gaussian of
        5 px 19 in 20 are below.
    """

    saturated_share: float = 0.10
    least_sharpness: float = 0.10


def drift_statistics(grey: Grey, filtered: ByteImage) -> DriftStatistics:
    """Measure an image.

    Parameters
    ----------
    grey : Grey
        Without its data bar.
    filtered : (rows, columns) uint8
        Its image after the median filter.
    """
    share = grey.counts[grey.counts > 0] / grey.image.size
    return DriftStatistics(
        mean=grey.mean,
        std=grey.std,
        entropy_bits=max(0.0, -float(share @ np.log2(share))),
        sharpness=sharpness(filtered),
        dark_share=grey.dark_share,
        bright_share=grey.bright_share,
    )


def sharpness(image: ByteImage) -> float:
    """Return how much of the contrast the sharpest edges span within a pixel; see `DriftStatistics`."""
    gradients = gradient_histogram(np.ascontiguousarray(image))
    low, high = _quantiles(histogram(image), _CONTRAST)
    if high == low or not gradients.any():
        return 0.0
    (steepest,) = _quantiles(gradients, (_SHARPEST,))
    return steepest / (high - low)


def acquisition_flags(
    statistics: DriftStatistics, limits: AcquisitionLimits, *, two_levels: bool = False
) -> tuple[str, ...]:
    """Return what is wrong with how an image was taken, without those of its kind (`to_grey`).

    Parameters
    ----------
    statistics : DriftStatistics
    limits : AcquisitionLimits
    two_levels : bool
        Of a thresholded image every pixel is at an end; that has a flag of its own.
    """
    flags = []
    if not two_levels and max(statistics.dark_share, statistics.bright_share) > limits.saturated_share:
        flags.append(SATURATED)
    if statistics.sharpness < limits.least_sharpness:
        flags.append(OUT_OF_FOCUS)
    return tuple(flags)


def _quantiles(counts: npt.NDArray[np.int64], shares: tuple[float, ...]) -> list[int]:
    total = int(counts.sum())
    return [int(level) for level in np.searchsorted(np.cumsum(counts), np.array(shares) * total)]
