"""``grainwatch train micrograph-classes``: what fingerprints are worth beside texture features."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from offline_training.commands.common import ProgressLine, Seed, need, need_torch, plainly
from offline_training.commands.micrographs import (
    AsTheyAre,
    Cores,
    Group,
    Images,
    Label,
    MedianPx,
    Minutes,
    Overlaps,
    PatchPx,
    Recipe,
    Set,
    Steps,
)


def micrograph_classes(
    images: Images,
    labels: Annotated[Path, typer.Option("--labels", help="CSV file: columns file, class, group.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for classes.json and the checkpoints.")],
    model: Annotated[str, typer.Option("--model", help="vqvae or vae.")] = "vqvae",
    label: Label = None,
    group: Group = "",
    folds: Annotated[int, typer.Option("--folds", help="No group is in two.")] = 5,
    patch_px: PatchPx = 128,
    median_px: MedianPx = 3,
    as_they_are: AsTheyAre = False,
    overlaps: Overlaps = True,
    recipe: Recipe = "",
    set_: Set = None,
    steps: Steps = 1000,
    minutes: Minutes = 0.0,
    seed: Seed = 0,
    cores: Cores = 2,
) -> None:
    """Classes of images by fingerprints, and by LBP and GLCM of scikit-image, in the same folds.

    A network is trained for each fold, on the images outside of it. An interrupted run goes on.
    """
    need_torch()
    need(["skimage"])
    line = ProgressLine()
    with plainly():
        from offline_training.loop import Progress, use_cores
        from offline_training.micrograph.classes import RESULT, compare_classes
        from offline_training.micrograph.data import DataRequest
        from offline_training.micrograph.recipes import recipe_of
        from offline_training.micrograph.training import TrainingSettings

        if model not in ("vqvae", "vae"):
            raise ValueError(f"--model {model}: expected vqvae or vae")
        kind: Literal["vqvae", "vae"] = "vqvae" if model == "vqvae" else "vae"
        use_cores(cores + 1)
        request = DataRequest(
            images=images,
            labels=labels,
            wanted=tuple(label or ()),
            group=group,
            patch_px=patch_px,
            median_px=median_px,
            turned=not as_they_are,
            overlaps=overlaps,
            seed=seed,
        )
        settings = TrainingSettings(
            recipe_of(kind, recipe, set_ or ()), steps, seed, 60 * minutes or math.inf
        )

        def show(fold: int, progress: Progress) -> None:
            line.show(progress, f"fold {fold + 1}/{folds}: ")

        def tell(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        f = compare_classes(request, settings, folds, out, show, tell)
    line.end()
    low, high = f.interval
    print(f"{out / RESULT}: written; {f.items} images, {f.groups} groups, {f.folds} folds")
    print(f"  right by fingerprint ({model}): {100 * f.accuracy:.1f} %")
    print(f"  right by LBP and GLCM: {100 * f.texture_accuracy:.1f} %")
    print(f"  right by the most frequent class: {100 * f.majority_accuracy:.1f} %")
    print(f"  difference: {100 * f.difference:+.1f} % (95 %: {100 * low:+.1f} to {100 * high:+.1f})")
    print(
        f"  {f.better} images right by the fingerprint alone, {f.worse} by texture alone; p = {f.p_value:.2g}"
    )
