"""Calibrate a detector from several frames of an unstrained crystal: one detector, an orientation a frame.

Each frame's rotation is eliminated before the detector is solved for (`joint_errors.Eliminated`).

Spots are matched and the detector stepped in turn; `joint_errors` says how sure the outcome is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from pipelines.laue.calibration import (
    DEEPEST_MM,
    DEPTH_SIGMAS,
    CalibrationError,
    CalibrationSettings,
    refuse_outcome,
)
from pipelines.laue.calibration_fit import (
    CORE_MEDIANS,
    FittedDetector,
    Geometry,
    linearise,
    rotation_of,
    vector_of,
    with_vector,
)
from pipelines.laue.calibration_search import Matches, Sky
from pipelines.laue.crystal import Material
from pipelines.laue.drift import Observation, observe
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.indexing.parameters import Phase
from pipelines.laue.joint_errors import Eliminated, Errors, Spots, agreement_of, parted

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_ROUNDS = 40
_FREE_ROUNDS = 10
_CONVERGED = 0.05  # a step below this share of every sigma
_LEAST_EIGENVALUE = 1e-9
_DISAGREE = 1e-6


@dataclass(frozen=True, eq=False)
class ReferenceFrame:
    """A frame that shows the reference crystal.

    Attributes
    ----------
    number : int
    xy_px : (n, 2) float64
        Peaks from 0.
    rotation : (3, 3) float64
        R of the crystal, near enough for its spots to be told.
    g : (k, 3) float64
        B0 hkl of spots that are known already.
    spots : (k,) int64
        Their numbers among the peaks.
    """

    number: int
    xy_px: FloatArray = field(repr=False)
    rotation: FloatArray = field(repr=False)
    g: FloatArray = field(repr=False)
    spots: IntArray = field(repr=False)


@dataclass(frozen=True, eq=False)
class JointFit(FittedDetector):
    """A calibration from several frames, how sure it is, and what it rests on.

    Attributes
    ----------
    calibration, start : Calibration
    frames : tuple of int
        Numbers of the frames.
    rotations : (T, 3, 3) float64
        R of the crystal in each.
    depth_mm : float
        Depth at 15 keV; 0 where it was not refined.
    covariance : (5, 5) or (6, 6) float64
        Of dd (mm), xcen, ycen (px), xbet, xgam (deg), depth (mm).
    peaks_px : (m, 2) float64
        All peaks of all frames, frame after frame.
    spots : (n,) int64
        Rows of it that were fitted.
    xy_px, residual_px : (n, 2) float64
        Their positions, and measured minus computed.
    matched, expected : int
        Spots within the match radius, and all that the crystal can put on the detector; all frames.
    shared : float
        ρ: share of the residuals' variance that comes again at the same place.
    agreement : float
        Probability that frames of a detector at rest disagree as much.
    left_out : tuple of int
        Frames that did not show enough spots.
    """

    calibration: Calibration
    start: Calibration
    frames: tuple[int, ...]
    rotations: FloatArray = field(repr=False)
    depth_mm: float
    covariance: FloatArray = field(repr=False)
    peaks_px: FloatArray = field(repr=False)
    spots: IntArray = field(repr=False)
    xy_px: FloatArray = field(repr=False)
    residual_px: FloatArray = field(repr=False)
    matched: int
    expected: int
    shared: float
    agreement: float
    left_out: tuple[int, ...] = ()

    @property
    def unchanged(self) -> float:
        """Probability that a detector that stands as in the start comes out as far from it (χ² of five)."""
        of_detector = self.covariance[:5, :5]
        return float(chi2.sf(self.change @ np.linalg.solve(of_detector, self.change), 5))


@dataclass(frozen=True, eq=False)
class _Work:
    """A state of the fit."""

    calibration: Calibration
    rotations: list[FloatArray]
    depth_mm: float = 0.0

    def geometry(self, frame: int) -> Geometry:
        return Geometry(self.calibration, self.rotations[frame], self.depth_mm)


class _TooFewSpots(CalibrationError):
    def __init__(self, frame: ReferenceFrame, count: int, material: str, needed: int) -> None:
        super().__init__(
            f"only {count} spots of {material} match in frame {frame.number}, at least {needed} are needed:"
            " choose frames with more"
        )
        self.frame = frame


class JointCalibrator:
    """Calibrates one detector from frames of one crystal.

    Parameters
    ----------
    material : Material
        Its cell is taken for exact; the crystal for free of deviatoric strain.
    start : Calibration
        What the answer is compared with, and where the fit begins.
    area : DetectorArea, optional
    settings : CalibrationSettings, optional
        Of it count `energy_keV`, `match_radius_px`, `min_spots`, `max_residual_px`, the limits of a change
        and `depth`.
    """

    def __init__(
        self,
        material: Material,
        start: Calibration,
        area: DetectorArea | None = None,
        settings: CalibrationSettings | None = None,
    ) -> None:
        self.material = material
        self.start = start
        self.area = area or DetectorArea.of(start)
        self.settings = settings or CalibrationSettings()
        self._phase = Phase.prepare(material, start, self.area, self.settings.energy_keV)

    def calibrate(self, frames: Sequence[ReferenceFrame]) -> JointFit:
        """Refine the detector and an orientation for each frame.

        Raises
        ------
        CalibrationError
            If the frames do not yield a calibration to rely on.
        """
        if not frames:
            raise CalibrationError(f"no frame that shows a crystal of {self.material.name}")
        kept = list(frames)
        left_out: list[int] = []
        while True:
            try:
                fit = replace(self._calibrated(kept), left_out=tuple(sorted(left_out)))
                break
            except _TooFewSpots as error:
                if len(kept) == 1:
                    raise
                # One frame with a blink of the beam does not spoil the others.
                left_out.append(error.frame.number)
                kept.remove(error.frame)
        # Left out at the end they are no blink: the answer would be where the detector was, not where it is.
        if left_out and max(left_out) > max(fit.frames):
            raise CalibrationError(
                f"the frames do not agree: frame {max(left_out)} shows too few spots where those up to"
                f" {max(fit.frames)} put the detector: it moved, or the beam failed; choose frames of one"
                " side with --frames"
            )
        return fit

    def _calibrated(self, frames: Sequence[ReferenceFrame]) -> JointFit:
        skies = [Sky(self._phase, frame.xy_px) for frame in frames]
        work = self._begun(frames)
        work, used = self._converged(skies, frames, work, with_depth=False)
        if self.settings.depth:
            work, used = self._deepened(skies, frames, work, used)
        return self._judged(skies, frames, work, used)

    def _begun(self, frames: Sequence[ReferenceFrame]) -> _Work:
        # From the pairs that indexing made: it follows a moved detector by strain, and knows its spots.
        work = _Work(self.start, [frame.rotation for frame in frames])
        spots = [Spots(frame.g, frame.xy_px[frame.spots]) for frame in frames]
        keep = [np.ones(len(s.g), dtype=bool) for s in spots]
        for _ in range(6):
            kept = [Spots(s.g[k], s.xy[k]) for s, k in zip(spots, keep, strict=True)]
            work = self._stepped(work, kept)[0]
            for number, s in enumerate(spots):
                distance = np.hypot(*(s.xy - linearise(work.geometry(number), s.g)[0]).T)
                keep[number] = distance <= CORE_MEDIANS * float(np.median(distance)) + 1e-6
        return work

    def _converged(
        self, skies: Sequence[Sky], frames: Sequence[ReferenceFrame], work: _Work, with_depth: bool
    ) -> tuple[_Work, list[Matches]]:
        # Match and fit in turn. Of a thousand spots one at the edge may come and go for ever, and take the
        # fit along: after some rounds none comes back.
        used: list[Matches] = []
        settled = 0
        for number in range(_ROUNDS):
            found = [
                sky.match(work.geometry(n), self.settings.match_radius_px).core()
                for n, sky in enumerate(skies)
            ]
            if number >= _FREE_ROUNDS:
                found = [m.take(np.isin(m.spot, old.spot)) for m, old in zip(found, used, strict=True)]
            used = found
            for frame, matches in zip(frames, used, strict=True):
                if len(matches) < self.settings.min_spots:
                    raise _TooFewSpots(frame, len(matches), self.material.name, self.settings.min_spots)
            spots = [_spots(sky, m, with_depth) for sky, m in zip(skies, used, strict=True)]
            work, step, sigma = self._stepped(work, spots)
            settled = settled + 1 if np.all(np.abs(step[:5]) <= _CONVERGED * sigma[:5]) else 0
            if settled == 2:
                return work, used
        raise CalibrationError(
            f"the fit did not converge within {_ROUNDS} rounds: spots at the edge of the match radius"
            f" ({self.settings.match_radius_px:g} px) come and go; choose other frames"
        )

    def _deepened(
        self,
        skies: Sequence[Sky],
        frames: Sequence[ReferenceFrame],
        plain: _Work,
        used: list[Matches],
    ) -> tuple[_Work, list[Matches]]:
        # A depth only where it is beyond doubt, as in indexing: it costs the others precision.
        try:
            deep, again = self._converged(skies, frames, plain, with_depth=True)
        except CalibrationError:
            return plain, used
        spots = [_spots(sky, m, True) for sky, m in zip(skies, again, strict=True)]
        covariance = Errors([deep.geometry(n) for n in range(len(spots))], spots).covariance
        beyond_doubt = 0.0 < deep.depth_mm < DEEPEST_MM and deep.depth_mm > DEPTH_SIGMAS * math.sqrt(
            float(covariance[5, 5])
        )
        return (deep, again) if beyond_doubt else (plain, used)

    def _stepped(self, work: _Work, spots: Sequence[Spots]) -> tuple[_Work, FloatArray, FloatArray]:
        """Return the state after a Gauss-Newton step, the step of the detector, and its sigmas."""
        frames = [Eliminated(work.geometry(number), s) for number, s in enumerate(spots)]
        design = np.concatenate([frame.design for frame in frames])
        residual = np.concatenate([frame.residual for frame in frames])
        inverse = self._inverse(design.T @ design, len(residual) // 2)
        step = inverse @ (design.T @ residual)
        freedom = max(len(residual) - 3 * len(frames) - len(step), 1)
        sigma = np.sqrt(np.diag(inverse) * float(residual @ residual) / freedom)
        try:
            calibration = with_vector(work.calibration, vector_of(work.calibration) + step[:5])
        except ValueError as error:
            raise CalibrationError(
                f"the fit ran away ({error}): choose other frames or a nearer start"
            ) from error
        rotations = [
            rotation_of(frame.turn - frame.turn_by_detector @ step) @ old
            for old, frame in zip(work.rotations, frames, strict=True)
        ]
        depth = work.depth_mm + (float(step[5]) if len(step) > 5 else 0.0)
        return _Work(calibration, rotations, depth), step, np.asarray(sigma)

    def _inverse(self, normal: FloatArray, count: int) -> FloatArray:
        diagonal = np.sqrt(np.diag(normal))
        if np.all(np.isfinite(normal)) and diagonal.all():
            unit = normal / np.outer(diagonal, diagonal)
            if np.linalg.eigvalsh(unit)[0] >= _LEAST_EIGENVALUE:
                return np.asarray(np.linalg.inv(unit) / np.outer(diagonal, diagonal))
        raise CalibrationError(
            f"the {count} matched spots do not determine the detector: choose frames whose spots cover more"
            " of it"
        )

    def _judged(
        self, skies: Sequence[Sky], frames: Sequence[ReferenceFrame], work: _Work, used: list[Matches]
    ) -> JointFit:
        spots = [_spots(sky, m, bool(work.depth_mm)) for sky, m in zip(skies, used, strict=True)]
        errors = Errors([work.geometry(n) for n in range(len(spots))], spots)
        matches = [sky.match(work.geometry(n), self.settings.match_radius_px) for n, sky in enumerate(skies)]
        offsets = np.cumsum([0, *(len(frame.xy_px) for frame in frames)])
        seen = [_observed(frame, work.geometry(n), spots[n]) for n, frame in enumerate(frames)]
        agreement = agreement_of(seen)
        fit = JointFit(
            calibration=work.calibration,
            start=self.start,
            frames=tuple(frame.number for frame in frames),
            rotations=np.array(work.rotations),
            depth_mm=work.depth_mm,
            covariance=errors.covariance,
            peaks_px=np.concatenate([frame.xy_px for frame in frames]),
            spots=np.concatenate([m.spot + first for m, first in zip(used, offsets, strict=False)]),
            xy_px=np.concatenate([s.xy for s in spots]),
            residual_px=errors.residual_px,
            matched=sum(len(m) for m in matches),
            expected=sum(len(m.computed_px) for m in matches),
            shared=errors.shared,
            agreement=agreement,
        )
        self._refuse(fit, seen)
        return fit

    def _refuse(self, fit: JointFit, seen: Sequence[Observation]) -> None:
        if fit.agreement < _DISAGREE:
            before, after = parted(fit.frames, seen)
            raise CalibrationError(
                f"the frames do not agree ({fit.agreement:.1g}): the detector moved within them, most of it"
                f" between frame {before} and frame {after}; choose frames of one side with --frames"
            )
        refuse_outcome(
            self.settings,
            self.material.name,
            fit.start,
            fit.calibration,
            fit.sigma,
            fit.mean_residual_px,
            "choose more frames, or frames with spots over more of the detector",
        )


def _observed(frame: ReferenceFrame, geometry: Geometry, spots: Spots) -> Observation:
    # With the energies, or the depth would be taken for a detector that moves with the choice of spots.
    try:
        return observe(geometry, spots.g, spots.xy, geometry.rotation, spots.energy_keV)
    except ValueError as error:
        raise CalibrationError(f"frame {frame.number}: {error}; choose other frames") from error


def _spots(sky: Sky, matches: Matches, with_depth: bool) -> Spots:
    return Spots(sky.g(matches), sky.xy[matches.spot], matches.energy_keV if with_depth else None)
