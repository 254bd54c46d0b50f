"""What a training of micrographs works on: images, who is held out, and how a bundle will prepare them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offline_training.micrograph.crops import CropDraw, side_by_side
from offline_training.micrograph.images import ImageSet, Parts, load_images, part_images
from offline_training.micrograph.labels import Values
from pipelines.engines.bundle import Bundle
from pipelines.micrograph.matching import ReferenceHistogram
from pipelines.micrograph.model_bundle import BundlePreparation, Domain, read_parts
from pipelines.micrograph.morphology import Phase
from pipelines.micrograph.preparation import PreparationParameters

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

_PATCH_MULTIPLE = 16
"""Of the scales of a VAE; a VQ-VAE could do with 8."""


@dataclass(frozen=True)
class DataRequest:
    """Which images, and what to make of them; see ``grainwatch train vqvae``.

    Attributes
    ----------
    images : str
    labels : Path, optional
    wanted : tuple of str
    group : str
    held_out : tuple of str
    pixel_size_um : float, optional
        See `load_images` and `part_images`.
    patch_px, median_px : int
    match : bool
        Whether histograms are matched to that of the images trained on.
    phase : str
    turned : bool
        Whether crops are mirrored and turned.
    overlaps : bool
        Whether images that show the same place become one group.
    seed : int
        Of who is held out, and of synthetic images.
    """

    images: str
    labels: Path | None = None
    wanted: tuple[str, ...] = ()
    group: str = ""
    held_out: tuple[str, ...] = ()
    pixel_size_um: float | None = None
    patch_px: int = 128
    median_px: int = 3
    match: bool = False
    phase: Phase = "bright"
    turned: bool = True
    overlaps: bool = True
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Data:
    """Images that are read and parted.

    Attributes
    ----------
    images : ImageSet
    parts : Parts
    preparation : BundlePreparation
    seen : tuple of (rows, columns) uint8 arrays
        As networks see them.
    request : DataRequest
    base_domain : Domain, optional
        Of the bundle that is added to.
    """

    images: ImageSet
    parts: Parts
    preparation: BundlePreparation
    seen: tuple[ByteImage, ...]
    request: DataRequest
    base_domain: Domain | None = None

    def text(self) -> list[str]:
        """Return what should be known before training, in words."""
        return [*self.images.remarks, self.parts.text()]

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        return self.preparation.parameters.patch_px

    def crops(self, seed: int) -> CropDraw:
        """Return crops of the images that are trained on."""
        images = tuple(self.seen[i] for i in self.parts.trained_on)
        return CropDraw(images, self.patch_px, seed, self.request.turned)

    def patches(self, images: IntArray) -> tuple[ByteImage, IntArray]:
        """Return all patches of some images side by side, and the number of each one's image."""
        patches, of = side_by_side([self.seen[i] for i in images], self.patch_px)
        return patches, images[of]

    def conditions(self, images: IntArray) -> Values | None:
        """Return the conditions of some images; None without any."""
        return None if self.images.conditions is None else self.images.conditions.of(images)

    def domain(self) -> Domain:
        """Return what images must be like for a model of these; of one that is added to, for its encoder."""
        if self.base_domain is not None:
            return self.base_domain
        trained = [self.images.acquisitions[i] for i in self.parts.trained_on]

        def range_of(values: list[float | None]) -> tuple[float, float] | None:
            known = [value for value in values if value is not None]
            return (min(known), max(known)) if known else None

        detectors = sorted({a.detector for a in trained if a.detector})
        about = self.images.about
        return Domain(
            pixel_size_um=range_of([a.pixel_size_um for a in trained]),
            voltage_kV=range_of([a.voltage_kV for a in trained]),
            # Where one image does not say it, others may have been taken by any.
            detectors=tuple(detectors) if all(a.detector for a in trained) else (),
            smallest_px=self.patch_px,
            about="synthetic two-phase structures" if about["synthetic"] else str(about["folder"]),
        )

    def record(self) -> dict[str, Any]:
        """Return where the images come from and who was held out, for a bundle."""
        groups = self.images.groups
        return {
            **self.images.about,
            "data_sha256": self.images.fingerprint,
            "trained_on": sorted({groups[i] for i in self.parts.trained_on}),
            "held_out": list(self.parts.held_out),
            "calibrated_on": sorted({groups[i] for i in self.parts.calibration}),
            "judged_on": sorted({groups[i] for i in self.parts.judged}),
            "trained_images": sorted(self.images.digests(self.parts.trained_on)),
            "held_out_images": sorted(
                {*self.images.digests(self.parts.calibration), *self.images.digests(self.parts.judged)}
            ),
            "turned": self.request.turned,
        }


