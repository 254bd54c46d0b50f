"""The classical indexer: from spots to crystals, their number unknown beforehand.

1. Seeds. The brightest unexplained spot is taken for each low-index reflection in turn; the other
   spots vote on the remaining rotation (`vote`). The best few candidates are scored in one batch
   against the reflection list (`match`), the best of them is refined (`refine`).
2. Evidence. A candidate is kept when chance would hardly give one as good, counting only what no
   stronger crystal explains (`evidence`). Its spots are set aside and the search goes on.
3. Global assignment. All kept crystals are taken together, the strongest first, each judged by
   the reflections that it does not share with a stronger one: a twin keeps two thirds of its
   reflections and stays, a pseudo-solution keeps nothing and goes. A spot belongs to the crystal
   whose computed position is nearest.
4. Strain is refined last, on the spots that belong to one crystal alone.

Candidates from elsewhere (a network, a neighbouring point of the scan) enter through `hints` and
are judged in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from pipelines.laue.crystal import Material
from pipelines.laue.evidence import SpotDensity, false_probability, log_binomial_tail, log_trials
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.match import Prediction, Scene, SpotGrid, pair, predict, score
from pipelines.laue.refine import (
    ROTATION,
    ROTATION_AND_STRAIN,
    ROTATION_STRAIN_DEPTH,
    Fit,
    decompose,
    depth_shift,
    refine,
)
from pipelines.laue.reflections import build_reflections
from pipelines.laue.rivals import plausibility
from pipelines.laue.vote import AngleTable, build_angle_table, candidates

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


_SPOTS_FOR_DEPTH = 20
_DEEPEST_MM = 1.0


@dataclass(frozen=True, slots=True)
class IndexingParameters:
    """What the indexer may be told.

    Attributes
    ----------
    angle_tolerance_deg : float
        Between a measured angle of two scattering vectors and a computed one, when voting.
    match_radius_px : float
        A computed spot is matched by a measured one within this distance, after refinement.
    max_strain : float
        Deviatoric strain components up to this are searched for, and larger ones flagged.
    max_false_probability : float
        A crystal is reported when chance would give one as good in this frame more rarely.
    max_crystals : int
        Upper bound on the crystals of a frame.
    max_spots : int
        The brightest spots that are used at all; bounds the time on a frame full of noise.
    max_voters : int
        The brightest unexplained spots that vote.
    max_seeds : int
        Seeds tried without success before the frame is called explained.
    min_matched : int
        Fewest spots of a crystal.
    """

    angle_tolerance_deg: float = 0.15
    match_radius_px: float = 2.0
    max_strain: float = 5e-3
    max_false_probability: float = 1e-3
    max_crystals: int = 24
    max_spots: int = 4000
    max_voters: int = 500
    max_seeds: int = 60
    min_matched: int = 5


@dataclass(frozen=True, eq=False)
class Phase:
    """A material as the indexer needs it on one detector."""

    material: Material
    scene: Scene
    angles: AngleTable
    n_search: int
    symmetry_order: int

    @classmethod
    def prepare(
        cls,
        material: Material,
        calibration: Calibration,
        area: DetectorArea,
        energy_keV: tuple[float, float],
        hypotheses: int = 200,
        partners: int = 1200,
    ) -> Phase:
        """Tabulate reflections and angles of a material (up to a second for a large cell)."""
        reflections = build_reflections(material, energy_keV)
        if len(reflections.g_norm) == 0:
            raise ValueError(
                f"{material.name}: no reflection can be excited between {energy_keV[0]:g} and {energy_keV[1]:g} keV"
            )
        table = build_angle_table(reflections, hypotheses, partners, energy_keV)
        scene = Scene(reflections, calibration, area, energy_keV)
        return cls(material, scene, table, partners, len(material.lattice_rotations))


@dataclass(frozen=True, eq=False)
class Hint:
    """A candidate from elsewhere: the number of the phase, and M."""

    phase: int
    matrix: FloatArray


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
        Fraction of them that chance alone would match.
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
    depth_mm: float = 0.0

    @property
    def false_probability(self) -> float:
        """Probability that chance alone would give a crystal as good."""
        return false_probability(self.log_false)


@dataclass(eq=False)
class _Trial:
    """A candidate on its way: matrix, what it predicts and what it matches."""

    phase: int
    fit: Fit
    parameters: int
    prediction: Prediction
    spot: IntArray
    distance: FloatArray
    log_false: float = 0.0
    plausibility: float = 0.0

    @property
    def hit(self) -> npt.NDArray[np.bool_]:
        return self.spot >= 0

    @property
    def matched(self) -> int:
        return int(np.count_nonzero(self.spot >= 0))


@dataclass(eq=False)
class Indexer:
    """Finds the crystals of given phases in peak lists of one detector. Deterministic."""

    phases: Sequence[Phase]
    parameters: IndexingParameters = field(default_factory=IndexingParameters)

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("an indexer needs at least one material")
        self._calibration = self.phases[0].scene.calibration
        self._log_accept = math.log(self.parameters.max_false_probability)
        self._rad_per_px = 0.5 * self._calibration.pixel_size_mm / self._calibration.dd_mm

    def index(
        self,
        xy_px: npt.ArrayLike,
        sigma_px: npt.ArrayLike | None = None,
        hints: Sequence[Hint] = (),
    ) -> list[IndexedCrystal]:
        """Find the crystals of a frame.

        Parameters
        ----------
        xy_px : (n, 2) array
            Peak positions from 0, x is the column, the brightest first.
        sigma_px : (n,) array, optional
            Relative position uncertainties.
        hints : sequence of Hint
            Candidates to judge before searching.

        Returns
        -------
        list of IndexedCrystal
            The one with the strongest evidence first.
        """
        p = self.parameters
        xy = np.ascontiguousarray(xy_px, dtype=np.float64).reshape(-1, 2)[: p.max_spots]
        if len(xy) < p.min_matched:
            return []
        sigma = None if sigma_px is None else np.asarray(sigma_px, dtype=np.float64)[: p.max_spots]
        frame = _FrameSpots(xy, sigma, self._calibration)
        kept: list[_Trial] = []
        explained = np.zeros(len(xy), dtype=bool)
        for hint in hints:
            self._keep(self._judge_hint(frame, hint, explained, kept), explained, kept)
        self._search(frame, explained, kept)
        return self._assign(frame, kept)

    # --- search -----------------------------------------------------------------------------

    def _search(self, frame: _FrameSpots, explained: npt.NDArray[np.bool_], kept: list[_Trial]) -> None:
        tried = np.zeros(len(frame.xy), dtype=bool)
        failures = 0
        while len(kept) < self.parameters.max_crystals:
            remaining = np.flatnonzero(~explained).astype(np.int32)
            if len(remaining) < self.parameters.min_matched:
                return
            view = _View(frame, explained)
            found = False
            for seed in remaining[~tried[remaining]]:
                tried[seed] = True
                trial = self._best_of_seed(frame, view, int(seed), explained, kept)
                if trial is not None and self._keep(self._best_name(frame, view, trial), explained, kept):
                    found = True
                    break
                failures += 1
                if failures >= self.parameters.max_seeds:
                    return
            if not found:
                return
            failures = 0

    def _best_of_seed(
        self,
        frame: _FrameSpots,
        view: _View,
        seed: int,
        explained: npt.NDArray[np.bool_],
        kept: list[_Trial],
    ) -> _Trial | None:
        p = self.parameters
        best: _Trial | None = None
        radius = self._search_radius_px
        for number, phase in enumerate(self.phases):
            matrices = self._vote(frame, phase, seed, view.kept[: p.max_voters])
            if len(matrices) == 0:
                continue
            matched, expected = score(phase.scene, view.grid, matrices, radius, phase.n_search)
            chance = view.density_rate(radius)
            quality = matched - chance * expected - 2.0 * np.sqrt(chance * expected + 1.0)
            for c in np.argsort(-quality, kind="stable")[:2]:
                if matched[c] < p.min_matched:
                    continue
                trial = self._refine_candidate(frame, view, number, matrices[c])
                if trial is None:
                    continue
                self._judge(frame, trial, explained, kept)
                if best is None or self._rank(frame, trial) < self._rank(frame, best):
                    best = trial
        return best

    def _vote(self, frame: _FrameSpots, phase: Phase, seed: int, partners: IntArray) -> FloatArray:
        tolerance = self.parameters.angle_tolerance_deg
        matrices, excess = candidates(phase.angles, frame.q, seed, partners, tolerance, keep=8)
        return matrices[excess > 2.0]

    def _best_name(self, frame: _FrameSpots, view: _View, trial: _Trial) -> _Trial:
        # The same spots may be another material's: its brightest ones are tried as that, too.
        best = trial
        spots = np.sort(trial.spot[trial.hit])
        for number, phase in enumerate(self.phases):
            if number == trial.phase:
                continue
            for seed in spots[:3]:
                for matrix in self._vote(frame, phase, int(seed), spots)[:1]:
                    rival = self._refine_candidate(frame, view, number, matrix)
                    if rival is not None and self._rank(frame, rival) < self._rank(frame, best):
                        self._judge(frame, rival, np.zeros(len(frame.xy), dtype=bool), ())
                        best = rival
        return best

    def _rank(self, frame: _FrameSpots, trial: _Trial) -> float:
        # Within one material the evidence ranks; between materials what is missing counts too.
        if len(self.phases) == 1:
            return trial.log_false
        if trial.plausibility == 0.0:
            chance = frame.density.chance(trial.prediction.xy_px, self.parameters.match_radius_px)
            trial.plausibility = plausibility(trial.hit, chance)
        return -trial.plausibility

    @property
    def _search_radius_px(self) -> float:
        # A voted orientation is good to about a third of the angle tolerance; strain adds as much.
        return min(14.0, 0.6 * math.radians(self.parameters.angle_tolerance_deg) / self._rad_per_px)

    def _refine_candidate(
        self, frame: _FrameSpots, view: _View, phase: int, matrix: FloatArray
    ) -> _Trial | None:
        # Rotation first at falling radii, then strain where enough spots determine it.
        p = self.parameters
        scene = self.phases[phase].scene
        radius = self._search_radius_px
        fit: Fit | None = None
        m = matrix
        prediction = predict(scene, m)
        for step_radius in (radius, 0.5 * radius + 0.5 * p.match_radius_px, 1.5 * p.match_radius_px):
            spot, _ = pair(prediction.xy_px, view.grid, step_radius)
            hit = spot >= 0
            if np.count_nonzero(hit) < p.min_matched:
                return None
            fit = self._fit(frame, scene, m, prediction, view.kept[spot[hit]], hit, ROTATION)
            if fit is None:
                return None
            m = fit.matrix
            prediction = predict(scene, m)
        assert fit is not None
        spot, distance = pair(prediction.xy_px, view.grid, p.match_radius_px)
        plain = _Trial(phase, fit, ROTATION, prediction, view.original(spot), distance)
        spot, _ = pair(prediction.xy_px, view.grid, 2.0 * p.match_radius_px)
        hit = spot >= 0
        if np.count_nonzero(hit) >= 2 * ROTATION_AND_STRAIN:
            strained = self._strained(frame, view, phase, m, prediction, spot)
            if strained is not None and strained.matched > plain.matched:
                return strained
        return plain if plain.matched >= p.min_matched else None

    def _strained(
        self,
        frame: _FrameSpots,
        view: _View,
        phase: int,
        matrix: FloatArray,
        prediction: Prediction,
        spot: IntArray,
    ) -> _Trial | None:
        p = self.parameters
        scene = self.phases[phase].scene
        fit: Fit | None = None
        m = matrix
        for _ in range(2):
            hit = spot >= 0
            if np.count_nonzero(hit) < ROTATION_AND_STRAIN:
                return None
            fit = self._fit(frame, scene, m, prediction, view.kept[spot[hit]], hit, ROTATION_AND_STRAIN)
            if fit is None or np.abs(decompose(fit.matrix)[1]).max() > 2.0 * p.max_strain:
                return None
            m = fit.matrix
            prediction = predict(scene, m)
            spot, distance = pair(prediction.xy_px, view.grid, p.match_radius_px)
        assert fit is not None
        return _Trial(phase, fit, ROTATION_AND_STRAIN, prediction, view.original(spot), distance)

    def _fit(
        self,
        frame: _FrameSpots,
        scene: Scene,
        matrix: FloatArray,
        prediction: Prediction,
        spots: IntArray,
        hit: npt.NDArray[np.bool_],
        parameters: int,
    ) -> Fit | None:
        g = scene.reflections.g[prediction.index[hit]]
        sigma = None if frame.sigma is None else frame.sigma[spots]
        return refine(matrix, g, frame.xy[spots], scene.projection, parameters, sigma)

    # --- evidence ---------------------------------------------------------------------------

    def _judge(
        self,
        frame: _FrameSpots,
        trial: _Trial,
        explained: npt.NDArray[np.bool_],
        stronger: Sequence[_Trial],
    ) -> int:
        """Set `log_false` from what no stronger crystal explains; return how many spots it shares."""
        p = self.parameters
        phase = self.phases[trial.phase]
        own = ~_coincides(trial.prediction.xy_px, stronger, 2.0 * p.match_radius_px, frame.shape)
        hit = trial.hit
        free = hit & own
        free[hit] &= ~explained[trial.spot[hit]]
        k, n = int(np.count_nonzero(free)), int(np.count_nonzero(own))
        density = SpotDensity(frame.xy[~explained], frame.shape)
        chance = density.chance(trial.prediction.xy_px, p.match_radius_px)
        mean = float(chance[own].mean()) if n else 0.0
        tail = log_binomial_tail(k, n, mean)
        strain = p.max_strain if trial.parameters == ROTATION_AND_STRAIN else 0.0
        trials = log_trials(p.match_radius_px * self._rad_per_px, k, phase.symmetry_order, strain)
        trial.log_false = tail + trials + math.log(len(self.phases))
        return int(np.count_nonzero(hit)) - k

    def _keep(
        self,
        trial: _Trial | None,
        explained: npt.NDArray[np.bool_],
        kept: list[_Trial],
    ) -> bool:
        if trial is None or trial.log_false > self._log_accept or not self._is_sharp(trial):
            return False
        kept.append(trial)
        explained[trial.spot[trial.hit]] = True
        return True

    def _is_sharp(self, trial: _Trial) -> bool:
        # Chance matches fill the match radius evenly (mean 2/3 of it), a crystal's lie at its centre.
        return float(np.mean(trial.distance[trial.hit])) < 0.5 * self.parameters.match_radius_px

    def _judge_hint(
        self,
        frame: _FrameSpots,
        hint: Hint,
        explained: npt.NDArray[np.bool_],
        kept: list[_Trial],
    ) -> _Trial | None:
        view = _View(frame, explained)
        trial = self._refine_candidate(frame, view, hint.phase, hint.matrix)
        if trial is not None:
            self._judge(frame, trial, explained, kept)
        return trial

    # --- global assignment ------------------------------------------------------------------

    def _assign(self, frame: _FrameSpots, kept: list[_Trial]) -> list[IndexedCrystal]:
        everything = _View(frame, np.zeros(len(frame.xy), dtype=bool))
        # What each crystal would explain were it alone decides who is the stronger.
        nothing = np.zeros(len(frame.xy), dtype=bool)
        alone: list[_Trial] = []
        for trial in kept:
            full = self._rematch(frame, everything, trial)
            self._judge(frame, full, nothing, ())
            alone.append(full)
        alone.sort(key=lambda t: self._rank(frame, t))
        accepted: list[_Trial] = []
        found: list[tuple[_Trial, float, int]] = []
        radius = self.parameters.match_radius_px
        explained = nothing.copy()
        for trial in alone:
            if _another_name(trial, accepted):
                continue
            shared = self._judge(frame, trial, explained, accepted)
            if trial.log_false > self._log_accept:
                continue
            chance = float(frame.density.chance(trial.prediction.xy_px, radius).mean())
            accepted.append(trial)
            explained[trial.spot[trial.hit]] = True
            found.append((trial, chance, shared))
        owner = _owners(len(frame.xy), accepted)
        return [
            self._finish(frame, everything, number, trial, owner, chance, shared)
            for number, (trial, chance, shared) in enumerate(found)
        ]

    def _rematch(self, frame: _FrameSpots, view: _View, trial: _Trial) -> _Trial:
        spot, distance = pair(trial.prediction.xy_px, view.grid, self.parameters.match_radius_px)
        return _Trial(trial.phase, trial.fit, trial.parameters, trial.prediction, spot, distance)

    def _finish(
        self,
        frame: _FrameSpots,
        view: _View,
        number: int,
        trial: _Trial,
        owner: IntArray,
        chance: float,
        shared: int,
    ) -> IndexedCrystal:
        """Refine on the spots that are this crystal's own, strain too where they determine it."""
        p = self.parameters
        scene = self.phases[trial.phase].scene
        prediction, spot, distance = trial.prediction, trial.spot, trial.distance
        fit, parameters = trial.fit, trial.parameters
        for _ in range(3):
            hit = spot >= 0
            mine = hit.copy()
            mine[hit] &= owner[spot[hit]] == number
            if np.count_nonzero(mine) < p.min_matched:
                mine = hit
            # Outliers (overlaps, other grains' spots) lie far outside the core of the residuals.
            use = mine & (distance <= max(4.0 * float(np.median(distance[mine])), 0.3))
            new = self._final_fit(frame, scene, fit, prediction, spot[use], use)
            if new is None:
                break
            fit, parameters = new, len(new.covariance)
            prediction = predict(scene, fit.matrix)
            if fit.depth_mm:
                prediction = replace(
                    prediction, xy_px=prediction.xy_px + fit.depth_mm * self._depth_shift(prediction)
                )
            spot, distance = pair(prediction.xy_px, view.grid, p.match_radius_px)
        hit = spot >= 0
        matrix, strain = fit.matrix, None
        if parameters >= ROTATION_AND_STRAIN:
            rotation, strain = decompose(matrix)
            matrix = rotation @ np.linalg.inv(np.eye(3) + strain)
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
            chance_rate=chance,
            log_false=trial.log_false,
            shared=shared,
            depth_mm=fit.depth_mm,
        )

    def _final_fit(
        self,
        frame: _FrameSpots,
        scene: Scene,
        start: Fit,
        prediction: Prediction,
        spots: IntArray,
        use: npt.NDArray[np.bool_],
    ) -> Fit | None:
        # As many parameters as the spots determine; a depth only where it is beyond doubt.
        count = len(spots)
        if count < ROTATION_AND_STRAIN + 2:
            return self._fit(frame, scene, start.matrix, prediction, spots, use, ROTATION)
        plain = self._fit(frame, scene, start.matrix, prediction, spots, use, ROTATION_AND_STRAIN)
        if plain is None or count < _SPOTS_FOR_DEPTH:
            return plain
        deep = refine(
            plain.matrix,
            scene.reflections.g[prediction.index[use]],
            frame.xy[spots],
            scene.projection,
            ROTATION_STRAIN_DEPTH,
            None if frame.sigma is None else frame.sigma[spots],
            shift_px_per_mm=self._depth_shift(prediction)[use],
        )
        if deep is None or not 0.0 < deep.depth_mm < _DEEPEST_MM:
            return plain
        significant = deep.depth_mm > 5.0 * math.sqrt(float(deep.covariance[8, 8]))
        return deep if significant else plain

    def _depth_shift(self, prediction: Prediction) -> FloatArray:
        calibration = self._calibration
        return depth_shift(prediction.xy_px, prediction.energy_keV, calibration.projection, calibration.dd_mm)


