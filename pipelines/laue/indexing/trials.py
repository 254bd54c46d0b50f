"""A candidate crystal on trial: refined on the spots near it, then judged against chance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.laue.indexing.evidence import SpotDensity, log_binomial_tail, log_trials
from pipelines.laue.indexing.match import Prediction, Scene, SpotGrid, pair, predict
from pipelines.laue.indexing.parameters import IndexingParameters, Phase
from pipelines.laue.indexing.refine import (
    ROTATION,
    ROTATION_AND_STRAIN,
    Fit,
    decompose,
    refine,
)
from pipelines.laue.indexing.rivals import plausibility
from pipelines.laue.indexing.spots import FrameSpots, View

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

_WIDEST_PX = 14.0

_SHARP = 0.2
"""Residuals below this share of the match radius leave nothing for a strain to explain in the search."""

_STRAIN_MARGIN = 2.0
"""Strains up to so many times the largest one asked for are tried; beyond it they are flagged."""

_ZONES = np.array(
    [uvw for uvw in itertools.product(range(-3, 4), repeat=3) if uvw > (0, 0, 0) and math.gcd(*uvw) == 1]
)


@dataclass(eq=False)
class Trial:
    """A candidate.

    Attributes
    ----------
    phase : int
    fit : Fit
    parameters : int
        How many were refined.
    prediction : Prediction
        Its spots on the detector, m of them.
    spot : (m,) int32
        The measured spot of each, -1 for none.
    distance : (m,) float64
        To that spot, px.
    log_false : float
        ln of the expected number of chance crystals as good, set by `Court.judge`.
    """

    phase: int
    fit: Fit
    parameters: int
    prediction: Prediction
    spot: IntArray
    distance: FloatArray
    log_false: float = math.inf

    @property
    def hit(self) -> BoolArray:
        """Which computed spots are matched."""
        return self.spot >= 0

    @property
    def matched(self) -> int:
        """How many."""
        return int(np.count_nonzero(self.spot >= 0))

    @property
    def mean_distance(self) -> float:
        """Mean distance of the matched, px; inf where there are none."""
        hit = self.hit
        return float(np.mean(self.distance[hit])) if hit.any() else math.inf

    @property
    def spots(self) -> IntArray:
        """The matched spots."""
        return self.spot[self.spot >= 0]


class Explained:
    """The crystals accepted so far, the spots that they explain, and those that are left."""

    def __init__(self, frame: FrameSpots) -> None:
        self.mask: BoolArray = np.zeros(len(frame.xy), dtype=bool)
        self.trials: list[Trial] = []
        self.density = frame.density
        self._frame = frame
        self._predicted: SpotGrid | None = None

    def add(self, trial: Trial) -> None:
        """Accept a crystal."""
        self.trials.append(trial)
        self.mask[trial.spots] = True
        # Every later candidate is judged against these: made once, not once a candidate.
        self.density = SpotDensity(self._frame.xy[~self.mask], self._frame.shape)
        positions = np.concatenate([t.prediction.xy_px for t in self.trials])
        self._predicted = SpotGrid.of(positions, self._frame.shape)

    def coincides(self, xy_px: FloatArray, radius_px: float) -> BoolArray:
        """Return which positions an accepted crystal predicts too."""
        if self._predicted is None:
            return np.zeros(len(xy_px), dtype=bool)
        return pair(xy_px, self._predicted, radius_px)[0] >= 0


class Court:
    """Refines and judges the candidates of one frame."""

    def __init__(self, frame: FrameSpots, phases: Sequence[Phase], parameters: IndexingParameters) -> None:
        self.frame = frame
        self.phases = phases
        self.parameters = parameters
        calibration = phases[0].scene.calibration
        # A spot moves by twice the turn of q.
        self._rad_per_px = 0.5 * calibration.pixel_size_mm / calibration.dd_mm
        # false_probability = 1 − exp(−expected number of chance crystals)
        self._log_accept = math.log(-math.log1p(-parameters.max_false_probability))
        # What voting tolerates between two spots, a spot may be off by after it.
        wide = math.radians(parameters.angle_tolerance_deg) / self._rad_per_px
        self.search_radius_px = min(_WIDEST_PX, wide)

    def refine(self, view: View, phase: int, matrix: FloatArray) -> Trial | None:
        """Refine a candidate: rotation at falling radii, then strain where enough spots determine it."""
        p = self.parameters
        scene, n_search = self.phases[phase].scene, self.phases[phase].n_search
        wide = self.search_radius_px
        prediction = predict(scene, matrix, n_search)
        fit: Fit | None = None
        for radius in (wide, wide, 0.5 * (wide + p.match_radius_px)):
            spot, _ = pair(prediction.xy_px, view.grid, radius)
            if np.count_nonzero(spot >= 0) < p.min_matched:
                return None
            start = matrix if fit is None else fit.matrix
            fit = self.fit(scene, start, prediction, view.original(spot), ROTATION)
            if fit is None:
                return None
            prediction = predict(scene, fit.matrix, n_search)
        assert fit is not None
        prediction = predict(scene, fit.matrix)
        spot, distance = pair(prediction.xy_px, view.grid, p.match_radius_px)
        plain = Trial(phase, fit, ROTATION, prediction, view.original(spot), distance)
        if plain.mean_distance < _SHARP * p.match_radius_px:
            return plain if plain.matched >= p.min_matched else None
        strained = self._strained(view, plain)
        if strained is not None and (
            strained.matched > plain.matched
            or (strained.matched == plain.matched and strained.mean_distance < 0.7 * plain.mean_distance)
        ):
            return strained
        return plain if plain.matched >= p.min_matched else None

    def _strained(self, view: View, plain: Trial) -> Trial | None:
        p = self.parameters
        scene, n_search = self.phases[plain.phase].scene, self.phases[plain.phase].n_search
        fit, prediction = plain.fit, predict(self.phases[plain.phase].scene, plain.fit.matrix, n_search)
        for widening in (3.0, 2.0, 1.0):
            spot, _ = pair(prediction.xy_px, view.grid, widening * p.match_radius_px)
            if np.count_nonzero(spot >= 0) < ROTATION_AND_STRAIN + 2:
                return None
            new = self.fit(scene, fit.matrix, prediction, view.original(spot), ROTATION_AND_STRAIN)
            if new is None or np.abs(decompose(new.matrix)[1]).max() > _STRAIN_MARGIN * p.max_strain:
                return None
            fit = new
            prediction = predict(scene, fit.matrix, n_search)
        prediction = predict(scene, fit.matrix)
        spot, distance = pair(prediction.xy_px, view.grid, p.match_radius_px)
        return Trial(plain.phase, fit, ROTATION_AND_STRAIN, prediction, view.original(spot), distance)

    def fit(
        self, scene: Scene, matrix: FloatArray, prediction: Prediction, spot: IntArray, parameters: int
    ) -> Fit | None:
        """Refine on the computed spots that have a measured one (`spot` >= 0)."""
        hit = spot >= 0
        spots = spot[hit]
        g = scene.reflections.g[prediction.index[hit]]
        sigma = None if self.frame.sigma is None else self.frame.sigma[spots]
        return refine(matrix, g, self.frame.xy[spots], scene.projection, parameters, sigma)

    def judge(self, trial: Trial, explained: Explained) -> int:
        """Set `log_false` from what no accepted crystal explains; return how many spots it shares."""
        p = self.parameters
        predicted = trial.prediction.xy_px
        own = ~explained.coincides(predicted, 2.0 * p.match_radius_px)
        hit = trial.hit
        free = hit & own
        free[hit] &= ~explained.mask[trial.spots]
        shared = int(np.count_nonzero(hit & ~free))
        chance = explained.density.chance(predicted, p.match_radius_px)
        trial.log_false = self._log_false(trial, free, own, chance)
        if trial.log_false <= self._log_accept:
            # Spots of other crystals lie on zone lines, and any orientation that lays a zone of its
            # own along one matches a row of them: a zone counts as the two matches that fix it.
            zone = self._fullest_zone(trial, free)
            in_zone = np.flatnonzero(free & zone)
            own &= ~zone
            own[in_zone[:2]] = True
            free[in_zone[2:]] = False
            trial.log_false = self._log_false(trial, free, own, chance)
        return shared

    def _log_false(self, trial: Trial, free: BoolArray, own: BoolArray, chance: FloatArray) -> float:
        p = self.parameters
        k, n = int(np.count_nonzero(free)), int(np.count_nonzero(own))
        tail = log_binomial_tail(k, n, float(chance[own].mean()) if n else 0.0)
        strain = _STRAIN_MARGIN * p.max_strain if trial.parameters == ROTATION_AND_STRAIN else 0.0
        radius = p.match_radius_px * self._rad_per_px
        trials = log_trials(radius, k, self.phases[trial.phase].symmetry_order, strain)
        return tail + trials + math.log(len(self.phases))

    def _fullest_zone(self, trial: Trial, free: BoolArray) -> BoolArray:
        # Which computed spots lie in the zone that most of the matched ones share.
        hkl = self.phases[trial.phase].scene.reflections.hkl[trial.prediction.index].astype(np.int64)
        fullest = _ZONES[int(np.argmax(np.count_nonzero(hkl[free] @ _ZONES.T == 0, axis=0)))]
        return np.asarray(hkl @ fullest == 0)

    def accepts(self, trial: Trial) -> bool:
        """Whether chance hardly gives a crystal as good, and its residuals are those of a crystal."""
        # Chance matches fill the match radius evenly (mean 2/3 of it), a crystal's lie at its centre.
        sharp = trial.mean_distance < 0.5 * self.parameters.match_radius_px
        return sharp and trial.log_false <= self._log_accept

    def rank(self, trial: Trial) -> float:
        """Return what orders candidates, the best lowest.

        Within one material the evidence; between materials what is missing counts too.
        """
        if len(self.phases) == 1:
            return trial.log_false
        chance = self.frame.density.chance(trial.prediction.xy_px, self.parameters.match_radius_px)
        return -plausibility(trial.hit, chance)
