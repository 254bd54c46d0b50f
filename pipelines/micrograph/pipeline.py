"""The micrograph pipeline of the daemon: registers as "micrograph" under ``grainwatch.pipelines``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from grainwatch import __version__
from grainwatch.config import ConfigError, EnginesTable, Table
from grainwatch.messages import (
    AnyMessage,
    ArrayData,
    FrameKey,
    MicrographResult,
    ModelInfo,
    Provenance,
)
from pipelines.engines.bundle import BundleError, joined
from pipelines.engines.flavours import EngineError
from pipelines.engines.shipped import find_bundle
from pipelines.files import reason
from pipelines.frame import Agreement, BadFrame, Comparer, Failure, Frame, ModelRef, StreamContext, Watch
from pipelines.micrograph.acquisition import Acquisition
from pipelines.micrograph.analysis import ImageAnalysis, MicrographAnalysis, MicrographSettings
from pipelines.micrograph.compare import compare_micrographs
from pipelines.micrograph.frame_acquisition import AcquisitionTable, acquisition_of
from pipelines.micrograph.model_bundle import ALARM_COMPONENTS, read_parts
from pipelines.micrograph.networks import MicrographModel, open_bundle
from pipelines.micrograph.stream_watch import DriftTable, LearntStart, StreamWatch

CLASSICAL = ModelInfo(name="classical-morphology", version=__version__)
"""What results made without a network carry as their model."""

_MOST_NEIGHBOURS = 100


class Config(Table, frozen=True, kw_only=True):
    """``[streams.NAME.pipeline]`` of type "micrograph".

    Attributes
    ----------
    bundle : list of str
        Model bundles: folders, the names of those that come with grainwatch, for which a version that is
        active in the registry stands in, or names of the registry. The first one decides how images are
        prepared, and about novelty, process condition and neighbours; of the others the results have the
        fingerprints. Empty for morphology only.
    phase : str
        "bright" or "dark": the phase that is measured. "" for the one that the first bundle names, the
        bright one without a bundle.
    paper_compat : bool
        Count grains and threshold patches as the program of Noguchi & Inoue does, with its bias: for
        comparison with their tables.
    max_patches : int
        Patches of an image that networks look at, spread evenly over it; an image with more is flagged.
    posterior_patches : int
        Of these, whose codes are weighed under each process condition: that takes most of the time.
    neighbours : int
        Earlier images of the stream that a result names because they look alike; 0 for none.
    acquisition : table
        How images are taken, where neither file nor stream says it.
    drift : table
        Watch whether the images change.
    """

    bundle: tuple[str, ...] = ()
    phase: Literal["", "bright", "dark"] = ""
    paper_compat: bool = False
    max_patches: int = 64
    posterior_patches: int = 16
    neighbours: int = 5
    acquisition: AcquisitionTable = AcquisitionTable()
    drift: DriftTable = DriftTable()

    def __post_init__(self) -> None:
        self.settings()  # refuses what is wrong
        if not 0 <= self.neighbours <= _MOST_NEIGHBOURS:
            raise ValueError(f"neighbours: expected 0 to {_MOST_NEIGHBOURS}, got {self.neighbours}")

    def settings(self) -> MicrographSettings:
        """Return what the analysis is told."""
        return MicrographSettings(
            phase=self.phase or None,
            paper_compat=self.paper_compat,
            max_patches=self.max_patches,
            posterior_patches=self.posterior_patches,
        )


class MicrographPipeline:
    """Frame in, `MicrographResult` out. Keeps nothing between frames."""

    def __init__(self, config: Config, context: StreamContext) -> None:
        self._config = config
        self._analysis = open_analysis(
            config, f"streams.{context.stream}.pipeline", context.models, context.engines
        )
        self._provenance = Provenance(model=model_of(self._analysis), config_hash=context.config_hash)

    def describe(self) -> list[str]:
        """Return what decides over the results, for ``grainwatch check-config``, a line each."""
        config, analysis = self._config, self._analysis
        size = config.acquisition.pixel_size_um
        lines = [
            f"phase: {analysis.phase}{', counted as the paper does' if config.paper_compat else ''}",
            f"pixel size where nobody says it: {'unknown' if size is None else f'{size:g} um'}",
        ]
        if analysis.models:
            lines.append(
                f"patches: {config.max_patches} an image at most, {config.posterior_patches} of them for the"
                " process condition"
            )
        for model in analysis.models:
            parts = model.parts
            judged = [
                *(["novelty"] if parts.novelty is not None else []),
                *([parts.posterior.quantity] if parts.posterior is not None else []),
            ]
            lines.append(
                f"bundle {model.model.name}: patches of {model.patch_px} px, judges"
                f" {' and '.join(judged) or 'nothing'}"
            )
            if parts.novelty is not None and not parts.novelty.held_out.by_source:
                lines.append(
                    f"bundle {model.model.name}: calibrated on too few specimens: of a new one, more than"
                    f" {parts.novelty.level:.0%} of the images may be called novel"
                )
            if parts.posterior is not None and parts.posterior.few_sources:
                lines.append(
                    f"bundle {model.model.name}: {parts.posterior.quantity} calibrated on too few specimens"
                    f" ({parts.posterior.sources}): of a new one, it may be surer than it is right"
                )
        if config.drift.on:
            lines.append(
                f"drift alarm: {config.drift.images_between_false_alarms:g} images between false alarms"
            )
        return [*lines, *self.engines()]

    def engines(self) -> list[str]:
        """Return what runs each network, and why, a line each."""
        return [
            f"bundle {' '.join(filter(None, (m.model.name, m.model.version, part)))}"
            f" ({m.model.sha256[:8]}): {info}"
            for m in self._analysis.models
            for part, info in m.engines.items()
        ]

    def warm(self) -> None:
        """Run an image of stripes through everything, in 8 bits and in 16."""
        side = 2 * max([128, *(model.patch_px for model in self._analysis.models)])
        stripes = np.where(np.arange(side) // 16 % 2 == 0, 60, 180)
        image = (stripes[:, None] + stripes[None, :] // 4).astype(np.uint8)
        for pixels in (image, image.astype(np.uint16) * np.uint16(200)):
            self._analysis.analyse(pixels, Acquisition(data_bar_px=0))

    def process(self, frames: Sequence[Frame]) -> list[AnyMessage | Failure]:
        """Analyse frames one by one; what is wrong with one becomes its `Failure`."""
        return [self._one(frame) for frame in frames]

    def _one(self, frame: Frame) -> AnyMessage | Failure:
        try:
            acquisition = acquisition_of(frame, self._config.acquisition)
            found = self._analysis.analyse(frame.image.array(), acquisition)
        except BadFrame as error:
            return Failure(frame.key, str(error))
        result = result_of(found, frame.key, self._provenance)
        return msgspec.structs.replace(result, grid_index=frame.grid_index, position_um=frame.position_um)


def result_of(found: ImageAnalysis, key: FrameKey, provenance: Provenance) -> MicrographResult:
    """Return what was found as a message."""
    taken = found.acquisition
    return MicrographResult(
        key=key,
        provenance=provenance,
        shape_px=found.shape_px,
        data_bar_px=found.prepared.data_bar_px,
        pixel_size_um=taken.pixel_size_um,
        instrument=" ".join(filter(None, (taken.vendor, taken.instrument, taken.detector))),
        statistics=found.statistics,
        patches=found.patches,
        fingerprints=found.fingerprints,
        morphology=found.morphology,
        posterior=found.posterior,
        novelty=found.novelty,
        flags=found.flags,
        remarks=found.remarks,
    )


def model_of(analysis: MicrographAnalysis) -> ModelInfo:
    """Return what results carry: the bundle, several joined by +, or the classical way."""
    models = [one.model for one in analysis.models]
    return joined(models) if models else CLASSICAL


def open_analysis(
    config: Config,
    where: str,
    models: Mapping[str, ModelRef] | None = None,
    engines: EnginesTable | None = None,
    named: str = "",
) -> MicrographAnalysis:
    """Read the bundles.

    Parameters
    ----------
    config : Config
    where : str
        Leads the errors: "streams.sem.pipeline", "fingerprint".
    models : mapping, optional
        Bundles that were chosen, by the names that mean them; other names mean what `find_bundle` finds.
    engines : EnginesTable, optional
        What runs the networks; the best that works by default.
    named : str
        What the errors call the key ``bundle``, if not so.

    Raises
    ------
    ConfigError
        Naming the key and what was expected.
    """
    key = f"{where}: {named}" if named else f"{where}.bundle"
    try:
        opened = [
            MicrographModel((models or {}).get(name) or find_bundle(name), engines) for name in config.bundle
        ]
    except (BundleError, EngineError) as error:
        raise ConfigError(f"{key}: {reason(error)}") from error
    names = [model.model.sha256 for model in opened]
    if len(set(names)) < len(names):
        raise ConfigError(f"{key}: a bundle is named twice")
    return MicrographAnalysis(opened, config.settings())


def build(config: Config, context: StreamContext) -> MicrographPipeline:
    """Make the pipeline of a stream."""
    return MicrographPipeline(config, context)


def watch(config: Config, context: StreamContext) -> Watch | None:
    """Return what follows the images of a stream; None where it has nothing to do."""
    if not config.drift.on and not config.neighbours:
        return None
    learnt, followed = None, ALARM_COMPONENTS[:-2]
    if config.drift.on and config.bundle:
        learnt, followed = _known(config, context)
    measured = (config.phase, config.paper_compat)
    return StreamWatch(config.drift, config.neighbours, learnt, measured, followed=followed)


def _known(config: Config, context: StreamContext) -> tuple[LearntStart | None, tuple[str, ...]]:
    """Return what the first bundle lets the alarm begin with, if asked for, and what it lets it follow."""
    name = config.bundle[0]
    try:
        bundle = open_bundle(context.models.get(name) or find_bundle(name))
        parts = read_parts(bundle)
    except BundleError:
        return None, ALARM_COMPONENTS  # building the pipeline says it, or the registry has the model
    left_out = 2 if parts.novelty is None else 1 if parts.novelty.code_space is None else 0
    followed = ALARM_COMPONENTS[: len(ALARM_COMPONENTS) - left_out]
    if config.drift.start != "model" or parts.alarm_values is None:
        return None, followed
    return LearntStart(bundle.sha256, parts.alarm_names, ArrayData.of(parts.alarm_values)), followed


def comparer(config: Config, context: StreamContext) -> Comparer:
    """Return what compares what two models conclude."""

    def compare(live: AnyMessage, other: AnyMessage) -> Agreement:
        if not isinstance(live, MicrographResult) or not isinstance(other, MicrographResult):
            raise TypeError("expected two results of the micrograph pipeline")
        return compare_micrographs(live, other)

    return compare
