"""Candidate orientations from the angles between spots.

If a spot i is the reflection h, the crystal can still turn about q_i by an angle φ. Every other
spot j whose angle to q_i is that of some reflection k to h says what φ would have to be; spots
of the same crystal agree, others scatter. One spot and one hypothesis cost a look into a table of
angles per other spot, and the right hypothesis stands out by tens of votes over a background of
about one. (A Hough transform over the one remaining angle; the angle look-up is that of the
classical indexers, for example LaueTools' findorient.py.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel
from pipelines.laue.geometry import HC_KEV_A
from pipelines.laue.reflections import ReflectionList

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

ANGLE_BINS = 3600
"""Bins of the angle table over 180 degrees."""

PHI_BINS = 1440
"""Bins of the remaining rotation over one turn (0.25 degree)."""


@dataclass(frozen=True, eq=False)
class AngleTable:
    """Angles between hypotheses h and reflections k of one material.

    Attributes
    ----------
    hypothesis : (n_h,) int32
        Rows of the reflection list: one of each set of equivalents under the proper rotations.
    frames : (n_h, 3, 3) float64
        Rows e1, e2, ĝ_h: the axes that azimuths are counted in.
    fold : (n_h,) int32
        Order of the rotation axis along h; φ is counted modulo 360°/fold.
    starts : (n_h, ANGLE_BINS + 1) int32
        Where the entries of an angle bin begin.
    azimuth, angle : (entries,) float32
        Of ĝ_k about ĝ_h, rad, sorted by angle within h.
    s_min, s_max : (entries,) float32
        sin θ between which some order of k is in the energy band.
    h_s_min, h_s_max : (n_h,) float64
        The same for h.
    """

    hypothesis: IntArray
    frames: FloatArray
    fold: IntArray
    starts: IntArray
    azimuth: npt.NDArray[np.float32]
    angle: npt.NDArray[np.float32]
    s_min: npt.NDArray[np.float32]
    s_max: npt.NDArray[np.float32]
    h_s_min: FloatArray
    h_s_max: FloatArray


def build_angle_table(
    reflections: ReflectionList,
    n_hypotheses: int,
    n_partners: int,
    energy_keV: tuple[float, float],
    max_angle_deg: float = 120.0,
) -> AngleTable:
    """Tabulate the angles of a material.

    Parameters
    ----------
    reflections : ReflectionList
        Sorted by |g|.
    n_hypotheses : int
        How many inequivalent reflections of smallest |g| a spot is tried as.
    n_partners : int
        How many reflections of smallest |g| (both signs) the other spots may be.
    energy_keV : (float, float)
        Band of the experiment.
    max_angle_deg : float
        Angles between scattering vectors beyond this do not occur on one detector.
    """
    hypothesis = _representatives(reflections, n_hypotheses)
    n_k = min(n_partners, len(reflections.g_norm))
    unit = reflections.g_unit[:n_k]
    s_min, s_max = _sine_range(reflections, energy_keV)
    rotations = reflections.material.lattice_rotations

    frames, folds, starts = [], [], []
    azimuths, angles, mins, maxs = [], [], [], []
    offset = 0
    edges = np.linspace(0.0, np.pi, ANGLE_BINS + 1)
    for h in hypothesis:
        axis = reflections.g_unit[h]
        frame = _frame(axis)
        fold = int(np.sum(np.linalg.norm(rotations @ axis - axis, axis=1) < 1e-6))
        local = unit @ frame.T
        angle = np.arccos(np.clip(local[:, 2], -1.0, 1.0))
        azimuth = np.mod(np.arctan2(local[:, 1], local[:, 0]), 2 * np.pi)
        # One partner of each set that the axis repeats is enough, as φ is counted modulo 360°/fold.
        keep = (angle > np.radians(3.0)) & (angle < np.radians(max_angle_deg))
        keep &= azimuth < 2 * np.pi / fold - 1e-9
        rows = np.flatnonzero(keep)
        rows = rows[np.argsort(angle[rows], kind="stable")]
        frames.append(frame)
        folds.append(fold)
        starts.append(offset + np.searchsorted(angle[rows], edges).astype(np.int32))
        azimuths.append(azimuth[rows])
        angles.append(angle[rows])
        mins.append(s_min[rows])
        maxs.append(s_max[rows])
        offset += len(rows)
    return AngleTable(
        hypothesis=hypothesis,
        frames=np.ascontiguousarray(frames),
        fold=np.array(folds, dtype=np.int32),
        starts=np.ascontiguousarray(starts, dtype=np.int32),
        azimuth=np.concatenate(azimuths).astype(np.float32),
        angle=np.concatenate(angles).astype(np.float32),
        s_min=np.concatenate(mins).astype(np.float32),
        s_max=np.concatenate(maxs).astype(np.float32),
        h_s_min=s_min[hypothesis],
        h_s_max=s_max[hypothesis],
    )


def _representatives(reflections: ReflectionList, count: int) -> IntArray:
    # One reflection of each orbit under the proper rotations, the smallest |g| first. Friedel
    # mates that no proper rotation connects are different hypotheses.
    rotations = reflections.material.lattice_rotations
    chosen: list[int] = []
    seen: set[tuple[int, int, int]] = set()
    to_hkl = np.linalg.inv(reflections.material.B0) @ rotations @ reflections.material.B0
    operators = np.rint(to_hkl).astype(np.int64)
    for row, hkl in enumerate(reflections.hkl.astype(np.int64)):
        if len(chosen) == count:
            break
        if tuple(hkl) in seen:
            continue
        seen.update(map(tuple, (operators @ hkl).tolist()))
        chosen.append(row)
    return np.array(chosen, dtype=np.int32)


def _sine_range(
    reflections: ReflectionList, energy_keV: tuple[float, float]
) -> tuple[FloatArray, FloatArray]:
    # sin θ = hc n |g| / (2 E): from the lowest allowed order at the top of the band to the
    # highest at its bottom. Between, a gap of the orders is ignored: this only prunes votes.
    bits = np.arange(1, 64, dtype=np.uint64)
    allowed = (reflections.orders[:, None] >> bits) & np.uint64(1)
    lowest = 1 + np.argmax(allowed, axis=1)
    highest = 63 - np.argmax(allowed[:, ::-1], axis=1)
    s_min = HC_KEV_A * lowest * reflections.g_norm / (2.0 * energy_keV[1])
    s_max = HC_KEV_A * highest * reflections.g_norm / (2.0 * energy_keV[0])
    return s_min, s_max


def _frame(axis: FloatArray) -> FloatArray:
    # Right-handed rows e1, e2, axis.
    start = np.eye(3)[int(np.argmin(np.abs(axis)))]
    e1 = start - axis * (start @ axis)
    e1 /= np.linalg.norm(e1)
    return np.stack([e1, np.cross(axis, e1), axis])


@kernel(
    "int64("
    "float64[:, ::1], int64, int32[::1], float64[:, :, ::1], int32[::1], int32[:, ::1], float32[::1],"
    " float32[::1], float32[::1], float32[::1], float64[::1], float64[::1], int32[::1], float64,"
    " float64[:, :, ::1], int32[::1], float64[::1])"
)
def _vote(
    q: FloatArray,
    i: int,
    partners: IntArray,
    frames: FloatArray,
    fold: IntArray,
    starts: IntArray,
    azimuth: npt.NDArray[np.float32],
    angle: npt.NDArray[np.float32],
    s_min: npt.NDArray[np.float32],
    s_max: npt.NDArray[np.float32],
    h_s_min: FloatArray,
    h_s_max: FloatArray,
    hypotheses: IntArray,
    tolerance: float,
    out_matrix: FloatArray,
    out_hypothesis: IntArray,
    out_excess: FloatArray,
) -> int:
    # Fills the outputs with the best candidates of spot i, best first; returns how many.
    size = out_hypothesis.shape[0]
    found = 0
    n = partners.shape[0]
    f = np.empty((3, 3))
    f[2] = q[i]
    lead = 0
    if abs(q[i, 1]) < abs(q[i, lead]):
        lead = 1
    if abs(q[i, 2]) < abs(q[i, lead]):
        lead = 2
    norm = 0.0
    for a in range(3):
        f[0, a] = -q[i, a] * q[i, lead]
        if a == lead:
            f[0, a] += 1.0
        norm += f[0, a] * f[0, a]
    norm = np.sqrt(norm)
    for a in range(3):
        f[0, a] /= norm
    f[1, 0] = f[2, 1] * f[0, 2] - f[2, 2] * f[0, 1]
    f[1, 1] = f[2, 2] * f[0, 0] - f[2, 0] * f[0, 2]
    f[1, 2] = f[2, 0] * f[0, 1] - f[2, 1] * f[0, 0]

    gamma = np.empty(n)
    beta = np.empty(n)
    sine = np.empty(n)
    for p in range(n):
        j = partners[p]
        a1 = f[0, 0] * q[j, 0] + f[0, 1] * q[j, 1] + f[0, 2] * q[j, 2]
        a2 = f[1, 0] * q[j, 0] + f[1, 1] * q[j, 1] + f[1, 2] * q[j, 2]
        a3 = f[2, 0] * q[j, 0] + f[2, 1] * q[j, 1] + f[2, 2] * q[j, 2]
        gamma[p] = np.arctan2(np.sqrt(a1 * a1 + a2 * a2), a3)
        beta[p] = np.arctan2(a2, a1) + 2.0 * np.pi
        sine[p] = -q[j, 0]
    histogram = np.zeros(PHI_BINS + 2, dtype=np.int32)
    step = np.pi / ANGLE_BINS
    for index in range(hypotheses.shape[0]):
        h = hypotheses[index]
        if -q[i, 0] < h_s_min[h] or -q[i, 0] > h_s_max[h]:
            continue
        period = 2.0 * np.pi / fold[h]
        bins = PHI_BINS // fold[h]
        per_bin = bins / period
        for b in range(bins + 2):
            histogram[b] = 0
        votes = 0
        for p in range(n):
            low = int((gamma[p] - tolerance) / step)
            high = min(int((gamma[p] + tolerance) / step) + 1, ANGLE_BINS)
            if low < 0 or gamma[p] < 0.05:
                continue
            for e in range(starts[h, low], starts[h, high]):
                if abs(angle[e] - gamma[p]) > tolerance or sine[p] < s_min[e] or sine[p] > s_max[e]:
                    continue
                phi = (beta[p] - azimuth[e]) % period
                histogram[1 + int(phi * per_bin)] += 1
                votes += 1
        if votes < 3:
            continue
        # Neighbouring bins count together; the ends of the period meet.
        histogram[0] = histogram[bins]
        histogram[bins + 1] = histogram[1]
        peak = 0
        at = 0
        for b in range(1, bins + 1):
            total = histogram[b - 1] + histogram[b] + histogram[b + 1]
            if total > peak:
                peak = total
                at = b
        background = 3.0 * votes / bins
        excess = (peak - background) / np.sqrt(background + 1.0)
        if peak < 3 or (found == size and excess <= out_excess[size - 1]):
            continue
        # The mean φ of the votes in the window is finer than a bin.
        centre = (at - 0.5) / per_bin
        shift = 0.0
        weight = 0.0
        for p in range(n):
            low = int((gamma[p] - tolerance) / step)
            high = min(int((gamma[p] + tolerance) / step) + 1, ANGLE_BINS)
            if low < 0 or gamma[p] < 0.05:
                continue
            for e in range(starts[h, low], starts[h, high]):
                if abs(angle[e] - gamma[p]) > tolerance or sine[p] < s_min[e] or sine[p] > s_max[e]:
                    continue
                delta = (beta[p] - azimuth[e] - centre + 0.5 * period) % period - 0.5 * period
                if abs(delta) * per_bin <= 1.5:
                    # An azimuth is known the better, the farther the partner is.
                    w = np.sin(gamma[p]) ** 2
                    shift += w * delta
                    weight += w
        phi = centre + (shift / weight if weight > 0.0 else 0.0)
        place = min(found, size - 1)
        while place > 0 and out_excess[place - 1] < excess:
            place -= 1
        last = min(found, size - 1)
        for k in range(last, place, -1):
            out_excess[k] = out_excess[k - 1]
            out_hypothesis[k] = out_hypothesis[k - 1]
            out_matrix[k] = out_matrix[k - 1]
        out_excess[place] = excess
        out_hypothesis[place] = h
        cos = np.cos(phi)
        sin = np.sin(phi)
        for a in range(3):
            c1 = f[0, a] * cos + f[1, a] * sin
            c2 = f[1, a] * cos - f[0, a] * sin
            for b in range(3):
                out_matrix[place, a, b] = (
                    c1 * frames[h, 0, b] + c2 * frames[h, 1, b] + f[2, a] * frames[h, 2, b]
                )
        if found < size:
            found += 1
    return found


def candidates(
    table: AngleTable,
    q: FloatArray,
    spot: int,
    partners: IntArray,
    tolerance_deg: float,
    keep: int,
    hypotheses: IntArray | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Return the orientations that most partners of a spot agree on.

    Parameters
    ----------
    q : (n, 3) float64
        Unit scattering vectors of all spots.
    spot : int
        The spot that is taken for each hypothesis in turn.
    partners : (m,) int32
        Spots that vote.
    tolerance_deg : float
        How far a measured angle may be from a tabulated one.
    keep : int
        How many candidates to return at most, one a hypothesis.
    hypotheses : (k,) int32, optional
        Entries of ``table.hypothesis`` to try; all of them by default.

    Returns
    -------
    matrices : (c, 3, 3) float64
        Crystal to lab, best first.
    excess : (c,) float64
        Votes above the background of accidental ones, in its standard deviations.
    """
    if hypotheses is None:
        hypotheses = np.arange(len(table.hypothesis), dtype=np.int32)
    matrix = np.empty((keep, 3, 3))
    hypothesis = np.empty(keep, dtype=np.int32)
    excess = np.zeros(keep)
    n = _vote(
        q,
        spot,
        partners,
        table.frames,
        table.fold,
        table.starts,
        table.azimuth,
        table.angle,
        table.s_min,
        table.s_max,
        table.h_s_min,
        table.h_s_max,
        hypotheses,
        np.radians(tolerance_deg),
        matrix,
        hypothesis,
        excess,
    )
    return matrix[:n], excess[:n]
