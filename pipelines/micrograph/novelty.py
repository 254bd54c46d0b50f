"""Whether an image looks like those that the model was trained on.

Neither the error of a reconstruction nor the bits per code can say it alone: smooth images are easy,
whatever they show. Four numbers are taken together (`pipelines.micrograph.typicality`):

- how far patches lie from the nearest training patches in the latent space;
- how far the mean of the patches lies from those of the training images, which differ less than patches do;
- how far the histogram of codes is from any that is made of what the histograms of the training images have
  in common: their mean and the directions in which they differ most (square roots of shares, whose distance
  is Hellinger's). The plain distance from the mean says little, because images of one process differ in how
  much of everything they have; what another process makes is outside of these directions;
- the bits per code of the PixelCNN, where fewer than usual are as strange as more.

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
_LEAST_VARIANCE: Final = 1e-6
"""Of the largest: below it, directions hold rounding errors."""
_MOST_DIRECTIONS: Final = 16
_IMAGES_A_DIRECTION: Final = 6
_SHRINKAGE: Final = 0.1
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
        Number of the candidate that stands for its true condition; −1 where none does, or it is unknown.
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
        """Fit to training patches (n, d): the directions of largest variance, 32 at most.

        Directions of small variance count: what is foreign often shows there.

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
        kept = min(int(np.count_nonzero(variance > _LEAST_VARIANCE * variance[0])), _MOST_DIMENSIONS)
        return cls(mean, directions[:, :kept] / np.sqrt(variance[:kept]))

    def whitened(self, latents: AnyArray) -> FloatArray:
        """Return (n, k) of (n, d), or (k,) of (d,)."""
        return np.asarray((latents - self.mean) @ self.whitening, dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class CodeSpace:
    """What histograms of codes of the training images have in common.

    Attributes
    ----------
    mean : (codebook,) float64
        Of the square roots of the shares.
    directions : (codebook, q) float64
        Orthonormal: those in which they differ most.
    """

    mean: FloatArray
    directions: FloatArray

    @classmethod
    def fit(cls, histograms: FloatArray) -> Self:
        """Fit to the histograms of training images (n, codebook): a direction for six images, 16 at most."""
        roots = np.sqrt(histograms)
        mean = roots.mean(axis=0)
        count = min(_MOST_DIRECTIONS, len(roots) // _IMAGES_A_DIRECTION)
        return cls(mean, np.linalg.svd(roots - mean, full_matrices=False)[2][:count].T.copy())

    def divergence_bits(self, histogram: FloatArray) -> float:
        """Return the Jensen-Shannon divergence of a histogram from the nearest one of this kind."""
        off = np.sqrt(histogram) - self.mean
        near = np.maximum(self.mean + self.directions @ (self.directions.T @ off), 0.0) ** 2
        return float(js_divergence_bits(histogram, near / near.sum()))


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
class HeldOut:
    """Images that nothing was trained on, patch by patch.

    Attributes
    ----------
    latents : tuple of (n_i, k) float32
        Whitened.
    codes : tuple of (n_i, rows, columns) uint16, or None
    log_likelihood : tuple of (m_i, c) float32, or None
    sources : (images,) int64
    by_source : bool
        Whether those are sources, or there were too few of them and they are images.
    has_candidate : (images,) bool, optional
        Whether a candidate stands for the image's condition; None where one does for all, or it is unknown.
    """

    latents: tuple[AnyArray, ...]
    codes: tuple[AnyArray, ...] | None
    log_likelihood: tuple[AnyArray, ...] | None
    sources: IntArray
    by_source: bool
    has_candidate: npt.NDArray[np.bool_] | None = None

    def of_candidates(self, level: float) -> tuple[IntArray, IntArray]:
        """Return numbers of the images whose condition is among the candidates, and those of their sources.

        Sources are ranked where they are enough of them for the level, else images, as `ranked_sources` does.
        """
        if self.has_candidate is None:
            return np.arange(len(self.sources)), self.sources
        images = np.flatnonzero(self.has_candidate)
        sources = np.unique(self.sources[images], return_inverse=True)[1].astype(np.int64)
        enough = int(sources.max(initial=-1)) + 1 >= 1.0 / level
        return images, sources if enough else np.arange(len(images), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class NoveltyReference:
    """What a bundle keeps in order to judge images.

    Attributes
    ----------
    space : LatentSpace
    reference : (m, k) float32
        Whitened training patches.
    image_mean : (k,) float64
        Mean of the means of whitened patches over training images.
    image_whitening : (k, k) float64
        Takes the difference from it to numbers of variance 1, for whole images.
    code_space : CodeSpace or None
    held_out : HeldOut
    level : float
    neighbours : int
    """

    space: LatentSpace
    reference: npt.NDArray[np.float32]
    image_mean: FloatArray
    image_whitening: FloatArray
    code_space: CodeSpace | None
    held_out: HeldOut
    level: float = LEVEL
    neighbours: int = NEIGHBOURS
    _distances: dict[int, FloatArray] = field(default_factory=dict, repr=False)
    _tables: dict[tuple[int, int], FloatArray] = field(default_factory=dict, repr=False)

    @property
    def weighs_codes(self) -> bool:
        """Whether it compares bits per code, for which an image needs log-likelihoods."""
        return self.held_out.log_likelihood is not None

    def judge(self, image: ImageFeatures, *, blank: bool = False) -> Novelty:
        """Return how an image compares with those held out.

        Parameters
        ----------
        image : ImageFeatures
            With what the held-out ones have.
        blank : bool
            It has one grey, or pixels that are no numbers: whatever networks make of it, it is not typical.
        """
        numbers = self._of_image(image)
        two_sided = [False] * 3 + [True]
        share = 0.0
        if not blank:
            share = typicality(self._known(image), _scale(numbers), self.held_out.sources, two_sided)
        patch, whole, *codes = (float(number) for number in numbers)
        return Novelty(
            typicality=share,
            novel=share < self.level,
            level=self.level,
            latent_distance=patch,
            image_distance=whole,
            code_divergence_bits=codes[0] if codes else None,
            bits_per_code=codes[1] if len(codes) > 1 else None,
        )

    def fit_typicality(self, image: ImageFeatures) -> float:
        """Return the share of held-out images whose codes fit the trained conditions as badly, or worse.

        That is, of divergence and bits per code; 1 without a PixelCNN. Only images whose condition is a
        candidate are ranked among: that the asked one is of these is what is doubted. Codes of others fit
        worse by nature; among them, what is none of the candidates would look usual.
        """
        if not self.weighs_codes or self.code_space is None:
            return 1.0
        asked, known = _scale(self._of_image(image)), self._known(image)
        images, sources = self.held_out.of_candidates(self.level)
        return typicality(known[images, 2:], asked[2:], sources, (False, True))

    def _of_image(self, image: ImageFeatures) -> FloatArray:
        whitened = self.space.whitened(image.latents)
        return self._numbers(
            whitened,
            nearest_distance(whitened, self.reference, self.neighbours),
            None if self.code_space is None else image.codes,
            image.log_likelihood if self.weighs_codes else None,
        )

    def _known(self, image: ImageFeatures) -> FloatArray:
        """Return the numbers of the held-out images, as if they had as many patches."""
        n, n_bits = len(image.latents), 0
        if self.weighs_codes:
            n_bits = len(_given(image.log_likelihood))
        if (n, n_bits) not in self._tables:
            if len(self._tables) > 64:  # images of ever other sizes
                self._tables.clear()
            held, rows = self.held_out, []
            for number, latents in enumerate(held.latents):
                if number not in self._distances:
                    self._distances[number] = nearest_distance(latents, self.reference, self.neighbours)
                some = regular_subset(len(latents), n)
                likelihood = None
                if held.log_likelihood is not None:
                    likelihood = held.log_likelihood[number]
                    likelihood = likelihood[regular_subset(len(likelihood), n_bits)]
                codes = None if held.codes is None else held.codes[number][some]
                distances = self._distances[number][some]
                rows.append(_scale(self._numbers(latents[some], distances, codes, likelihood)))
            self._tables[n, n_bits] = np.array(rows)
        return self._tables[n, n_bits]

    def _numbers(
        self,
        whitened: AnyArray,
        distances: FloatArray,
        codes: AnyArray | None,
        log_likelihood: AnyArray | None,
    ) -> FloatArray:
        """Return distance of patches, of the image, divergence and bits, as many as there are."""
        whole = (whitened.mean(axis=0) - self.image_mean) @ self.image_whitening
        numbers = [float(np.mean(distances)), float(np.sqrt(whole @ whole / len(whole)))]
        if self.code_space is not None:
            histogram = code_histogram(_given(codes), len(self.code_space.mean))
            numbers.append(self.code_space.divergence_bits(histogram))
            if self.weighs_codes:
                rows, columns = _given(codes).shape[1:]
                numbers.append(bits_per_code(_given(log_likelihood), rows * columns))
        return np.array(numbers)


def _given(array: AnyArray | None) -> AnyArray:
    if array is None:
        raise ValueError("the held-out images have codes or log-likelihoods, this one has none")
    return array


def _scale(numbers: FloatArray) -> FloatArray:
    """Return numbers as they are ranked: distances and divergences have long tails, their logarithms less."""
    scaled = numbers.copy()
    scaled[:3] = np.log(scaled[:3] + _LEAST_DISTANCE)
    return scaled


def fit_novelty(
    training_latents: AnyArray,
    held_out: Sequence[ImageFeatures],
    *,
    training_images: AnyArray | None = None,
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
        Of images of sources that nothing was trained on: 1 / level of them at least. Novelty ranks among all
        of them: one whose condition is no candidate is an image of the known kind still.
    training_images : (n,) int array, optional
        Number of the image that each training patch is from; without it, each patch counts as an image,
        and what is foreign in an image as a whole is seen less well.
    training_codes : (n, rows, columns) int array, optional
        Of the same patches: then the held-out ones need codes, too.
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
    whitened = space.whitened(training_latents)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(whitened))[:MOST_REFERENCES])
    reference = whitened[chosen].astype(np.float32)
    given = np.arange(len(whitened)) if training_images is None else np.asarray(training_images)
    if given.shape != (len(whitened),):
        raise ValueError(f"training_images: expected {len(whitened)}, one a patch, got {given.shape}")
    image = np.unique(given, return_inverse=True)[1]
    count = np.bincount(image)
    means = np.stack([np.bincount(image, weights=w) / count for w in whitened.T], axis=1)
    names = [each.source or f"image {number}" for number, each in enumerate(held_out)]
    sources, by_source = ranked_sources(names, level)
    if any(len(each.latents) == 0 for each in held_out):
        raise ValueError("held-out images: one has no patch")
    code_space = codes = likelihood = None
    if training_codes is not None:
        code_space = CodeSpace.fit(_histograms(np.asarray(training_codes), image, codebook))
        codes = tuple(_sorted(_given(each.codes)) for each in held_out)
        if any(each.log_likelihood is not None for each in held_out):
            likelihood = tuple(np.asarray(_given(each.log_likelihood), np.float32) for each in held_out)
    has_candidate = np.array([each.condition >= 0 for each in held_out])
    return NoveltyReference(
        space,
        reference,
        means.mean(axis=0),
        _whitening(means),
        code_space,
        HeldOut(
            tuple(space.whitened(each.latents).astype(np.float32) for each in held_out),
            codes,
            likelihood,
            sources,
            by_source,
            has_candidate if has_candidate.any() and not has_candidate.all() else None,
        ),
        level,
        neighbours,
    )


def _sorted(codes: AnyArray) -> npt.NDArray[np.uint16]:
    """Return codes (n, rows, columns) in order, patch by patch: they count the same and show nothing.

    Whoever gets a bundle does not get the images of whoever made it.
    """
    in_order = np.sort(np.asarray(codes, dtype=np.uint16).reshape(len(codes), -1), axis=1)
    return in_order.reshape(codes.shape)


def _whitening(means: FloatArray) -> FloatArray:
    """Return what makes the means of images (n, k) independent: a tenth of the way to equal variances."""
    size = means.shape[1]
    covariance = np.cov(means, rowvar=False).reshape(size, size) if len(means) > 1 else np.eye(size)
    equal = max(float(np.trace(covariance)) / size, 1e-12)
    variance, directions = np.linalg.eigh((1.0 - _SHRINKAGE) * covariance + _SHRINKAGE * equal * np.eye(size))
    return np.asarray(directions / np.sqrt(variance))


def _histograms(codes: AnyArray, image: IntArray, codebook: int) -> FloatArray:
    """Return the share of each code in each image, (images, codebook), of codes of patches."""
    code_histogram(codes, codebook)  # refuses what is none
    flat = codes.reshape(len(codes), -1).astype(np.int64)
    images = int(image.max()) + 1
    counts = np.bincount((image[:, None] * codebook + flat).ravel(), minlength=images * codebook)
    table = counts.reshape(images, codebook).astype(np.float64)
    return np.asarray(table / table.sum(axis=1, keepdims=True))
