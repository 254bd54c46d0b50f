"""Histogram matching to a reference: cumulative histograms of 256 greys become equal.

Exact matching gives every image the grey levels of the reference, and so its share of bright pixels,
too: phase fractions are to be measured before (`pipelines.micrograph.morphology`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from pipelines.micrograph.grey import ByteImage, bands, histogram

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReferenceHistogram:
    """The histogram that images are matched to; a model bundle keeps it.

    Attributes
    ----------
    counts : tuple of 256 int
        Pixels of each grey level.

    Raises
    ------
    ValueError
        If there are not 256 counts from 0, or no pixel at all.
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.counts) != 256:
            raise ValueError(f"reference histogram: expected 256 counts, got {len(self.counts)}")
        if min(self.counts) < 0 or not any(self.counts):
            raise ValueError("reference histogram: expected counts from 0, and one above it")

    @classmethod
    def of(cls, images: Sequence[ByteImage]) -> Self:
        """Return the histogram of one or several reference images of 8 bits."""
        total = np.sum([histogram(image) for image in images], axis=0)
        return cls(tuple(int(count) for count in total))

    @classmethod
    def typical(cls, images: Sequence[ByteImage]) -> Self:
        """Return the histogram of the image that differs least from all others, by the sum of W1 distances.

        Of images that differ in brightness the sum of all histograms is none that an image ever had, and
        matching to it would tear one phase into several greys.
        """
        cumulative = np.array([np.cumsum(histogram(image)) / image.size for image in images])
        apart = [np.abs(cumulative - one).sum() for one in cumulative]
        return cls.of([images[int(np.argmin(apart))]])

    def lookup(self, counts: IntArray) -> npt.NDArray[np.uint8]:
        """Return the grey level that each level of an image becomes.

        Parameters
        ----------
        counts : (256,) int64
            Histogram of the image.

        Returns
        -------
        (256,) uint8
            Level with the same share of darker or equal pixels in the reference, interpolated between
            those that occur there (Gonzalez & Woods, Digital Image Processing, section 3.3).
        """
        own = np.asarray(self.counts, dtype=np.int64)
        levels = np.flatnonzero(own)
        share = np.cumsum(own)[levels] / own.sum()
        matched = np.interp(np.cumsum(counts) / max(int(counts.sum()), 1), share, levels)
        return np.rint(matched).astype(np.uint8)

    def match(self, image: ByteImage, counts: IntArray | None = None) -> ByteImage:
        """Return an image with this histogram; one pass over its pixels where `counts` are known."""
        table = self.lookup(histogram(image) if counts is None else counts)
        matched = np.empty_like(image, order="C")
        for band in bands(*image.shape):  # numpy makes indices eight times as large
            matched[band] = table[image[band]]
        return matched
