"""The picture of a map: orientations in inverse pole figure colours, grains, match rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import numpy.typing as npt
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from grainwatch.messages import MapPoint
from pipelines.laue.crystal import Material
from pipelines.maps.colours import ColourKey
from pipelines.maps.series_map import SeriesMap

FloatArray = npt.NDArray[np.float64]

INK = "#1a1a1a"
QUIET = "#6b6b6b"
HOLE = "#ffffff"
EMPTY = "#bdbdbd"
_MAP_HEIGHT_IN = 6.0
_SIDE_IN = 2.9
_LEFT_IN = 0.75


@dataclass(frozen=True)
class Plane:
    """One plane of a map as images; rows are y, columns x.

    Attributes
    ----------
    rgb : (ny, nx, 3) array
        Inverse pole figure colour of the best crystal; NaN where there is none.
    grain : (ny, nx) int array
        Its grain; -1 where a frame held no crystal, -2 where nothing was measured.
    match_rate : (ny, nx) array
        NaN where there is none.
    """

    rgb: FloatArray
    grain: npt.NDArray[np.int64]
    match_rate: FloatArray


def plane(series: SeriesMap, direction: str = "z", material: str | None = None, z: int = 0) -> Plane:
    """Lay out one plane of a map.

    Parameters
    ----------
    series : SeriesMap
    direction : str
        Direction of the sample, "x", "y" or "z", that the colours show.
    material : str, optional
        Show the best crystal of this material; the best of all when None.
    z : int
        Which plane of a volume.

    Raises
    ------
    ValueError
        If there is no such plane, or no crystal of that material.
    """
    update = series.snapshot
    nx, ny, nz = (*update.shape, 1, 1)[:3]
    if not 0 <= z < nz:
        raise ValueError(f"plane {z}: expected 0 to {nz - 1}")
    if material is not None and material not in series.materials:
        raise ValueError(f"no crystal of {material!r} on the map; found: {', '.join(series.materials)}")
    grain = np.full((ny, nx), -2, dtype=np.int64)
    rate = np.full((ny, nx), np.nan)
    rgb = np.full((ny, nx, 3), np.nan)
    for index in [*update.empty, *(point.grid_index for point in update.points)]:
        x, y, at = (*index, 0, 0)[:3]
        if at == z:
            grain[y, x] = -1
    best: dict[tuple[int, int], MapPoint] = {}
    for point in update.points:  # best crystal of each point first
        x, y, at = (*point.grid_index, 0, 0)[:3]
        if at == z and material in (None, point.material):
            best.setdefault((y, x), point)
    for name, crystal in series.materials.items():
        places = [place for place, point in best.items() if point.material == name]
        if not places:
            continue
        rows, columns = np.array(places).T
        chosen = [best[place] for place in places]
        key = ColourKey.of(crystal.proper_point_group)
        rgb[rows, columns] = key.orientation_colours(np.array([p.quaternion for p in chosen]), direction)
        grain[rows, columns] = [point.grain_id for point in chosen]
        rate[rows, columns] = [point.match_rate for point in chosen]
    return Plane(rgb, grain, rate)


def boundaries(grain: npt.NDArray[np.int64]) -> FloatArray:
    """Return the edges between points of different grains, (n, 2, 2): two ends (x, y) each.

    Points without a crystal have no boundary: their own colour sets them off.
    """
    left, right = grain[:, :-1], grain[:, 1:]
    below, above = grain[:-1], grain[1:]
    y, x = np.nonzero((left != right) & (left >= 0) & (right >= 0))
    upright = np.stack([np.stack([x + 0.5, y - 0.5], -1), np.stack([x + 0.5, y + 0.5], -1)], 1)
    y, x = np.nonzero((below != above) & (below >= 0) & (above >= 0))
    level = np.stack([np.stack([x - 0.5, y + 0.5], -1), np.stack([x + 0.5, y + 0.5], -1)], 1)
    return np.concatenate([upright, level]).astype(np.float64)


def draw_map(
    series: SeriesMap, direction: str = "z", material: str | None = None, z: int | None = None
) -> Figure:
    """Draw a map: orientations and grain boundaries, colour key, match rate.

    Parameters
    ----------
    direction, material : see `plane`
    z : int, optional
        Which plane of a volume; the middle one when None.

    Raises
    ------
    ValueError
        As `plane`.
    """
    nz = (*series.snapshot.shape, 1, 1)[2]
    z = nz // 2 if z is None else z
    shown = plane(series, direction, material, z)
    ny, nx = shown.grain.shape
    step = (*series.snapshot.step_um, 0.0, 0.0)[:2]
    # A line scan is drawn as a band, and an axis that stands still has the step of the other.
    aspect = step[1] / step[0] if step[0] > 0 and step[1] > 0 else 1.0
    tall = max(ny * aspect, nx / 12) / nx
    height = min(_MAP_HEIGHT_IN, max(2.8, 9.0 * tall))
    width = min(9.0, max(3.0, height / tall))
    total_w, total_h = width + _SIDE_IN + _LEFT_IN + 0.25, height + 1.25
    figure = Figure(figsize=(total_w, total_h), dpi=150, facecolor="white")

    def axes(left: float, bottom: float, w: float, h: float) -> Any:
        return figure.add_axes((left / total_w, bottom / total_h, w / total_w, h / total_h))

    band = "auto" if ny == 1 else aspect
    main = axes(_LEFT_IN, 0.5, width, height)
    _base(main, shown, band)
    colours = np.dstack([np.nan_to_num(shown.rgb), np.isfinite(shown.rgb[..., 0])])
    main.imshow(colours, origin="lower", interpolation="nearest", aspect=band)
    lines = boundaries(shown.grain)
    if len(lines):
        thick = max(0.25, min(1.4, 72 * width / nx / 7))
        main.add_collection(LineCollection(list(lines), colors=INK, linewidths=thick, capstyle="projecting"))
    _points(main, shown.grain.shape, step, height)
    _frame_zero(main, series, z, (nx, ny))

    side = width + _LEFT_IN + 0.25
    rate_height = min(2.5 * max(ny * aspect / nx, 0.16), height * 0.4)
    rate_width = min(_SIDE_IN - 0.25, rate_height * nx / (ny * aspect)) if ny > 1 else _SIDE_IN - 0.25
    rates = axes(side, 0.5 + 0.42, rate_width, rate_height)
    _base(rates, shown, band)
    low, high = _range(shown.match_rate)
    image = rates.imshow(
        shown.match_rate,
        origin="lower",
        interpolation="nearest",
        cmap="viridis",
        vmin=low,
        vmax=high,
        aspect=band,
    )
    rates.set_title(
        f"match rate, colours {low:.2f} to {high:.2f}", fontsize=9, color=QUIET, loc="left", pad=4
    )
    bar_axes = axes(side, 0.5 + 0.22, max(rate_width, 1.4), 0.09)
    bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal", ticks=[low, high], format="%.2f")
    bar.ax.tick_params(labelsize=8, colors=QUIET, length=2)
    bar.outline.set_visible(False)

    names = [name for name in series.materials if material in (None, name)]
    each = min((height - rate_height - 0.85) / len(names), 2.3)
    for number, name in enumerate(names):
        top = 0.5 + height - number * each
        words = f"{name} along {direction}"
        figure.text(side / total_w, top / total_h, words, fontsize=10, color=INK, va="top")
        draw_key(axes(side, top - each + 0.1, _SIDE_IN - 0.2, each - 0.35), series.materials[name])
    _words(figure, series, shown, direction, material, z, 0.25 / total_w, total_h)
    return figure


def draw_key(axes: Any, material: Material) -> None:
    """Draw the colour triangle of a material, in stereographic projection."""
    key = ColourKey.of(material.proper_point_group)
    corners = [key.corners]
    if key.triangles > 1:
        corners.append(key.corners @ _other_half(key).T)
    ends = _project(np.concatenate(corners))
    low, high = ends.min(axis=0), ends.max(axis=0)
    arcs = [_arc(c[i], c[(i + 1) % 3]) for c in corners for i in range(3)]
    outline = np.concatenate(arcs)
    low, high = np.minimum(low, outline.min(axis=0)), np.maximum(high, outline.max(axis=0))
    n = 500
    x, y = np.meshgrid(np.linspace(low[0], high[0], n), np.linspace(low[1], high[1], n))
    r2 = x * x + y * y
    v = np.stack([2 * x, 2 * y, 1 - r2], axis=-1) / (1 + r2)[..., None]
    inside = np.zeros((n, n), dtype=bool)
    for c in corners:
        inside |= (v @ np.linalg.inv(c.T).T >= -1e-3).all(axis=-1)
    rgba = np.dstack([key.colours(v), inside])
    extent = (low[0], high[0], low[1], high[1])
    axes.imshow(rgba, origin="lower", extent=extent, interpolation="bilinear", aspect="equal")
    for arc in arcs:
        axes.plot(arc[:, 0], arc[:, 1], color=INK, lw=1.0, solid_capstyle="round")
    middle = outline.mean(axis=0)
    span = float(max(high - low))
    for corner, label in zip(_project(key.corners), key.labels, strict=True):
        away = corner - middle
        away = away / np.linalg.norm(away)
        axes.text(
            *(corner + 0.05 * span * away),
            label,
            fontsize=9,
            color=INK,
            ha="center" if abs(away[0]) < 0.4 else ("left" if away[0] > 0 else "right"),
            va="center" if abs(away[1]) < 0.4 else ("bottom" if away[1] > 0 else "top"),
        )
    axes.set_xlim(low[0] - 0.22 * span, high[0] + 0.22 * span)
    axes.set_ylim(low[1] - 0.14 * span, high[1] + 0.14 * span)
    axes.set_anchor("NW")
    axes.axis("off")


def save(figure: Figure, path: Path) -> None:
    """Write the picture; the suffix gives the format (.png, .pdf, .svg).

    Raises
    ------
    ValueError
        If the format is unknown or the file cannot be written.
    """
    try:
        figure.savefig(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error
    except ValueError as error:  # an unknown suffix
        raise ValueError(f"{path}: {error}") from error


def _base(axes: Any, shown: Plane, aspect: Any) -> None:
    """Paint what was not measured and what held no crystal, and take the ticks away."""
    hollow = np.where((shown.grain == -1)[..., None], matplotlib.colors.to_rgb(EMPTY), 1.0)
    axes.set_facecolor(HOLE)
    axes.imshow(
        np.dstack([hollow, shown.grain != -2]), origin="lower", interpolation="nearest", aspect=aspect
    )
    if (shown.grain == -2).any():
        axes.patch.set(hatch="////", edgecolor="#d9d9d9", linewidth=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_anchor("SW")
    for spine in axes.spines.values():
        spine.set(color=INK, linewidth=0.8)


def _range(rate: FloatArray) -> tuple[float, float]:
    """Return the range of what is there, at least 0.02 wide, so that small differences show."""
    there = rate[np.isfinite(rate)]
    if not len(there):
        return 0.0, 1.0
    low, high = math.floor(100 * float(there.min())) / 100, math.ceil(100 * float(there.max())) / 100
    return (low, high) if high - low >= 0.02 else (max(0.0, high - 0.02), max(high, 0.02))


def _points(axes: Any, shape: tuple[int, ...], step_um: Sequence[float], height_in: float) -> None:
    """Label the axes: in um from point 0 where the step is known, else in points; arrows say where to.

    A scale bar stands below where the step is known.
    """
    ny, nx = shape
    for axis, name, n, step in ((axes.xaxis, "x", nx, step_um[0]), (axes.yaxis, "y", ny, step_um[1])):
        if n == 1:
            continue
        unit, scale = ("µm", step) if step > 0 else ("points", 1.0)
        locator = MaxNLocator(nbins=6, integer=step <= 0, steps=[1, 2, 5, 10])
        values = [v for v in locator.tick_values(0.0, (n - 1) * scale) if 0 <= v <= (n - 1) * scale * 1.0001]
        axis.set_ticks([v / scale for v in values], [f"{v:g}" for v in values])
        axis.set_label_text(f"{name} ({unit}) →", fontsize=9, color=INK)
        axis.set_tick_params(labelsize=8, colors=INK, length=3)
    if step_um[0] > 0:
        _scale_bar(axes, nx, step_um[0], -0.36 / height_in)


def _frame_zero(axes: Any, series: SeriesMap, z: int, shape: tuple[int, int]) -> None:
    """Mark where the first frame is, when its place is known and in this plane."""
    first = min(series.snapshot.points, key=lambda point: point.frame, default=None)
    if first is None or first.frame != 0:
        return
    x, y, at = (*first.grid_index, 0, 0)[:3]
    if at != z:
        return
    size = 30.0 if max(shape) < 60 else 14.0
    axes.scatter([x], [y], s=size, marker="o", facecolors="white", edgecolors=INK, linewidths=0.9, zorder=5)
    axes.annotate(
        "frame 0",
        (x, y),
        xytext=(5, 5),
        textcoords="offset points",
        fontsize=8,
        color=INK,
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
    )


def _scale_bar(axes: Any, nx: int, step_um: float, y: float) -> None:
    """Draw a bar of a round length at height y, in axes units."""
    transform = axes.get_xaxis_transform()
    rough = 0.25 * nx * step_um
    power = 10.0 ** math.floor(math.log10(rough))
    length = max(f for f in (1, 2, 5) if f * power <= rough * 1.0001) * power
    ends = [-0.5, -0.5 + length / step_um]
    axes.plot(ends, [y, y], transform=transform, color=INK, lw=3, solid_capstyle="butt", clip_on=False)
    text, unit = (f"{length / 1000:g}", "mm") if length >= 1000 else (f"{length:g}", "µm")
    axes.text(ends[1], y, f"  {text} {unit}", transform=transform, fontsize=9, color=INK, va="center")


def _words(
    figure: Figure,
    series: SeriesMap,
    shown: Plane,
    direction: str,
    material: str | None,
    z: int,
    left: float,
    total_h: float,
) -> None:
    update = series.snapshot
    grains = len({int(g) for g in shown.grain.ravel() if g >= 0})
    measured = int((shown.grain >= -1).sum())
    indexed = int((shown.grain >= 0).sum())
    nz = (*update.shape, 1, 1)[2]
    title = f"{series.stream or 'map'}  ·  series {update.series_uid[:8]}"
    if nz > 1:
        title += f"  ·  plane {z} of 0 to {nz - 1}"
    parts = [f"{measured:,} of {shown.grain.size:,} points measured".replace(",", "\u2009")]
    parts.append(f"{100 * indexed / max(measured, 1):.3g} % {'with ' + material if material else 'indexed'}")
    parts.append(f"{grains} grain{'s' if grains != 1 else ''}")
    if any(update.step_um):
        parts.append(f"step {' × '.join(f'{s:g}' for s in update.step_um)} µm")
    figure.text(left, 1 - 0.22 / total_h, title, fontsize=13, color=INK, va="top", weight="bold")
    figure.text(left, 1 - 0.49 / total_h, "   ·   ".join(parts), fontsize=9.5, color=QUIET, va="top")
    patches = []
    if (shown.grain == -1).any():
        patches.append(Patch(facecolor=EMPTY, label="no crystal" if material is None else f"no {material}"))
    if (shown.grain == -2).any():
        patches.append(Patch(facecolor=HOLE, edgecolor="#c4c4c4", hatch="////", label="not measured"))
    if patches:
        figure.legend(
            handles=patches,
            loc="lower right",
            bbox_to_anchor=(1 - 0.1 / figure.get_figwidth(), 0.06 / total_h),
            ncols=2,
            fontsize=8.5,
            frameon=False,
            labelcolor=QUIET,
            handlelength=1.3,
            columnspacing=1.2,
        )


def _other_half(key: ColourKey) -> FloatArray:
    """Return the mirror, (3, 3), through an edge at the first corner that the group does not contain."""
    corners = key.corners
    inner = corners.sum(axis=0) + 0.3 * corners[1]
    inner /= np.linalg.norm(inner)
    mirrors = []
    for other in (2, 1):
        normal = np.cross(corners[0], corners[other])
        normal /= np.linalg.norm(normal)
        mirrors.append(np.eye(3) - 2 * np.outer(normal, normal))
    return next((m for m in mirrors if not key.weights(m @ inner)[1]), mirrors[0])


def _project(v: FloatArray) -> FloatArray:
    """Stereographic projection from the south pole, (..., 3) -> (..., 2)."""
    return np.asarray(v[..., :2] / (1 + v[..., 2:3]))


def _arc(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the projected great circle from a to b, (60, 2)."""
    t = np.linspace(0, 1, 60)[:, None]
    v = (1 - t) * a + t * b
    return _project(v / np.linalg.norm(v, axis=1, keepdims=True))
