"""Phase fraction and mean free path of a two-phase micrograph.

Noguchi & Inoue (Phys. Rev. E 104, 025302, 2021) part a micrograph by Otsu's threshold, take the share of
one phase as its volume fraction, and as its grain size the mean free path

    d_f = V_f / (N_L I_u),

V_f the area of the phase, N_L how many of its grains test lines meet, I_u the distance of the lines; in
rows and in columns, then averaged. With a line on every row or column of pixels I_u is 1 px and d_f the area
over the number of chords: the mean length of a chord, in px.

Chords that the edge of the image cuts off are not complete: counted as whole ones they make d_f too
small, left out together with their area they make it too small again, because long chords are cut more
often. Here crossings of the phase boundary are counted instead, two a chord: the stereological estimate
2 V_V / P_L (Underwood, Quantitative Stereology, 1970), without bias in any stationary structure. A line of n
pixels has n − 1 places to cross, which is allowed for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel
from pipelines.micrograph.grey import ByteImage, histogram
from pipelines.micrograph.otsu import otsu
from pipelines.micrograph.preparation import cut_patches

Phase = Literal["bright", "dark"]
FloatArray = npt.NDArray[np.float64]

NO_BOUNDARY: Final = "no_phase_boundary"
"""No line crosses a boundary in one direction at least: there is no mean free path."""
UNCLEAR_PHASES: Final = "unclear_phases"
"""The grey levels hardly part: more than `MOST_DOUBTFUL` of the pixels are as good as in between."""

MOST_DOUBTFUL: Final = 0.12
"""One normal distribution, which is no two phases, has 0.127; equally frequent greys have 0.1."""

_AREA, _ROW_CROSSINGS, _COLUMN_CROSSINGS, _ROW_PAPER, _COLUMN_PAPER = range(5)


@dataclass(frozen=True, slots=True)
class Morphology:
    """What one phase of an image looks like. Lengths are in px, and in um where the pixel size is known.

    Attributes
    ----------
    phase : str
        "bright" or "dark".
    threshold : int
        Levels above it are bright; 255 for an image of one grey.
    separability : float
        Otsu's η of the image: 1 for two levels. It is small, too, where one phase is rare.
    doubtful : float
        Share of pixels that are closer to the threshold than a tenth of the distance between the phases'
        mean greys: so much the fraction may be off if the threshold is. 1 without two phases.
    fraction : float
        Share of the phase; NaN for an image of one grey, which may be either phase.
    fraction_spread : float
        Standard deviation over the patches; NaN with fewer than two, or without a fraction.
    free_path_rows_px, free_path_columns_px : float
        d_f along rows and along columns; NaN without a boundary that way.
    free_path_px : float
        Their mean.
    free_path_spread_px : float
        Standard deviation of the patches' mean free paths; NaN with fewer than two.
    free_path_um, free_path_spread_um : float or None
        None without a pixel size.
    chords : (float, float)
        Along rows and along columns: half the crossings; so many grains were met.
    patches : int
        That the spreads are taken over.
    flags : tuple of str
        `NO_BOUNDARY`, `UNCLEAR_PHASES`.
    """

    phase: Phase
    threshold: int
    separability: float
    doubtful: float
    fraction: float
    fraction_spread: float
    free_path_rows_px: float
    free_path_columns_px: float
    free_path_px: float
    free_path_spread_px: float
    free_path_um: float | None
    free_path_spread_um: float | None
    chords: tuple[float, float]
    patches: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PatchMorphology:
    """The same of many patches, (n,) each.

    Attributes
    ----------
    threshold : int64
    separability : float64
    fraction : float64
        NaN for a patch of one grey that has only its own threshold: which phase it is, nothing says.
    free_path_rows_px, free_path_columns_px, free_path_px : float64
        NaN without a boundary that way.
    chords_rows, chords_columns : float64
    """

    threshold: npt.NDArray[np.int64]
    separability: FloatArray
    fraction: FloatArray
    free_path_rows_px: FloatArray
    free_path_columns_px: FloatArray
    free_path_px: FloatArray
    chords_rows: FloatArray
    chords_columns: FloatArray


def morphology(
    image: ByteImage,
    *,
    phase: Phase = "bright",
    pixel_size_um: float | None = None,
    patch_px: int = 128,
    threshold: int | None = None,
    paper_compat: bool = False,
) -> Morphology:
    """Measure one phase of an image.

    Parameters
    ----------
    image : (rows, columns) uint8
        Filtered, without data bar, and before its histogram is matched: that would set the fraction.
    phase : "bright" or "dark"
    pixel_size_um : float, optional
    patch_px : int
        Side of the patches for the spreads.
    threshold : int, optional
        Levels above it are bright; None takes Otsu's, of the whole image for itself and its patches.
    paper_compat : bool
        Count chords as the paper's program does (see `patch_morphology`), and threshold each patch by
        itself: the spreads compare with its Tables I and II.

    Raises
    ------
    ValueError
        If the pixel size is not above 0, or the image has no pixels.
    """
    if pixel_size_um is not None and not 0.0 < pixel_size_um < np.inf:
        raise ValueError(f"pixel_size_um: expected a number greater than 0, got {pixel_size_um}")
    if not image.size:
        raise ValueError("morphology: the image has no pixels")
    counts = histogram(image)
    level, eta = otsu(counts)
    used = int(level) if threshold is None else threshold
    # A patch of one grey is one phase or the other by the image's threshold; an image of one grey has none.
    parted = threshold is not None or np.count_nonzero(counts) > 1
    given = np.array([used]) if parted else None
    whole = patch_morphology(image[None, None], phase=phase, thresholds=given, paper_compat=paper_compat)
    view = cut_patches(image, patch_px).view
    n_patches = view.shape[0] * view.shape[1]
    by_image = parted and not (paper_compat and threshold is None)
    own = np.full(n_patches, used, dtype=np.int64) if by_image else None
    parts = patch_morphology(view, phase=phase, thresholds=own, paper_compat=paper_compat)
    flags = []
    if not np.isfinite(whole.free_path_px[0]):
        flags.append(NO_BOUNDARY)
    doubtful = _doubtful(counts, used)
    if doubtful > MOST_DOUBTFUL:
        flags.append(UNCLEAR_PHASES)
    free_path, spread = float(whole.free_path_px[0]), _spread(parts.free_path_px)
    return Morphology(
        phase=phase,
        threshold=used,
        separability=float(eta),
        doubtful=doubtful,
        fraction=float(whole.fraction[0]),
        fraction_spread=_spread(parts.fraction),
        free_path_rows_px=float(whole.free_path_rows_px[0]),
        free_path_columns_px=float(whole.free_path_columns_px[0]),
        free_path_px=free_path,
        free_path_spread_px=spread,
        free_path_um=None if pixel_size_um is None else free_path * pixel_size_um,
        free_path_spread_um=None if pixel_size_um is None else spread * pixel_size_um,
        chords=(float(whole.chords_rows[0]), float(whole.chords_columns[0])),
        patches=n_patches,
        flags=tuple(flags),
    )


def patch_morphology(
    patches: ByteImage,
    *,
    phase: Phase = "bright",
    thresholds: npt.NDArray[np.int64] | None = None,
    paper_compat: bool = False,
) -> PatchMorphology:
    """Measure one phase of each of many patches.

    Parameters
    ----------
    patches : (n, rows, columns) or (down, across, rows, columns) uint8
        Views, as `cut_patches` gives them, need no copy.
    phase : "bright" or "dark"
    thresholds : (n,) int64, optional
        Levels above are bright; None takes Otsu's of each patch, as the paper does.
    paper_compat : bool
        Count chords as the paper's published program does: every run of the phase is a whole chord, also one
        that the edge cuts; but of a line that begins and ends in the other phase one chord is missing (a line
        without any counts −1). That overrates mean free paths, more the fewer grains there are.

    Raises
    ------
    ValueError
        If the number of thresholds is not that of patches.
    """
    if phase not in ("bright", "dark"):
        raise ValueError(f"phase: expected bright or dark, got {phase!r}")
    stack = patches if patches.ndim == 4 else patches[None]
    n, (rows, columns) = stack.shape[0] * stack.shape[1], stack.shape[2:]
    separability, parted = np.full(n, np.nan), np.ones(n, dtype=np.bool_)
    if thresholds is None:
        counts = _histograms(stack)
        thresholds, separability = otsu(counts)
        parted = np.count_nonzero(counts, axis=1) > 1
    if thresholds.shape != (n,):
        raise ValueError(f"thresholds: expected {n}, one a patch, got {thresholds.shape}")
    counted = _count(stack, thresholds.astype(np.int64), phase == "dark").astype(np.float64)
    area = np.where(parted, counted[:, _AREA], np.nan)
    fraction = area / max(rows * columns, 1)
    if paper_compat:
        chords_rows, chords_columns = counted[:, _ROW_PAPER], counted[:, _COLUMN_PAPER]
        along_rows, along_columns = _ratio(area, chords_rows), _ratio(area, chords_columns)
    else:
        chords_rows, chords_columns = counted[:, _ROW_CROSSINGS] / 2, counted[:, _COLUMN_CROSSINGS] / 2
        along_rows = _ratio(fraction * rows * (columns - 1), chords_rows)
        along_columns = _ratio(fraction * columns * (rows - 1), chords_columns)
    return PatchMorphology(
        threshold=thresholds,
        separability=separability,
        fraction=fraction,
        free_path_rows_px=along_rows,
        free_path_columns_px=along_columns,
        free_path_px=(along_rows + along_columns) / 2,
        chords_rows=chords_rows,
        chords_columns=chords_columns,
    )


def _doubtful(counts: npt.NDArray[np.int64], threshold: int) -> float:
    levels, share = np.arange(256.0), counts / counts.sum()
    bright = levels > threshold
    if not share[bright].any() or not share[~bright].any():
        return 1.0
    high, low = (float(np.average(levels[part], weights=share[part])) for part in (bright, ~bright))
    reach = 0.1 * (high - low)
    # Wherever it lies between two levels that occur, the threshold does the same.
    middle = (np.max(levels[~bright & (share > 0.0)]) + np.min(levels[bright & (share > 0.0)])) / 2.0
    # A level stands for the greys from half below it to half above it.
    near = np.clip(reach + 0.5 - np.abs(levels - middle), 0.0, 1.0)
    return float(share @ near)


def _ratio(length: FloatArray, chords: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chords > 0.0, length / chords, np.nan)


def _spread(values: FloatArray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.std(finite, ddof=1)) if finite.size > 1 else float("nan")


@kernel("int64[:, ::1](Array(uint8, 4, 'A', readonly=True))")
def _histograms(stack: ByteImage) -> npt.NDArray[np.int64]:
    counts = np.zeros((stack.shape[0] * stack.shape[1], 256), dtype=np.int64)
    for down in range(stack.shape[0]):
        for across in range(stack.shape[1]):
            own = counts[down * stack.shape[1] + across]
            for row in range(stack.shape[2]):
                for column in range(stack.shape[3]):
                    own[stack[down, across, row, column]] += 1
    return counts


@kernel("int64[:, ::1](Array(uint8, 4, 'A', readonly=True), int64[::1], boolean)")
def _count(stack: ByteImage, thresholds: npt.NDArray[np.int64], dark: bool) -> npt.NDArray[np.int64]:
    # Area, crossings along rows and columns, the paper's chords along rows and columns.
    rows, columns = stack.shape[2], stack.shape[3]
    found = np.zeros((stack.shape[0] * stack.shape[1], 5), dtype=np.int64)
    above = np.empty(columns, dtype=np.bool_)
    column_runs = np.empty(columns, dtype=np.int64)
    column_began = np.empty(columns, dtype=np.bool_)
    for down in range(stack.shape[0]):
        for across in range(stack.shape[1]):
            number = down * stack.shape[1] + across
            limit = thresholds[number]
            area = row_crossings = column_crossings = row_paper = column_paper = 0
            for row in range(rows):
                left = False
                runs = 0
                for column in range(columns):
                    inside = (stack[down, across, row, column] > limit) != dark
                    area += inside
                    if column > 0:
                        row_crossings += inside != left
                    runs += inside and not left
                    left = inside
                    if row == 0:
                        column_began[column] = inside
                        column_runs[column] = inside
                    else:
                        column_crossings += inside != above[column]
                        column_runs[column] += inside and not above[column]
                    above[column] = inside
                began = (stack[down, across, row, 0] > limit) != dark
                row_paper += runs - (not began and not left)
            for column in range(columns):
                column_paper += column_runs[column] - (not column_began[column] and not above[column])
            found[number, 0] = area
            found[number, 1] = row_crossings
            found[number, 2] = column_crossings
            found[number, 3] = row_paper
            found[number, 4] = column_paper
    return found
