"""From the pixels of a micrograph to what is published: prepared once, cut into patches, read by networks.

`MicrographAnalysis` is what the daemon's pipeline and ``grainwatch fingerprint`` share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from grainwatch.messages import (
    ArrayData,
    Fingerprint,
    ImageStatistics,
    ModelInfo,
    Novelty,
    PatchGrid,
    PhaseMorphology,
    ProcessPosterior,
)
from pipelines.micrograph.acquisition import UNKNOWN, Acquisition
from pipelines.micrograph.grey import NOT_FINITE, ONE_GREY, full_scale
from pipelines.micrograph.image_statistics import DriftStatistics
from pipelines.micrograph.morphology import Morphology, Phase, morphology
from pipelines.micrograph.networks import MicrographModel, PatchFeatures
from pipelines.micrograph.novelty import ImageFeatures, LatentSpace
from pipelines.micrograph.preparation import Patches, PreparationParameters, Prepared, cut_patches, prepare
from pipelines.micrograph.typicality import IntArray, regular_subset

OUT_OF_DOMAIN: Final = "out_of_domain"
"""The image is not like those that a model was trained on, as its metadata say; `remarks` say in what."""
PATCHES_SAMPLED: Final = "patches_sampled"
"""There are more patches than networks were to look at: they looked at some, spread evenly."""
NOVEL: Final = "novel"
"""The image does not look like those that the first model was trained on: see `Novelty`."""
NONE_OF_THESE: Final = "none_of_these"
"""No process condition that the model knows fits: see `ProcessPosterior`."""


@dataclass(frozen=True, slots=True)
class MicrographSettings:
    """What an analysis may be told.

    Attributes
    ----------
    phase : "bright" or "dark", optional
        That is measured; None takes the first model's, "bright" without one.
    paper_compat : bool
        See `pipelines.micrograph.morphology`.
    max_patches : int
        That networks look at.
    posterior_patches : int
        Of these, whose codes are weighed under each process condition.

    Raises
    ------
    ValueError
        Naming what is wrong.
    """

    phase: Phase | None = None
    paper_compat: bool = False
    max_patches: int = 64
    posterior_patches: int = 16

    def __post_init__(self) -> None:
        for name in ("max_patches", "posterior_patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, eq=False)
class ImageAnalysis:
    """What was found in one image: fields of `MicrographResult`, and the image that they were found in.

    Attributes
    ----------
    prepared : Prepared
        For the first model.
    """

    prepared: Prepared
    acquisition: Acquisition
    shape_px: tuple[int, int]
    statistics: ImageStatistics | None
    patches: PatchGrid | None
    fingerprints: tuple[Fingerprint, ...]
    morphology: PhaseMorphology | None
    posterior: ProcessPosterior | None
    novelty: Novelty | None
    flags: tuple[str, ...]
    remarks: tuple[str, ...]


class MicrographAnalysis:
    """Preparation, morphology and the networks of any number of models.

    Attributes
    ----------
    models : list of MicrographModel
        The first one decides how images are prepared for morphology, and about novelty and posterior.
    settings : MicrographSettings
    phase : str
    """

    def __init__(
        self, models: Sequence[MicrographModel] = (), settings: MicrographSettings | None = None
    ) -> None:
        self.models = list(models)
        self.settings = settings or MicrographSettings()
        first = models[0].parts.preparation if models else None
        self._parameters = PreparationParameters() if first is None else first.parameters
        self.phase: Phase = self.settings.phase or ("bright" if first is None else first.phase)

    def analyse(self, pixels: npt.NDArray[Any], acquisition: Acquisition = UNKNOWN) -> ImageAnalysis:
        """Analyse an image (rows, columns) or (rows, columns, channels).

        Raises
        ------
        BadFrame
            If it is no image, or too large.
        """
        prepared = prepare(pixels, self._parameters, acquisition)
        shape = (int(pixels.shape[0]), int(pixels.shape[1]))
        flags = [*acquisition.flags, *prepared.flags]
        remarks = list(acquisition.remarks)
        grid = posterior = novelty = measured = None
        fingerprints: list[Fingerprint] = []
        if prepared.filtered.size:
            found = morphology(
                prepared.filtered,
                phase=self.phase,
                pixel_size_um=acquisition.pixel_size_um,
                patch_px=self._parameters.patch_px,
                paper_compat=self.settings.paper_compat,
            )
            measured = _published(found)
            flags += found.flags
        for number, model in enumerate(self.models):
            own = model.parts.preparation.parameters
            ready = prepared if own == self._parameters else prepare(pixels, own, acquisition)
            problems = model.parts.domain.mismatch(acquisition, (shape[0] - ready.data_bar_px, shape[1]))
            if problems:
                flags.append(OUT_OF_DOMAIN)
                remarks += [f"{model.model.name}: {problem}" for problem in problems]
            patches = cut_patches(ready.image, own.patch_px, own.stride_px)
            if not patches.count:
                continue
            down, across = patches.view.shape[:2]
            chosen = regular_subset((down, across), self.settings.max_patches)
            if len(chosen) < patches.count:
                flags.append(PATCHES_SAMPLED)
            read = model.read(patches.some(chosen))
            # The latent space of a bundle is that of its first network.
            novel = model.parts.novelty
            spaces = [None if novel is None else novel.space, *([None] * (len(read) - 1))]
            fingerprints += [
                _fingerprint(model.model, features, model.parts.codebook, space)
                for features, space in zip(read, spaces, strict=True)
            ]
            if number == 0:
                grid = _grid(patches, chosen, shape, ready)
                blank = not {ONE_GREY, NOT_FINITE}.isdisjoint(ready.flags)
                # What was chosen is no grid any more.
                read_grid = (down, across) if len(chosen) == patches.count else len(chosen)
                posterior, novelty = self._judge(model, read[0], read_grid, blank=blank)
        if posterior is not None and posterior.none_of_these:
            flags.append(NONE_OF_THESE)
        if novelty is not None and novelty.novel:
            flags.append(NOVEL)
        return ImageAnalysis(
            prepared=prepared,
            acquisition=acquisition,
            shape_px=shape,
            statistics=_statistics(prepared.statistics, full_scale(pixels.dtype)),
            patches=grid,
            fingerprints=tuple(fingerprints),
            morphology=measured,
            posterior=posterior,
            novelty=novelty,
            flags=tuple(dict.fromkeys(flags)),
            remarks=tuple(remarks),
        )

    def _judge(
        self, model: MicrographModel, features: PatchFeatures, grid: tuple[int, int] | int, *, blank: bool
    ) -> tuple[ProcessPosterior | None, Novelty | None]:
        likelihood = None
        if model.has_prior and features.codes is not None:
            some = regular_subset(grid, self.settings.posterior_patches)
            likelihood = model.log_likelihood(features.codes[some])
        image = ImageFeatures(features.latents, features.codes, likelihood)
        reference, posterior, novelty = model.parts.novelty, None, None
        if model.parts.posterior is not None and likelihood is not None:
            share = 0.0 if blank else 1.0 if reference is None else reference.fit_typicality(image)
            posterior = model.parts.posterior.judge(likelihood, share)
        if reference is not None:
            novelty = reference.judge(image, blank=blank)
        return posterior, novelty


def _grid(patches: Patches, chosen: IntArray, shape: tuple[int, int], prepared: Prepared) -> PatchGrid:
    rows, columns = prepared.image.shape
    # What was cropped is the middle.
    top, left = (shape[0] - prepared.data_bar_px - rows) // 2, (shape[1] - columns) // 2
    down, across, size = patches.view.shape[:3]
    return PatchGrid(
        size_px=int(size),
        stride_px=patches.stride_px,
        origin_px=(top + patches.origin[0], left + patches.origin[1]),
        shape=(int(down), int(across)),
        numbers=ArrayData.of(chosen, "<i4"),
    )


def _fingerprint(
    model: ModelInfo, features: PatchFeatures, codebook: int, space: LatentSpace | None
) -> Fingerprint:
    latents = features.latents.astype(np.float64)
    spread = latents.std(axis=0, ddof=1) if len(latents) > 1 else np.full(latents.shape[1], np.nan)
    codes, mean = features.codes, latents.mean(axis=0)
    return Fingerprint(
        model=model,
        kind=features.kind,
        vector=ArrayData.of(mean, "<f4"),
        spread=ArrayData.of(spread, "<f4"),
        codes=None if codes is None else ArrayData.of(codes, "<u2"),
        codebook=0 if codes is None else codebook,
        whitened=None if space is None else ArrayData.of(space.whitened(mean), "<f4"),
    )


def _statistics(found: DriftStatistics | None, scale: float | None) -> ImageStatistics | None:
    return None if found is None else ImageStatistics(**asdict(found), full_scale=scale)


def _published(found: Morphology) -> PhaseMorphology:
    return PhaseMorphology(**{name: getattr(found, name) for name in PhaseMorphology.__struct_fields__})
