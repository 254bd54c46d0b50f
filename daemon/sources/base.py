"""What a source tells the flow. One module a wire format; it registers under ``grainwatch.sources``.

A source module has a ``Config`` struct (a `grainwatch.config.Table`) and
``open_source(config, stream) -> Source``. A source knows the instrument's numbers only; the
daemon gives each series its uid, judges order and gaps, and keeps the accounts.

Two things are optional. ``open_source(config, stream, context)`` is given a `SourceContext` as well: for
a source that can fetch again what a crash lost. A source with a property ``problem`` (str) says in it
what keeps it from its work at present, "" if nothing: `status` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from daemon.flow.ranges import Ranges
from grainwatch.config import ScanTable
from pipelines.frame import Image


@dataclass(frozen=True, slots=True)
class SeriesStart:
    """A series begins.

    `detector_series` is what the instrument calls it (number and unique id in one string).
    `first_frame` is the number its frames start from; `n_frames` how many *numbers* will come
    (None: unknown). `channels` are the names of the images in each message, ("",) for one.

    `scan` is the grid that the instrument says it walks over; the arrivals then carry their
    `grid_index`. A scan in the configuration outranks it. `beside` leaves other series of the stream
    open, for an instrument that runs several at once; without it a start ends what is open.
    """

    detector_series: str
    n_frames: int | None = None
    first_frame: int = 0
    channels: tuple[str, ...] = ("",)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    scan: ScanTable | None = None
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """One image of one channel. `position_um` and `metadata` when the message carries them.

    `grid_index` is its place in the `scan` that its series started with. `mixed`: shape and type of its
    pixels may differ from those of the other images of the series, as those of pictures do.
    """

    detector_series: str
    frame: int
    image: Image
    channel: str = ""
    acquired: float = 0.0
    position_um: tuple[float, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    grid_index: tuple[int, ...] | None = None
    mixed: bool = False


@dataclass(frozen=True, slots=True)
class Bad:
    """A message that arrived and cannot be used.

    With `frame` (and `detector_series`) it fails that frame, in all channels unless `channel` names
    one; without, it is counted as a failed message of the stream. `reason` is written for an operator.
    """

    reason: str
    detector_series: str | None = None
    frame: int | None = None
    channel: str = ""


@dataclass(frozen=True, slots=True)
class SeriesEnd:
    """A series is over; frames that did not come by now are missing.

    `n_frames` is how many numbers there were in fact, where the instrument says so only at the end: a
    scan that was aborted has none missing of those that it did not reach.
    """

    detector_series: str
    n_frames: int | None = None


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing came for a moment: lets the caller look at its stop flag."""


@dataclass(frozen=True, slots=True)
class Exhausted:
    """The source has no more to give (a replay that came to its end)."""


Event: TypeAlias = SeriesStart | Arrival | Bad | SeriesEnd | Idle | Exhausted


@dataclass(frozen=True, slots=True)
class Standing:
    """How a series stands in the accounts.

    `open`: images that come now may belong to it. `held`: the numbers that need not come again, which
    are those that were received, except those that a crash lost.
    """

    open: bool
    held: Ranges


def _nothing_known(detector_series: str) -> Standing | None:
    return None


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What a source may know of its daemon, so that it can go on after a restart.

    Attributes
    ----------
    state_dir : Path
        Where it may keep a file of its own, with the name of the stream in the file's name.
    standing : callable
        Says how the latest series of a `detector_series` stands at present, also one that ended; None
        where the accounts know none. Images of one that is open may go on without a `SeriesStart`,
        after a restart of the daemon too. It reads the ledger's file: to be asked when a series begins, not
        for each image.
    """

    state_dir: Path
    standing: Callable[[str], Standing | None] = _nothing_known


class Source(Protocol):
    """A stream of events. Runs in a thread of its own; `events` yields `Idle` at least every 0.2 s."""

    def events(self) -> Iterator[Event]:
        """Yield what arrives until the source is closed or exhausted."""
        ...

    def describe(self) -> str:
        """Say in a few words what it listens to, for the log and `status`."""
        ...

    def close(self) -> None:
        """Release sockets and files. Called from the thread that iterated `events`."""
        ...
