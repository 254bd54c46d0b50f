"""Which crystals of neighbouring grid points are the same crystal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel

FloatArray = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]


@kernel("float64(float64[::1], float64[::1], float64[:,::1], int64, int64)")
def cos_half_angle(a: FloatArray, b: FloatArray, group: FloatArray, first: int, last: int) -> float:
    """Return cos(theta/2) of the misorientation of two orientations (4,), symmetry-reduced.

    theta is the smallest angle of s a b*, so cos(theta/2) = max over s of |<a b*, s>|; the
    operators s are the rows `first` to `last` (excluded) of `group`.
    """
    w = a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]
    x = a[1] * b[0] - a[0] * b[1] - a[2] * b[3] + a[3] * b[2]
    y = a[2] * b[0] - a[0] * b[2] - a[3] * b[1] + a[1] * b[3]
    z = a[3] * b[0] - a[0] * b[3] - a[1] * b[2] + a[2] * b[1]
    best = 0.0
    for s in range(first, last):
        cosine = abs(w * group[s, 0] + x * group[s, 1] + y * group[s, 2] + z * group[s, 3])
        best = max(best, cosine)
    return best


@kernel(
    "int32[:,::1](float64[:,::1], int32[::1], float64[:,::1], int32[::1], int32[::1], boolean[::1], "
    "float64[:,::1], int64[::1], float64)"
)
def link(
    here: FloatArray,
    here_material: Int32Array,
    there: FloatArray,
    there_material: Int32Array,
    neighbour: Int32Array,
    precedes: npt.NDArray[np.bool_],
    group: FloatArray,
    group_start: npt.NDArray[np.int64],
    min_cos_half: float,
) -> Int32Array:
    """Pair the crystals of a grid point with those of its neighbours.

    With each neighbour a crystal pairs at most once. The pair with the smallest misorientation
    of all goes first, and so on up to the tolerance; of equal ones that with the better rank at
    the point that comes first in the grid. So the pairs of two points do not depend on which of
    them arrived first.

    Parameters
    ----------
    here, here_material : (k, 4) and (k,)
        Orientations and material numbers of the point's crystals, best rank first.
    there, there_material : (m, 4) and (m,)
        The same of all neighbours' crystals, best rank first in each neighbour.
    neighbour : (m,) int
        Which neighbour each of `there` belongs to, ascending from 0.
    precedes : (m,) bool
        That neighbour comes before this point in the grid.
    group, group_start : (t, 4) and (materials + 1,)
        Symmetry operators of all materials, and where each material's begin.
    min_cos_half : float
        cos(tolerance / 2).

    Returns
    -------
    (p, 2) int32
        Rows of `here` and `there` that belong together.
    """
    k, m = here.shape[0], there.shape[0]
    pairs = np.empty((m, 2), dtype=np.int32)
    n = 0
    begin = 0
    while begin < m:
        end = begin + 1
        while end < m and neighbour[end] == neighbour[begin]:
            end += 1
        # Rows are the point that comes first in the grid, whichever of the two arrived first.
        swapped = precedes[begin]
        rows, columns = (end - begin, k) if swapped else (k, end - begin)
        cosines = np.full((rows, columns), -1.0)
        for r in range(rows):
            for c in range(columns):
                i, j = (c, begin + r) if swapped else (r, begin + c)
                p = here_material[i]
                if p != there_material[j]:
                    continue
                first, last = group_start[p], group_start[p + 1]
                if swapped:
                    cosines[r, c] = cos_half_angle(there[j], here[i], group, first, last)
                else:
                    cosines[r, c] = cos_half_angle(here[i], there[j], group, first, last)
        for _ in range(min(rows, columns)):
            best, best_r, best_c = -1.0, -1, -1
            for r in range(rows):
                for c in range(columns):
                    if cosines[r, c] >= min_cos_half and cosines[r, c] > best:
                        best, best_r, best_c = cosines[r, c], r, c
            if best_r < 0:
                break
            pairs[n, 0], pairs[n, 1] = (best_c, begin + best_r) if swapped else (best_r, begin + best_c)
            n += 1
            cosines[best_r, :] = -1.0
            cosines[:, best_c] = -1.0
        begin = end
    return pairs[:n].copy()


@kernel("int64(float64[::1], float64[::1], float64[:,::1], int64, int64)")
def nearest_operator(a: FloatArray, b: FloatArray, group: FloatArray, first: int, last: int) -> int:
    """Return the row s of `group` for which |<a, s b>| is largest: s b is the equivalent next to a."""
    best, chosen = -1.0, first
    for s in range(first, last):
        w, x, y, z = group[s, 0], group[s, 1], group[s, 2], group[s, 3]
        cosine = abs(
            a[0] * (w * b[0] - x * b[1] - y * b[2] - z * b[3])
            + a[1] * (w * b[1] + x * b[0] + y * b[3] - z * b[2])
            + a[2] * (w * b[2] - x * b[3] + y * b[0] + z * b[1])
            + a[3] * (w * b[3] + x * b[2] - y * b[1] + z * b[0])
        )
        if cosine > best:
            best, chosen = cosine, s
    return chosen


def left_matrix(q: FloatArray) -> FloatArray:
    """Return the (4, 4) matrix L with L p = q p (Hamilton's product) for all p."""
    w, x, y, z = q
    return np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])
