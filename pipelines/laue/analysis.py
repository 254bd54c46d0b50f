"""From a frame or a peak list to crystals as they are published.

`LaueAnalysis` is what the daemon's pipeline and ``grainwatch index`` share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grainwatch.messages import ArrayData, Crystal
from pipelines import rotations
from pipelines.files import read_images
from pipelines.frame import BadFrame
from pipelines.laue.crystal import Material
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.indexing.assign import IndexedCrystal
from pipelines.laue.indexing.indexer import Hint, Indexer
from pipelines.laue.indexing.parameters import IndexingParameters, Phase
from pipelines.laue.indexing.refine import decompose, strain_sigma
from pipelines.laue.orientation import SAMPLE_FRAMES, orientation_of
from pipelines.laue.peaks import PeakSearch, PeakTable, find_peaks
from pipelines.laue.proposals import Proposer, SpotClassifier
from pipelines.laue.reach import check_reach

FloatArray = npt.NDArray[np.float64]

OUTSIDE_BUNDLE = "outside_bundle_domain"
"""Flag of frames for which a bundle was given that is made for something else: indexed classically."""

UNPHYSICAL_SIGMA = 5e-3
"""A strain with a standard deviation above this says nothing, and is flagged."""

LOW_MATCH_RATE = 0.4
"""A crystal that shows less of its spots is flagged: a wrong material or a weak crystal looks so."""

_MOST_OFF_DETECTOR = 0.5
"""Share of the peaks of a list that may lie off the detector before it is taken for another one's."""


@dataclass(frozen=True)
class LaueSettings:
    """What an analysis may be told.

    Attributes
    ----------
    energy_keV : (float, float)
        Band of the beam on the sample.
    sample_frame : str
        Name of a rotation from the lab, see `SAMPLE_FRAMES`.
    search : PeakSearch
    indexing : IndexingParameters
    """

    energy_keV: tuple[float, float] = (5.0, 22.0)
    sample_frame: str = "tilt40"
    search: PeakSearch = field(default_factory=PeakSearch)
    indexing: IndexingParameters = field(default_factory=IndexingParameters)

    def __post_init__(self) -> None:
        low, high = self.energy_keV
        if not 0 < low < high < 200:
            raise ValueError(
                f"energy_keV: expected the lower first, both between 0 and 200 keV, got {low:g} {high:g}"
            )
        if self.sample_frame not in SAMPLE_FRAMES:
            known = ", ".join(SAMPLE_FRAMES)
            raise ValueError(f"sample_frame: {self.sample_frame!r} is not known; known: {known}")


@dataclass(frozen=True, eq=False)
class FrameAnalysis:
    """What was found in one frame: peaks, crystals as published, their indexing, flags."""

    peaks: PeakTable | None
    xy_px: FloatArray
    crystals: tuple[Crystal, ...]
    indexed: tuple[IndexedCrystal, ...]
    flags: tuple[str, ...]


