"""Whether an image looks like those that the model was trained on.

Neither the error of a reconstruction nor the bits per code can say it alone: smooth images are easy,
whatever they show. Three numbers are taken together (`pipelines.micrograph.typicality`): how far patches lie
from the nearest training patches in the latent space, how far the histogram of codes is from that of the
training images, and the bits per code of the PixelCNN, where fewer than usual are as strange as more.

All of them depend on how many patches an image has. So held-out images are kept patch by patch, and an image
is compared with as many patches of each. Where it has more than they have, all of theirs are taken: they
spread more then, and fewer images are called novel than the level says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from grainwatch.messages import Novelty
from pipelines.micrograph.typicality import FloatArray, IntArray, ranked_sources, regular_subset, typicality

AnyArray = npt.NDArray[Any]

LEVEL: Final = 0.05
NEIGHBOURS: Final = 3
MOST_REFERENCES: Final = 2000
"""Training patches that are kept: the distance to the nearest hardly depends on more."""
_MOST_DIMENSIONS: Final = 32
_KEPT_VARIANCE: Final = 0.99
_LEAST_DISTANCE: Final = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """What networks say about the patches of one image; training hands over one for each held-out image.

    Attributes
    ----------
    latents : (n, d) float array
        Of its patches: means of the encoder's vectors, or mu of a VAE.
    codes : (n, rows, columns) int array, optional
        Code maps of the same patches.
    log_likelihood : (m, c) float array, optional
        Nats of the code map of m of them, spread evenly, under each of c candidate conditions.
    source : str
        Specimen or spot: images of one source are not independent. "" for an image by itself.
    condition : int
        Number of the candidate that is nearest to its true condition; −1 where it is unknown.
    """

    latents: AnyArray
    codes: AnyArray | None = None
    log_likelihood: AnyArray | None = None
    source: str = ""
    condition: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class LatentSpace:
    """Latent vectors in standard deviations of the training patches, along their main directions.

    Attributes
    ----------
    mean : (d,) float64
    whitening : (d, k) float64
        Takes z − mean to k independent numbers of variance 1.
    """

    mean: FloatArray
    whitening: FloatArray

    @classmethod
    def fit(cls, latents: AnyArray) -> Self:
        """Fit to training patches (n, d): the main directions that hold 99 % of the variance, 32 at most.

        Raises
        ------
        ValueError
            If there are fewer than two patches, or they are all the same, or not finite.
        """
        table = np.asarray(latents, dtype=np.float64)
        if table.ndim != 2 or len(table) < 2 or not np.isfinite(table).all():
            raise ValueError(f"latents: expected finite (n, d) of two patches or more, got {table.shape}")
        mean = table.mean(axis=0)
        variance, directions = np.linalg.eigh(np.cov(table, rowvar=False).reshape(len(mean), -1))
        variance, directions = variance[::-1], directions[:, ::-1]
        if variance[0] <= 0.0:
            raise ValueError("latents: all patches have the same")
        share = np.cumsum(np.maximum(variance, 0.0)) / np.sum(np.maximum(variance, 0.0))
        kept = min(int(np.searchsorted(share, _KEPT_VARIANCE)) + 1, _MOST_DIMENSIONS)
        kept = min(kept, int(np.count_nonzero(variance > 1e-9 * variance[0])))
        return cls(mean, directions[:, :kept] / np.sqrt(variance[:kept]))

    def whitened(self, latents: AnyArray) -> FloatArray:
        """Return (n, k) of (n, d), or (k,) of (d,)."""
        return np.asarray((latents - self.mean) @ self.whitening, dtype=np.float64)


def nearest_distance(points: FloatArray, reference: AnyArray, neighbours: int = NEIGHBOURS) -> FloatArray:
    """Return the mean distance of points (n, k) to their nearest of reference (m, k), (n,) float64."""
    square = (
        np.sum(points * points, axis=1)[:, None]
        - 2.0 * points @ reference.T
        + np.sum(reference * reference, axis=1)
    )
    k = min(neighbours, len(reference))
    near = np.partition(square, k - 1, axis=1)[:, :k]
    return np.asarray(np.sqrt(np.maximum(near, 0.0)).mean(axis=1))


def code_histogram(codes: AnyArray, codebook: int) -> FloatArray:
    """Return the share of each code, (codebook,) float64.

    Raises
    ------
    ValueError
        If a code is not in the codebook, or there are none.
    """
    flat = np.asarray(codes).ravel()
    if not flat.size or int(flat.min()) < 0 or int(flat.max()) >= codebook:
        raise ValueError(f"codes: expected 0 to {codebook - 1}, and one at least")
    return np.bincount(flat, minlength=codebook) / flat.size


def js_divergence_bits(p: FloatArray, q: FloatArray) -> FloatArray:
    """Return the Jensen-Shannon divergence over the last axis, 0 to 1 bit (Lin, IEEE Trans. IT 37, 1991)."""
    middle = (p + q) / 2.0

    def against(share: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(share > 0.0, share * np.log2(share / middle), 0.0)
        return np.asarray(terms.sum(axis=-1))

    return np.maximum((against(p) + against(q)) / 2.0, 0.0)


def bits_per_code(log_likelihood: AnyArray, codes_per_patch: int) -> float:
    """Return the bits per code under the best condition, of (n, candidates) nats of patches."""
    best = float(np.max(np.mean(np.asarray(log_likelihood, dtype=np.float64), axis=0)))
    return -best / (codes_per_patch * float(np.log(2.0)))


@dataclass(frozen=True, eq=False)
class NoveltyReference:
    """What a bundle keeps in order to judge images.

    Attributes
    ----------
    space : LatentSpace
    reference : (m, k) float32
        Whitened training patches.
    histogram : (codebook,) float64, optional
        Mean share of each code in the training images.
    distances : tuple of (n_i,) float64
        Of the patches of each held-out image.
    codes : tuple of (n_i, rows, columns) uint16, or None
    log_likelihood : tuple of (m_i, c) float64, or None
    sources : (images,) int64
    by_source : bool
        Whether those are sources, or there were too few of them and they are images.
    level : float
    neighbours : int
    """

    space: LatentSpace
    reference: npt.NDArray[np.float32]
    histogram: FloatArray | None
    distances: tuple[FloatArray, ...]
    codes: tuple[AnyArray, ...] | None
    log_likelihood: tuple[FloatArray, ...] | None
    sources: IntArray
    by_source: bool
    level: float = LEVEL
    neighbours: int = NEIGHBOURS
    _tables: dict[tuple[int, int], FloatArray] = field(default_factory=dict, repr=False)

    def judge(self, image: ImageFeatures, *, blank: bool = False) -> Novelty:
        """Return how an image compares with those held out.

        Parameters
        ----------
        image : ImageFeatures
            With what the held-out ones have: codes and log-likelihoods are left out where they have none.
        blank : bool
            It has one grey, or pixels that are no numbers: whatever networks make of it, it is not typical.
        """
        distances = nearest_distance(self.space.whitened(image.latents), self.reference, self.neighbours)
        numbers = self._numbers(distances, image.codes, image.log_likelihood)
        n_bits = 0 if self.log_likelihood is None else len(_given(image.log_likelihood))
        known = self._known(len(distances), n_bits)
        share = 0.0 if blank else typicality(known, _scale(numbers), self.sources, _TWO_SIDED)
        return Novelty(
            typicality=share,
            novel=share < self.level,
            level=self.level,
            latent_distance=float(numbers[0]),
            code_divergence_bits=None if self.histogram is None else float(numbers[1]),
            bits_per_code=None if self.log_likelihood is None else float(numbers[-1]),
        )

    def _known(self, n: int, n_bits: int) -> FloatArray:
        """Return the numbers of the held-out images, as if they had so many patches."""
        if (n, n_bits) not in self._tables:
            rows = []
            for number, distances in enumerate(self.distances):
                some = regular_subset(len(distances), n)
                codes = None if self.codes is None else self.codes[number][some]
                likelihood = None
                if self.log_likelihood is not None:
                    likelihood = self.log_likelihood[number]
                    likelihood = likelihood[regular_subset(len(likelihood), n_bits)]
                rows.append(_scale(self._numbers(distances[some], codes, likelihood)))
            if len(self._tables) > 64:  # images of ever other sizes
                self._tables.clear()
            self._tables[n, n_bits] = np.array(rows)
        return self._tables[n, n_bits]

    def _numbers(
        self, distances: FloatArray, codes: AnyArray | None, log_likelihood: AnyArray | None
    ) -> FloatArray:
        """Return distance, divergence and bits, as many as there are."""
        numbers = [float(np.mean(distances))]
        if self.histogram is not None:
            histogram = code_histogram(_given(codes), len(self.histogram))
            numbers.append(float(js_divergence_bits(histogram, self.histogram)))
            if self.log_likelihood is not None:
                numbers.append(bits_per_code(_given(log_likelihood), int(np.prod(_given(codes).shape[1:]))))
        return np.array(numbers)


_TWO_SIDED: Final = (False, False, True)


def _given(array: AnyArray | None) -> AnyArray:
    if array is None:
        raise ValueError("the held-out images have codes and log-likelihoods, this one has none")
    return array


def _scale(numbers: FloatArray) -> FloatArray:
    """Return numbers as they are ranked: distances and divergences have long tails, their logarithms less."""
    scaled = numbers.copy()
    scaled[:2] = np.log(scaled[:2] + _LEAST_DISTANCE)
    return scaled


def fit_novelty(
    training_latents: AnyArray,
    held_out: Sequence[ImageFeatures],
    *,
    training_codes: AnyArray | None = None,
    codebook: int = 0,
    level: float = LEVEL,
    neighbours: int = NEIGHBOURS,
    seed: int = 0,
) -> NoveltyReference:
    """Learn what is usual.

    Parameters
    ----------
    training_latents : (n, d) array
        Of patches of the training images.
    held_out : sequence of ImageFeatures
        Of images of sources that nothing was trained on: 1 / level of them at least.
    training_codes : (n, rows, columns) int array, optional
        Of patches of the training images: then the held-out ones need codes, too.
    codebook : int
        Entries of the codebook.
    level : float
        So many images of the trained kind are called novel.
    neighbours : int
    seed : int
        Of the choice of training patches that are kept.

    Raises
    ------
    ValueError
        If there are too few images, or some have less than the others.
    """
    space = LatentSpace.fit(training_latents)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(training_latents))[:MOST_REFERENCES])
    reference = space.whitened(np.asarray(training_latents)[chosen]).astype(np.float32)
    names = [image.source or f"image {number}" for number, image in enumerate(held_out)]
    sources, by_source = ranked_sources(names, level)
    if any(len(image.latents) == 0 for image in held_out):
        raise ValueError("held-out images: one has no patch")
    distances = tuple(
        nearest_distance(space.whitened(image.latents), reference, neighbours) for image in held_out
    )
    histogram = codes = likelihood = None
    if training_codes is not None:
        histogram = code_histogram(training_codes, codebook)
        codes = tuple(np.asarray(_given(image.codes), dtype=np.uint16) for image in held_out)
        with_likelihood = [image.log_likelihood is not None for image in held_out]
        if any(with_likelihood):
            likelihood = tuple(np.asarray(_given(i.log_likelihood), np.float64) for i in held_out)
    return NoveltyReference(
        space, reference, histogram, distances, codes, likelihood, sources, by_source, level, neighbours
    )
