"""What a bundle keeps of held-out images in order to judge others: novelty, posterior, drift.

Conformal calibration needs twenty images. Where fewer are held out each is cut into parts that count as
images; parts of one image resemble each other, so typicality is then too sure of itself, and it is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from offline_training.micrograph.data import Data
from offline_training.micrograph.labels import Conditions
from pipelines.micrograph.model_bundle import ALARM_COMPONENTS, BundleParts
from pipelines.micrograph.morphology import morphology
from pipelines.micrograph.novelty import LEVEL, ImageFeatures, NoveltyReference, fit_novelty
from pipelines.micrograph.posterior import (
    LEAST_IMAGES,
    PosteriorReference,
    calibration_error,
    fit_posterior,
    log_score,
)
from pipelines.micrograph.typicality import regular_subset

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
AnyArray = npt.NDArray[Any]

POSTERIOR_PATCHES: Final = 16
CANDIDATES: Final = 7
_MOST_CANDIDATES: Final = 24
_TRAINING_PATCHES: Final = 4000

Reading = Callable[[ByteImage], tuple[AnyArray, AnyArray | None]]
"""From patches (n, side, side) to latents (n, d) and, of a VQ-VAE, codes (n, rows, columns)."""
Likelihood = Callable[[AnyArray, AnyArray | None], npt.NDArray[np.float64]]
"""From codes (n, rows, columns) and conditions (c, ...) to nats (n, c); (n, 1) without conditions."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Conditions that a posterior is given over.

    Attributes
    ----------
    quantity : str
    names : tuple of str
    inputs : (c, numbers) float32 or (c,) int64
    values : tuple of float
        The same as numbers, rising; empty for classes and where there are several numbers.
    """

    quantity: str
    names: tuple[str, ...]
    inputs: AnyArray
    values: tuple[float, ...]

    @classmethod
    def of(cls, conditions: Conditions, trained_on: IntArray, count: int = CANDIDATES) -> Candidates:
        """Choose them: all classes; all values that occur; over a range of many, so many evenly spaced.

        Raises
        ------
        ValueError
            If several numbers have too many combinations, or there are fewer than two candidates.
        """
        own = conditions.of(trained_on)
        quantity = ", ".join(conditions.names)
        if conditions.classes:
            inputs = np.arange(len(conditions.classes))
            return cls(quantity, conditions.classes, inputs, ())
        different = np.unique(own, axis=0)
        if len(conditions.names) == 1 and len(different) > max(count, 2):
            different = np.linspace(own.min(), own.max(), max(count, 2), dtype=np.float32)[:, None]
        if not 2 <= len(different) <= _MOST_CANDIDATES:
            raise ValueError(
                f"{len(different)} conditions ({quantity}): expected 2 to {_MOST_CANDIDATES} to weigh"
            )
        values = tuple(float(v) for v in different[:, 0]) if len(conditions.names) == 1 else ()
        named = tuple(f"{v:.4g}" for v in values) or tuple(conditions.text(row) for row in different)
        return cls(quantity, named, different.astype(np.float32), values)

    def nearest(self, value: AnyArray) -> int:
        """Return the number of the candidate next to a condition, in spreads of the candidates."""
        if self.inputs.ndim == 1:
            return int(value)
        spread = self.inputs.std(axis=0)
        off = (self.inputs - value) / np.where(spread > 0.0, spread, 1.0)
        return int(np.argmin(np.square(off).sum(axis=1)))


def image_features(
    data: Data,
    images: IntArray,
    read: Reading,
    likelihood: Likelihood | None = None,
    candidates: Candidates | None = None,
) -> list[ImageFeatures]:
    """Return what networks say of images, one by one."""
    found = []
    for number in images:
        latents, codes = read(data.patches(np.array([number]))[0])
        nats, condition = None, -1
        if likelihood is not None and codes is not None:
            some = regular_subset(len(codes), POSTERIOR_PATCHES)
            nats = likelihood(codes[some], None if candidates is None else candidates.inputs)
        given = data.conditions(np.array([number]))
        if candidates is not None and given is not None:
            condition = candidates.nearest(given[0])
        found.append(ImageFeatures(latents, codes, nats, data.images.groups[number], condition))
    return found


def in_parts(images: list[ImageFeatures], level: float = LEVEL) -> tuple[list[ImageFeatures], int]:
    """Cut images into parts where there are fewer than 1 / level; return how many each became."""
    wanted = math.ceil(1.0 / level)
    pieces = min(math.ceil(wanted / max(len(images), 1)), min(len(i.latents) for i in images))
    if pieces == 1:
        return images, 1
    cut = []
    for image in images:
        nats = image.log_likelihood
        for number, some in enumerate(np.array_split(np.arange(len(image.latents)), pieces)):
            # The log-likelihoods are of some patches only, evenly spread.
            share = None if nats is None else nats[number % len(nats) :: pieces]
            codes = None if image.codes is None else image.codes[some]
            cut.append(replace(image, latents=image.latents[some], codes=codes, log_likelihood=share))
    return cut, pieces


def fit_parts(
    data: Data,
    read: Reading,
    codebook: int,
    likelihood: Likelihood | None = None,
    candidates: Candidates | None = None,
) -> tuple[BundleParts, dict[str, Any], list[str]]:
    """Fit what can be fitted, and judge it on the images that are left for that.

    Returns
    -------
    parts : BundleParts
    metrics : dict
        "novelty" and "posterior", as far as there are any.
    remarks : list of str
        What could not be had, or is worth less than it seems.
    """
    remarks: list[str] = []
    patches, of = data.patches(data.parts.trained_on)
    some = regular_subset(len(patches), _TRAINING_PATCHES)
    latents, codes = read(patches[some])
    whole = image_features(data, data.parts.calibration, read, likelihood, candidates)
    features, pieces = in_parts(whole)
    if pieces > 1:
        remarks.append(
            f"{len(whole)} images to calibrate with are few: each counts as {pieces}, and typicality is surer"
            " of itself than it should be"
        )
    novelty, posterior = None, None
    try:
        novelty = fit_novelty(
            latents, features, training_images=of[some], training_codes=codes, codebook=codebook
        )
    except ValueError as error:
        remarks.append(f"no judgement of novelty: {error}")
    if likelihood is not None and candidates is not None:
        # Parts have fewer patches than images that are asked about: whole ones, unless they are too few.
        given = whole if sum(image.condition >= 0 for image in whole) >= LEAST_IMAGES else features
        try:
            posterior = fit_posterior(
                candidates.quantity, candidates.names, candidates.inputs, given, values=candidates.values
            )
        except ValueError as error:
            remarks.append(f"no posterior: {error}")
    judged = image_features(data, data.parts.judged, read, likelihood, candidates)
    metrics: dict[str, Any] = {}
    if novelty is not None:
        called = [novelty.judge(image).novel for image in judged]
        metrics["novelty"] = {
            "level": novelty.level,
            "images": len(called),
            "called_novel": int(sum(called)),
            "calibration_images": len(features),
            "parts_of_an_image": pieces,
        }
    if posterior is not None:
        metrics["posterior"] = _posterior_metrics(posterior, novelty, judged)
    alarm = _alarm_values(data, whole, novelty) if novelty is not None else None
    parts = BundleParts(
        data.preparation,
        data.domain(),
        codebook,
        novelty,
        posterior,
        () if alarm is None else ALARM_COMPONENTS[: alarm.shape[1]],
        alarm,
    )
    return parts, metrics, remarks


def _posterior_metrics(
    posterior: PosteriorReference, novelty: NoveltyReference | None, judged: list[ImageFeatures]
) -> dict[str, Any]:
    asked = [image for image in judged if image.condition >= 0]
    found = []
    for image in asked:
        assert image.log_likelihood is not None
        fits = 1.0 if novelty is None else novelty.fit_typicality(image)
        found.append(posterior.judge(image.log_likelihood, fits))
    probability = np.array([each.probability for each in found])
    true = np.array([image.condition for image in asked])
    return {
        "images": len(asked),
        "candidates": list(posterior.candidates),
        "log_score": log_score(probability, true),
        "prior_log_score": -math.log(len(posterior.candidates)),
        "calibration_error": calibration_error(probability, true),
        "right": float((probability.argmax(axis=1) == true).mean()),
        "none_of_these": int(sum(each.none_of_these for each in found)),
        "patches_an_image": POSTERIOR_PATCHES,
    }


def _alarm_values(
    data: Data, features: list[ImageFeatures], novelty: NoveltyReference
) -> npt.NDArray[np.float64]:
    rows = []
    for number, image in zip(data.parts.calibration, features, strict=True):
        shown = morphology(data.images.images[number], phase=data.preparation.phase, patch_px=data.patch_px)
        found = novelty.judge(image)
        codes = () if found.code_divergence_bits is None else (found.code_divergence_bits,)
        rows.append([*data.images.statistics[number], shown.fraction, found.latent_distance, *codes])
    return np.array(rows)
