"""How likely each process condition is, from what a PixelCNN says about patches of an image.

Patches of one image resemble each other, so their log-likelihoods do not simply add up: n of them are worth
n / (1 + (n − 1) ρ) independent ones, as with any mean of values with a correlation ρ. A second number, the
sharpness, makes up for a network that is too sure of itself, or not sure enough. Both are fitted to held-out
images whose condition is known, for the best logarithmic score over images of few and of many patches.

Images of one source (a specimen, a spot) resemble each other, too, and the next specimen is another one. So
sources count alike, however many images they have, and beside them counts what is expected before any is
seen: that an image is worth little more than one of its patches, and that the network is about as sure as it
should be. Without it, images of one specimen that it has all right would make it as sure as numbers allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from grainwatch.messages import ProcessPosterior
from pipelines.micrograph.novelty import ImageFeatures
from pipelines.micrograph.typicality import FloatArray, IntArray, regular_subset

AnyArray = npt.NDArray[Any]

LEVEL: Final = 0.05
LEAST_IMAGES: Final = 10
"""Of a condition among the candidates, for a calibration: whole ones, of which parts would say the same."""
LEAST_SOURCES: Final = 10
"""With fewer, a calibration knows little of how specimens differ; that is said wherever it is used."""
_BINS: Final = 10
_EXPECTED: Final = ((0.0, 2.0), (3.0, 6.0))
"""Mean and standard deviation of ln sharpness and logit correlation, before any source is seen.

