"""The door of the indexer: spots in, crystals out. See the package for the way between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipelines.laue.indexing.assign import IndexedCrystal, assign
from pipelines.laue.indexing.parameters import IndexingParameters, Phase
from pipelines.laue.indexing.search import Proposer, search, search_proposed
from pipelines.laue.indexing.spots import FrameSpots, View
from pipelines.laue.indexing.trials import Court, Explained

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Hint:
    """A candidate from elsewhere (a network, a neighbour in the scan): number of the phase, and M."""

    phase: int
    matrix: FloatArray


@dataclass(frozen=True, eq=False)
class Indexer:
    """Finds the crystals of given phases in the peak lists of one detector. Deterministic.

    Attributes
    ----------
    phases : sequence of Phase
    parameters : IndexingParameters
    proposers : sequence
        A network for each phase, or None; empty for the classical search alone.
    """

    phases: Sequence[Phase]
    parameters: IndexingParameters = field(default_factory=IndexingParameters)
    proposers: Sequence[Proposer | None] = ()

    def __post_init__(self) -> None:
        """Refuse to work without a material."""
        if not self.phases:
            raise ValueError("an indexer needs at least one material")
        if self.proposers and len(self.proposers) != len(self.phases):
            raise ValueError(f"{len(self.proposers)} proposers for {len(self.phases)} phases")

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
            Relative position uncertainties; equal by default, because the model is rarely as
            good as the positions of bright spots.
        hints : sequence of Hint
            Candidates to judge before searching; those that stand spare the search.

        Returns
        -------
        list of IndexedCrystal
            The one with the strongest evidence first.

        Raises
        ------
        ValueError
            If a position is not a finite number, or the uncertainties are not one positive number a peak.
        """
        p = self.parameters
        every = np.ascontiguousarray(xy_px, dtype=np.float64).reshape(-1, 2)
        bad = np.flatnonzero(~np.isfinite(every).all(axis=1))
        if len(bad):
            raise ValueError(f"peak {bad[0]} of {len(every)} has the position {every[bad[0]].tolist()}")
        xy = every[: p.max_spots]
        if len(xy) < p.min_matched:
            return []
        sigma = None if sigma_px is None else _checked_sigma(sigma_px, len(every))[: p.max_spots]
        frame = FrameSpots(xy, sigma, self.phases[0].scene.calibration)
        court = Court(frame, self.phases, p)
        explained = Explained(frame)
        for hint in hints:
            if len(explained.trials) == p.max_crystals:
                break
            trial = court.refine(View(frame, explained.mask), hint.phase, hint.matrix)
            if trial is not None:
                court.judge(trial, explained)
                if court.accepts(trial):
                    explained.add(trial)
        seeds = p.max_seeds
        if any(proposer is not None for proposer in self.proposers):
            before = len(explained.trials)
            search_proposed(court, explained, self.proposers)
            if len(explained.trials) > before:
                seeds = p.max_seeds_after_network
        search(court, explained, seeds)
        return assign(court, explained.trials)


def _checked_sigma(sigma_px: npt.ArrayLike, n: int) -> FloatArray:
    sigma = np.asarray(sigma_px, dtype=np.float64)
    if sigma.shape != (n,) or not np.all(np.isfinite(sigma) & (sigma > 0)):
        raise ValueError(f"uncertainties of {n} peaks: expected as many positive numbers, got {sigma.shape}")
    return sigma
