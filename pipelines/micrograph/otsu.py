"""Otsu's threshold of 8-bit images (IEEE Trans. Syst. Man Cybern. 9, 62, 1979)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def otsu(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the thresholds that part histograms best.

    Parameters
    ----------
    counts : (..., 256) int64
        Histograms.

    Returns
    -------
    threshold : (...) int64
        Levels above it are bright; 255, so that nothing is, for a histogram of one level.
    separability : (...) float64
        Otsu's η: variance between the two parts over the whole. 1 for two levels, 0.75 for equally frequent
        levels, 0.64 for one normal distribution; 0 for one level.
    """
    levels = np.arange(256.0)
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    below = np.cumsum(share, axis=-1)
    moment = np.cumsum(share * levels, axis=-1)
    mean = moment[..., -1:]
    spread = below * (1.0 - below)
    # σ_B² = (m μ_T − μ)² / (m (1 − m)), his equation 18, m and μ up to the threshold.
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.where(spread > 1e-15, np.square(mean * below - moment) / spread, 0.0)
    threshold = np.argmax(between, axis=-1)
    best = np.max(between, axis=-1)
    variance = np.sum(share * np.square(levels - mean), axis=-1)
    parted = variance > 1e-9
    with np.errstate(divide="ignore", invalid="ignore"):
        separability = np.where(parted, best / variance, 0.0)
    return np.where(parted, threshold, 255).astype(np.int64), separability
