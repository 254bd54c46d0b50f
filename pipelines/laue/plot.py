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
        grey = np.log(np.clip(np.asarray(image, dtype=np.float32), 1.0, None))
        low, high = np.percentile(grey[::4, ::4], (1.0, 99.9))
        axes.imshow(grey, cmap="gray_r", vmin=low, vmax=max(high, low + 0.5), interpolation="nearest")
    explained = np.zeros(len(found.xy_px), dtype=bool)
    for number, (indexed, crystal) in enumerate(zip(found.indexed, found.crystals, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        explained[indexed.spots] = True
        expected = predict(analysis.phases[indexed.phase].scene, indexed.matrix).xy_px
        axes.plot(expected[:, 0], expected[:, 1], "+", color=colour, ms=5, mew=0.6, alpha=0.7)
        matched = found.xy_px[indexed.spots]
        label = (
            f"{crystal.material}: {crystal.spots_matched} of {crystal.spots_expected} spots,"
            f" {crystal.residual_px:.2f} px"
        )
        axes.plot(matched[:, 0], matched[:, 1], "o", mfc="none", mec=colour, ms=9, mew=1.3, label=label)
    rest = found.xy_px[~explained]
    if len(rest):
        axes.plot(
            rest[:, 0],
            rest[:, 1],
            "s",
            mfc="none",
            mec="#555555",
            ms=6,
            mew=0.8,
            label=f"not explained: {len(rest)}",
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
