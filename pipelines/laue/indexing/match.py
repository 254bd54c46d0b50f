"""Compare computed reflections with measured spots, for many orientations at once.

A crystal is described by one matrix M, (3, 3): q = M g with g = B0 hkl. M is the rotation of an
unstrained crystal, or rotation times lattice deformation. A Laue spot depends on the direction of
q alone: with s = sin θ = −q̂_x the beam leaves along u = ki + 2 s q̂ and its orders have energies
n · hc |g| / (2 s), so that harmonics fall on one spot and are counted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel
from pipelines.laue.geometry import HC_KEV_A, Calibration, DetectorArea
from pipelines.laue.reflections import ReflectionList

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

CELL_PX = 16.0
"""Edge of a cell of the spot grid; a search radius may not exceed it."""


@dataclass(frozen=True, eq=False)
class SpotGrid:
    """Measured spots sorted into square cells, so that a neighbour is found by looking at a few.

    Attributes
    ----------
    xy_px : (n, 2) float64
        Positions counted from 0, x is the column.
    starts : (n_cells + 1,) int32
        Where a cell's spots begin in `order`.
    order : (n,) int32
        Spot numbers sorted by cell.
    shape : (int, int)
        Cells in y and x.
    """

    xy_px: FloatArray
    starts: IntArray
    order: IntArray
    shape: tuple[int, int]

    @classmethod
    def of(cls, xy_px: FloatArray, detector_shape: tuple[int, int]) -> SpotGrid:
        """Sort spots into cells; spots off the detector go to the nearest cell."""
        xy = np.ascontiguousarray(xy_px, dtype=np.float64).reshape(-1, 2)
        ny, nx = (int(n // CELL_PX) + 1 for n in detector_shape)
        ix = np.clip((xy[:, 0] // CELL_PX).astype(np.int64), 0, nx - 1)
        iy = np.clip((xy[:, 1] // CELL_PX).astype(np.int64), 0, ny - 1)
        cell = iy * nx + ix
        order = np.argsort(cell, kind="stable").astype(np.int32)
        starts = np.zeros(ny * nx + 1, dtype=np.int32)
        np.cumsum(np.bincount(cell, minlength=ny * nx), out=starts[1:])
        return cls(xy, starts, order, (ny, nx))

    def without(self, taken: npt.NDArray[np.bool_]) -> tuple[SpotGrid, IntArray]:
        """Return the grid of the spots that are not taken, and their numbers in this one."""
        kept = np.flatnonzero(~taken).astype(np.int32)
        detector = (int(self.shape[0] * CELL_PX) - 1, int(self.shape[1] * CELL_PX) - 1)
        return SpotGrid.of(self.xy_px[kept], detector), kept


@dataclass(frozen=True, eq=False)
class Scene:
    """What the reflections of one material can do on one detector: all that does not depend on M.

    `n_search` reflections of smallest |g| serve for scoring candidates; all serve for the rest.
    """

    reflections: ReflectionList
    calibration: Calibration
    area: DetectorArea
    energy_keV: tuple[float, float]

    @cached_property
    def projection(self) -> FloatArray:
        """P of the calibration, C-contiguous."""
        return np.ascontiguousarray(self.calibration.projection)

    @cached_property
    def band(self) -> FloatArray:
        """Lowest and highest energy over hc/2, (2,) 1/angstrom: order n shows when n |g| / s lies within."""
        return np.array(self.energy_keV) * (2.0 / HC_KEV_A)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The spots that a crystal can put on the detector, each direction once.

    Attributes
    ----------
    index : (m,) int32
        Rows of the reflection list.
    xy_px : (m, 2) float64
    order : (m,) int32
        Lowest order that is allowed and in the band.
    energy_keV : (m,) float64
        Its energy.
    """

    index: IntArray
    xy_px: FloatArray
    order: IntArray
    energy_keV: FloatArray


@kernel(
    "Tuple((boolean, float64, float64))(float64, float64, float64, float64[:, ::1], uint8[:, ::1])",
    inline=True,
)
def land(
    ux: float, uy: float, uz: float, projection: FloatArray, usable: npt.NDArray[np.uint8]
) -> tuple[bool, float, float]:
    """Return whether a beam hits a usable pixel, and x, y in px (see `geometry`)."""
    depth = projection[2, 0] * ux + projection[2, 1] * uy + projection[2, 2] * uz
    if depth <= 1e-6:
        return False, 0.0, 0.0
    x = (projection[0, 0] * ux + projection[0, 1] * uy + projection[0, 2] * uz) / depth
    y = (projection[1, 0] * ux + projection[1, 1] * uy + projection[1, 2] * uz) / depth
    if x <= -0.5 or y <= -0.5 or x >= usable.shape[1] - 0.5 or y >= usable.shape[0] - 0.5:
        return False, 0.0, 0.0
    return usable[int(y + 0.5), int(x + 0.5)] != 0, x, y


