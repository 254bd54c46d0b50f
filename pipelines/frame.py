"""A frame: what a source hands over and a pipeline reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from grainwatch.config import EnginesTable, ScanTable
from grainwatch.messages import AnyMessage, AnyResult, FrameKey


class BadFrame(ValueError):
    """A frame that cannot be read or analysed; the message says which and why."""


class Image(Protocol):
    """Pixels that may still be compressed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns; of a colour image rows, columns and channels."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a pixel, in native byte order."""
        ...

    def array(self) -> npt.NDArray[Any]:
        """Return the pixels [row, column(, channel)]; decompression happens here, once a call.

        Raises
        ------
        BadFrame
            If the data do not decode to `shape` and `dtype`.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlainImage:
    """Pixels that are already an array, (rows, columns) or (rows, columns, channels)."""

    pixels: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns; of a colour image rows, columns and channels."""
        return self.pixels.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a pixel."""
        return self.pixels.dtype

    def array(self) -> npt.NDArray[Any]:
        """Return the pixels."""
        return self.pixels


@dataclass(frozen=True, slots=True)
class Frame:
    """One image of one detector channel. Immutable.

    Attributes
    ----------
    key : FrameKey
        (source, series_uid, frame, channel).
    image : Image
    acquired, received : float
        UTC seconds; `acquired` is 0 where the instrument gave none.
    grid_index, position_um : tuple, optional
        Where in the scan; from the metadata or from the configured grid.
    metadata : mapping
        Exposure, detector, file name: whatever the source knows, plain values. Under "acquisition" what
        the file and those beside it say of how the image was taken, where they say it:
        `pipelines.micrograph.frame_acquisition`.
    """

    key: FrameKey
    image: Image
    acquired: float = 0.0
    received: float = 0.0
    grid_index: tuple[int, ...] | None = None
    position_um: tuple[float, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a frame could not be analysed, in words for an operator.

    `fault` says that not the frame is to blame but what computed it: a defect, or a worker that died.
    """

    key: FrameKey
    reason: str
    fault: bool = False


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model bundle as it was chosen: its folder and the sha256 of its manifest ("" for any)."""

    folder: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class StreamContext:
    """What a pipeline may know of the stream it serves.

    `scan` is that of the configuration; an aggregator is given that of its series, which the
    instrument may have brought. `models` says which bundle a name means: names that are not in it mean
    what `pipelines.engines.shipped.find_bundle` finds. `engines` says what runs them.

    A pipeline module has a ``Config`` struct and ``build(config, context) -> Pipeline``; it
    registers under ``grainwatch.pipelines``. It may also have
    ``aggregator(config, context, series_uid) -> Aggregator | None``,
    ``watch(config, context) -> Watch | None`` and ``comparer(config, context) -> Comparer``.
    """

    stream: str
    config_hash: str = ""
    scan: ScanTable | None = None
    models: Mapping[str, ModelRef] = field(default_factory=dict)
    engines: EnginesTable = field(default_factory=EnginesTable)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two results of one frame say the same: whether they do, and by how much in figures."""

    agree: bool
    figures: Mapping[str, float] = field(default_factory=dict)


#: Compares the result of a model at work with that of a model in the shadow.
Comparer: TypeAlias = Callable[[AnyMessage, AnyMessage], Agreement]


class Aggregator(Protocol):
    """Sums up a series result by result (a map): pure, one instance a series."""

    def add(self, result: AnyMessage) -> Sequence[AnyMessage]:
        """Take a result, in order of completion; return what is to be published (deltas)."""
        ...

    def finish(self) -> Sequence[AnyMessage]:
        """Return what is to be published when the series is over (a snapshot)."""
        ...


class Watch(Protocol):
    """Follows all results of a stream, over all its series (for a detector that moves): pure."""

    @property
    def text(self) -> str:
        """What it knows, in words for an operator."""
        ...

    @property
    def alarm(self) -> bool:
        """Whether it has something to complain of."""
        ...

    def same_as(self, other: Watch) -> bool:
        """Whether another one would watch for the same: then it goes on when the configuration changes."""
        ...

    def take(self, result: AnyResult) -> tuple[AnyResult, Sequence[AnyMessage]]:
        """Take a result, in order of completion, before it is published.

        Returns
        -------
        result : AnyResult
            With the flags that are due.
        messages : sequence
            What is to be published after it.
        """
        ...


class Pipeline(Protocol):
    """An analysis: pure, one instance a worker.

    `process` answers every frame, in order, by a message or by a `Failure`; it never raises for
    what is in a frame.
    """

    def warm(self) -> None:
        """Do now what the first frame would otherwise wait for."""
        ...

    def process(self, frames: Sequence[Frame]) -> list[AnyMessage | Failure]:
        """Analyse a batch of frames."""
        ...
