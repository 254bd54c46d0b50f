"""A picture of what was found in a micrograph: the image, its phases, its codes, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from grainwatch.messages import Fingerprint, Neighbour, Novelty, PatchGrid, ProcessPosterior
from grainwatch.words import phase_words
from pipelines.micrograph.analysis import ImageAnalysis
from pipelines.micrograph.grey import histogram
from pipelines.micrograph.preparation import cut_patches

_PHASE = np.array([228, 87, 46], dtype=np.float64)
_BAR = "#17779b"
_LOUD = "#c1292e"
_QUIET = "#555555"
_MOST_SIDE = 1200
"""Pixels of a side that are drawn: more do not show."""


def plot_micrograph(found: ImageAnalysis, neighbours: Sequence[Neighbour], title: str, path: Path) -> None:
    """Write a PNG; panels for what is not there are left out.

    Parameters
    ----------
    found : ImageAnalysis
    neighbours : sequence of Neighbour
    title : str
    path : Path
    """
    coded = next((each for each in found.fingerprints if each.codes is not None), None)
    draw: list[Any] = [lambda axes: _image(axes, found)]
    if found.morphology is not None:
        draw += [lambda axes: _phases(axes, found), lambda axes: _greys(axes, found)]
    if coded is not None and found.patches is not None:
        grid = found.patches
        draw.append(lambda axes: _codes(axes, coded, found, grid))
    if (posterior := found.posterior) is not None:
        draw.append(lambda axes: _posterior(axes, posterior))
    if (novelty := found.novelty) is not None:
        draw.append(lambda axes: _novelty(axes, novelty, neighbours))
    columns = min(3, len(draw))
    rows = -(-len(draw) // columns)
    figure = Figure(figsize=(4.4 * columns, 4.3 * rows + 0.7), layout="constrained")
    for number, panel in enumerate(draw, 1):
        panel(figure.add_subplot(rows, columns, number))
    flags = f"\nflags: {', '.join(found.flags)}" if found.flags else ""
    figure.suptitle(f"{_literal(title)}{flags}", fontsize=11)
    figure.savefig(path, dpi=110)


def _image(axes: Axes, found: ImageAnalysis) -> None:
    image = _drawn(found.prepared.filtered)
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=_extent(found), interpolation="nearest")
    if found.patches is not None:
        top, left = _offset(found)
        row, column = found.patches.origin_px
        size, stride = found.patches.size_px, found.patches.stride_px
        for number in found.patches.numbers.numpy():
            down, across = divmod(int(number), found.patches.shape[1])
            corner = (column - left + across * stride, row - top + down * stride)
            axes.add_patch(Rectangle(corner, size, size, fill=False, ec="#ffc914", lw=0.7))
    size_um = found.acquisition.pixel_size_um
    rows, columns = found.prepared.filtered.shape
    if size_um is not None and columns:
        length_um = _round(columns * size_um / 4.0)
        length = length_um / size_um
        y = rows * 0.95
        axes.plot(
            [columns * 0.04, columns * 0.04 + length], [y, y], color="white", lw=5, solid_capstyle="butt"
        )
        axes.plot(
            [columns * 0.04, columns * 0.04 + length], [y, y], color="black", lw=3, solid_capstyle="butt"
        )
        axes.text(
            columns * 0.04 + length / 2,
            y - rows * 0.02,
            f"{length_um:g} µm",
            ha="center",
            va="bottom",
            fontsize=9,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
        )
    bar = f", {found.prepared.data_bar_px} rows of data bar cut off" if found.prepared.data_bar_px else ""
    axes.set_title(f"{found.shape_px[0]} x {found.shape_px[1]} px{bar}", fontsize=9)
    _bare(axes)


def _phases(axes: Axes, found: ImageAnalysis) -> None:
    phase = found.morphology
    assert phase is not None
    image = _drawn(found.prepared.filtered)
    # Of one grey nothing is coloured: it may be either phase.
    inside = ((image > phase.threshold) != (phase.phase == "dark")) & math.isfinite(phase.fraction)
    grey = np.repeat(image[..., None].astype(np.float64), 3, axis=2)
    grey[inside] = 0.45 * grey[inside] + 0.55 * _PHASE
    axes.imshow(grey.astype(np.uint8), extent=_extent(found), interpolation="nearest")
    share, path = phase_words(phase)
    path = path.replace("um", "µm")
    axes.set_title(f"{phase.phase} phase (red): {share}, mean free path {path}", fontsize=9)
    _bare(axes)


def _greys(axes: Axes, found: ImageAnalysis) -> None:
    phase = found.morphology
    assert phase is not None
    counts = histogram(found.prepared.filtered)
    axes.fill_between(np.arange(256), counts / counts.sum(), step="mid", color="#9aa5ab")
    words = "one grey: no threshold"
    if math.isfinite(phase.fraction):
        axes.axvline(phase.threshold + 0.5, color=_LOUD, lw=1.5)
        words = f"threshold {phase.threshold} (red); {100 * phase.doubtful:.1f} % of the pixels close to it"
    axes.set_xlim(0, 255)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("grey level")
    axes.set_ylabel("share of pixels")
    axes.set_title(words, fontsize=9)


def _codes(axes: Axes, coded: Fingerprint, found: ImageAnalysis, grid: PatchGrid) -> None:
    assert coded.codes is not None
    maps = coded.codes.numpy().astype(np.int64)
    n, rows, columns = maps.shape
    cut = cut_patches(found.prepared.image, grid.size_px, grid.stride_px)
    patches = cut.some(grid.numbers.numpy().astype(np.int64))
    side = grid.size_px // rows
    means = patches.reshape(n, rows, side, columns, side).mean(axis=(2, 4))
    # What a code stands for here: the mean grey of all places that have it.
    count = np.maximum(np.bincount(maps.ravel(), minlength=coded.codebook), 1)
    stands_for = np.bincount(maps.ravel(), weights=means.ravel(), minlength=coded.codebook) / count
    down, across = grid.shape
    whole = np.full((down * rows, across * columns), np.nan)
    for number, patch in zip(grid.numbers.numpy().tolist(), stands_for[maps], strict=True):
        y, x = divmod(number, across)
        whole[y * rows : (y + 1) * rows, x * columns : (x + 1) * columns] = patch
    axes.imshow(whole, cmap="viridis", interpolation="nearest")
    used = len(np.unique(maps))
    axes.set_title(f"{used} of {coded.codebook} codes, coloured by their mean grey", fontsize=9)
    _bare(axes)


def _posterior(axes: Axes, posterior: ProcessPosterior) -> None:
    axes.bar(range(len(posterior.candidates)), posterior.probability, color=_BAR)
    axes.axhline(1.0 / len(posterior.candidates), color=_QUIET, lw=0.8, ls=":")
    axes.set_xticks(range(len(posterior.candidates)), [_literal(each) for each in _labels(posterior)])
    if len(posterior.candidates) > 8:
        axes.tick_params(axis="x", labelrotation=60)
    axes.set_ylim(0, 1)
    axes.set_xlabel(_literal(posterior.quantity))
    axes.set_ylabel("probability (dotted: before the image)")
    words = f"fit: typicality {posterior.typicality:.2g}"
    if posterior.mean is not None and posterior.sigma is not None:
        words = f"{posterior.mean:.2f} ± {posterior.sigma:.2f}; {words}"
    colour = "black"
    if posterior.none_of_these:
        words, colour = f"none of these: typicality {posterior.typicality:.2g}", _LOUD
        for bar in axes.patches:
            bar.set_alpha(0.3)
    axes.set_title(words, fontsize=9, color=colour)


def _labels(posterior: ProcessPosterior) -> Sequence[str]:
    # As many decimals as tell neighbours apart: all of them would not fit beside each other.
    if len(posterior.values) < 2:
        return posterior.candidates
    step = float(np.diff(np.asarray(posterior.values)).min())
    decimals = 1 - math.floor(math.log10(step)) if step > 0.0 else 0
    return [f"{value:.{max(decimals, 0)}f}" for value in posterior.values]


def _novelty(axes: Axes, novelty: Novelty, neighbours: Sequence[Neighbour]) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.axvspan(0, novelty.level, ymax=0.16, color=_LOUD, alpha=0.25)
    axes.plot(novelty.typicality, 0.08, "v", ms=12, color=_LOUD if novelty.novel else _BAR, clip_on=False)
    axes.set_xlabel(f"typicality (red: below {novelty.level:g}, novel)")
    lines = [
        f"distance of patches        {novelty.latent_distance:8.2f}",
        f"distance of the image      {novelty.image_distance:8.2f}",
    ]
    if novelty.code_divergence_bits is not None:
        lines.append(f"divergence of codes (bit)  {novelty.code_divergence_bits:8.3f}")
    if novelty.bits_per_code is not None:
        lines.append(f"bits per code              {novelty.bits_per_code:8.2f}")
    if neighbours:
        lines += ["", "most alike among the files before:"]
        lines += [f"{n.distance:6.2f}  {_literal(_shortened(Path(n.key.source).name))}" for n in neighbours]
    axes.text(
        0.0, 0.97, "\n".join(lines), va="top", family="monospace", fontsize=8.5, transform=axes.transAxes
    )
    verdict = "novel: not like the training images" if novelty.novel else "like the training images"
    axes.set_title(verdict, fontsize=9, color=_LOUD if novelty.novel else "black")


def _drawn(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    step = max(1, -(-max(image.shape) // _MOST_SIDE))
    return image[::step, ::step]


def _extent(found: ImageAnalysis) -> tuple[float, float, float, float]:
    rows, columns = found.prepared.filtered.shape
    return (0.0, float(max(columns, 1)), float(max(rows, 1)), 0.0)


def _offset(found: ImageAnalysis) -> tuple[int, int]:
    """Return row and column at which the picture that is drawn begins in the image as it came."""
    rows, columns = found.prepared.filtered.shape
    shape = found.shape_px
    return (shape[0] - found.prepared.data_bar_px - rows) // 2, (shape[1] - columns) // 2


def _round(length: float) -> float:
    """Return 1, 2 or 5 times a power of ten, not above a length."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(max(f for f in (1.0, 2.0, 5.0) if f * power <= length * (1 + 1e-9)) * power)


def _shortened(name: str) -> str:
    return name if len(name) <= 34 else f"{name[:16]}...{name[-15:]}"


def _literal(text: str) -> str:
    """Return a text that is drawn as it is: no formula between dollars, no bytes that are no character."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
