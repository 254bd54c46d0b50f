"""A network names bright spots, and thereby the few hypotheses that a search needs to try."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from grainwatch.messages import ModelInfo
from pipelines.engines.bundle import BundleError, load_bundle
from pipelines.engines.onnxruntime_engine import OnnxEngine
from pipelines.laue.classes import REJECT, ClassList
from pipelines.laue.crystal import Material
from pipelines.laue.features import FeatureMaker, FeatureSpec
from pipelines.laue.geometry import Calibration
from pipelines.laue.indexing.vote import AngleTable
from pipelines.laue.reflections import ReflectionList

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

KIND = "laue-classes"
CLASSES = "classes.npz"

_PLAUSIBLE = 0.1
"""A spot is tried as every class that has at least this probability."""

_CELL_TOLERANCE = 1e-3
"""Relative: about the strain that training covers."""


class Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Lowest and highest value."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value lies inside, ends included."""
        return self.low <= value <= self.high


class Domain(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a network of this kind was trained over.

    Attributes
    ----------
    material, space_group : str
    cell_A_deg : 6 floats
    energy_keV : (float, float)
    dd_mm, xcen_px, ycen_px, xbet_deg, xgam_deg : Interval
        xcen and ycen count from 0.
    pixel_size_mm : float
    shape : (int, int)
    crystals, spurious : Interval
    """

    material: str
    space_group: str
    cell_A_deg: tuple[float, float, float, float, float, float]
    energy_keV: tuple[float, float]
    dd_mm: Interval
    xcen_px: Interval
    ycen_px: Interval
    xbet_deg: Interval
    xgam_deg: Interval
    pixel_size_mm: float
    shape: tuple[int, int]
    crystals: Interval
    spurious: Interval

    def mismatch(
        self, material: Material, calibration: Calibration, energy_keV: tuple[float, float]
    ) -> str | None:
        """Return what lies outside, in words; None where nothing does."""
        problems = []
        if material.space_group != self.space_group or not np.allclose(
            material.cell_A_deg, self.cell_A_deg, rtol=_CELL_TOLERANCE
        ):
            problems.append(
                f"material {material.name} ({material.space_group}, {material.cell_A_deg}) is not"
                f" {self.material} ({self.space_group}, {self.cell_A_deg})"
            )
        if not np.allclose(energy_keV, self.energy_keV, rtol=1e-6):
            problems.append(f"energy_keV {tuple(energy_keV)} is not {self.energy_keV}")
        for name in ("dd_mm", "xcen_px", "ycen_px", "xbet_deg", "xgam_deg"):
            interval: Interval = getattr(self, name)
            value = getattr(calibration, name)
            if not interval.holds(value):
                problems.append(f"{name} {value:g} is outside {interval.low:g} to {interval.high:g}")
        if not math.isclose(calibration.pixel_size_mm, self.pixel_size_mm, rel_tol=1e-3):
            problems.append(f"pixel_size_mm {calibration.pixel_size_mm:g} is not {self.pixel_size_mm:g}")
        if tuple(calibration.shape) != tuple(self.shape):
            problems.append(f"detector shape {calibration.shape} is not {self.shape}")
        return "; ".join(problems) or None


@dataclass(frozen=True, eq=False)
class SpotNames:
    """What a network says about the brightest spots of a frame.

    Attributes
    ----------
    best : (n,) int32
        Most probable class; 0 is the reject class.
    probability : (n,) float32
        Of it.
    """

    best: IntArray
    probability: npt.NDArray[np.float32]


class SpotClassifier:
    """A bundle at work for one material on one detector."""

    def __init__(self, folder: Path) -> None:
        """Load and verify a bundle.

        Raises
        ------
        BundleError
            If the bundle cannot be used at all.
        """
        bundle = load_bundle(folder, KIND)
        d = bundle.description
        try:
            self.domain = msgspec.convert(d.domain, Domain)
            self.spec = FeatureSpec(**d.preparation)
            self.threshold = float(d.decision["confident"])
        except (msgspec.ValidationError, TypeError, ValueError, KeyError) as error:
            raise BundleError(f"{folder / 'bundle.json'}: {error}") from error
        self.classes = _classes(bundle.file(CLASSES), folder)
        self.model: ModelInfo = bundle.model
        self.metrics: dict[str, Any] = d.metrics
        self._maker = FeatureMaker(self.spec)
        self._engine = OnnxEngine(bundle)
        width = self._engine.run(np.zeros((1, self.spec.width), np.float32)).shape[1]
        if width != len(self.classes):
            raise BundleError(f"{folder}: the network knows {width} classes, {CLASSES} {len(self.classes)}")

    def probabilities(self, q: FloatArray, spots: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """Return calibrated probabilities (k, classes) of spots of a frame, see `FeatureMaker`."""
        return self._engine.run(self._maker.features(q, spots))

    def names(self, q: FloatArray, spots: npt.ArrayLike | None = None) -> SpotNames:
        """Return the most probable class of each spot and its probability."""
        p = self.probabilities(q, spots)
        best = p.argmax(axis=1)
        return SpotNames(best.astype(np.int32), p[np.arange(len(p)), best])


class Proposer:
    """Which hypotheses of an angle table a spot is worth trying as."""

    def __init__(self, classifier: SpotClassifier, reflections: ReflectionList, angles: AngleTable) -> None:
        self.classifier = classifier
        of_hypothesis = classifier.classes.of_reflections(reflections)[angles.hypothesis]
        self._hypotheses = [
            np.flatnonzero(of_hypothesis == c).astype(np.int32) for c in range(len(classifier.classes))
        ]
        self._hypotheses[REJECT] = np.empty(0, dtype=np.int32)

    def propose(self, q: FloatArray, count: int) -> list[IntArray]:
        """Return the hypotheses of the plausible classes of the first `count` spots of q (n, 3).

        A confident spot has one class, a doubtful one several; spots that are most likely
        spurious, or of classes beyond the angle table, have no hypotheses.
        """
        p = self.classifier.probabilities(q, np.arange(count, dtype=np.int32))
        proposed = []
        for spot in p:
            classes = np.flatnonzero(spot >= _PLAUSIBLE)
            proposed.append(
                np.concatenate([self._hypotheses[REJECT], *(self._hypotheses[c] for c in classes)])
            )
        return proposed


def _classes(content: bytes, folder: Path) -> ClassList:
    try:
        return ClassList.load(io.BytesIO(content))
    except (ValueError, OSError) as error:
        raise BundleError(f"{folder / CLASSES}: {error}") from error
