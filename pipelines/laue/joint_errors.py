"""How sure a calibration from several frames is.

With J_c, J_r the derivatives of a frame's spots by the detector and by the frame's own rotation,

    J̃ = J_c − J_r (J_rᵀ J_r)⁻¹ J_rᵀ J_c,   N = Σ J̃ᵀ J̃   over the frames.

**What many frames do not average out.** A crystal that stands still puts its spots on the same pixels
frame after frame, and most of what keeps them from their computed positions (shape of the spot, the
camera's distortion) comes again each time. Residuals are therefore split into a part that spots of one
place share, a fraction ρ of the variance s², and a part of their own. ρ is measured by the products of
residuals at one place in different frames; with clusters c of such spots the covariance is

    N⁻¹ s² [ (1 − ρ) N + ρ Σ_c (Σ_{i∈c} J̃_i)ᵀ (Σ_{i∈c} J̃_i) ] N⁻¹

(variance components, the exchangeable case of Liang & Zeger, Biometrika 73, 13, 1986). With ρ = 0 it is
the covariance of least squares; T copies of a frame give that of the one frame, as they should.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from scipy.stats import chi2

from pipelines.laue.calibration import CalibrationError
from pipelines.laue.calibration_fit import CORE_VARIANCE, Geometry, linearise
from pipelines.laue.drift import Observation

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

ONE_PLACE_PX = 2.0
"""Spots of different frames that lie this close share what is wrong with the place."""


@dataclass(frozen=True, eq=False)
class Spots:
    """What is fitted of one frame: B0 hkl, measured positions, energies where the depth is a parameter."""

    g: FloatArray
    xy: FloatArray
    energy_keV: FloatArray | None = None


class Eliminated:
    """The equations of one frame with its rotation eliminated.

    Attributes
    ----------
    design : (2n, 5 or 6)
        J̃: by the detector and the depth.
    residual : (2n,)
    turn, turn_by_detector : (3,), (3, 5 or 6)
        The rotation step is turn − turn_by_detector @ (step of the detector).
    """

    def __init__(self, geometry: Geometry, spots: Spots) -> None:
        computed, jacobian = linearise(geometry, spots.g, spots.energy_keV)
        flat = jacobian.reshape(2 * len(spots.g), -1)
        residual = (spots.xy - computed).ravel()
        detector, rotation = np.delete(flat, (5, 6, 7), axis=1), flat[:, 5:8]
        # Fewer than two spots leave a rotation undetermined; lstsq then changes nothing along it.
        solved = np.linalg.lstsq(rotation, np.column_stack([residual, detector]), rcond=None)[0]
        self.turn, self.turn_by_detector = solved[:, 0], solved[:, 1:]
        self.residual = residual - rotation @ self.turn
        self.design = detector - rotation @ self.turn_by_detector


class Errors:
    """Covariance of a converged fit, see the module.

    Attributes
    ----------
    covariance : (p, p)
    residual_px : (n, 2)
    shared : float
        ρ.
    """

    def __init__(self, geometries: Sequence[Geometry], spots: Sequence[Spots]) -> None:
        frames = [Eliminated(geometry, s) for geometry, s in zip(geometries, spots, strict=True)]
        design = np.concatenate([frame.design for frame in frames])
        residual = np.concatenate([frame.residual for frame in frames]).reshape(-1, 2)
        p = design.shape[1]
        freedom = residual.size - p - 3 * len(frames)
        if freedom <= 0:
            raise CalibrationError(f"{len(residual)} spots do not determine the detector: choose more frames")
        variance = float(np.sum(np.square(residual))) / freedom / CORE_VARIANCE
        place = _places(np.concatenate([s.xy for s in spots]))
        frame_of = np.repeat(np.arange(len(spots)), [len(s.g) for s in spots])
        self.residual_px = residual
        self.shared = _shared(residual, place, frame_of, p, variance * CORE_VARIANCE)
        normal = design.T @ design
        summed = np.zeros((int(place.max()) + 1, 2, p))
        np.add.at(summed, place, design.reshape(-1, 2, p))
        together = summed.reshape(-1, p)
        inverse = np.linalg.inv(normal)
        inner = (1.0 - self.shared) * normal + self.shared * (together.T @ together)
        self.covariance = np.asarray(variance * inverse @ inner @ inverse)


def _places(xy: FloatArray) -> IntArray:
    """Number the places: spots that a chain of steps below `ONE_PLACE_PX` joins are at one."""
    pairs = cKDTree(xy).query_pairs(ONE_PLACE_PX, output_type="ndarray")
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(xy), len(xy)))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _shared(
    residual: FloatArray, place: IntArray, frame: npt.NDArray[np.intp], parameters: int, variance: float
) -> float:
    """Return the share of the variance that residuals of different frames at one place have in common."""
    count = int(place.max()) + 1
    total = np.zeros((count, 2))
    np.add.at(total, place, residual)
    squares = np.bincount(place, np.sum(np.square(residual), axis=1), count)
    size = np.bincount(place, minlength=count)
    # Two spots of one frame at a place are no repetition; they are rare enough to be counted as one.
    in_frames = len(np.unique(place * (int(frame.max()) + 1) + frame))
    several = int(np.count_nonzero(size > 1))
    if in_frames == count or 2 * several <= parameters + 3 or variance <= 0.0:
        return 0.0
    products = float(np.sum(np.sum(np.square(total), axis=1) - squares))
    pairs = 2.0 * float(np.sum(size * (size - 1.0)))
    # What all frames share the fit has taken up, too, as far as its parameters reach.
    taken = 1.0 - (parameters + 3) / (2.0 * several)
    return min(max(products / pairs / taken / variance, 0.0), 1.0)


def agreement_of(seen: Sequence[Observation]) -> float:
    """Return the probability that frames of a detector at rest scatter as much (χ² of dd, xcen, ycen)."""
    if len(seen) < 2:
        return 1.0
    precisions, changes = _weights(seen)
    mean = np.linalg.solve(precisions.sum(0), np.einsum("tij,tj->i", precisions, changes))
    off = changes - mean
    return float(chi2.sf(np.einsum("ti,tij,tj->", off, precisions, off), 3 * (len(seen) - 1)))


def parted(frames: Sequence[int], seen: Sequence[Observation]) -> tuple[int, int]:
    """Return the two neighbouring frames between which a single step explains most."""
    order = np.argsort(frames, kind="stable")
    precisions, changes = _weights([seen[i] for i in order])
    weighted = np.einsum("tij,tj->ti", precisions, changes)
    best, where = -1.0, 1
    for k in range(1, len(seen)):
        gain = 0.0
        for part in (slice(0, k), slice(k, None)):
            b = weighted[part].sum(0)
            gain += float(b @ np.linalg.solve(precisions[part].sum(0), b))
        if gain > best:
            best, where = gain, k
    return frames[order[where - 1]], frames[order[where]]


def _weights(seen: Sequence[Observation]) -> tuple[FloatArray, FloatArray]:
    # The noise of all frames together is known better than that of one.
    variance = sum(o.square_sum_px2 for o in seen) / sum(o.freedom for o in seen)
    precisions = np.array([np.linalg.inv(o.unit_covariance * variance) for o in seen])
    return precisions, np.array([o.change for o in seen])
