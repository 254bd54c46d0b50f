"""How many of the images that a model knows are as strange as this one: a rank, no probability model.

Several numbers say how strange an image is, each on its own scale. All of them, of the image asked about and
of the held-out ones together, are put in units of their own spread, and one soft maximum makes one number of
them; the share of held-out images whose number is as large is the typicality. Because the image asked about
takes part in everything that the held-out ones take part in, an image of the same kind has any rank as
likely as any other: the share of those below a level is the level at most, whatever the distributions are
(conformal prediction: Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World, 2005). Images of one
source (a specimen, a spot) resemble each other, so sources are ranked, and images within them are averaged
(Lee, Barber & Willett, J. R. Stat. Soc. B, 2025, on hierarchical data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_NORMAL = 1.4826
"""Median |x| of a normal distribution is its standard deviation over this."""
_SHARPNESS = 2.0
"""Of the soft maximum: 0 is the mean, infinity the maximum."""
_LEAST_SPREAD = 1e-6
"""Of the median: what never differs has no spread of its own."""
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def typicality(
    known: FloatArray, asked: FloatArray, sources: IntArray, two_sided: Sequence[bool] = ()
) -> float:
    """Return the share of known images that are as strange as the one asked about, or stranger.

    Parameters
    ----------
    known : (n, c) float64
        Of held-out images; the larger, the stranger.
    asked : (c,) float64
    sources : (n,) int64
        Numbers of their sources.
    two_sided : sequence of bool, optional
        Whether small values of a column are as strange as large ones.

    Returns
    -------
    float
        From 1 / (number of sources + 1) to 1; 0 where a number of `asked` is not finite.
    """
    if not np.isfinite(asked).all():
        return 0.0
    table = np.vstack([asked, known])
    centre = np.median(table, axis=0)
    off = table - centre
    spread = _NORMAL * np.median(np.abs(off), axis=0)
    z = off / np.maximum(spread, np.maximum(_LEAST_SPREAD * np.abs(centre), 1e-12))
    sided = np.zeros(len(asked), dtype=bool)
    sided[: len(two_sided)] = two_sided[: len(asked)]
    strange = np.logaddexp.reduce(_SHARPNESS * np.where(sided, np.abs(z), z), axis=1)
    at_least = strange[1:] >= strange[0]
    n_sources = int(sources.max(initial=-1)) + 1
    images = np.bincount(sources, minlength=n_sources)
    share = np.bincount(sources, weights=at_least, minlength=n_sources) / np.maximum(images, 1)
    return float((1.0 + share.sum()) / (n_sources + 1.0))


def ranked_sources(names: Sequence[str], level: float) -> tuple[IntArray, bool]:
    """Number the sources of held-out images.

    Parameters
    ----------
    names : sequence of str
        Of the source of each image.
    level : float
        That typicality must be able to fall below.

    Returns
    -------
    sources : (n,) int64
    by_source : bool
        False where there are too few sources for the level: then each image counts as one, and more images
        of a new source fall below the level than it says.

    Raises
    ------
    ValueError
        If there are too few images, too.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    least = math.ceil(1.0 / level)
    _, numbers = np.unique(np.asarray(names, dtype=str), return_inverse=True)
    numbers = numbers.astype(np.int64)
    if int(numbers.max(initial=-1)) + 1 >= least:
        return numbers, True
    if len(names) < least:
        raise ValueError(
            f"held-out images: {len(names)} cannot say what 1 in {1.0 / level:g} of them is like;"
            f" hold out {least} or more"
        )
    return np.arange(len(names), dtype=np.int64), False


def regular_subset(grid: tuple[int, int] | int, most: int) -> IntArray:
    """Return the numbers of `most` patches of a grid, spread evenly over it; of all, where there are fewer.

    Rows have as many of them as each other, or one more, and so have columns.

    Parameters
    ----------
    grid : (int, int) or int
        How many patches there are, down and across. Where only their number is kept, it is taken for that of
        the grid of whole rows that is most nearly square, and not higher than wide: 48 for 6 x 8.
    most : int
        1 or more.

    Returns
    -------
    (n,) int64
        Counted row by row; rising.
    """
    down, across = _most_nearly_square(grid) if isinstance(grid, int) else grid
    if down * across <= most:
        return np.arange(down * across, dtype=np.int64)
    turn = np.arange(most, dtype=np.int64)
    used = min(most, across)
    columns = (2 * turn[:used] + 1) * across // (2 * used)
    # Down the image one takes its turn after the other. Equal steps across it would often meet the same
    # columns again and again; multiples of the golden ratio are far from that, and neighbours far apart.
    shuffled = np.argsort(np.argsort((0.5 + turn[:used] * _GOLDEN) % 1.0))
    rows = (2 * turn + 1) * down // (2 * most)
    return np.sort(rows * across + columns[shuffled[turn % used]])


def _most_nearly_square(count: int) -> tuple[int, int]:
    down = next((n for n in range(math.isqrt(count), 1, -1) if count % n == 0), 1)
    return down, count // down
