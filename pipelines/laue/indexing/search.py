"""Find candidate crystals: seed spots, votes, one batch of scores, a trial of the best.

Where a network names spots, these are seeds first, each as what it is said to be: a few
hypotheses instead of hundreds. Whether there is a crystal is decided as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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


class Proposer(Protocol):
    """Names spots: see `pipelines.laue.proposals`."""

    def propose(self, q: FloatArray, count: int) -> list[IntArray]:
        """Return the hypotheses that each of the first spots of q is worth trying as, maybe none."""


def search_proposed(court: Court, explained: Explained, proposers: Sequence[Proposer | None]) -> None:
    """Accept the crystals that named spots lead to.

    What is left after a round is named anew: without the spots of the strong crystals, those of
    the weak ones are plainer.

    Parameters
    ----------
    court, explained
    proposers : sequence
        One for each phase; None for a phase without a network.
    """
    p = court.parameters
    before = -1
    while before < len(explained.trials) < p.max_crystals:
        before = len(explained.trials)
        remaining = np.flatnonzero(~explained.mask).astype(np.int32)
        if len(remaining) < p.min_matched:
            return
        count = min(p.max_named, len(remaining))
        q = np.ascontiguousarray(court.frame.q[remaining])
        proposals = [None if one is None else one.propose(q, count) for one in proposers]
        _try_proposals(court, explained, remaining[:count], proposals)


def _try_proposals(
    court: Court, explained: Explained, seeds: IntArray, proposals: Sequence[list[IntArray] | None]
) -> None:
    p = court.parameters
    view = View(court.frame, explained.mask)
    failures = 0
    for place, seed in enumerate(seeds):
        hypotheses = [None if named is None else named[place] for named in proposals]
        if explained.mask[seed] or not any(h is not None and len(h) for h in hypotheses):
            continue
        trial = _best_of_seed(court, view, int(seed), explained, hypotheses)
        if trial is None or not court.accepts(trial):
            failures += 1
            if failures >= p.max_seeds:
                return
            continue
        explained.add(_best_name(court, view, trial))
        if len(explained.trials) >= p.max_crystals:
            return
        failures = 0
        view = View(court.frame, explained.mask)


def search(court: Court, explained: Explained, max_seeds: int) -> None:
    """Accept crystals one after the other until no bright spot leads to another one.

    The brightest unexplained spots are seeds in turn. Each seed is tried once: what is left when
    it fails is hardly different later. After `max_seeds` that failed the frame is called explained.
    """
    p = court.parameters
    tried = np.zeros(len(court.frame.xy), dtype=bool)
    failures = 0
    while len(explained.trials) < p.max_crystals and failures < max_seeds:
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
            if failures >= max_seeds:
                return


def _best_of_seed(
    court: Court,
    view: View,
    seed: int,
    explained: Explained,
    hypotheses: Sequence[IntArray | None] | None = None,
) -> Trial | None:
    # With hypotheses, a phase without any (None, or an empty list) is not tried.
    p = court.parameters
    best: Trial | None = None
    radius = court.search_radius_px
    for number, phase in enumerate(court.phases):
        of_phase = None if hypotheses is None else hypotheses[number]
        if hypotheses is not None and (of_phase is None or len(of_phase) == 0):
            continue
        matrices = _vote(court, phase, seed, view.kept[: p.max_voters], of_phase)
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


def _vote(
    court: Court, phase: Phase, seed: int, partners: IntArray, hypotheses: IntArray | None = None
) -> FloatArray:
    tolerance = court.parameters.angle_tolerance_deg
    matrices, excess = candidates(
        phase.angles, court.frame.q, seed, partners, tolerance, _CANDIDATES_OF_A_SEED, hypotheses
    )
    return matrices[excess > 2.0]
