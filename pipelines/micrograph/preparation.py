"""From an image as it comes to one that networks and morphology can take.

Lambard et al. (npj Comput. Mater. 9, 18, 2023, Methods) bring SEM images to 8-bit grey, filter them by a
median, match their histograms to a reference and crop. Here the data bar goes first, and what the paper
leaves open (reference, size of the filter, cropping) is part of `PreparationParameters`, which a model
bundle keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipelines.frame import BadFrame
from pipelines.micrograph import grey as grey_images
from pipelines.micrograph.acquisition import UNKNOWN, Acquisition
from pipelines.micrograph.data_bar import MOST_SHARE, find_data_bar
from pipelines.micrograph.filters import median_filter
from pipelines.micrograph.grey import ByteImage, check_size, to_grey
from pipelines.micrograph.image_statistics import (
    TOO_SMALL,
    AcquisitionLimits,
    DriftStatistics,
    acquisition_flags,
    drift_statistics,
)
from pipelines.micrograph.matching import ReferenceHistogram

DATA_BAR_ONLY: Final = "data_bar_only"
"""There is nothing but a data bar."""
DATA_BAR_GUESSED: Final = "data_bar_guessed"
"""The metadata say nothing of a data bar; one was seen and cut off."""


@dataclass(frozen=True, slots=True)
class PreparationParameters:
    """How images are prepared.

    Attributes
    ----------
    percentiles : (float, float)
        What becomes black and white in images that are not 8-bit.
    median_px : int
        Side of the median filter, odd; 1 for none.
    reference : ReferenceHistogram, optional
        What histograms are matched to; None leaves them.
    crop : (int, int), optional
        Rows and columns of the middle that is kept; None keeps all. Smaller images stay as they are.
    patch_px : int
        Side of the patches.
    stride_px : int
        From one patch to the next; 0 for patches side by side.
    limits : AcquisitionLimits
    max_pixels : int
        Larger images are refused.

    Raises
    ------
    ValueError
        Naming the parameter that is wrong.
    """

    percentiles: tuple[float, float] = grey_images.PERCENTILES
    median_px: int = 3
    reference: ReferenceHistogram | None = None
    crop: tuple[int, int] | None = None
    patch_px: int = 128
    stride_px: int = 0
    limits: AcquisitionLimits = field(default_factory=AcquisitionLimits)
    max_pixels: int = grey_images.MAX_PIXELS

    def __post_init__(self) -> None:
        low, high = self.percentiles
        if not 0.0 <= low < high <= 100.0:
            raise ValueError(f"percentiles: expected two rising numbers from 0 to 100, got {low}, {high}")
        if self.median_px < 1 or self.median_px % 2 == 0 or self.median_px > 99:
            raise ValueError(f"median_px: expected an odd number from 1 to 99, got {self.median_px}")
        if self.crop is not None and min(self.crop) < 1:
            raise ValueError(f"crop: expected rows and columns from 1, got {self.crop}")
        if self.patch_px < 1:
            raise ValueError(f"patch_px: expected 1 or more, got {self.patch_px}")
        if self.stride_px < 0:
            raise ValueError(f"stride_px: expected 0 or more, got {self.stride_px}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels: expected 1 or more, got {self.max_pixels}")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """An image that is ready.

    Attributes
    ----------
    image : (rows, columns) uint8
        Filtered, matched, cropped: for networks. Without a reference it is `filtered`.
    filtered : (rows, columns) uint8
        The same before its histogram was matched: for morphology.
    statistics : DriftStatistics or None
        Before the median filter (but for sharpness) and before matching; None for a data bar only.
    data_bar_px : int
        Rows that were cut off at the bottom.
    flags : tuple of str
        Those of `grey`, `image_statistics` and this module.
    """

    image: ByteImage
    filtered: ByteImage
    statistics: DriftStatistics | None
    data_bar_px: int
    flags: tuple[str, ...]


def prepare(
    pixels: npt.NDArray[Any],
    parameters: PreparationParameters | None = None,
    acquisition: Acquisition = UNKNOWN,
) -> Prepared:
    """Prepare an image; two to five bytes a pixel are needed beside the input.

    Parameters
    ----------
    pixels : (rows, columns) or (rows, columns, channels) array
    parameters : PreparationParameters, optional
    acquisition : Acquisition
        Says how high the data bar is; where it does not, the bar is looked for.

    Raises
    ------
    BadFrame
        If it is no image, or too large.
    """
    use = parameters or PreparationParameters()
    check_size(pixels, use.max_pixels)
    flags: list[str] = []
    bar = acquisition.data_bar_px
    if bar is None:
        # The black and white of a bar must not decide over the contrast.
        above = max(1, round((1.0 - MOST_SHARE) * pixels.shape[0]))
        bar = find_data_bar(to_grey(pixels, use.percentiles, use.max_pixels, above).image)
        if bar:
            flags.append(DATA_BAR_GUESSED)
    rows = pixels.shape[0] - bar
    if rows <= 0:
        empty = np.zeros((0, pixels.shape[1]), dtype=np.uint8)
        return Prepared(empty, empty, None, bar, (*flags, DATA_BAR_ONLY, TOO_SMALL))
    grey = to_grey(pixels[:rows], use.percentiles, use.max_pixels)
    filtered = median_filter(grey.image, use.median_px)
    statistics = drift_statistics(grey, filtered)
    flags += grey.flags
    if grey_images.ONE_GREY not in grey.flags:
        two_levels = grey_images.TWO_LEVELS in grey.flags
        flags += acquisition_flags(statistics, use.limits, two_levels=two_levels)
    filtered = centre_crop(filtered, use.crop)
    if min(filtered.shape) < use.patch_px:
        flags.append(TOO_SMALL)
    image = filtered if use.reference is None else use.reference.match(filtered)
    return Prepared(image, filtered, statistics, bar, tuple(flags))


def centre_crop(image: ByteImage, size: tuple[int, int] | None) -> ByteImage:
    """Return the middle of an image (a view); what is smaller stays as it is."""
    if size is None:
        return image
    rows, columns = (min(wanted, has) for wanted, has in zip(size, image.shape, strict=True))
    top, left = (image.shape[0] - rows) // 2, (image.shape[1] - columns) // 2
    return image[top : top + rows, left : left + columns]


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """Squares cut from an image.

    Attributes
    ----------
    view : (down, across, size, size) uint8
        A read-only view of the image: nothing is copied.
    origin : (int, int)
        Row and column of the first patch.
    stride_px : int
    """

    view: ByteImage
    origin: tuple[int, int]
    stride_px: int

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.view.shape[0] * self.view.shape[1])

    def some(self, numbers: Sequence[int] | npt.NDArray[np.int64]) -> ByteImage:
        """Return patches by their number, row by row, as (n, size, size), copied."""
        down, across = np.divmod(np.asarray(numbers, dtype=np.int64), max(self.view.shape[1], 1))
        return np.asarray(self.view[down, across])


def cut_patches(image: ByteImage, size_px: int = 128, stride_px: int = 0) -> Patches:
    """Cut as many patches as fit, with equal margins around them; none where the image is too small.

    Parameters
    ----------
    image : (rows, columns) uint8
    size_px : int
    stride_px : int
        0 for patches side by side.

    Raises
    ------
    BadFrame
        If the size is less than 1.
    """
    if size_px < 1:
        raise BadFrame(f"patches of {size_px} px: expected 1 or more")
    stride = stride_px or size_px
    rows, columns = image.shape
    if min(rows, columns) < size_px:
        return Patches(np.zeros((0, 0, size_px, size_px), dtype=np.uint8), (0, 0), stride)
    top, left = ((length - size_px) % stride // 2 for length in (rows, columns))
    windows = np.lib.stride_tricks.sliding_window_view(image[top:, left:], (size_px, size_px))
    return Patches(windows[::stride, ::stride], (top, left), stride)
