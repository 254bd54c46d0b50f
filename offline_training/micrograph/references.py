"""What a bundle keeps of held-out images in order to judge others: novelty, posterior, drift.

Conformal calibration needs twenty images. Where fewer are held out each is cut into parts that count as
images; parts of one image resemble each other, so typicality is then too sure of itself, and it is said.
A posterior is calibrated on whole images only: what it must learn is how images, and specimens, differ.

A posterior answers which of its candidates is true, so only images for whose condition a candidate stands can
calibrate or judge it. Who holds out whole specimens, each made in its own way, holds out conditions that were
never trained on: such a number is weighed at even places of the trained range, which stand for what lies
between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    LEAST_SOURCES,
    PosteriorReference,
    calibration_error,
    fit_posterior,
    log_score,
)
from pipelines.micrograph.typicality import regular_subset

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]

POSTERIOR_PATCHES: Final = 16
CANDIDATES: Final = 7
_MOST_CANDIDATES: Final = 24
_TRAINING_PATCHES: Final = 4000
_ROUNDING: Final = 1e-4
"""Of distances: a label midway between two candidates belongs to one of them."""
_ALARM_SEED: Final = 0

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
    def of(
        cls,
        conditions: Conditions,
        trained_on: IntArray,
        count: int = CANDIDATES,
        *,
        held_out: IntArray | None = None,
        groups: Sequence[str] = (),
    ) -> Candidates:
        """Choose them: all classes; all values that occur; or of one number, places evenly spaced.

        That number has more values than `count`; or it differs from group to group, and groups are held out
        whose value was not trained on: then the next specimen will have yet another one.

        Parameters
        ----------
        conditions : Conditions
        trained_on : (n,) int64
            Numbers of images.
        count : int
            Of places.
        held_out : (m,) int64, optional
            Numbers of the images that calibrate and judge.
        groups : sequence of str, optional
            Of all images; without them each image is a group.

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
        if len(conditions.names) == 1 and (
            len(different) > max(count, 2) or _differs(conditions, trained_on, held_out, groups)
        ):
            different = np.linspace(own.min(), own.max(), max(count, 2), dtype=np.float32)[:, None]
        if not 2 <= len(different) <= _MOST_CANDIDATES:
            raise ValueError(
                f"{len(different)} conditions ({quantity}): expected 2 to {_MOST_CANDIDATES} to weigh"
            )
        values = tuple(float(v) for v in different[:, 0]) if len(conditions.names) == 1 else ()
        named = tuple(f"{v:.4g}" for v in values) or tuple(conditions.text(row) for row in different)
        return cls(quantity, named, different.astype(np.float32), values)

    def standing_for(self, value: AnyArray) -> int:
        """Return the number of the candidate that stands for a condition; −1 where none does.

        Each stands for what lies within half the distance to the next candidate, in spreads of them all.
        """
        if self.inputs.ndim == 1:
            return int(value)
        spread = self.inputs.std(axis=0, dtype=np.float64)
        scaled = self.inputs / np.where(spread > 0.0, spread, 1.0)
        away = _distance(scaled, value / np.where(spread > 0.0, spread, 1.0))
        nearest = int(np.argmin(away))
        between = np.delete(_distance(scaled, scaled[nearest]), nearest).min()
        return nearest if away[nearest] <= 0.5 * between * (1.0 + _ROUNDING) else -1


def _distance(points: FloatArray, point: FloatArray) -> FloatArray:
    return np.asarray(np.sqrt(np.square(points - point).sum(axis=1)))


def _differs(
    conditions: Conditions, trained_on: IntArray, held_out: IntArray | None, groups: Sequence[str]
) -> bool:
    """Whether most values were trained on in one group only, and some that are held out in none."""
    if held_out is None:
        return False
    own, others = conditions.of(trained_on)[:, 0], conditions.of(held_out)[:, 0]
    if np.isin(others, own).all():
        return False
    names = [groups[i] if groups else str(i) for i in trained_on]
    pairs = set(zip(own.tolist(), names, strict=True))
    shared_by = np.unique([value for value, _ in pairs], return_counts=True)[1]
    return bool((shared_by == 1).mean() >= 0.5)


