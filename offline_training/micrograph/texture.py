"""Classes of images from what describes them: fingerprints beside texture features of scikit-image.

The features are local binary patterns (Ojala et al., IEEE TPAMI 24, 971, 2002) at three radii and Haralick's
figures of grey-level co-occurrence at four distances. Both descriptions go to the same classifier in the same
folds: least squares on standardised features, its ridge chosen inside the training folds alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from offline_training.micrograph.splits import GroupedFolds

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_RIDGES: Final = tuple(float(r) for r in 10.0 ** np.arange(-4.0, 3.0))
_RADII: Final = (1, 2, 4)
_DISTANCES: Final = (1, 2, 4, 8)
_FIGURES: Final = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "ASM")
_LEVELS: Final = 32


def texture_features(image: ByteImage) -> FloatArray:
    """Return local binary patterns and co-occurrence of an image (rows, columns), (features,)."""
    from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

    parts: list[FloatArray] = []
    for radius in _RADII:
        patterns = local_binary_pattern(image, 8 * radius, radius, "uniform")
        counts = np.bincount(patterns.astype(np.int64).ravel(), minlength=8 * radius + 2)
        parts.append(counts / counts.sum())
    coarse = (image // (256 // _LEVELS)).astype(np.uint8)
    angles = [0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    met = graycomatrix(coarse, list(_DISTANCES), angles, levels=_LEVELS, symmetric=True, normed=True)
    # Mean and range over the angles, as Haralick, Shanmugam & Dinstein (1973) do.
    for name in _FIGURES:
        values = np.asarray(graycoprops(met, name), dtype=np.float64)
        parts += [values.mean(axis=1), np.ptp(values, axis=1)]
    return np.concatenate(parts)


def classify(
    features: FloatArray, classes: IntArray, train: IntArray, test: IntArray, groups: tuple[str, ...]
) -> IntArray:
    """Return the classes of test items, learned from the others.

    Parameters
    ----------
    features : (n, d) float64
    classes : (n,) int64
        From 0.
    train, test : (m,) int64
        Numbers of items.
    groups : tuple of str
        Of all items: the ridge is chosen by folds that no group is parted by.
    """
    own = [groups[i] for i in train]
    best = _RIDGES[len(_RIDGES) // 2]
    if len(set(own)) >= 2:
        inner = GroupedFolds.draw(own, min(5, len(set(own))), labels=classes[train].tolist())
        right = np.zeros(len(_RIDGES))
        for fold in range(inner.folds):
            inside, outside = train[inner.trained_on(fold)], train[inner.held_out(fold)]
            scores = _scores(features, classes, inside, outside, _RIDGES)
            right += (scores.argmax(axis=2) == classes[outside]).sum(axis=1)
        # Of equally good ones the strongest: it changes least with the sample.
        best = _RIDGES[len(_RIDGES) - 1 - int(np.argmax(right[::-1]))]
    return np.asarray(_scores(features, classes, train, test, (best,))[0].argmax(axis=1))


def _scores(
    features: FloatArray, classes: IntArray, train: IntArray, test: IntArray, ridges: tuple[float, ...]
) -> FloatArray:
    # (ridges, tests, classes): least squares in its dual form, which is as large as there are items.
    x, asked = features[train], features[test]
    mean, spread = x.mean(axis=0), x.std(axis=0)
    scale = np.where(spread > 1e-12 * (np.abs(mean) + 1e-300), spread, np.inf) * np.sqrt(x.shape[1])
    x, asked = (x - mean) / scale, (asked - mean) / scale
    target = np.eye(int(classes.max()) + 1)[classes[train]]
    offset = target.mean(axis=0)
    values, vectors = np.linalg.eigh(x @ x.T)
    turned = vectors.T @ (target - offset)
    near = asked @ x.T @ vectors
    damped = [np.maximum(values, 0.0)[:, None] + ridge for ridge in ridges]
    return np.stack([near @ (turned / each) + offset for each in damped])


@dataclass(frozen=True)
class ClassFigures:
    """Of two descriptions in the same folds.

    Attributes
    ----------
    items, groups, folds : int
    accuracy, texture_accuracy, majority_accuracy : float
        Of the fingerprint, of LBP and GLCM, of always saying the most frequent class of the training part.
    difference : float
        Accuracy of the fingerprint minus that of texture.
    interval : (float, float)
        95 % of that: groups are what was drawn, and few of them leave much open. Student's t with the
        variance of a ratio of sums over groups (Cochran, Sampling Techniques, 1977, section 6.3).
    better, worse : int
        Items that the fingerprint alone has right, and that texture alone has right.
    p_value : float
        Of the two being equally good (McNemar's exact test; items taken as independent).
    """

    items: int
    groups: int
    folds: int
    accuracy: float
    texture_accuracy: float
    majority_accuracy: float
    difference: float
    interval: tuple[float, float]
    better: int
    worse: int
    p_value: float


def paired_figures(
    classes: IntArray,
    by_fingerprint: IntArray,
    by_texture: IntArray,
    by_majority: IntArray,
    split: GroupedFolds,
) -> ClassFigures:
    """Compare what two descriptions said of the same items, (n,) each."""
    right, other = by_fingerprint == classes, by_texture == classes
    off = right.astype(np.float64) - other
    names = np.unique(np.array(split.sources), return_inverse=True)[1]
    sums, counts = np.bincount(names, off), np.bincount(names).astype(np.float64)
    difference, groups = float(off.mean()), len(sums)
    error = float(np.sqrt(groups / (groups - 1) * np.sum((sums - difference * counts) ** 2)) / counts.sum())
    reach = float(stats.t.ppf(0.975, groups - 1)) * error
    better, worse = int(np.sum(right & ~other)), int(np.sum(other & ~right))
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return ClassFigures(
        items=len(classes),
        groups=groups,
        folds=split.folds,
        accuracy=float(right.mean()),
        texture_accuracy=float(other.mean()),
        majority_accuracy=float((by_majority == classes).mean()),
        difference=difference,
        interval=(difference - reach, difference + reach),
        better=better,
        worse=worse,
        p_value=p,
    )


def image_description(latents: FloatArray, codes: IntArray | None = None, codebook: int = 0) -> FloatArray:
    """Return one vector of an image from its patches: mean and spread of latents, shares of codes.

    Shares as square roots, in which equal differences mean as much for rare codes as for common ones.
    """
    parts: list[npt.NDArray[Any]] = [latents.mean(axis=0), latents.std(axis=0)]
    if codes is not None:
        counts = np.bincount(codes.ravel(), minlength=codebook)
        parts.append(np.sqrt(counts / counts.sum()))
    return np.concatenate(parts).astype(np.float64)
