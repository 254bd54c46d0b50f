"""Two materials for the same spots: the more plausible name wins.

Laue spots give angles only. All cubic crystals share them, and a crystal of one material can be
indexed as another whose cell predicts its spots among many more. What tells them apart is what
is *not* seen. (Brightness does not: |F|² and spectrum fall off alike under both names.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_SEEN = 0.85
"""Share of its spots that a crystal shows; the value matters little between rivals."""


def plausibility(matched: npt.NDArray[np.bool_], chance: npt.NDArray[np.float64]) -> float:
    """Return ln P(matches and misses | crystal) − ln P(the same | chance).

    Parameters
    ----------
    matched : (m,) bool
        Which computed spots are there.
    chance : (m,) float64
        Probability that each would have a spot nearby by chance.
    """
    p = np.clip(chance, 1e-12, 1.0 - 1e-12)
    ratio = np.where(matched, np.log(_SEEN / p), np.log((1.0 - _SEEN) / (1.0 - p)))
    return float(np.sum(ratio))
