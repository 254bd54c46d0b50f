"""The data bar that microscopes write below a picture, found by its look.

A bar has one background grey over the full width, text and a scale in strong contrast on it, and a straight
upper edge. All three are asked for: a dark hole in the sample has no straight edge, a horizontal stripe
of one phase has no text. Bars at the top, and text written into the picture itself, are not found.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from pipelines.micrograph.grey import ByteImage, histogram

#: A data bar is at most so much of the image's height.
MOST_SHARE: Final = 0.30

_TOLERANCE: Final = 10  # grey levels that compression changes a background by
_LEAST_ROWS: Final = 10
_LEAST_SHARE: Final = 0.015  # of the image's height
_BACKGROUND: Final = 0.30  # least share of a row of text
_MEAN_BACKGROUND: Final = 0.55
_EDGE: Final = 0.25  # by so much the share of the background falls at the upper edge
_LINE: Final = 0.95  # share of a frame's line that has its grey
_GAP: Final = 3  # rows of a frame or of a separating line
_INK_LEVELS: Final = 50
_INK: Final = (0.004, 0.45)  # share of pixels that are text, scale and logo
_FLAT_LEVELS: Final = 2
_FLAT: Final = 0.45  # share of pixels that have the background's grey exactly
_FLATTEST: Final = 4  # a bar without picture is so many times wider than high
_CHUNK: Final = 64


def find_data_bar(image: ByteImage) -> int:
    """Return how many rows at the bottom are a data bar, 0 for none, all of them for nothing else.

    Parameters
    ----------
    image : (rows, columns) uint8
    """
    rows, columns = image.shape
    least = max(_LEAST_ROWS, int(_LEAST_SHARE * rows))
    if rows < 2 * _LEAST_ROWS or columns < 2 * _LEAST_ROWS:
        return 0
    grey = int(np.argmax(histogram(image[-least:])))
    height, share = _height(image, grey)
    top = height + _frame_lines(image[: rows - height])
    alone = top == rows and columns >= _FLATTEST * rows
    if height < least or (top > MOST_SHARE * rows and not alone):
        return 0
    if float(share[:height].mean()) < _MEAN_BACKGROUND:
        return 0
    counts = histogram(image[rows - height :]) / (height * columns)
    distance = np.abs(np.arange(256) - grey)
    if not _INK[0] <= float(counts[distance > _INK_LEVELS].sum()) <= _INK[1]:
        return 0
    # Where nothing was filmed nothing flickers.
    if float(counts[distance <= _FLAT_LEVELS].sum()) < _FLAT:
        return 0
    if alone:
        return int(rows)
    above = share[top : top + 2 * _GAP]
    edge = share[max(height - 2 * _GAP, 0) : height]
    return top if float(np.max(edge)) - float(np.mean(above)) >= _EDGE else 0


def _height(image: ByteImage, grey: int) -> tuple[int, npt.NDArray[np.float64]]:
    """Count the rows from the bottom that look like a bar's; return the share of background in each, too.

    The shares go on for some rows above the bar.
    """
    rows = len(image)
    lowest = np.uint8(max(grey - _TOLERANCE, 0))
    width = np.uint8(min(2 * _TOLERANCE, grey + _TOLERANCE))
    share = np.empty(rows)
    height = known = 0
    while known < rows and known <= height + 4 * _GAP:
        chunk = image[max(rows - known - _CHUNK, 0) : rows - known][::-1]
        # Unsigned: what is darker than the range wraps around to above it.
        share[known : known + len(chunk)] = ((chunk - lowest) <= width).mean(axis=1)
        known += len(chunk)
        height = _below_gap(share[:known])
    return height, share[:known]


def _frame_lines(above: ByteImage) -> int:
    """Return how many rows above a bar are the upper line of its frame: of one grey, and few."""
    nearest = above[: -2 - _GAP : -1].astype(np.int16)
    own = np.abs(nearest - np.median(nearest, axis=1, keepdims=True)) <= _TOLERANCE
    other = np.flatnonzero(own.mean(axis=1) < _LINE)
    lines = int(other[0]) if other.size else len(nearest)
    return lines if lines <= _GAP else 0


def _below_gap(share: npt.NDArray[np.float64]) -> int:
    """Return the number of rows below the first gap that is too wide to be a line."""
    full = np.flatnonzero(share >= _BACKGROUND)
    if not full.size or full[0] > _GAP:
        return 0
    wide = np.flatnonzero(np.diff(full) > _GAP + 1)
    return int(full[wide[0]] if wide.size else full[-1]) + 1