def image_features(
    data: Data,
    images: IntArray,
    read: Reading,
    likelihood: Likelihood | None = None,
    candidates: Candidates | None = None,
    weighed: int = POSTERIOR_PATCHES,
) -> list[ImageFeatures]:
    """Return what networks say of images, one by one; of so many patches each, how likely they are."""
    found = []
    for number in images:
        latents, codes = read(data.patches(np.array([number]))[0])
        nats, condition = None, -1
        if likelihood is not None and codes is not None:
            down, across = (length // data.patch_px for length in data.seen[number].shape)
            some = regular_subset((down, across), weighed)
            nats = likelihood(codes[some], None if candidates is None else candidates.inputs)
        given = data.conditions(np.array([number]))
        if candidates is not None and given is not None:
            condition = candidates.standing_for(given[0])
        found.append(ImageFeatures(latents, codes, nats, data.images.groups[number], condition))
    return found


def in_parts(images: list[ImageFeatures], level: float = LEVEL) -> tuple[list[ImageFeatures], int]:
    """Cut images into parts where there are fewer than 1 / level; return how many each became.

    No patch is in two parts. Where enough images have a candidate for a posterior, these are counted: the fit
    to the candidates is ranked among them alone.
    """
    rows = [image.log_likelihood for image in images if image.log_likelihood is not None]
    most = min(*(len(image.latents) for image in images), *(len(table) for table in rows), _wanted(level))
    pieces = min(math.ceil(_wanted(level) / max(_counted(images), 1)), most)
    if pieces == 1:
        return images, 1
    cut = []
    for image in images:
        nats = image.log_likelihood
        for number, some in enumerate(np.array_split(np.arange(len(image.latents)), pieces)):
            # The log-likelihoods are of some patches only, evenly spread.
            share = None if nats is None else nats[number::pieces]
            codes = None if image.codes is None else image.codes[some]
            cut.append(replace(image, latents=image.latents[some], codes=codes, log_likelihood=share))
    return cut, pieces


def _wanted(level: float) -> int:
    return math.ceil(1.0 / level)


def _known(images: Sequence[ImageFeatures]) -> int:
    return sum(image.condition >= 0 for image in images)


def _counted(images: Sequence[ImageFeatures]) -> int:
    known = _known(images)
    return known if known >= LEAST_IMAGES else len(images)


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
    # So many patches of each that its parts will have some of their own.
    weighed = max(POSTERIOR_PATCHES, math.ceil(_wanted(LEVEL) / max(len(data.parts.calibration), 1)))
    whole = image_features(data, data.parts.calibration, read, likelihood, candidates, weighed)
    posterior = None
    if likelihood is not None and candidates is not None:
        posterior, said = _posterior(data, candidates, whole)
        remarks += said
        if posterior is None:
            # A bundle that weighs no conditions cannot say under which ones an image is likely, either.
            likelihood, whole = None, [replace(image, log_likelihood=None) for image in whole]
    features, pieces = in_parts(whole)
    if pieces > 1:
        remarks.append(
            f"{_counted(whole)} images to calibrate with are few: each counts as {pieces}, and typicality is"
            " surer of itself than it should be"
        )
    if posterior is not None and _known(features) < _wanted(LEVEL):
        remarks.append(f"{_known(features)} images to calibrate with are too few to call one none of these")
    novelty = None
    try:
        novelty = fit_novelty(
            latents, features, training_images=of[some], training_codes=codes, codebook=codebook
        )
    except ValueError as error:
        remarks.append(f"no judgement of novelty: {error}")
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
    if posterior is not None and _known(judged):
        metrics["posterior"] = _posterior_metrics(posterior, novelty, judged)
    elif posterior is not None:
        remarks.append("the posterior is not judged: no image to judge by is of a candidate's condition")
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


def _posterior(
    data: Data, candidates: Candidates, whole: list[ImageFeatures]
) -> tuple[PosteriorReference | None, list[str]]:
    """Calibrate on whole images; return what came of it, and what is to be said."""
    remarks = []
    held_out = np.union1d(data.parts.calibration, data.parts.judged)
    given = data.conditions(held_out)
    absent = 0 if given is None else sum(candidates.standing_for(value) < 0 for value in given)
    if absent:
        shown = f"{candidates.quantity}: {candidates.names[0]} to {candidates.names[-1]}"
        if not candidates.values:
            shown = candidates.quantity
        wider = "; with fewer --candidates each stands for more" if candidates.values else ""
        remarks.append(
            f"{absent} of {len(held_out)} held-out images are of a condition that no candidate stands for"
            f" ({shown}): the posterior is neither calibrated nor judged on them; hold out groups whose"
            f" condition is trained on, or lies between two that are (--held-out){wider}"
        )
    try:
        posterior = fit_posterior(
            candidates.quantity, candidates.names, candidates.inputs, whole, values=candidates.values
        )
    except ValueError as error:
        return None, [*remarks, f"no posterior: {error}"]
    if posterior.few_sources:
        remarks.append(
            f"images of {posterior.sources} {'group' if posterior.sources == 1 else 'groups'} calibrate the"
            f" posterior, fewer than {LEAST_SOURCES}: of a new one it may be surer than it is right; hold out"
            " more groups"
        )
    return posterior, remarks


def _posterior_metrics(
    posterior: PosteriorReference, novelty: NoveltyReference | None, judged: list[ImageFeatures]
) -> dict[str, Any]:
    said = []
    for image in judged:
        assert image.log_likelihood is not None
        fits = 1.0 if novelty is None else novelty.fit_typicality(image)
        said.append(posterior.judge(image.log_likelihood, fits))
    asked = [image for image in judged if image.condition >= 0]
    found = [each for each, image in zip(said, judged, strict=True) if image.condition >= 0]
    others = [each for each, image in zip(said, judged, strict=True) if image.condition < 0]
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
        "calibration_groups": posterior.sources,
        "without_candidate": {
            "images": len(others),
            "none_of_these": int(sum(each.none_of_these for each in others)),
        },
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
        # One grey has no phases; what follows the stream takes that for a fraction of 0, too.
        fraction = shown.fraction if math.isfinite(shown.fraction) else 0.0
        rows.append([*data.images.statistics[number], fraction, found.latent_distance, *codes])
    # The order of files is often that of specimens, and no time.
    return np.random.default_rng(_ALARM_SEED).permutation(np.array(rows))
