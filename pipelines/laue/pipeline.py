"""The Laue pipeline of the daemon: registers as "laue" under ``grainwatch.pipelines``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from grainwatch import __version__
from grainwatch.config import ConfigError, EnginesTable, Table
from grainwatch.messages import (
    AnyMessage,
    ArrayData,
    DriftObservation,
    LaueResult,
    ModelInfo,
    Provenance,
)
from pipelines.engines.bundle import BundleError, joined
from pipelines.engines.flavours import EngineError
from pipelines.engines.shipped import find_bundle
from pipelines.files import reason
from pipelines.frame import (
    Aggregator,
    Agreement,
    BadFrame,
    Comparer,
    Failure,
    Frame,
    ModelRef,
    StreamContext,
    Watch,
)
from pipelines.laue.analysis import FrameAnalysis, LaueAnalysis, LaueSettings, read_mask
from pipelines.laue.compare import compare_crystals
from pipelines.laue.crystal import load_material
from pipelines.laue.drift_watch import DriftTable, ReferenceWatch, observation_of
from pipelines.laue.geometry import DetectorArea
from pipelines.laue.indexing.indexer import Hint
from pipelines.laue.indexing.parameters import IndexingParameters
from pipelines.laue.lauetools_files import read_det
from pipelines.laue.peaks import PeakSearch
from pipelines.laue.proposals import SpotClassifier
from pipelines.maps.aggregate import map_aggregator

CLASSICAL = ModelInfo(name="classical-indexer", version=__version__)
"""What results made without a network carry as their model."""


class Config(Table, frozen=True, kw_only=True):
    """``[streams.NAME.pipeline]`` of type "laue".

    Attributes
    ----------
    materials : list of str
        Built-in names or CIF files.
    geometry : str
        Calibration: a LaueTools .det file.
    mask : str
        Image whose non-zero pixels are dead.
    energy_keV : (float, float)
        Band of the beam on the sample.
    sample_frame : str
        "tilt40": the surface is inclined by 40 deg to the beam; "lab": the laboratory frame.
    threshold_sigma : float
        Peaks so many standard deviations above the background count.
    match_radius_px : float
        A computed spot is there when a measured one lies within this distance.
    max_strain : float
        Strain components up to this are searched for; larger ones are flagged.
    max_false_probability : float
        A crystal is reported when chance would give one as good in a frame more rarely.
    max_crystals : int
        Upper bound on the crystals of a frame.
    bundle : list of str
        Model bundles, one a material: folders, the names of those that come with grainwatch (Cu, Si,
        Ge, GaN, ZrO2), for which a version that is active in the registry stands in, or names of the
        registry. Empty for the classical search. A bundle that is made for another material or geometry
        is not used, and the results are flagged.
    reuse_neighbours : bool
        Judge the crystals of the frame before first; faster in a scan of large grains.
    map_tolerance_deg : float
        Crystals of neighbouring points closer than this are one grain.
    drift : table
        Watch whether the detector moves.
    """

    materials: tuple[str, ...]
    geometry: str
    mask: str = ""
    energy_keV: tuple[float, float] = (5.0, 22.0)
    sample_frame: str = "tilt40"
    threshold_sigma: float = 5.3
    match_radius_px: float = 2.0
    max_strain: float = 5e-3
    max_false_probability: float = 1e-5
    max_crystals: int = 24
    bundle: tuple[str, ...] = ()
    reuse_neighbours: bool = False
    map_tolerance_deg: float = 5.0
    drift: DriftTable | None = None


class LauePipeline:
    """Frame in, `LaueResult` out. Keeps nothing between frames unless `reuse_neighbours` is set."""

    def __init__(self, config: Config, context: StreamContext) -> None:
        self._config = config
        self._analysis = open_analysis(
            config, f"streams.{context.stream}.pipeline", models=context.models, engines=context.engines
        )
        self._provenance = Provenance(
            model=model_of(self._analysis),
            calibration_hash=self._analysis.calibration_hash,
            config_hash=context.config_hash,
        )
        self._reuse = config.reuse_neighbours
        self._hints: list[Hint] = []
        self._reference = _reference(config, self._analysis)

    def describe(self) -> list[str]:
        """Return what decides over the results, for ``grainwatch check-config``, a line each."""
        config, calibration = self._config, self._analysis.calibration
        rows, columns = calibration.shape
        low, high = config.energy_keV
        lines = [
            f"materials: {', '.join(config.materials)}",
            f"geometry: {calibration.label or 'camera'} of {rows} x {columns} pixels,"
            f" {calibration.dd_mm:.3f} mm from the sample ({config.geometry})",
            f"energy band: {low:g} to {high:g} keV",
            f"sample frame: {config.sample_frame}",
            f"threshold: peaks {config.threshold_sigma:g} sigma above the background",
        ]
        if config.mask:
            lines.append(f"mask: {config.mask}")
        if config.drift is not None:
            lines.append(
                f"drift watch: on {config.drift.material},"
                f" {config.drift.frames_between_false_alarms:g} frames between false alarms"
            )
        return [*lines, *self.engines(), *self._analysis.remarks]

    def engines(self) -> list[str]:
        """Return what runs each model, and why, a line each."""
        return [
            f"bundle {c.model.name} {c.model.version} ({c.model.sha256[:8]}): {c.engine}"
            for c in self._analysis.classifiers
        ]

    def warm(self) -> None:
        """Run a frame with one strong and many weak bumps through everything."""
        rows, columns = self._analysis.calibration.shape
        image = np.full((rows, columns), 10, dtype=np.uint16)
        image[rows // 2 - 1 : rows // 2 + 2, columns // 2 - 1 : columns // 2 + 2] += np.array(
            [[50, 90, 50], [90, 200, 90], [50, 90, 50]], dtype=np.uint16
        )
        self._analysis.analyse_image(image)
        grid = np.stack(np.meshgrid(np.linspace(9, columns - 9, 8), np.linspace(9, rows - 9, 8)), axis=-1)
        self._analysis.analyse_peaks(grid.reshape(-1, 2))

    def process(self, frames: Sequence[Frame]) -> list[AnyMessage | Failure]:
        """Analyse frames one by one; what is wrong with one becomes its `Failure`."""
        return [self._one(frame) for frame in frames]

    def _one(self, frame: Frame) -> AnyMessage | Failure:
        try:
            found = self._analysis.analyse_image(
                frame.image.array(), self._hints, f"frame {frame.key.frame} of {frame.key.source}"
            )
        except BadFrame as error:
            return Failure(frame.key, str(error))
        if self._reuse:
            self._hints = [Hint(c.phase, c.matrix) for c in found.indexed]
        return LaueResult(
            key=frame.key,
            provenance=self._provenance,
            n_peaks=len(found.xy_px),
            peaks=peak_array(found),
            crystals=found.crystals,
            grid_index=frame.grid_index,
            position_um=frame.position_um,
            flags=found.flags,
            drift=self._drift(found),
        )

    def _drift(self, found: FrameAnalysis) -> DriftObservation | None:
        table, analysis = self._config.drift, self._analysis
        if table is None or self._reference is None:
            return None
        return observation_of(found, analysis.calibration, analysis.phases, self._reference, table.min_spots)


def _reference(config: Config, analysis: LaueAnalysis) -> int | None:
    # Number of the phase that the drift watch follows: as it is written, or by the name it has.
    if config.drift is None:
        return None
    wanted = config.drift.material
    if wanted in config.materials:
        return config.materials.index(wanted)
    return [phase.material.name for phase in analysis.phases].index(wanted)


def peak_array(found: FrameAnalysis) -> ArrayData:
    """Pack the peak table as `LaueResult.peaks`: x, y, intensity, width."""
    peaks = found.peaks
    if peaks is None:
        table = np.column_stack([found.xy_px, np.zeros((len(found.xy_px), 2))])
    else:
        table = np.column_stack([peaks.xy_px, peaks.intensity, peaks.fwhm_px.mean(axis=1)])
    return ArrayData.of(table, "<f4")


def model_of(analysis: LaueAnalysis) -> ModelInfo:
    """Return what results carry: the network's bundle, several joined by +, or the classical indexer."""
    models = [classifier.model for classifier in analysis.classifiers]
    return joined(models) if models else CLASSICAL


