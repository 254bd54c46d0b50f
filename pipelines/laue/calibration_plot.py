"""A picture of what a calibration leaves: residual arrows on the detector, their scatter, their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from pipelines.laue.calibration import CalibrationFit
from pipelines.laue.joint_calibration import JointFit

_ARROW_PX = 150.0
"""On the detector, of a residual of three times the median."""


def plot_residuals(
    fit: CalibrationFit | JointFit,
    peaks_px: npt.NDArray[np.float64],
    image: npt.NDArray[Any] | None,
    title: str,
    path: Path,
) -> None:
    """Write a PNG.

    Parameters
    ----------
    fit : CalibrationFit or JointFit
    peaks_px : (n, 2) array
        All peaks; those that were not fitted are drawn pale.
    image : (rows, columns) array or None
        Shown on a logarithmic grey scale; None for a peak list.
    title : str
    path : Path
    """
    rows, columns = fit.calibration.shape
    residual = fit.residual_px
    size = np.hypot(residual[:, 0], residual[:, 1])
    figure = Figure(figsize=(12.0, 7.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.9, 1.0))

    axes = figure.add_subplot(grid[:, 0])
    if image is not None:
        grey = np.log(np.clip(np.asarray(image, dtype=np.float32), 1.0, None))
        low, high = np.percentile(grey[::4, ::4], (1.0, 99.9))
        axes.imshow(
            grey, cmap="gray_r", vmin=low, vmax=max(high, low + 0.5), alpha=0.45, interpolation="nearest"
        )
    rest = np.ones(len(peaks_px), dtype=bool)
    rest[fit.spots] = False
    axes.plot(
        *peaks_px[rest].T, "s", mfc="none", mec="#999999", ms=4, mew=0.6, label=f"not fitted: {rest.sum()}"
    )
    # A round factor, so that the length of an arrow can be read.
    wanted = _ARROW_PX / max(3.0 * float(np.median(size)), 1e-6)
    power = 10.0 ** np.floor(np.log10(wanted))
    exaggerated = power * max(step for step in (1.0, 2.0, 5.0) if step * power <= wanted)
    arrows = axes.quiver(
        *fit.xy_px.T,
        *residual.T,
        size,
        angles="xy",
        scale_units="xy",
        scale=1.0 / exaggerated,
        width=0.004,
        cmap="viridis",
    )
    figure.colorbar(arrows, ax=axes, shrink=0.6, label="residual (px)")
    foot = (fit.calibration.xcen_px, fit.calibration.ycen_px)
    axes.plot(*foot, "+", color="#e4572e", ms=14, mew=1.8, label="xcen, ycen")
    axes.set(
        xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal", xlabel="x (px)", ylabel="y (px)"
    )
    axes.set_title(f"measured − computed, arrows {exaggerated:g} times too long", fontsize=10)
    axes.legend(loc="upper right", fontsize=8)

    scatter = figure.add_subplot(grid[0, 1])
    scatter.plot(*residual.T, "o", color="#4e79a7", ms=3.5, alpha=0.8)
    scatter.axhline(0.0, color="#999999", lw=0.7)
    scatter.axvline(0.0, color="#999999", lw=0.7)
    reach = 1.1 * float(np.abs(residual).max())
    scatter.set(
        xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="Δx (px)", ylabel="Δy (px)"
    )

    histogram = figure.add_subplot(grid[1, 1])
    edges = np.linspace(0.0, float(size.max()), 16)
    histogram.hist(size, bins=edges.tolist(), color="#76b041", edgecolor="white")
    # Errors that are normal and equal in x and y leave distances of Rayleigh's law.
    variance = float(np.mean(np.square(residual)))
    r = np.linspace(0.0, edges[-1], 200)
    expected = len(size) * (edges[1] - edges[0]) * r / variance * np.exp(-r * r / (2.0 * variance))
    histogram.plot(r, expected, "--", color="#e4572e", lw=1.2, label="normal errors")
    histogram.axvline(
        fit.mean_residual_px, color="#333333", lw=1.0, label=f"mean {fit.mean_residual_px:.3f} px"
    )
    histogram.set(xlabel="residual (px)", ylabel="spots")
    histogram.legend(fontsize=8)

    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
