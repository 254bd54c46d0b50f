"""A pipeline that says, as flags, how each micrograph was taken and what is odd about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grainwatch.config import Table
from grainwatch.messages import AnyMessage, ArrayData, LaueResult, ModelInfo, Provenance
from pipelines.frame import BadFrame, Failure, Frame, StreamContext
from pipelines.micrograph.frame_acquisition import AcquisitionTable, acquisition_of
from pipelines.micrograph.preparation import PreparationParameters, prepare


class Config(Table, frozen=True, kw_only=True):
    acquisition: AcquisitionTable = AcquisitionTable()


class MicrographPipeline:
    """Prepares images; `n_peaks` is the size of a pixel in pm, 0 where nobody knows it."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def warm(self) -> None:
        self.prepared(np.zeros((64, 64), np.uint8))

    def prepared(self, pixels: np.ndarray) -> tuple[str, ...]:
        return prepare(pixels, PreparationParameters(patch_px=32)).flags

    def process(self, frames: Sequence[Frame]) -> list[AnyMessage | Failure]:
        return [self.one(frame) for frame in frames]

    def one(self, frame: Frame) -> AnyMessage | Failure:
        found = acquisition_of(frame, self.config.acquisition)
        try:
            prepared = prepare(frame.image.array(), PreparationParameters(patch_px=32), found)
        except BadFrame as error:
            return Failure(frame.key, str(error))
        return LaueResult(
            key=frame.key,
            provenance=Provenance(ModelInfo("micrographs", "1")),
            n_peaks=round(1e6 * (found.pixel_size_um or 0.0)),
            peaks=ArrayData.of(np.zeros((0, 4)), "<f4"),
            flags=(
                *found.flags,
                *prepared.flags,
                f"bar {prepared.data_bar_px}",
                found.vendor,
                found.detector,
            ),
        )


def build(config: Config, context: StreamContext) -> MicrographPipeline:
    return MicrographPipeline(config)
