"""Whether two models find the same crystals in a frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from grainwatch.messages import Crystal, LaueResult
from pipelines.frame import Agreement
from pipelines.rotations import misorientation_deg

FloatArray = npt.NDArray[np.float64]

#: Crystals of one material closer than this are the same one. Two refinements of it differ by
#: hundredths of a degree, two grains by degrees.
SAME_DEG: Final = 0.5


def compare_crystals(live: LaueResult, other: LaueResult, groups: Mapping[str, FloatArray]) -> Agreement:
    """Pair the crystals of two results of one frame.

    Parameters
    ----------
    live, other : LaueResult
    groups : mapping of str to (n, 4) array
        Proper point group of each material.

    Returns
    -------
    Agreement
        They agree when every crystal of one is in the other. Figures: ``in_both``, ``only_live``,
        ``only_shadow`` (crystals), ``misorientation_deg`` (median of the pairs, absent without any),
        ``spots_more`` (matched spots of the other less those of the live one).
    """
    angles = [
        angle
        for material in {c.material for c in live.crystals}
        for angle in _paired_deg(
            [c for c in live.crystals if c.material == material],
            [c for c in other.crystals if c.material == material],
            groups[material],
        )
    ]
    both = len(angles)
    figures = {
        "in_both": float(both),
        "only_live": float(len(live.crystals) - both),
        "only_shadow": float(len(other.crystals) - both),
        "spots_more": float(_spots(other) - _spots(live)),
    }
    if angles:
        figures["misorientation_deg"] = float(np.median(angles))
    return Agreement(both == len(live.crystals) == len(other.crystals), figures)


def _paired_deg(ours: Sequence[Crystal], theirs: Sequence[Crystal], group: FloatArray) -> list[float]:
    """Return the misorientations of crystals that are the same, each paired once at most."""
    if not ours or not theirs:
        return []
    p, q = (np.array([c.quaternion for c in crystals]) for crystals in (ours, theirs))
    angles = misorientation_deg(p[:, None], q[None], group)
    # Pairs that are none cost all the same, so that a near pair is never given up for them.
    rows, columns = linear_sum_assignment(np.minimum(angles, SAME_DEG))
    return [float(a) for a in angles[rows, columns] if a < SAME_DEG]


def _spots(result: LaueResult) -> int:
    return sum(c.spots_matched for c in result.crystals)
