"""Pictures of what models of micrographs have learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offline_training.micrograph.inverse import Answer
from offline_training.micrograph.labels import Conditions

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]

_BLUE, _RED, _GREEN, _GREY = "#4e79a7", "#e4572e", "#59a14f", "#999999"
_CLASSES = ("#4e79a7", "#e4572e", "#59a14f", "#b07aa1", "#edc948", "#76b7b2", "#9c755f", "#ff9da7")
_DPI = 120


def plot_reconstructions(rows: Sequence[tuple[str, ByteImage]], title: str, path: Path) -> None:
    """Draw patches as they are and as models show them, one line each: (name, (n, side, side))."""
    count = min(8, len(rows[0][1]))
    figure = Figure(figsize=(1.35 * count + 0.9, 1.45 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(grid, rows, strict=True):
        for place, image in zip(line, images, strict=False):
            _image(place, image)
        line[0].set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_codebook(vectors: FloatArray, counts: IntArray, shown: ByteImage, title: str, path: Path) -> None:
    """Draw the codebook along its main directions, and what its most frequent codes look like.

    Parameters
    ----------
    vectors : (codes, width) float64
    counts : (codes,) int64
        How often each was met in held-out patches.
    shown : (n, side, side) uint8
        Maps of one code only, of the most frequent ones, the most frequent first.
    """
    met = counts > 0
    axes_of, share = _directions(vectors[met] if met.sum() > 2 else vectors)
    at = (vectors - vectors[met].mean(axis=0)) @ axes_of
    figure = Figure(figsize=(10.0, 4.8), layout="constrained")
    parts = figure.subfigures(1, 2, width_ratios=(1.15, 1.0), squeeze=False)
    left, right = parts[0]
    axes = left.add_subplot()
    axes.plot(*at[~met].T, "x", color=_GREY, ms=3, lw=0, label=f"{int((~met).sum())} never met")
    size = 8.0 + 160.0 * np.sqrt(counts[met] / counts.max())
    axes.scatter(
        *at[met].T, s=size, color=_BLUE, alpha=0.5, lw=0, label=f"{int(met.sum())} met (area: how often)"
    )
    axes.set(xlabel=f"first direction ({100 * share[0]:.0f} %)", ylabel=f"second ({100 * share[1]:.0f} %)")
    axes.legend(fontsize=8)
    axes.set_title("codebook, main directions (area: how often a code was met)", fontsize=9)
    grid = right.subplots(4, 4, squeeze=False)
    for place, image in zip(grid.ravel(), shown, strict=False):
        _image(place, image)
    for place in grid.ravel()[len(shown) :]:
        place.set_axis_off()
    right.suptitle("the most frequent codes, each by itself", fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_latents(
    latents: FloatArray, conditions: Conditions | None, images: IntArray, title: str, path: Path
) -> None:
    """Draw held-out patches along the main directions of their latent space, coloured by condition.

    Parameters
    ----------
    latents : (n, d) float64
    conditions : Conditions or None
        None colours by image.
    images : (n,) int64
        Which image a patch is of.
    """
    axes_of, share = _directions(latents)
    at = (latents - latents.mean(axis=0)) @ axes_of
    figure = Figure(figsize=(6.6, 5.2), layout="constrained")
    axes = figure.add_subplot()
    if conditions is not None and conditions.classes:
        for number, name in enumerate(conditions.classes):
            own = conditions.of(images) == number
            axes.plot(*at[own].T, "o", ms=4, alpha=0.6, mew=0, color=_CLASSES[number % 8], label=name)
        axes.legend(fontsize=8, title=conditions.names[0])
    else:
        values = (
            conditions.of(images)[:, 0]
            if conditions is not None
            else np.unique(images, return_inverse=True)[1]
        )
        drawn = axes.scatter(at[:, 0], at[:, 1], c=values, s=14, cmap="viridis", alpha=0.8, lw=0)
        label = conditions.names[0] if conditions is not None else "image"
        figure.colorbar(drawn, label=label)
    axes.set(xlabel=f"first direction ({100 * share[0]:.0f} %)", ylabel=f"second ({100 * share[1]:.0f} %)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    _save(figure, path)


def plot_distributions(
    bins: Sequence[tuple[str, FloatArray, FloatArray, FloatArray]], title: str, path: Path
) -> None:
    """Draw fraction and free path, (n, 2) each: condition, held out, shown by their codes, generated."""
    figure = Figure(figsize=(3.1 * len(bins) + 0.6, 5.4), layout="constrained")
    grid = figure.subplots(2, len(bins), squeeze=False, sharex="row")
    for line, name, scale in ((0, "fraction, %", 100.0), (1, "mean free path, px", 1.0)):
        finite = [part[np.isfinite(part[:, line]), line] * scale for _, *parts in bins for part in parts]
        edges = np.histogram_bin_edges(np.concatenate(finite), 24)
        for place, (condition, held_out, shown, generated) in zip(grid[line], bins, strict=True):
            for values, label, colour, form in (
                (held_out, "held out", _GREY, {"histtype": "stepfilled", "alpha": 0.45}),
                (shown, "the same by their codes", _BLUE, {"histtype": "step", "lw": 1.2}),
                (generated, "generated", _RED, {"histtype": "step", "lw": 1.8}),
            ):
                own = values[np.isfinite(values[:, line]), line] * scale
                place.hist(own, edges, density=True, color=colour, label=label, **form)
            place.set_yticks([])
            place.set_xlabel(name, fontsize=8)
            place.tick_params(labelsize=8)
            if line == 0:
                place.set_title(condition, fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_answer(answer: Answer, quantity: str, title: str, path: Path) -> None:
    """Draw the probability density of a condition; see `inverse`."""
    figure = Figure(figsize=(6.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    inside = (answer.grid >= answer.low) & (answer.grid <= answer.high)
    axes.plot(answer.grid, answer.density, color=_BLUE)
    axes.fill_between(
        answer.grid[inside], answer.density[inside], color=_BLUE, alpha=0.25, label="90 % of the probability"
    )
    axes.axvline(answer.best, color=_RED, lw=1.2, label=f"most probable: {answer.best:.3g}")
    axes.set(xlabel=quantity, ylabel="probability density", ylim=(0.0, None))
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def _directions(points: AnyArray) -> tuple[FloatArray, FloatArray]:
    # The two main directions (d, 2), and their shares of the variance.
    centred = np.asarray(points, dtype=np.float64) - np.mean(points, axis=0)
    _, spread, turned = np.linalg.svd(centred, full_matrices=False)
    variance = np.square(spread)
    directions = np.zeros((2, centred.shape[1]))
    directions[: min(2, len(turned))] = turned[:2]
    share = np.zeros(2)
    share[: min(2, len(variance))] = variance[:2] / max(float(variance.sum()), 1e-300)
    return directions.T, share


def _image(axes: Axes, image: ByteImage) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