class LaueAnalysis:
    """Peak search and indexing for one detector and one set of materials."""

    def __init__(
        self,
        materials: Sequence[Material],
        calibration: Calibration,
        area: DetectorArea | None = None,
        settings: LaueSettings | None = None,
        classifiers: Sequence[SpotClassifier] = (),
    ) -> None:
        """Prepare the materials; ValueError if one of them cannot show a crystal on this detector.

        A classifier serves the material and geometry it was trained for; one that fits none is in
        `mismatches` with the reason, and the classical search does its work, flagged.
        """
        self.settings = settings or LaueSettings()
        self.calibration = calibration
        self.area = area or DetectorArea.of(calibration)
        names = [m.name for m in materials]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"materials: {', '.join(twice)} is named twice; name each once, or rename one of the files"
            )
        self.phases = [Phase.prepare(m, calibration, self.area, self.settings.energy_keV) for m in materials]
        for phase in self.phases:
            least = self.settings.indexing.min_matched
            check_reach(phase.scene.reflections, calibration, self.area, least)
        self.mismatches: list[str] = []
        proposers = self._proposers(classifiers)
        self.classifiers = [one.classifier for one in proposers if one is not None]
        self.indexer = Indexer(self.phases, self.settings.indexing, proposers if self.classifiers else ())
        self.calibration_hash = calibration_hash(calibration)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know before the first frame: of the materials' files, of bundles not used."""
        of_materials = (f"material {p.material.name}: {r}" for p in self.phases for r in p.material.remarks)
        not_used = (f"not used, the classical search does its work: {m}" for m in self.mismatches)
        return (*of_materials, *not_used)

    def analyse_image(
        self, image: npt.NDArray[Any], hints: Sequence[Hint] = (), source: str = "frame"
    ) -> FrameAnalysis:
        """Find peaks and crystals of a frame.

        Raises
        ------
        BadFrame
            If the frame is in colour or for another detector, or nothing can be searched in it.
        """
        if image.ndim != 2:
            raise BadFrame(f"{source} is a colour image ({image.shape[-1]} channels), expected a grey one")
        if image.shape != self.calibration.shape:
            raise BadFrame(
                f"{source} has {image.shape[0]} rows and {image.shape[1]} columns, but the calibration is for"
                f" {self.calibration.label or 'a detector'} of {self.calibration.shape[0]} rows and"
                f" {self.calibration.shape[1]} columns: give the calibration of this detector"
            )
        peaks = find_peaks(image, self.settings.search, self.area.usable)
        result = self.analyse_peaks(peaks.xy_px, hints=hints)
        flags = (("peaks_truncated",) if peaks.truncated else ()) + result.flags
        return FrameAnalysis(peaks, result.xy_px, result.crystals, result.indexed, flags)

    def analyse_peaks(
        self, xy_px: npt.ArrayLike, hints: Sequence[Hint] = (), source: str = "peak list"
    ) -> FrameAnalysis:
        """Find the crystals of a peak list, (n, 2) px from 0, the brightest peak first.

        Raises
        ------
        BadFrame
            If the list is for another detector, or holds a position that is not a number.
        """
        xy = np.asarray(xy_px, dtype=np.float64).reshape(-1, 2)
        self._check_peaks(xy, source)
        indexed = self.indexer.index(xy, hints=hints)
        flags = ["spots_truncated"] if len(xy) > self.settings.indexing.max_spots else []
        if self.mismatches:
            flags.append(OUTSIDE_BUNDLE)
        crystals = tuple(self._publish(found) for found in indexed)
        return FrameAnalysis(None, xy, crystals, tuple(indexed), tuple(flags))

    def _proposers(self, classifiers: Sequence[SpotClassifier]) -> list[Proposer | None]:
        chosen: list[Proposer | None] = [None] * len(self.phases)
        for classifier in classifiers:
            domain = classifier.domain
            # A bundle of another material says so by name; one of this material says what differs.
            named = [p for p in self.phases if p.material.name == domain.material] or self.phases
            reasons = []
            for phase in named:
                reason = domain.mismatch(phase.material, self.calibration, self.settings.energy_keV)
                other = chosen[self.phases.index(phase)]
                if reason is None and other is not None:
                    raise ValueError(
                        f"bundle: {other.classifier.model.name} and {classifier.model.name} are both for"
                        f" {phase.material.name}; name one"
                    )
                if reason is None:
                    try:
                        proposer = Proposer(classifier, phase.scene.reflections, phase.angles)
                    except ValueError as error:  # a cell at the edge of the domain loses a class
                        reason = str(error)
                    else:
                        chosen[self.phases.index(phase)] = proposer
                        break
                reasons.append(reason)
            else:
                self.mismatches.append(f"bundle {classifier.model.name}: {'; '.join(reasons)}")
        return chosen

    def _check_peaks(self, xy: FloatArray, source: str) -> None:
        bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
        if len(bad):
            raise BadFrame(f"{source}: peak {bad[0] + 1} of {len(xy)} has the position {xy[bad[0]].tolist()}")
        rows, columns = self.calibration.shape
        # Simulated lists go beyond the frame, and so does a fit that ran away; most of a list is another's.
        off = int(np.count_nonzero(((xy < -1.0) | (xy > (columns, rows))).any(axis=1)))
        if off > _MOST_OFF_DETECTOR * len(xy):
            raise BadFrame(
                f"{source}: {off} of {len(xy)} peaks lie off the detector of {rows} rows and {columns}"
                " columns: give the calibration of this detector"
            )

    def _publish(self, found: IndexedCrystal) -> Crystal:
        material = self.phases[found.phase].material
        reflections = self.phases[found.phase].scene.reflections
        to_sample = SAMPLE_FRAMES[self.settings.sample_frame]
        ub = found.matrix @ material.B0
        quaternion, _ = orientation_of(ub, material, to_sample)
        rotation, _ = decompose(found.matrix)
        flags: list[str] = []
        if found.strain is None:
            flags.append("strain_not_refined")
            nan = np.full((3, 3), np.nan)
            strain_crystal, strain_sample, sigma = nan, nan, nan
        else:
            to_crystal = material.crystal_frame
            strain_crystal = to_crystal @ found.strain @ to_crystal.T
            lab_strain = rotation @ found.strain @ rotation.T
            strain_sample = to_sample @ lab_strain @ to_sample.T
            sigma = strain_sigma(found.covariance, to_crystal @ rotation.T)
            # The largest principal strain: a component depends on the frame it is written in.
            if np.abs(np.linalg.eigvalsh(found.strain)).max() > self.settings.indexing.max_strain:
                flags.append("unphysical_strain")
            if not np.all(sigma < UNPHYSICAL_SIGMA):
                flags.append("uncertain_strain")
        if found.shared > 0.2 * len(found.spots):
            flags.append("shares_spots")
        matched = len(found.spots)
        if matched < LOW_MATCH_RATE * found.expected:
            flags.append("low_match_rate")
        if material.doubtful:
            flags.append("doubtful_structure")
        hkl = reflections.hkl[found.reflections] * found.orders[:, None]
        return Crystal(
            material=material.name,
            UB=ArrayData.of(ub),
            B0=ArrayData.of(material.B0),
            quaternion=_four(quaternion),
            euler_deg=_three(rotations.to_euler_deg(quaternion)),
            strain_crystal=ArrayData.of(strain_crystal),
            strain_sample=ArrayData.of(strain_sample),
            strain_sigma=ArrayData.of(sigma),
            orientation_sigma_deg=math.degrees(math.sqrt(float(np.trace(found.covariance[:3, :3])) / 3.0)),
            spots_matched=matched,
            spots_expected=found.expected,
            match_rate=matched / found.expected,
            chance_match_rate=found.chance_rate,
            false_probability=found.false_probability,
            residual_px=float(np.mean(found.distance_px)),
            depth_um=1e3 * found.depth_mm,
            spot_indices=ArrayData.of(found.spots, "<i4"),
            hkl=ArrayData.of(hkl, "<i2"),
            flags=tuple(flags),
        )


def calibration_hash(calibration: Calibration) -> str:
    """Return sha256 over the numbers of a calibration."""
    text = repr((calibration.to_lauetools(), calibration.pixel_size_mm, calibration.shape, calibration.label))
    return hashlib.sha256(text.encode()).hexdigest()


def read_mask(path: Path, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Read a mask image (any format that fabio reads, or .npy): pixels that are not 0 are masked.

    Raises
    ------
    ValueError
        If it cannot be read or does not fit the detector.
    """
    if path.suffix == ".npy":
        try:
            mask = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: is no .npy file with a mask") from error
        if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "buif":
            raise ValueError(f"{path}: is no .npy file with a mask")
    else:
        mask = next(iter(read_images(path)))[1]
    if mask.shape != shape:
        raise ValueError(f"{path}: mask of shape {mask.shape} does not fit a detector of shape {shape}")
    return np.asarray(mask != 0)


def _four(v: FloatArray) -> tuple[float, float, float, float]:
    w, x, y, z = (float(c) for c in v)
    return w, x, y, z


def _three(v: FloatArray) -> tuple[float, float, float]:
    a, b, c = (float(c) for c in v)
    return a, b, c