@kernel(
    "Tuple((int64, float64, float64, float64))("
    "float64[:, ::1], float64[:, ::1], float64, uint64, int64, float64[:, ::1], float64[::1], uint8[:, ::1])",
    inline=True,
)
def _compute(
    m: FloatArray,
    g_unit: FloatArray,
    g_norm: float,
    orders: int,
    i: int,
    projection: FloatArray,
    band: FloatArray,
    usable: npt.NDArray[np.uint8],
) -> tuple[int, float, float, float]:
    # The spot of reflection i: its lowest order (0 where nothing of it can be seen), x, y, and the
    # energy of order 1 in units of hc/2.
    qx = m[0, 0] * g_unit[i, 0] + m[0, 1] * g_unit[i, 1] + m[0, 2] * g_unit[i, 2]
    if qx >= 0.0:
        return 0, 0.0, 0.0, 0.0
    qy = m[1, 0] * g_unit[i, 0] + m[1, 1] * g_unit[i, 1] + m[1, 2] * g_unit[i, 2]
    qz = m[2, 0] * g_unit[i, 0] + m[2, 1] * g_unit[i, 1] + m[2, 2] * g_unit[i, 2]
    norm = np.sqrt(qx * qx + qy * qy + qz * qz)
    s = -qx / norm
    first = g_norm * norm / s
    if first > band[1]:
        return 0, 0.0, 0.0, 0.0
    order = 0
    for n in range(max(int(np.ceil(band[0] / first)), 1), min(int(np.floor(band[1] / first)), 63) + 1):
        if (orders >> np.uint64(n)) & np.uint64(1):
            order = n
            break
    if order == 0:
        return 0, 0.0, 0.0, 0.0
    twice = 2.0 * s / norm
    seen, x, y = land(1.0 + twice * qx, twice * qy, twice * qz, projection, usable)
    return order if seen else 0, x, y, first


@kernel(
    "Tuple((int64, float64))("
    "float64, float64, float64, float64[:, ::1], int32[::1], int32[::1], int64, int64)",
    inline=True,
)
def _nearest(
    x: float,
    y: float,
    radius: float,
    xy: FloatArray,
    starts: IntArray,
    order: IntArray,
    ny: int,
    nx: int,
) -> tuple[int, float]:
    # Nearest spot within the radius (at most CELL_PX): its number or -1, and the squared distance.
    best = -1
    best_d2 = radius * radius
    x0 = max(int((x - radius) / CELL_PX), 0)
    x1 = min(int((x + radius) / CELL_PX), nx - 1)
    y0 = max(int((y - radius) / CELL_PX), 0)
    y1 = min(int((y + radius) / CELL_PX), ny - 1)
    for cy in range(y0, y1 + 1):
        for k in range(starts[cy * nx + x0], starts[cy * nx + x1 + 1]):
            j = order[k]
            dx = xy[j, 0] - x
            dy = xy[j, 1] - y
            d2 = dx * dx + dy * dy
            if d2 < best_d2:
                best_d2 = d2
                best = j
    return best, best_d2


@kernel(
    "void("
    "float64[:, :, ::1], float64[:, ::1], float64[::1], uint64[::1], int64, float64[:, ::1], float64[::1],"
    " uint8[:, ::1], float64[:, ::1], int32[::1], int32[::1], int64, int64, float64, int32[::1], int32[::1])"
)
def _score(
    matrices: FloatArray,
    g_unit: FloatArray,
    g_norm: FloatArray,
    orders: npt.NDArray[np.uint64],
    n_reflections: int,
    projection: FloatArray,
    band: FloatArray,
    usable: npt.NDArray[np.uint8],
    xy: FloatArray,
    starts: IntArray,
    cell_order: IntArray,
    ny: int,
    nx: int,
    radius: float,
    matched: IntArray,
    expected: IntArray,
) -> None:
    for c in range(matrices.shape[0]):
        m = matrices[c]
        hits = 0
        total = 0
        for i in range(n_reflections):
            order, x, y, _ = _compute(m, g_unit, g_norm[i], orders[i], i, projection, band, usable)
            if order == 0:
                continue
            total += 1
            j, _ = _nearest(x, y, radius, xy, starts, cell_order, ny, nx)
            if j >= 0:
                hits += 1
        matched[c] = hits
        expected[c] = total


