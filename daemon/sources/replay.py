"""Replay of files as if a detector sent them: one series a run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from daemon.sources.base import Arrival, Bad, Event, Exhausted, Idle, SeriesEnd, SeriesStart
from grainwatch.config import ConfigError, Table
from pipelines.files import FileImage, expand, open_images
from pipelines.frame import BadFrame, PlainImage
from pipelines.micrograph.frame_acquisition import file_metadata

_IDLE_S: Final = 0.1


class Config(Table, frozen=True, kw_only=True):
    """``[streams.NAME.source]`` of type "replay".

    Attributes
    ----------
    files : list of str
        Image files, folders, patterns, or ``file.h5::/path/of/dataset``.
    rate_hz : float
        Frames a second; 0 reads as fast as the frames are taken.
    repeat : int
        How often to go through the files, 0 for ever; the numbers go on.
    mixed : bool
        Images may differ in size and type, as micrographs do; otherwise those fail that are not like the
        first.
    """

    files: tuple[str, ...]
    rate_hz: float = 0.0
    repeat: int = 1
    mixed: bool = False

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files: expected at least one file, folder or pattern")
        if self.rate_hz < 0:
            raise ValueError(f"rate_hz: expected 0 (no limit) or more, got {self.rate_hz}")
        if self.repeat < 0:
            raise ValueError(f"repeat: expected 0 (for ever) or more, got {self.repeat}")


def open_source(config: Config, stream: str) -> ReplaySource:
    """Find the files.

    Raises
    ------
    ConfigError
        If a folder or pattern gives no file.
    """
    try:
        return ReplaySource(config, expand(config.files))
    except BadFrame as error:
        raise ConfigError(f"streams.{stream}.source.files: {error}") from error


class ReplaySource:
    """Implements `daemon.sources.base.Source`.

    A file that cannot be read is a `Bad` frame that names it; it takes one number. An image of
    another size is passed on as it is: the daemon judges it.
    """

    def __init__(self, config: Config, files: list[str]) -> None:
        self._config = config
        self._files = files
        self._closed = False
        self._due = 0.0

    def events(self) -> Iterator[Event]:
        """Yield the series, then `Exhausted`, then `Idle` until the source is closed."""
        series = f"replay/{self._files[0]}/{time.time_ns()}"
        yield SeriesStart(series, metadata={"files": list(self._files)})
        self._due = time.monotonic()
        numbers = itertools.count()
        turns = itertools.count() if self._config.repeat == 0 else range(self._config.repeat)
        for _ in turns:
            for file in self._files:
                for item in _images(file):
                    yield from self._wait()
                    if self._closed:
                        return
                    frame = next(numbers)
                    if isinstance(item, FileImage):
                        metadata = {**item.metadata, "label": item.label}
                        image, mixed = PlainImage(item.pixels), self._config.mixed
                        yield Arrival(series, frame, image, metadata=metadata, mixed=mixed)
                    else:
                        yield Bad(str(item), series, frame)
        yield SeriesEnd(series)
        yield Exhausted()
        while not self._closed:
            time.sleep(_IDLE_S)
            yield Idle()

    def describe(self) -> str:
        """Say what it reads."""
        more = f" and {len(self._files) - 1} more" if len(self._files) > 1 else ""
        return f"replay of {self._files[0]}{more}"

    def close(self) -> None:
        """Stop at the next frame."""
        self._closed = True

    def _wait(self) -> Iterator[Idle]:
        """Wait until the next frame is due."""
        if not self._config.rate_hz:
            return
        while not self._closed and (left := self._due - time.monotonic()) > 0:
            time.sleep(min(left, _IDLE_S))
            yield Idle()
        # Late frames are not made up for in a burst.
        self._due = max(self._due + 1 / self._config.rate_hz, time.monotonic())


def _images(file: str) -> Iterator[FileImage | BadFrame]:
    """Yield the images of a file, and at its end the error that cut it short."""
    said: dict[str, Any] | None = None
    try:
        for image in open_images(file, colour=True):
            said = file_metadata(image.metadata["file"]) if said is None else said
            yield replace(image, metadata={**image.metadata, **said})
    except BadFrame as error:
        yield error
