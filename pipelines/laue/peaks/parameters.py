"""Parameters of the peak search."""

from __future__ import annotations

import math
from dataclasses import dataclass

WINDOW_HALF = 8
"""Half size of the pixels looked at around a candidate, px."""


@dataclass(frozen=True)
class PeakSearch:
    """Parameters of the search.

    Attributes
    ----------
    threshold_sigma : float
        A spot's response must exceed the local background by so many standard deviations of
        the response without spots (see `detect`).
    box_px : int
        Half size of the smallest fitted window, px; wide spots get larger ones by themselves.
    separation_px : float
        Of two maxima nearer than this the stronger stays.
    prominence_sigma : float
        A maximum beside a stronger one counts when the valley between is so many sigmas deep.
    tile_px : int
        Size of the tiles of background and noise.
    saturation : float, optional
        Pixels at or above it are saturated; None: the largest value of an integer type.
    gain : float
        Counts per photon, for photon noise.
    min_noise : float
        Least standard deviation of a pixel, counts; None: that of rounding, 1/sqrt(12), for integers.
    max_sharpness : float
        A single hot pixel or cosmic is no spot. The height of the brightest pixel over the
        response must not exceed this, that of the two brightest not 1.4 times this. A spike has
        7.1 (a pair of pixels 8.5), a spot of 0.9 px full width 4.9 (6.9 between two pixels), one
        of 1.2 px 3.9 (5.9). Infinity accepts all, for detectors with spots inside one pixel.
    max_peaks : int
        At most so many of the strongest maxima are looked at: bounds the time of a bad frame.
    """

    threshold_sigma: float = 5.3
    box_px: int = 4
    separation_px: float = 2.5
    prominence_sigma: float = 3.0
    tile_px: int = 64
    saturation: float | None = None
    gain: float = 1.0
    min_noise: float | None = None
    max_sharpness: float = 5.0
    max_peaks: int = 20000

    def __post_init__(self) -> None:
        if not 2.0 <= self.threshold_sigma <= 1e6:
            raise ValueError(f"threshold_sigma {self.threshold_sigma} must be 2 or more")
        if not 3 <= self.box_px <= WINDOW_HALF:
            raise ValueError(f"box_px {self.box_px} must lie between 3 and {WINDOW_HALF}")
        if self.tile_px < 16:
            raise ValueError(f"tile_px {self.tile_px} must be 16 or more")
        if not self.max_sharpness > 0:
            raise ValueError(f"max_sharpness {self.max_sharpness} must be positive")
        if self.max_peaks < 1:
            raise ValueError(f"max_peaks {self.max_peaks} must be positive")
        for name in ("separation_px", "prominence_sigma", "gain"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value} must be a number, 0 or more")
