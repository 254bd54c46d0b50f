"""Where results go. One module an output; it registers under ``grainwatch.sinks``.

A sink module has a ``Config`` struct (a `grainwatch.config.Table`, with an `edge: EdgeTable`) and
``open_sink(config, context) -> Sink``. Every sink runs in a thread of its own behind a bounded
edge, so that a slow one delays nobody but itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from grainwatch.config import ScanTable
from grainwatch.messages import AnyMessage


@dataclass(frozen=True, slots=True)
class SinkContext:
    """What a sink may know of the daemon it serves."""

    daemon_name: str
    state_dir: Path
    config_text: str = ""
    config_hash: str = ""


@dataclass(frozen=True, slots=True)
class SeriesOpened:
    """The daemon opened a series. `started` is UTC seconds, `scan` the grid that its frames walk over."""

    stream: str
    series_uid: str
    started: float
    detector_series: str
    n_frames: int | None = None
    scan_shape: tuple[int, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    scan: ScanTable | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """A message with its final head (seq, times), and the payload that goes on the wire."""

    stream: str
    message: AnyMessage
    payload: bytes


@dataclass(frozen=True, slots=True)
class SeriesClosed:
    """All frames of a series reached their state; `counts` holds how many in each."""

    stream: str
    series_uid: str
    ended: float
    counts: Mapping[str, int]


SinkEvent: TypeAlias = SeriesOpened | Published | SeriesClosed


class Sink(Protocol):
    """Takes events in order, in its own thread."""

    def handle(self, events: list[SinkEvent]) -> None:
        """Take what has queued up since the last call (a batch, to spare system calls)."""
        ...

    def idle(self) -> None:
        """Do periodic work (flush, answer requests); called at least every 0.1 s."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...
