"""Give each spot its crystal, drop what only repeats a stronger crystal, refine what stays.

All candidates are taken together, the strongest first, each judged by the reflections that it
does not share with a stronger one: a twin keeps two thirds of its reflections and stays, a
pseudo-solution keeps nothing and goes. A spot belongs to the crystal whose computed position is
nearest, and strain is refined on the spots that belong to one crystal alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipelines.laue.indexing.evidence import false_probability
from pipelines.laue.indexing.match import Prediction, Scene, pair, predict
from pipelines.laue.indexing.refine import (
    ROTATION,
    ROTATION_AND_STRAIN,
    ROTATION_STRAIN_DEPTH,
    Fit,
    decompose,
    depth_shift,
    refine,
)
from pipelines.laue.indexing.trials import Court, Explained, Trial

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

_SPOTS_FOR_DEPTH = 20
_DEEPEST_MM = 1.0


@dataclass(frozen=True, eq=False)
class IndexedCrystal:
    """A crystal that was found.

    Attributes
    ----------
    phase : int
        Number of its phase.
    matrix : (3, 3) float64
        M; UB = M B0.
    strain : (3, 3) float64 or None
        ε in the frame of B0; None where too few spots determine it.
    covariance : (3, 3), (8, 8) or (9, 9) float64
        See `refine.Fit`.
    spots, reflections : (k,) int32
        Matched spots, and the rows of the reflection list they are.
    orders : (k,) int32
        Lowest order in the band of each.
    distance_px : (k,) float64
    expected : int
        Distinct spots that it can put on the detector.
    chance_rate : float
        Fraction of them that a random orientation matches on this frame.
    log_false : float
        ln of the expected number of chance crystals as good, given the stronger crystals.
    shared : int
        Matched spots that also fit a stronger crystal.
    depth_mm : float
        Depth of penetration at 15 keV, see `refine`; 0 where the spots do not show any.
    """

    phase: int
    matrix: FloatArray
    strain: FloatArray | None
    covariance: FloatArray
    spots: IntArray
    reflections: IntArray
    orders: IntArray
    distance_px: FloatArray
    expected: int
    chance_rate: float
    log_false: float
    shared: int
    depth_mm: float

    @property
    def false_probability(self) -> float:
        """Probability that chance alone would give a crystal as good."""
        return false_probability(self.log_false)


def assign(court: Court, proposed: Sequence[Trial]) -> list[IndexedCrystal]:
    """Return the crystals that stand when all are judged together, the strongest first."""
    n_spots = len(court.frame.xy)
    nobody = Explained(court.frame)
    # What each would explain were it alone decides who is the stronger.
    alone = [_rematched(court, trial) for trial in proposed]
    for trial in alone:
        court.judge(trial, nobody)
    explained = Explained(court.frame)
    shared: list[int] = []
    for trial in sorted(alone, key=court.rank):
        if _is_another_name(trial, explained.trials):
            continue
        common = court.judge(trial, explained)
        if court.accepts(trial):
            explained.add(trial)
            shared.append(common)
    owner = _owners(n_spots, explained.trials)
    return [
        _finished(court, trial, owner == number, common)
        for number, (trial, common) in enumerate(zip(explained.trials, shared, strict=True))
    ]


def _rematched(court: Court, trial: Trial) -> Trial:
    # Against all spots of the frame, whoever had them before.
    spot, distance = pair(trial.prediction.xy_px, court.frame.grid, court.parameters.match_radius_px)
    return Trial(trial.phase, trial.fit, trial.parameters, trial.prediction, spot, distance)


def _is_another_name(trial: Trial, accepted: Sequence[Trial]) -> bool:
    # The same grain under another material's name: most of its spots are a stronger crystal's.
    return any(
        other.phase != trial.phase and 2 * np.count_nonzero(np.isin(trial.spots, other.spots)) > trial.matched
        for other in accepted
    )


def _owners(n_spots: int, trials: Sequence[Trial]) -> IntArray:
    # The crystal whose computed position is nearest owns a spot.
    owner = np.full(n_spots, -1, dtype=np.int32)
    nearest = np.full(n_spots, np.inf)
    for number, trial in enumerate(trials):
        distance = trial.distance[trial.hit]
        closer = distance < nearest[trial.spots]
        owner[trial.spots[closer]] = number
        nearest[trial.spots[closer]] = distance[closer]
    return owner


def _finished(court: Court, trial: Trial, owned: npt.NDArray[np.bool_], shared: int) -> IndexedCrystal:
    p = court.parameters
    scene = court.phases[trial.phase].scene
    prediction, spot, distance = trial.prediction, trial.spot, trial.distance
    fit = trial.fit
    for _ in range(3):
        hit = spot >= 0
        mine = hit & owned[spot]
        if np.count_nonzero(mine) < p.min_matched:
            mine = hit
        # Outliers (overlaps, other grains' spots) lie far outside the core of the residuals.
        core = distance <= max(4.0 * float(np.median(distance[mine])), 0.3)
        new = _final_fit(court, scene, fit, prediction, np.where(mine & core, spot, -1).astype(np.int32))
        if new is None:
            break
        computed = predict(scene, new.matrix)
        if new.depth_mm:
            moved = computed.xy_px + new.depth_mm * _depth_shift(scene, computed)
            computed = replace(computed, xy_px=moved)
        paired = pair(computed.xy_px, court.frame.grid, p.match_radius_px)
        if np.count_nonzero(paired[0] >= 0) < p.min_matched:
            break  # the fit ran away from its spots: what was accepted stands
        fit, prediction, (spot, distance) = new, computed, paired
    hit = spot >= 0
    matrix, strain = fit.matrix, None
    if len(fit.covariance) >= ROTATION_AND_STRAIN:
        rotation, strain = decompose(matrix)
        matrix = rotation @ np.linalg.inv(np.eye(3) + strain)
    chance = court.frame.density.chance(prediction.xy_px, p.match_radius_px)
    return IndexedCrystal(
        phase=trial.phase,
        matrix=matrix,
        strain=strain,
        covariance=fit.covariance,
        spots=spot[hit],
        reflections=prediction.index[hit],
        orders=prediction.order[hit],
        distance_px=distance[hit],
        expected=len(prediction.index),
        chance_rate=float(chance.mean()),
        log_false=trial.log_false,
        shared=shared,
        depth_mm=fit.depth_mm,
    )


def _final_fit(court: Court, scene: Scene, start: Fit, prediction: Prediction, spot: IntArray) -> Fit | None:
    # As many parameters as the spots determine; a depth only where it is beyond doubt.
    use = spot >= 0
    count = int(np.count_nonzero(use))
    if count < ROTATION_AND_STRAIN + 2:
        return court.fit(scene, start.matrix, prediction, spot, ROTATION)
    plain = court.fit(scene, start.matrix, prediction, spot, ROTATION_AND_STRAIN)
    if plain is None or count < _SPOTS_FOR_DEPTH:
        return plain
    spots = spot[use]
    deep = refine(
        plain.matrix,
        scene.reflections.g[prediction.index[use]],
        court.frame.xy[spots],
        scene.projection,
        ROTATION_STRAIN_DEPTH,
        None if court.frame.sigma is None else court.frame.sigma[spots],
        shift_px_per_mm=_depth_shift(scene, prediction)[use],
    )
    if deep is None or not 0.0 < deep.depth_mm < _DEEPEST_MM:
        return plain
    significant = deep.depth_mm > 5.0 * math.sqrt(float(deep.covariance[8, 8]))
    return deep if significant else plain


def _depth_shift(scene: Scene, prediction: Prediction) -> FloatArray:
    return depth_shift(prediction.xy_px, prediction.energy_keV, scene.projection, scene.calibration.dd_mm)