def open_analysis(
    config: Config,
    where: str,
    options: Mapping[str, str] | None = None,
    models: Mapping[str, ModelRef] | None = None,
    engines: EnginesTable | None = None,
) -> LaueAnalysis:
    """Read materials, calibration and mask.

    Parameters
    ----------
    config : Config
    where : str
        Leads the errors: "streams.laue.pipeline", "index".
    options : mapping, optional
        From keys to what the errors call them instead: {"geometry": "--geometry"}.
    models : mapping, optional
        Bundles that were chosen, by the names that mean them; other names mean what `find_bundle` finds.
    engines : EnginesTable, optional
        What runs the networks; the best that works by default.

    Raises
    ------
    ConfigError
        Naming the key and what was expected.
    """

    def named(key: str) -> str:
        return f"{where}: {options[key]}" if options and key in options else f"{where}.{key}"

    def checked(key: str, error: Exception) -> ConfigError:
        return ConfigError(f"{named(key)}: {reason(error)}")

    if not config.materials:
        raise ConfigError(f"{named('materials')}: expected at least one built-in name or CIF file")
    try:
        calibration = read_det(config.geometry).calibration
    except (OSError, ValueError) as error:
        raise checked("geometry", error) from error
    try:
        materials = [load_material(name) for name in config.materials]
    except (OSError, ValueError) as error:
        raise checked("materials", error) from error
    try:
        mask = read_mask(Path(config.mask), calibration.shape) if config.mask else None
    except (OSError, ValueError) as error:
        raise checked("mask", error) from error
    try:
        classifiers = [
            SpotClassifier((models or {}).get(name) or find_bundle(name), engines) for name in config.bundle
        ]
    except (BundleError, EngineError) as error:
        raise checked("bundle", error) from error
    try:
        settings = LaueSettings(
            energy_keV=config.energy_keV,
            sample_frame=config.sample_frame,
            search=PeakSearch(threshold_sigma=config.threshold_sigma),
            indexing=IndexingParameters(
                match_radius_px=config.match_radius_px,
                max_strain=config.max_strain,
                max_false_probability=config.max_false_probability,
                max_crystals=config.max_crystals,
            ),
        )
        area = DetectorArea.of(calibration, mask)
        known = [*config.materials, *(material.name for material in materials)]
        if config.drift is not None and config.drift.material not in known:
            raise ValueError(
                f"drift.material: {config.drift.material!r} is not one of the materials that are indexed:"
                f" {', '.join(config.materials)}"
            )
        return LaueAnalysis(materials, calibration, area, settings, classifiers)
    except ValueError as error:
        # What is wrong with a setting begins with its name.
        key = str(error).partition(" ")[0].rstrip(":")
        if key.partition(".")[0] not in config.__struct_fields__:
            raise ConfigError(f"{where}: {error}") from error
        raise ConfigError(named(key) + str(error).removeprefix(key)) from error


def build(config: Config, context: StreamContext) -> LauePipeline:
    """Make the pipeline of a stream."""
    return LauePipeline(config, context)


def aggregator(config: Config, context: StreamContext, series_uid: str) -> Aggregator | None:
    """Return what draws the map of a series; None for a stream without a scan."""
    return map_aggregator(
        context, series_uid, [load_material(name) for name in config.materials], config.map_tolerance_deg
    )


def watch(config: Config, context: StreamContext) -> Watch | None:
    """Return what watches the detector of a stream; None where no reference crystal is named."""
    return None if config.drift is None else ReferenceWatch(config.drift)


def comparer(config: Config, context: StreamContext) -> Comparer:
    """Return what compares the crystals of two models."""
    materials = map(load_material, config.materials)
    groups = {material.name: material.proper_point_group for material in materials}

    def compare(live: AnyMessage, other: AnyMessage) -> Agreement:
        if not isinstance(live, LaueResult) or not isinstance(other, LaueResult):
            raise TypeError("expected two results of the Laue pipeline")
        return compare_crystals(live, other, groups)

    return compare