def load_data(request: DataRequest, base: Bundle | None = None) -> Data:
    """Read images and part them.

    Parameters
    ----------
    request : DataRequest
    base : Bundle, optional
        That is added to: images are prepared as it says, and what it was trained on is not held out.

    Raises
    ------
    ValueError
        If the images cannot be used, or the base was trained on all of them.
    """
    if request.patch_px < _PATCH_MULTIPLE or request.patch_px % _PATCH_MULTIPLE:
        raise ValueError(f"--patch-px {request.patch_px}: expected a multiple of {_PATCH_MULTIPLE}")
    parameters = PreparationParameters(median_px=request.median_px, patch_px=request.patch_px)
    told, domain = None if base is None else read_parts(base), None
    if told is not None:
        parameters = told.preparation.parameters
    images = load_images(
        request.images,
        replace(parameters, reference=None),
        labels=request.labels,
        wanted=request.wanted,
        group=request.group,
        pixel_size_um=request.pixel_size_um,
        overlaps=request.overlaps,
        seed=request.seed,
    )
    if base is None or told is None:
        parts = part_images(images, request.held_out, request.seed)
        if request.match:
            trained = [images.images[i] for i in parts.trained_on]
            parameters = replace(parameters, reference=ReferenceHistogram.typical(trained))
        preparation = BundlePreparation(parameters=parameters, phase=request.phase)
    else:
        parts = _parts_of(images, request, base)
        preparation, domain = told.preparation, told.domain
    seen = images.matched(preparation.parameters.reference)
    return Data(images, parts, preparation, seen, request, domain)


def _parts_of(images: ImageSet, request: DataRequest, base: Bundle) -> Parts:
    told = base.description.training.get("data", {})
    if told.get("data_sha256") == images.fingerprint and not request.held_out:
        place = {name: np.array([g in set(told[name]) for g in images.groups]) for name in _PARTS}
        trained, calibration, judged = (np.flatnonzero(place[name]) for name in _PARTS)
        return Parts(trained, calibration, judged, tuple(told["held_out"]))
    digests = images.digests(np.arange(len(images)))

    def groups_of(names: str, contents: str) -> set[str]:
        # By their content too: other labels may call the groups something else.
        named, shown = set(told.get(names, ())), set(told.get(contents, ()))
        return {g for g, d in zip(images.groups, digests, strict=True) if g in named or d in shown}

    seen, kept = groups_of("trained_on", "trained_images"), groups_of("held_out", "held_out_images")
    if leaked := sorted(seen & set(request.held_out)):
        raise ValueError(f"--held-out {leaked[0]}: {base.folder} was trained on it")
    fresh = set(images.groups) - seen
    if not fresh:
        raise ValueError(
            f"{base.folder} was trained on all of these images: nothing is held out; give the images that it"
            " was made with, or others"
        )
    if request.held_out or not seen:
        return part_images(images, request.held_out, request.seed)
    # Those that were held out stay so; of new ones alone a fifth is.
    drawn = np.random.default_rng(request.seed).permutation(sorted(fresh))[: max(2, len(fresh) // 5)]
    return part_images(images, sorted(kept & fresh) or drawn.tolist(), request.seed)


_PARTS = ("trained_on", "calibrated_on", "judged_on")
