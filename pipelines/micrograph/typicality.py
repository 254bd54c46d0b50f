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


def regular_subset(count: int, most: int) -> IntArray:
    """Return the numbers of `most` of `count` patches, spread evenly; all of them where there are fewer."""
    if count <= most:
        return np.arange(count, dtype=np.int64)
    return (np.arange(most, dtype=np.int64) * 2 + 1) * count // (2 * most)
