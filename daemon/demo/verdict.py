"""The map of the demo beside the truth that it was simulated from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from daemon.demo.sample import Sample
from grainwatch.messages import MapUpdate
from pipelines.rotations import misorientation_deg

#: A grain is found when the map has one of its orientation within so many degrees.
FOUND_WITHIN_DEG: Final = 0.2


@dataclass(frozen=True)
class Verdict:
    """How good a map is.

    Attributes
    ----------
    points : int
        Of the grid.
    indexed : int
        Points with a crystal.
    right : int
        Points whose best crystal is the grain that has most of the beam there.
    grains_true, grains_found, grains_mapped : int
        Grains that lead at some point; those of them that the map has; grains on the map. One that
        falls into pieces, or is seen beside others across a gap, is several on a map.
    grains_false : int
        Grains on the map that are in no place of the sample.
    misorientation_deg : float
        Median over the points that are right; NaN when there are none.
    """

    points: int
    indexed: int
    right: int
    grains_true: int
    grains_found: int
    grains_mapped: int
    grains_false: int
    misorientation_deg: float

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"map: {self.grains_found} of {self.grains_true} grains found, {self.grains_false} false,"
            f" {self.grains_mapped} pieces on the map; the leading grain is right at {self.right} of"
            f" {self.points} points, median misorientation {self.misorientation_deg:.4f} deg"
        )


def compare(found: MapUpdate, sample: Sample) -> Verdict:
    """Compare a snapshot of the map with the sample."""
    group = sample.material.proper_point_group
    truth, labels = sample.orientations, sample.labels
    best = {point.grid_index: point for point in found.points if point.rank == 0}
    leading = np.unique(labels)
    if not best:
        return Verdict(sample.grid.size, 0, 0, len(leading), 0, 0, 0, float("nan"))
    index = np.array(list(best))
    measured = np.array([point.quaternion for point in best.values()])
    apart = misorientation_deg(measured, truth[labels[tuple(index.T)]], group)
    right = apart <= FOUND_WITHIN_DEG
    means = np.array([grain.mean_quaternion for grain in found.grains])
    close = misorientation_deg(means[:, None], truth[None], group) <= FOUND_WITHIN_DEG
    return Verdict(
        points=sample.grid.size,
        indexed=len(best),
        right=int(right.sum()),
        grains_true=len(leading),
        grains_found=int(close[:, leading].any(axis=0).sum()),
        grains_mapped=len(means),
        grains_false=int((~close.any(axis=1)).sum()),
        misorientation_deg=float(np.median(apart[right])) if right.any() else float("nan"),
    )
