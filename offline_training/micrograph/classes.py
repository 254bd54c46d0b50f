"""Are fingerprints worth more than texture features: classes of images in grouped folds.

In each fold a network is trained anew on the images outside of it, so that the encoder has never seen what
it describes, nor has the classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from offline_training.loop import Progress
from offline_training.micrograph.crops import CropDraw, side_by_side
from offline_training.micrograph.data import DataRequest
from offline_training.micrograph.figures import codes_of
from offline_training.micrograph.images import ImageSet, load_images
from offline_training.micrograph.splits import GroupedFolds
from offline_training.micrograph.texture import (
    ClassFigures,
    FloatArray,
    classify,
    image_description,
    paired_figures,
    texture_features,
)
from offline_training.micrograph.training import TrainingSettings, train_vae, train_vqvae
from offline_training.micrograph.vae import Vae
from offline_training.micrograph.vqvae import VqVae, to_pixels
from pipelines.micrograph.preparation import PreparationParameters

RESULT = "classes.json"


def compare_classes(
    request: DataRequest,
    settings: TrainingSettings,
    folds: int,
    out: Path,
    report: Callable[[int, Progress], None] = lambda _, __: None,
    tell: Callable[[str], None] = lambda _: None,
) -> ClassFigures:
    """Train a VQ-VAE or a VAE for each fold, describe and classify; write classes.json.

    An interrupted run goes on where it stopped.

    Parameters
    ----------
    request : DataRequest
        With labels that are a class. Histograms are not matched.
    settings : TrainingSettings
        Of each training; its time budget, too.
    folds : int
    out : Path
        For checkpoints and the result.
    report : callable
        Told the number of the fold, from 0, and its progress.
    tell : callable
        Told what should be known, in words.

    Raises
    ------
    ValueError
        If there is no class, or too few groups.
    TrainingError
        See `loop.fit`.
    """
    parameters = PreparationParameters(median_px=request.median_px, patch_px=request.patch_px)
    images = load_images(
        request.images,
        parameters,
        labels=request.labels,
        wanted=request.wanted,
        group=request.group,
        overlaps=request.overlaps,
        seed=request.seed,
    )
    if images.conditions is None or not images.conditions.classes:
        raise ValueError("classes are asked for: give --labels with a column that is a class")
    for remark in images.remarks:
        tell(remark)
    classes = images.conditions.values.astype(np.int64)
    split = GroupedFolds.draw(images.groups, folds, request.seed, classes.tolist())
    texture = np.stack([texture_features(image) for image in images.images])
    by_fingerprint, by_texture, by_majority = (np.empty_like(classes) for _ in range(3))
    out.mkdir(parents=True, exist_ok=True)
    for fold in range(split.folds):
        train, test = split.trained_on(fold), split.held_out(fold)
        described = _descriptions(images, request, settings, train, out / f"fold{fold}.pt", fold, report)
        by_fingerprint[test] = classify(described, classes, train, test, images.groups)
        by_texture[test] = classify(texture, classes, train, test, images.groups)
        by_majority[test] = np.bincount(classes[train]).argmax()
    figures = paired_figures(classes, by_fingerprint, by_texture, by_majority, split)
    result: dict[str, Any] = {
        "figures": asdict(figures),
        "classes": list(images.conditions.classes),
        "data_sha256": images.fingerprint,
        "same_place": images.about.get("same_place", []),
        "training": {**settings.recipe.as_dict(), "steps": settings.steps, "seed": settings.seed},
        "files": [
            {
                "file": name,
                "group": group,
                "fold": int(fold),
                "class": images.conditions.classes[true],
                "by_fingerprint": images.conditions.classes[one],
                "by_texture": images.conditions.classes[other],
            }
            for name, group, fold, true, one, other in zip(
                images.names, images.groups, split.fold, classes, by_fingerprint, by_texture, strict=True
            )
        ],
    }
    text = msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
    (out / RESULT).write_bytes(text)
    return figures


def _descriptions(
    images: ImageSet,
    request: DataRequest,
    settings: TrainingSettings,
    train: np.ndarray[Any, np.dtype[np.int64]],
    checkpoint: Path,
    fold: int,
    report: Callable[[int, Progress], None],
) -> FloatArray:
    crops = CropDraw(tuple(images.images[i] for i in train), request.patch_px, settings.seed, request.turned)

    def told(progress: Progress) -> None:
        report(fold, progress)

    own = replace(settings, seed=settings.seed + fold)
    model: VqVae | Vae
    if settings.recipe.kind == "vqvae":
        model, _ = train_vqvae(crops, own, checkpoint, told)
    else:
        model, _ = train_vae(crops, own, checkpoint, told)
    return np.stack([_describe(model, image, request.patch_px) for image in images.images])


def _describe(model: VqVae | Vae, image: np.ndarray[Any, np.dtype[np.uint8]], side_px: int) -> FloatArray:
    patches, _ = side_by_side([image], side_px)
    with torch.no_grad():
        pixels = to_pixels(torch.from_numpy(patches))
        if isinstance(model, Vae):
            return image_description(model.fingerprint(pixels).numpy())
        latents = model.encoder(pixels).mean((2, 3)).numpy()
    return image_description(latents, codes_of(model, patches), model.sizes.codes)