class _FrameSpots:
    """The spots of a frame, and what follows from them alone."""

    def __init__(self, xy: FloatArray, sigma: FloatArray | None, calibration: Calibration) -> None:
        self.xy = xy
        self.sigma = sigma
        self.q = np.ascontiguousarray(calibration.scattering_vectors(xy))
        self.shape = calibration.shape
        self.grid = SpotGrid.of(xy, calibration.shape)
        self.density = SpotDensity(xy, calibration.shape)


class _View:
    """The spots that are not explained yet: their grid, and their numbers in the frame."""

    def __init__(self, frame: _FrameSpots, explained: npt.NDArray[np.bool_]) -> None:
        self.grid, self.kept = frame.grid.without(explained)
        self._per_px2 = len(self.kept) / (frame.shape[0] * frame.shape[1])

    def density_rate(self, radius_px: float) -> float:
        """Mean chance that a position has a spot within the radius."""
        return -math.expm1(-math.pi * radius_px**2 * self._per_px2)

    def original(self, spot: IntArray) -> IntArray:
        """Translate numbers in this view to numbers in the frame; -1 stays."""
        return np.where(spot >= 0, self.kept[np.maximum(spot, 0)], -1).astype(np.int32)


def _coincides(
    xy: FloatArray, others: Sequence[_Trial], radius_px: float, shape: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    # Which computed positions another crystal also predicts.
    if not others:
        return np.zeros(len(xy), dtype=bool)
    taken = SpotGrid.of(np.concatenate([t.prediction.xy_px for t in others]), shape)
    return pair(xy, taken, radius_px)[0] >= 0


def _another_name(trial: _Trial, accepted: Sequence[_Trial]) -> bool:
    # The same grain under another material's name: most of its spots are a stronger crystal's.
    spots = trial.spot[trial.hit]
    return any(
        other.phase != trial.phase
        and 2 * np.count_nonzero(np.isin(spots, other.spot[other.hit])) > len(spots)
        for other in accepted
    )


def _owners(n_spots: int, trials: Sequence[_Trial]) -> IntArray:
    # The crystal whose computed position is nearest owns a spot.
    owner = np.full(n_spots, -1, dtype=np.int32)
    nearest = np.full(n_spots, np.inf)
    for number, trial in enumerate(trials):
        hit = trial.hit
        spots, distance = trial.spot[hit], trial.distance[hit]
        closer = distance < nearest[spots]
        owner[spots[closer]] = number
        nearest[spots[closer]] = distance[closer]
    return owner
