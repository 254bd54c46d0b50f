"""What is generated beside what was held out, as distributions: Tables I and II of Noguchi & Inoue (2021).

Means alone flatter: a model that always draws the average image has the right ones. Fraction and mean free
path are compared patch by patch, by mean, spread and the distance of the two distributions (W1, the area
between the cumulated ones). Beside it stands the W1 of two halves of the held-out images, which is what
chance makes of so many patches, and that of held-out patches shown by their codes, which is what the
decoder makes of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.stats import wasserstein_distance

from offline_training.micrograph.labels import Conditions
from pipelines.micrograph.morphology import Phase, patch_morphology

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

QUANTITIES: Final = ("fraction", "free_path_px")
BINS: Final = 4


def measure_patches(patches: ByteImage, phase: Phase = "bright") -> FloatArray:
    """Return fraction and mean free path in px of patches (n, rows, columns), (n, 2).

    Both are NaN for a patch of one grey, the path also where no line crosses a boundary one way.

    Each patch has its own threshold (Otsu), as in the paper.
    """
    found = patch_morphology(patches, phase=phase)
    return np.stack([found.fraction, found.free_path_px], axis=1)


@dataclass(frozen=True)
class Comparison:
    """One quantity under one condition.

    Attributes
    ----------
    condition, quantity : str
    held_out, shown, generated : (float, float)
        Mean and standard deviation over patches: as they are, through their codes, drawn.
    w1, w1_shown, w1_halves : float
        Distance from the held-out ones of those drawn, of those shown by their codes, and of one half of the
        held-out images from the other (NaN with one image).
    patches, drawn : int
        That have the quantity.
    """

    condition: str
    quantity: str
    held_out: tuple[float, float]
    shown: tuple[float, float]
    generated: tuple[float, float]
    w1: float
    w1_shown: float
    w1_halves: float
    patches: int
    drawn: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def compare_distributions(
    condition: str, held_out: FloatArray, shown: FloatArray, generated: FloatArray, images: IntArray
) -> list[Comparison]:
    """Compare fraction and free path, (n, 2) each.

    Parameters
    ----------
    condition : str
        For people.
    held_out, shown : (n, 2) float64
        Of the same patches.
    generated : (m, 2) float64
    images : (n,) int64
        Which image a held-out patch is of.

    Raises
    ------
    ValueError
        If none of the patches has a quantity.
    """
    rows = []
    half = np.isin(images, np.unique(images)[::2])
    for i, quantity in enumerate(QUANTITIES):
        parts = [
            values[np.isfinite(values[:, i]), i]
            for values in (held_out, shown, generated, held_out[half], held_out[~half])
        ]
        if any(part.size == 0 for part in parts[:3]):
            raise ValueError(f"{condition}: {quantity} cannot be compared, because no patch has a boundary")
        own, seen, drawn, one, other = parts
        rows.append(
            Comparison(
                condition=condition,
                quantity=quantity,
                held_out=_mean_spread(own),
                shown=_mean_spread(seen),
                generated=_mean_spread(drawn),
                w1=float(wasserstein_distance(own, drawn)),
                w1_shown=float(wasserstein_distance(own, seen)),
                w1_halves=float(wasserstein_distance(one, other)) if one.size and other.size else np.nan,
                patches=own.size,
                drawn=drawn.size,
            )
        )
    return rows


def _mean_spread(values: FloatArray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else float("nan")


def bins_of(conditions: Conditions | None, images: IntArray, count: int = BINS) -> list[tuple[str, IntArray]]:
    """Part patches by their condition: one bin a class, or bins of equal numbers along the first number.

    Parameters
    ----------
    conditions : Conditions or None
        None puts all into one bin.
    images : (n,) int64
        Which image a patch is of.
    count : int
        Of numbers: so many bins, or one for each that occurs where there are fewer.

    Returns
    -------
    list of (str, (m,) int64)
        What the bin is, and the numbers of its patches.
    """
    if conditions is None:
        return [("all", np.arange(len(images)))]
    if conditions.classes:
        place = conditions.of(images).astype(np.int64)
        named = list(conditions.classes)
    else:
        name, first = conditions.names[0], conditions.of(images)[:, 0].astype(np.float64)
        different = np.unique(first)
        if len(different) <= count:
            place = np.searchsorted(different, first)
            named = [f"{name} {value:.4g}" for value in different]
        else:
            edges = np.quantile(different, np.linspace(0.0, 1.0, count + 1))
            place = np.clip(np.searchsorted(edges, first, side="right") - 1, 0, count - 1)
            named = [f"{name} {low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]
    return [(text, np.flatnonzero(place == i)) for i, text in enumerate(named) if np.any(place == i)]


def table_rows(compared: Sequence[Comparison]) -> list[list[str]]:
    """Return rows for people: condition, quantity, held out, through codes, drawn, W1 (codes, chance)."""
    rows = []
    for row in compared:
        scale, form = (100.0, ".2f") if row.quantity == "fraction" else (1.0, ".2f")

        def two(values: tuple[float, float], scale: float = scale, form: str = form) -> str:
            return f"{scale * values[0]:{form}} ± {scale * values[1]:{form}}"

        unit = "%" if row.quantity == "fraction" else "px"
        rows.append(
            [
                row.condition,
                f"{row.quantity.removesuffix('_px').replace('_', ' ')}, {unit}",
                two(row.held_out),
                two(row.shown),
                two(row.generated),
                f"{scale * row.w1:{form}} ({scale * row.w1_shown:{form}}, {scale * row.w1_halves:{form}})",
            ]
        )
    return rows


TABLE_HEAD: Final = ("condition", "", "held out", "by codes", "generated", "W1 (by codes, chance)")
