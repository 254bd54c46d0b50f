"""A network names bright spots, and thereby the few hypotheses that a search needs to try."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from grainwatch.config import EnginesTable
from grainwatch.messages import ModelInfo
from pipelines.engines.bundle import DESCRIPTION, Bundle, BundleError, load_bundle
from pipelines.engines.choice import open_engine
from pipelines.engines.engine import EngineInfo
from pipelines.engines.shipped import shipped_bundles
from pipelines.engines.tensors import Tensor, ports_of
from pipelines.frame import ModelRef
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
    dd_mm, xbet_deg, xgam_deg : Interval
    centre_x_mm, centre_y_mm : Interval
        Of (xcen, ycen) from the middle of the detector.
    width_mm, height_mm : Interval
        Of the detector.
    largest_pixel_mm : float
        Positions measured with larger pixels are less exact than any in training.
    crystals, spurious : Interval
    """

    material: str
    space_group: str
    cell_A_deg: tuple[float, float, float, float, float, float]
    energy_keV: tuple[float, float]
    dd_mm: Interval
    centre_x_mm: Interval
    centre_y_mm: Interval
    xbet_deg: Interval
    xgam_deg: Interval
    width_mm: Interval
    height_mm: Interval
    largest_pixel_mm: float
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
        pixel = calibration.pixel_size_mm
        height, width = (n * pixel for n in calibration.shape)
        centre_x, centre_y = calibration.centre_off_middle_mm
        given = {
            "dd_mm": calibration.dd_mm,
            "centre_x_mm": centre_x,
            "centre_y_mm": centre_y,
            "xbet_deg": calibration.xbet_deg,
            "xgam_deg": calibration.xgam_deg,
            "width_mm": width,
            "height_mm": height,
        }
        for name, value in given.items():
            interval: Interval = getattr(self, name)
            if not interval.holds(value):
                problems.append(f"{name} {value:g} is outside {interval.low:g} to {interval.high:g}")
        if pixel > self.largest_pixel_mm:
            problems.append(f"pixels of {pixel:g} mm are larger than {self.largest_pixel_mm:g} mm")
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

    def __init__(self, source: Path | ModelRef | Bundle, engines: EnginesTable | None = None) -> None:
        """Load a bundle, verify it and get ready what runs it.

        Parameters
        ----------
        source : Path, ModelRef or Bundle
            Its folder, the bundle as it was chosen, or the bundle.
        engines : EnginesTable, optional
            What the configuration says of backend and precision; the best by default.

        Raises
        ------
        BundleError
            If the bundle cannot be used at all, or is not the one that was chosen.
        EngineError
            If a backend is asked for that cannot be used.
        """
        bundle = _bundle(source)
        folder, d = bundle.folder, bundle.description
        try:
            self.domain = msgspec.convert(d.domain, Domain)
            self.spec = _preparation(d.preparation)
            self.threshold = _threshold(d.decision)
        except (msgspec.ValidationError, ValueError) as error:
            raise BundleError(f"{folder / DESCRIPTION}: {error}") from error
        self.classes = _classes(bundle.file(CLASSES), folder)
        self.model: ModelInfo = bundle.model
        self.metrics: dict[str, Any] = d.metrics
        self._maker = FeatureMaker(self.spec)
        self._input, width = _vector(folder, "input", ports_of(bundle).inputs)
        self._output, classes = _vector(folder, "output", ports_of(bundle).outputs)
        if width != self.spec.width:
            raise BundleError(
                f"{folder}: the network takes {width} numbers a spot, the preparation makes"
                f" {self.spec.width}; make the bundle again"
            )
        if classes != len(self.classes):
            raise BundleError(
                f"{folder}: the network knows {classes} classes, {CLASSES} {len(self.classes)};"
                " make the bundle again"
            )
        self._engine = open_engine(bundle, engines)

    @property
    def engine(self) -> EngineInfo:
        """What runs the network."""
        return self._engine.about

    def probabilities(self, q: FloatArray, spots: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """Return calibrated probabilities (k, classes) of spots of a frame, see `FeatureMaker`."""
        answer: npt.NDArray[np.float32] = self._engine.run({self._input: self._maker.features(q, spots)})[
            self._output
        ]
        return answer

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


def shipped_for(
    materials: Iterable[Material], calibration: Calibration, energy_keV: tuple[float, float]
) -> list[str]:
    """Return the names of the shipped bundles that serve these materials on this detector."""
    shipped, found = shipped_bundles(), []
    for material in materials:
        if material.name in shipped:
            described = load_bundle(shipped[material.name], KIND).description
            domain = msgspec.convert(described.domain, Domain)
            if domain.mismatch(material, calibration, energy_keV) is None:
                found.append(material.name)
    return found


def _bundle(source: Path | ModelRef | Bundle) -> Bundle:
    if isinstance(source, Bundle):
        if source.description.kind != KIND:
            raise BundleError(
                f"{source.folder}: is a bundle of kind {source.description.kind!r}, expected {KIND!r}"
            )
        return source
    if isinstance(source, ModelRef):
        return load_bundle(Path(source.folder), KIND, source.sha256)
    return load_bundle(source, KIND)


def _vector(folder: Path, kind: str, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return name and width of the only input or output, one vector of float32 a spot."""
    (name, tensor), *more = tensors.items()
    if more or tensor.dtype != np.float32 or len(tensor.shape) != 2:
        listed = ", ".join(f"{name} {tensor}" for name, tensor in tensors.items())
        raise BundleError(
            f"{folder / DESCRIPTION}: {kind}s are {listed}; a bundle of kind {KIND!r} has one, float32"
            " [batch, any number]"
        )
    return name, tensor.shape[1]


def _preparation(stated: dict[str, Any]) -> FeatureSpec:
    surplus = stated.keys() - {field.name for field in fields(FeatureSpec)}
    if surplus:  # of a later version: without it the features would be others
        raise ValueError(f"preparation has {', '.join(sorted(surplus))}, which this version does not know")
    return msgspec.convert(stated, FeatureSpec)


def _threshold(stated: dict[str, Any]) -> float:
    value = stated.get("confident")
    if not isinstance(value, float) or not 0 < value < 1:
        raise ValueError(f"decision.confident is {value}, expected a probability")
    return value


def _classes(content: bytes, folder: Path) -> ClassList:
    try:
        return ClassList.load(io.BytesIO(content))
    except (ValueError, OSError) as error:
        raise BundleError(f"{folder / CLASSES}: {error}") from error
