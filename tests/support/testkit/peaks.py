"""Comparing peak tables with each other and with the truth."""

from __future__ import annotations

import numpy as np

from pipelines.laue.peaks import PeakTable
from pipelines.laue.render import add_noise


def same(a: PeakTable, b: PeakTable) -> bool:
    """Whether two tables hold the very same numbers."""
    names = (
        "xy_px",
        "intensity",
        "amplitude",
        "background",
        "fwhm_px",
        "tilt_deg",
        "sigma_px",
        "snr",
        "flags",
    )
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def nearest(truth: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance of each true spot to the nearest peak, and the row of that."""
    if len(found) == 0:
        return np.full(len(truth), np.inf), np.zeros(len(truth), np.intp)
    apart = np.linalg.norm(truth[:, None] - found[None], axis=2)
    return apart.min(axis=1), apart.argmin(axis=1)


def blank(level: float = 60.0, shape: tuple[int, int] = (512, 512), seed: int = 3) -> np.ndarray:
    """Return a frame of noise alone."""
    return add_noise(np.full(shape, level, np.float32), np.random.default_rng(seed))