So wide that in simulations with ten specimens no logarithmic score changes by more than 0.02. With one,
0.03 are lost where it happens to be like all others, and the worst of twelve scores is −1.3, not −8.3 (flat:
−1.9).
"""


@dataclass(frozen=True, eq=False)
class PosteriorReference:
    """What a bundle keeps in order to weigh conditions.

    Attributes
    ----------
    quantity : str
    candidates : tuple of str
    inputs : (c, s) float32 or (c,) int64
        What the network is given for each candidate.
    values : tuple of float
        The candidates as numbers, rising; empty for classes.
    sharpness, correlation : float
    level : float
        So many images of the trained conditions are called none of them.
    sources : int, optional
        Specimens (groups) whose images it was calibrated on; None where a bundle does not say it.
    """

    quantity: str
    candidates: tuple[str, ...]
    inputs: AnyArray
    values: tuple[float, ...]
    sharpness: float
    correlation: float
    level: float = LEVEL
    sources: int | None = None

    @property
    def few_sources(self) -> bool:
        """Whether it is known that few specimens calibrated it: of a new one it may be too sure."""
        return self.sources is not None and self.sources < LEAST_SOURCES

    def judge(self, log_likelihood: AnyArray, typicality: float = 1.0) -> ProcessPosterior:
        """Weigh the candidates.

        Parameters
        ----------
        log_likelihood : (n, c) array
            Nats of n patches under each.
        typicality : float
            Of the fit: `NoveltyReference.fit_typicality`; 1 where nothing says it.
        """
        table = np.asarray(log_likelihood, dtype=np.float64)
        finite = bool(np.isfinite(table).all()) and len(table) > 0
        mean = table.mean(axis=0) if finite else np.zeros(len(self.candidates))
        probability = probabilities(table if finite else table[:0], self.sharpness, self.correlation)
        share = typicality if finite else 0.0
        expected = sigma = None
        if self.values:
            values = np.array(self.values)
            expected = float(probability @ values)
            sigma = float(np.sqrt(probability @ np.square(values - expected)))
        return ProcessPosterior(
            quantity=self.quantity,
            candidates=self.candidates,
            values=self.values,
            probability=tuple(probability.tolist()),
            log_likelihood=tuple(mean.tolist()),
            mean=expected,
            sigma=sigma,
            typicality=share,
            none_of_these=share < self.level,
            patches=len(table),
        )


def probabilities(log_likelihood: FloatArray, sharpness: float, correlation: float) -> FloatArray:
    """Return the probability of each candidate, flat prior, of (n, c) nats of patches."""
    n = len(log_likelihood)
    scaled = log_likelihood.sum(axis=0) * sharpness / (1.0 + max(n - 1, 0) * correlation)
    weights = np.exp(scaled - scaled.max())
    return np.asarray(weights / weights.sum())


def fit_posterior(
    quantity: str,
    candidates: Sequence[str],
    inputs: AnyArray,
    held_out: Sequence[ImageFeatures],
    *,
    values: Sequence[float] = (),
    level: float = LEVEL,
) -> PosteriorReference:
    """Calibrate on held-out images.

    Parameters
    ----------
    quantity : str
        Name of the label: "ln_cooling_rate".
    candidates : sequence of str
        Conditions that are tried, as people read them.
    inputs : (c, s) float32 or (c,) int64
        The same, as the network takes them; scalars may lie between the trained ones.
    held_out : sequence of ImageFeatures
        Whole images, with `log_likelihood` under these candidates, `condition` where it is one of them, and
        `source`: all sources count alike, one that is "" is the image itself.
    values : sequence of float
        The candidates as numbers; empty for classes.
    level : float
        So many images of the trained conditions are called none of them.

    Raises
    ------
    ValueError
        If something does not fit together, or too few images are of a candidate's condition.
    """
    if len(candidates) < 2 or len(inputs) != len(candidates) or len(values) not in (0, len(candidates)):
        raise ValueError(
            f"candidates: expected two or more, with inputs and values for each, got {len(candidates)},"
            f" {len(inputs)} and {len(values)}"
        )
    tables = []
    for number, image in enumerate(held_out):
        if image.log_likelihood is None:
            raise ValueError(f"held-out image {number}: has no log-likelihoods")
        table = np.asarray(image.log_likelihood, dtype=np.float64)
        if table.ndim != 2 or table.shape[1] != len(candidates) or not len(table):
            raise ValueError(
                f"held-out image {number}: log-likelihoods of the shape {table.shape}, expected"
                f" (patches, {len(candidates)})"
            )
        tables.append(table)
    true = np.array([image.condition for image in held_out], dtype=np.int64)
    if int(true.max(initial=-1)) >= len(candidates):
        raise ValueError(f"held-out images: condition {true.max()} is none of {len(candidates)} candidates")
    known = np.flatnonzero(true >= 0)
    if len(known) < LEAST_IMAGES:
        raise ValueError(
            f"held-out images: the condition of {len(known)} is among the candidates, calibration needs"
            f" {LEAST_IMAGES}"
        )
    names = [held_out[i].source or f"image {i}" for i in known.tolist()]
    source = np.unique(np.asarray(names, dtype=str), return_inverse=True)[1].astype(np.int64)
    sharpness, correlation = _calibrate([tables[i] for i in known], true[known], source)
    return PosteriorReference(
        quantity,
        tuple(candidates),
        np.asarray(inputs),
        tuple(values),
        sharpness,
        correlation,
        level,
        int(source.max()) + 1,
    )


def _calibrate(tables: Sequence[FloatArray], true: IntArray, source: IntArray) -> tuple[float, float]:
    most = max(len(table) for table in tables)
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < most] + [most]
    sums = np.array([[t[regular_subset(len(t), n)].sum(axis=0) for t in tables] for n in counts])
    sums -= sums.max(axis=2, keepdims=True)
    numbers = np.array([[min(n, len(t)) for t in tables] for n in counts])
    own = np.take_along_axis(sums, np.broadcast_to(true[None, :, None], (*sums.shape[:2], 1)), axis=2)[..., 0]
    images = np.bincount(source)
    weights = 1.0 / (images[source] * len(images))
    mean, spread = np.array(_EXPECTED).T

    def loss(x: FloatArray) -> float:
        sharp = np.exp(x[0]) / (1.0 + (numbers - 1) / (1.0 + np.exp(-x[1])))
        nats = np.log(np.sum(np.exp(sums * sharp[..., None]), axis=2)) - own * sharp
        expected = float(np.square((x - mean) / spread).sum()) / 2.0
        return float(nats.mean(axis=0) @ weights) + expected / len(images)

    starts = [(a, b) for a in (-3.0, -1.0, 0.0) for b in (-4.0, 0.0, 3.0)]
    best = min(
        (minimize(loss, start, method="L-BFGS-B", bounds=[(-9.0, 3.0), (-9.0, 9.0)]) for start in starts),
        key=lambda found: float(found.fun),
    )
    return float(np.exp(best.x[0])), float(1.0 / (1.0 + np.exp(-best.x[1])))


def log_score(probability: FloatArray, true: IntArray) -> float:
    """Return the mean logarithm (nats) of the probability (n, c) of what was true (n,); flat: −ln c."""
    own = probability[np.arange(len(true)), true]
    return float(np.mean(np.log(np.maximum(own, 1e-300))))


def calibration_error(probability: FloatArray, true: IntArray, bins: int = _BINS) -> float:
    """Return the expected calibration error of the most probable candidate, in bins of equal numbers.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017; with equal numbers no bin is empty. Of n
    images, chance alone makes it 0.4 √(bins / n) where everything is right half of the time: 0.03 takes two
    thousand images.
    """
    sure = probability.max(axis=1)
    right = probability.argmax(axis=1) == true
    order = np.argsort(sure, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return float(sum(len(part) * abs(sure[part].mean() - right[part].mean()) for part in parts) / len(order))
