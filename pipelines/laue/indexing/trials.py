"""A candidate crystal on trial: refined on the spots near it, then judged against chance."""

from __future__ import annotations

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
    def spots(self) -> IntArray:
        """The matched spots."""
        return self.spot[self.spot >= 0]


class Explained:
    """The crystals accepted so far, and the spots that they explain."""

    def __init__(self, n_spots: int) -> None:
        self.mask: BoolArray = np.zeros(n_spots, dtype=bool)
        self.trials: list[Trial] = []

    def add(self, trial: Trial) -> None:
        """Accept a crystal."""
        self.trials.append(trial)
        self.mask[trial.spots] = True

    def coincides(self, xy_px: FloatArray, radius_px: float, shape: tuple[int, int]) -> BoolArray:
        """Return which positions an accepted crystal predicts too."""
        if not self.trials:
            return np.zeros(len(xy_px), dtype=bool)
        taken = SpotGrid.of(np.concatenate([t.prediction.xy_px for t in self.trials]), shape)
        return pair(xy_px, taken, radius_px)[0] >= 0


class Court:
    """Refines and judges the candidates of one frame."""

    def __init__(self, frame: FrameSpots, phases: Sequence[Phase], parameters: IndexingParameters) -> None:
        self.frame = frame
        self.phases = phases
        self.parameters = parameters
        calibration = phases[0].scene.calibration
        # A spot moves by twice the turn of q.
        self._rad_per_px = 0.5 * calibration.pixel_size_mm / calibration.dd_mm
        self._log_accept = math.log(parameters.max_false_probability)
        # A voted orientation is good to about a third of the angle tolerance; strain adds as much.
        wide = 0.6 * math.radians(parameters.angle_tolerance_deg) / self._rad_per_px
        self.search_radius_px = min(_WIDEST_PX, wide)

    def refine(self, view: View, phase: int, matrix: FloatArray) -> Trial | None:
        """Refine a candidate: rotation at falling radii, then strain where enough spots determine it."""
        p = self.parameters
        scene = self.phases[phase].scene
        wide = self.search_radius_px
        prediction = predict(scene, matrix)
        fit: Fit | None = None
        for radius in (wide, 0.5 * (wide + p.match_radius_px), 1.5 * p.match_radius_px):
            spot, _ = pair(prediction.xy_px, view.grid, radius)
            if np.count_nonzero(spot >= 0) < p.min_matched:
                return None
            start = matrix if fit is None else fit.matrix
            fit = self.fit(scene, start, prediction, view.original(spot), ROTATION)
            if fit is None:
                return None
            prediction = predict(scene, fit.matrix)
        assert fit is not None
        spot, distance = pair(prediction.xy_px, view.grid, p.match_radius_px)
        plain = Trial(phase, fit, ROTATION, prediction, view.original(spot), distance)
        spot, _ = pair(prediction.xy_px, view.grid, 2.0 * p.match_radius_px)
        if np.count_nonzero(spot >= 0) >= 2 * ROTATION_AND_STRAIN:
            strained = self._strained(view, plain, spot)
            if strained is not None and strained.matched > plain.matched:
                return strained
        return plain if plain.matched >= p.min_matched else None

    def _strained(self, view: View, plain: Trial, spot: IntArray) -> Trial | None:
        p = self.parameters
        scene = self.phases[plain.phase].scene
        fit, prediction = plain.fit, plain.prediction
        distance = plain.distance
        for _ in range(2):
            if np.count_nonzero(spot >= 0) < ROTATION_AND_STRAIN:
                return None
            new = self.fit(scene, fit.matrix, prediction, view.original(spot), ROTATION_AND_STRAIN)
            if new is None or np.abs(decompose(new.matrix)[1]).max() > 2.0 * p.max_strain:
                return None
            fit = new
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
        frame = self.frame
        predicted = trial.prediction.xy_px
        own = ~explained.coincides(predicted, 2.0 * p.match_radius_px, frame.shape)
        hit = trial.hit
        free = hit & own
        free[hit] &= ~explained.mask[trial.spots]
        k, n = int(np.count_nonzero(free)), int(np.count_nonzero(own))
        density = SpotDensity(frame.xy[~explained.mask], frame.shape) if explained.trials else frame.density
        chance = density.chance(predicted, p.match_radius_px)
        tail = log_binomial_tail(k, n, float(chance[own].mean()) if n else 0.0)
        strain = p.max_strain if trial.parameters == ROTATION_AND_STRAIN else 0.0
        radius = p.match_radius_px * self._rad_per_px
        trials = log_trials(radius, k, self.phases[trial.phase].symmetry_order, strain)
        trial.log_false = tail + trials + math.log(len(self.phases))
        return int(np.count_nonzero(hit)) - k

    def accepts(self, trial: Trial) -> bool:
        """Whether chance hardly gives a crystal as good, and its residuals are those of a crystal."""
        # Chance matches fill the match radius evenly (mean 2/3 of it), a crystal's lie at its centre.
        sharp = float(np.mean(trial.distance[trial.hit])) < 0.5 * self.parameters.match_radius_px
        return sharp and trial.log_false <= self._log_accept

    def rank(self, trial: Trial) -> float:
        """Return what orders candidates, the best lowest.

        Within one material the evidence; between materials what is missing counts too.
        """
        if len(self.phases) == 1:
            return trial.log_false
        chance = self.frame.density.chance(trial.prediction.xy_px, self.parameters.match_radius_px)
        return -plausibility(trial.hit, chance)
