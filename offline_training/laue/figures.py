"""How right a network is, and how right it says it is: figures from probabilities and true classes.

*Confident* is a spot whose best class is not the reject class and has at least the bundle's
threshold of probability.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from pipelines.laue.classes import REJECT

Probabilities = npt.NDArray[np.float64] | npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]

_ECE_BINS = 15


@dataclass(frozen=True)
class Metrics:
    """Figures of a network on held-out spots.

    Attributes
    ----------
    spots : int
    accuracy : float
        Share of all spots, the reject class included, whose best class is the true one.
    majority_accuracy : float
        The same for the baseline that gives every spot the most frequent class.
    accuracy_listed : float
        Of the spots that have a class.
    threshold : float
        Probability from which a spot is confident.
    confident_right : float
        Share of the confident spots whose class is right.
    confident_share : float
        Share of the spots with a class that are confident and right.
    rejects_confident : float
        Share of spurious and unlisted spots that are confident.
    ece : float
        Expected calibration error of the best class, 15 bins of equal width.
    """

    spots: int
    accuracy: float
    majority_accuracy: float
    accuracy_listed: float
    threshold: float
    confident_right: float
    confident_share: float
    rejects_confident: float
    ece: float

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return {k: float(v) for k, v in asdict(self).items()}


def choose_threshold(probability: Probabilities, labels: IntArray, right: float, rejects: float) -> float:
    """Return the lowest of 0.5, 0.51 ... 0.99 at which both figures are met; 0.99 where none is.

    Parameters
    ----------
    probability : (n, classes) array
    labels : (n,) int array
    right : float
        Least share of the confident spots that is to be right.
    rejects : float
        Largest share of spurious and unlisted spots that may be confident.
    """
    for threshold in np.arange(0.5, 0.985, 0.01):
        m = measure(probability, labels, float(threshold))
        if m.confident_right >= right and m.rejects_confident <= rejects:
            return round(float(threshold), 2)
    return 0.99


def measure(probability: Probabilities, labels: IntArray, threshold: float) -> Metrics:
    """Return the figures of predicted probabilities (n, classes) against true classes (n,)."""
    best = probability.argmax(axis=1)
    top = probability[np.arange(len(best)), best]
    right = best == labels
    listed = labels != REJECT
    confident = (best != REJECT) & (top >= threshold)
    bins = np.minimum((top * _ECE_BINS).astype(int), _ECE_BINS - 1)
    gap = np.abs(np.bincount(bins, right - top, _ECE_BINS)).sum() / max(len(top), 1)
    return Metrics(
        spots=len(labels),
        accuracy=_mean(right),
        majority_accuracy=float(np.bincount(labels).max() / max(len(labels), 1)),
        accuracy_listed=_mean(right[listed]),
        threshold=threshold,
        confident_right=_mean(right[confident]),
        confident_share=_mean((confident & right)[listed]),
        rejects_confident=_mean(confident[~listed]),
        ece=float(gap),
    )


def _mean(values: npt.NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else 0.0
