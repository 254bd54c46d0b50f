"""The map of the demo beside the truth that it was simulated from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from daemon.demo.sample import LEAST_SHARE, Sample
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
    led : int
        Points with a crystal of the grain that has most of the beam there.
    crystals, strange : int
        On all points; those of them that are no grain in the beam.
    grains_true, grains_found : int
        Grains that have most of the beam at some point; those of them that the map has.
    pieces : int
        Grains on the map. One that falls apart on the grid is several there.
    misorientation_deg : float
        Median over the crystals that are a grain in the beam; NaN without any.
    """

    points: int
    led: int
    crystals: int
    strange: int
    grains_true: int
    grains_found: int
    pieces: int
    misorientation_deg: float

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"map: {self.grains_found} of {self.grains_true} grains found, in {self.pieces} pieces;"
            f" the leading grain at {self.led} of {self.points} points; {self.strange} of {self.crystals}"
            f" crystals false; median misorientation {self.misorientation_deg:.4f} deg"
        )


def compare(found: MapUpdate, sample: Sample) -> Verdict:
    """Compare a snapshot of the map with the sample."""
    group = sample.material.proper_point_group
    truth, labels = sample.orientations, sample.labels
    leading = np.unique(labels)
    if not found.points:
        return Verdict(sample.grid.size, 0, 0, 0, len(leading), 0, len(found.grains), float("nan"))
    index = np.array([point.grid_index for point in found.points])
    at = tuple(index.T)
    measured = np.array([point.quaternion for point in found.points])
    apart = misorientation_deg(measured[:, None], truth[None], group)
    near = apart <= FOUND_WITHIN_DEG
    met = near & (sample.shares[at] >= LEAST_SHARE)
    leads = met[np.arange(len(met)), labels[at]]
    means = np.array([grain.mean_quaternion for grain in found.grains])
    close = misorientation_deg(means[:, None], truth[leading][None], group) <= FOUND_WITHIN_DEG
    return Verdict(
        points=sample.grid.size,
        led=len(np.unique(index[leads], axis=0)),
        crystals=len(met),
        strange=int((~met.any(axis=1)).sum()),
        grains_true=len(leading),
        grains_found=int(close.any(axis=0).sum()),
        pieces=len(means),
        misorientation_deg=float(np.median(apart[met])) if met.any() else float("nan"),
    )