@kernel(
    "int64(float64[:, ::1], float64[:, ::1], float64[::1], uint64[::1], float64[:, ::1], float64[::1],"
    " uint8[:, ::1], int32[::1], float64[:, ::1], int32[::1], float64[::1])"
)
def _predict(
    m: FloatArray,
    g_unit: FloatArray,
    g_norm: FloatArray,
    orders: npt.NDArray[np.uint64],
    projection: FloatArray,
    band: FloatArray,
    usable: npt.NDArray[np.uint8],
    out_index: IntArray,
    out_xy: FloatArray,
    out_order: IntArray,
    out_first: FloatArray,
) -> int:
    n = 0
    for i in range(g_unit.shape[0]):
        order, x, y, first = _compute(m, g_unit, g_norm[i], orders[i], i, projection, band, usable)
        if order == 0:
            continue
        out_index[n] = i
        out_xy[n, 0] = x
        out_xy[n, 1] = y
        out_order[n] = order
        out_first[n] = first
        n += 1
    return n


@kernel(
    "void(float64[:, ::1], float64[::1], float64[:, ::1], int32[::1], int32[::1], int64, int64,"
    " int32[::1], float64[::1])"
)
def _pair(
    predicted: FloatArray,
    radius: FloatArray,
    xy: FloatArray,
    starts: IntArray,
    cell_order: IntArray,
    ny: int,
    nx: int,
    spot: IntArray,
    distance: FloatArray,
) -> None:
    # Nearest spot of each computed position; a spot keeps only its nearest computed position.
    holder = np.full(xy.shape[0], -1, dtype=np.int32)
    for i in range(predicted.shape[0]):
        j, d2 = _nearest(predicted[i, 0], predicted[i, 1], radius[i], xy, starts, cell_order, ny, nx)
        spot[i] = j
        distance[i] = np.sqrt(d2)
        if j < 0:
            distance[i] = np.inf
            continue
        other = holder[j]
        if other < 0:
            holder[j] = i
        elif distance[other] <= distance[i]:
            spot[i] = -1
            distance[i] = np.inf
        else:
            spot[other] = -1
            distance[other] = np.inf
            holder[j] = i


def score(
    scene: Scene, spots: SpotGrid, matrices: npt.ArrayLike, radius_px: float, n_reflections: int
) -> tuple[IntArray, IntArray]:
    """Count, for a batch of crystals, the reflections that have a spot nearby.

    Parameters
    ----------
    matrices : (c, 3, 3) array
        M of each candidate.
    radius_px : float
        At most `CELL_PX`.
    n_reflections : int
        How many reflections of smallest |g| to compute.

    Returns
    -------
    matched, expected : (c,) int32
        Reflections with a spot within the radius, and all that can hit the detector.
    """
    batch = np.ascontiguousarray(matrices, dtype=np.float64)
    matched = np.empty(len(batch), dtype=np.int32)
    expected = np.empty(len(batch), dtype=np.int32)
    r = scene.reflections
    _score(
        batch,
        r.g_unit,
        r.g_norm,
        r.orders,
        min(n_reflections, len(r.g_norm)),
        scene.projection,
        scene.band,
        scene.area.usable,
        spots.xy_px,
        spots.starts,
        spots.order,
        *spots.shape,
        min(radius_px, CELL_PX),
        matched,
        expected,
    )
    return matched, expected


def predict(scene: Scene, matrix: FloatArray, n_reflections: int | None = None) -> Prediction:
    """Compute every distinct spot that a crystal can put on the detector.

    With `n_reflections`, only those of the so many reflections of smallest |g|.
    """
    r = scene.reflections
    n = len(r.g_norm) if n_reflections is None else min(n_reflections, len(r.g_norm))
    index = np.empty(n, dtype=np.int32)
    xy = np.empty((n, 2))
    order = np.empty(n, dtype=np.int32)
    first = np.empty(n)
    m = _predict(
        np.ascontiguousarray(matrix),
        r.g_unit[:n],
        r.g_norm[:n],
        r.orders[:n],
        scene.projection,
        scene.band,
        scene.area.usable,
        index,
        xy,
        order,
        first,
    )
    energy = first[:m] * order[:m] * (HC_KEV_A / 2.0)
    return Prediction(index[:m].copy(), xy[:m].copy(), order[:m].copy(), energy)


def pair(
    predicted_xy: FloatArray, spots: SpotGrid, radius_px: float | FloatArray
) -> tuple[IntArray, FloatArray]:
    """Pair computed positions with measured spots, one to one.

    Returns
    -------
    spot : (m,) int32
        Number of the spot that belongs to each computed position, -1 for none.
    distance_px : (m,) float64
        Distance between the two; inf for none.
    """
    m = len(predicted_xy)
    radius = np.minimum(np.broadcast_to(np.asarray(radius_px, dtype=np.float64), (m,)), CELL_PX)
    spot = np.empty(m, dtype=np.int32)
    distance = np.empty(m)
    _pair(
        np.ascontiguousarray(predicted_xy),
        np.ascontiguousarray(radius),
        spots.xy_px,
        spots.starts,
        spots.order,
        *spots.shape,
        spot,
        distance,
    )
    return spot, distance
