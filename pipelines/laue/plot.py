"""A picture of an indexed frame: the image, its peaks, and where each crystal puts its spots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from pipelines.laue.analysis import FrameAnalysis, LaueAnalysis
from pipelines.laue.indexing.match import predict

_COLOURS = ("#e4572e", "#17bebb", "#ffc914", "#76b041", "#b07aa1", "#4e79a7", "#f28e2b", "#9c755f")
_QUIET = "#555555"
POOL = 2
"""Pixels of a side that become one point of the picture, the brightest: a spot is smaller than that."""
_TILE = 16


def plot_frame(
    analysis: LaueAnalysis,
    found: FrameAnalysis,
    image: npt.NDArray[Any] | None,
    title: str,
    path: Path,
) -> None:
    """Write a PNG.

    Parameters
    ----------
    analysis : LaueAnalysis
        What `found` was made with.
    image : (rows, columns) array or None
        Shown on a logarithmic grey scale; None for a peak list.
    title : str
    path : Path
    """
    rows, columns = analysis.calibration.shape
    figure = Figure(figsize=(9.0, 8.0), layout="constrained")
    axes = figure.add_subplot()
    if image is not None:
        grey, low, high = grey_scale(image, found)
        extent = (-0.5, grey.shape[1] * POOL - 0.5, grey.shape[0] * POOL - 0.5, -0.5)
        axes.imshow(grey, cmap="gray_r", vmin=low, vmax=high, interpolation="nearest", extent=extent)
    explained = np.zeros(len(found.xy_px), dtype=bool)
    for number, (indexed, crystal) in enumerate(zip(found.indexed, found.crystals, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        explained[indexed.spots] = True
        expected = predict(analysis.phases[indexed.phase].scene, indexed.matrix)
        unseen = expected.xy_px[~np.isin(expected.index, indexed.reflections)]
        axes.plot(unseen[:, 0], unseen[:, 1], "+", color=colour, ms=6, mew=0.8)
        matched = found.xy_px[indexed.spots]
        label = (
            f"ring: {crystal.material}: {crystal.spots_matched} of {crystal.spots_expected} spots,"
            f" {crystal.residual_px:.2f} px{''.join(f', {flag}' for flag in crystal.flags)}"
        )
        axes.plot(matched[:, 0], matched[:, 1], "o", mfc="none", mec=colour, ms=9, mew=1.3, label=label)
    if found.crystals:
        axes.plot([], [], "+", color=_QUIET, ms=6, mew=0.8, label="cross: expected, not seen")
    rest = found.xy_px[~explained]
    if len(rest):
        axes.plot(
            rest[:, 0],
            rest[:, 1],
            "s",
            mfc="none",
            mec=_QUIET,
            ms=6,
            mew=0.8,
            label=f"square: not explained, {len(rest)}",
        )
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xlabel("x (px)")
    axes.set_ylabel("y (px)")
    axes.set_title(title, fontsize=11)
    if found.crystals or len(rest):
        axes.legend(loc="upper right", fontsize=8, framealpha=0.9)
    figure.savefig(path, dpi=120)


def grey_scale(image: npt.NDArray[Any], found: FrameAnalysis) -> tuple[npt.NDArray[np.float32], float, float]:
    """Return what is shown of an image, and the values that are white and black.

    Shown is the logarithm of the height above the local background, the median of tiles. White is
    everything below two standard deviations of the noise above the median, black half the height of
    the brightest peaks, or 100 sigma where none was found.

    Returns
    -------
    grey : (rows / POOL, columns / POOL) float32
    low, high : float
    """
    rows, columns = image.shape
    pooled = np.asarray(image[: rows // POOL * POOL, : columns // POOL * POOL], dtype=np.float32)
    pooled = pooled.reshape(rows // POOL, POOL, columns // POOL, POOL).max(axis=(1, 3))
    height, width = (max(1, n // _TILE) for n in pooled.shape)
    edges = [
        np.minimum(np.arange(n) // _TILE, m - 1) for n, m in zip(pooled.shape, (height, width), strict=True)
    ]
    inner = pooled[: height * _TILE, : width * _TILE]
    tiles = inner.reshape(height, min(_TILE, pooled.shape[0]), width, min(_TILE, pooled.shape[1]))
    above = pooled - np.median(tiles, axis=(1, 3))[np.ix_(*edges)]
    # 1.4826 median |x| is the standard deviation of a normal distribution; spots do not move it.
    noise = 2.0 * max(1.4826 * float(np.median(np.abs(above))), 1e-3)
    top = 50.0 * noise
    if found.peaks is not None and len(found.peaks.amplitude):
        top = 0.5 * float(np.percentile(found.peaks.amplitude, 90.0))
    grey = np.log(np.clip(above, noise, None)).astype(np.float32)
    return grey, float(np.log(noise)), float(np.log(max(top, 5.0 * noise)))
