"""Find candidate crystals: seed spots, votes, one batch of scores, a trial of the best."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.laue.indexing.match import score
from pipelines.laue.indexing.parameters import Phase
from pipelines.laue.indexing.spots import View
from pipelines.laue.indexing.trials import Court, Explained, Trial
from pipelines.laue.indexing.vote import candidates

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

_CANDIDATES_OF_A_SEED = 8
_TRIALS_OF_A_SEED = 2
_BEYOND_DOUBT = -60.0


def search(court: Court, explained: Explained) -> None:
    """Accept crystals one after the other until no bright spot leads to another one.

    The brightest unexplained spots are seeds in turn. Each seed is tried once: what is left when
    it fails is hardly different later.
    """
    p = court.parameters
    tried = np.zeros(len(court.frame.xy), dtype=bool)
    failures = 0
    while len(explained.trials) < p.max_crystals and failures < p.max_seeds:
        remaining = np.flatnonzero(~explained.mask).astype(np.int32)
        seeds = remaining[~tried[remaining]]
        if len(remaining) < p.min_matched or len(seeds) == 0:
            return
        view = View(court.frame, explained.mask)
        for seed in seeds:
            tried[seed] = True
            trial = _best_of_seed(court, view, int(seed), explained)
            if trial is not None and court.accepts(trial):
                explained.add(_best_name(court, view, trial))
                failures = 0
                break
            failures += 1
            if failures >= p.max_seeds:
                return


def _best_of_seed(court: Court, view: View, seed: int, explained: Explained) -> Trial | None:
    p = court.parameters
    best: Trial | None = None
    radius = court.search_radius_px
    for number, phase in enumerate(court.phases):
        matrices = _vote(court, phase, seed, view.kept[: p.max_voters])
        if len(matrices) == 0:
            continue
        matched, expected = score(phase.scene, view.grid, matrices, radius, phase.n_search)
        by_chance = view.density_rate(radius) * expected
        quality = matched - by_chance - 2.0 * np.sqrt(by_chance + 1.0)
        for c in np.argsort(-quality, kind="stable")[:_TRIALS_OF_A_SEED]:
            if matched[c] < p.min_matched:
                continue
            trial = court.refine(view, number, matrices[c])
            if trial is None:
                continue
            court.judge(trial, explained)
            if best is None or court.rank(trial) < court.rank(best):
                best = trial
            if trial.log_false < _BEYOND_DOUBT:
                break
    return best


def _best_name(court: Court, view: View, trial: Trial) -> Trial:
    # The same spots may be another material's: its brightest ones are tried as that, too.
    best = trial
    spots = np.sort(trial.spots)
    for number, phase in enumerate(court.phases):
        if number == trial.phase:
            continue
        for seed in spots[:3]:
            for matrix in _vote(court, phase, int(seed), spots)[:1]:
                rival = court.refine(view, number, matrix)
                if rival is not None and court.rank(rival) < court.rank(best):
                    best = rival
    return best


def _vote(court: Court, phase: Phase, seed: int, partners: IntArray) -> FloatArray:
    tolerance = court.parameters.angle_tolerance_deg
    matrices, excess = candidates(
        phase.angles, court.frame.q, seed, partners, tolerance, _CANDIDATES_OF_A_SEED
    )
    return matrices[excess > 2.0]
