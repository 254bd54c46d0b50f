"""Peak search on raw frames: positions, intensities and shapes of Laue spots.

`search` is the door; `background` maps background and noise, `rows` and `detect` find the maxima of the
filtered response, `fit` fits them.
"""

from pipelines.laue.peaks.background import BackgroundMap
from pipelines.laue.peaks.parameters import PeakSearch
from pipelines.laue.peaks.search import (
    EDGE,
    FIT_FAILED,
    OVERLAP,
    SATURATED,
    PeakTable,
    background_map,
    empty_table,
    find_peaks,
)

__all__ = [
    "EDGE",
    "FIT_FAILED",
    "OVERLAP",
    "SATURATED",
    "BackgroundMap",
    "PeakSearch",
    "PeakTable",
    "background_map",
    "empty_table",
    "find_peaks",
]
