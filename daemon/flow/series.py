"""From what a source says to frames: series, order, gaps, and everything a detector may do wrong.

One tracker a stream, in the stream's receive thread. Each arrival is judged here and either
becomes a frame in flight or ends at once, in the ledger, with a reason for an operator.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from daemon.flow.ledger import Ledger, Series
from daemon.flow.log_limit import LogLimit
from daemon.flow.scan import GridWalk
from daemon.sinks.base import SeriesOpened
from daemon.sources.base import Arrival, Bad, Event, Exhausted, SeriesEnd, SeriesStart
from grainwatch.config import ScanTable
from grainwatch.messages import FrameKey
from pipelines.frame import Frame

log = logging.getLogger(__name__)

#: A number this far beyond the last one is garbage, not a gap, in a series of unknown length.
FARTHEST_JUMP: Final = 10_000_000
#: The same beyond the numbers that were announced, or the last one where more came than announced.
FARTHEST_OVERRUN: Final = 16
#: Channels of one series that were not announced and are taken nevertheless.
MOST_UNANNOUNCED: Final = 16
#: Series that one stream may have open at once.
MOST_OPEN: Final = 8
#: Ended series whose late images are told apart from images of unknown series.
REMEMBERED: Final = 8


@dataclass(frozen=True, slots=True)
class Taken:
    """A frame in flight. `again`: the same key may have been published before a crash."""

    frame: Frame
    received_monotonic: float
    again: bool = False


@dataclass(slots=True, eq=False)
class _Open:
    """A series that is under way."""

    series: Series
    walk: GridWalk | None
    channels: tuple[str, ...]
    forms: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)


class SeriesTracker:
    """Judges the events of one stream.

    Parameters
    ----------
    stream : str
    ledger : Ledger
    scan : ScanTable or None
        The grid that the frames of a series walk over; without it, the one that a series brings.
    open_before : list of Series
        Series of this stream that the ledger knows as open: images that go on arriving belong to
        them, although no start comes again.
    opened : callable
        Told of each series that opens or goes on.
    """

    def __init__(
        self,
        stream: str,
        ledger: Ledger,
        scan: ScanTable | None,
        open_before: list[Series],
        opened: Callable[[SeriesOpened], None],
    ) -> None:
        self.stream = stream
        self.last_error = ""
        self.last_error_at = 0.0  # monotonic
        self._complaints = LogLimit(log, stream)
        self._ledger = ledger
        self._scan = scan
        self._opened = opened
        self._open: dict[str, _Open] = {}  # by the detector's name, in order of their starts
        self._waiting: dict[str, Series] = {}
        for series in open_before:
            earlier = self._waiting.get(series.detector_series)
            if earlier is not None:  # killed between the start of the one and the end of the other
                ledger.end_series(earlier)
            self._waiting[series.detector_series] = series
        self._ended: deque[Series] = deque(maxlen=REMEMBERED)

    @property
    def series_uid(self) -> str:
        """The uid of the series that is under way (the latest of several), "" between series."""
        latest = self._latest()
        return latest.series.uid if latest else ""

    def set_scan(self, scan: ScanTable | None) -> None:
        """Have the series that start from now on walk over another grid."""
        self._scan = scan

    def take(self, event: Event) -> Taken | None:
        """Judge an event; return the frame that it brought, if it may go on."""
        match event:
            case SeriesStart():
                self._start(event)
            case Arrival():
                return self._arrival(event)
            case Bad():
                self._bad(event)
            case SeriesEnd():
                self._end(event)
            case Exhausted():
                self._close_all()
        return None

    def stop(self) -> None:
        """The daemon stops in mid-series: the series may go on after a restart."""
        for series in self._waiting.values():
            self._ledger.end_series(series, suspend=True)
        self._waiting = {}
        for current in self._open.values():
            self._ledger.end_series(current.series, suspend=True)
        self._open = {}

    # Starts and ends.

    def _start(self, start: SeriesStart) -> None:
        for current in self._in_the_way(start):
            log.warning(
                "%s: series %s starts while %s is open: closing that one",
                self.stream,
                start.detector_series,
                current.series.detector_series,
            )
            self._close(current.series)
        for series in self._waiting.values():
            self._close(series)
        self._waiting = {}
        series = self._ledger.open_series(
            self.stream,
            start.detector_series,
            start.first_frame,
            start.n_frames,
            start.channels,
            time.time(),
        )
        self._enter(series, start.channels, start.metadata, start.scan)
        expected = "" if start.n_frames is None else f", {start.n_frames} frames to come"
        log.info("%s: series %s starts (%s)%s", self.stream, start.detector_series, series.uid[:8], expected)

    def _in_the_way(self, start: SeriesStart) -> list[_Open]:
        """Return which of the open series end when this one starts."""
        if not start.beside:
            return list(self._open.values())
        same = [self._open[start.detector_series]] if start.detector_series in self._open else []
        others = [o for o in self._open.values() if o not in same]
        return same + others[: max(0, len(others) - MOST_OPEN + 1)]

    def _enter(
        self, series: Series, channels: tuple[str, ...], metadata: Any, own_scan: ScanTable | None = None
    ) -> None:
        walk = GridWalk(self._scan, series.first_frame) if self._scan else None
        scan = self._scan or own_scan
        self._open[series.detector_series] = _Open(series, walk, channels)
        self._opened(
            SeriesOpened(
                stream=self.stream,
                series_uid=series.uid,
                started=series.started,
                detector_series=series.detector_series,
                n_frames=series.n_frames,
                scan_shape=scan.shape if scan else None,
                metadata=metadata,
                scan=scan,
            )
        )

    def _end(self, end: SeriesEnd) -> None:
        current = self._open.get(end.detector_series)
        series = current.series if current else self._waiting.pop(end.detector_series, None)
        if series is None:
            log.warning("%s: series %s ends that did not start", self.stream, end.detector_series)
            return
        if end.n_frames is not None:
            series.n_frames = end.n_frames
        self._close(series)

    def _close(self, series: Series) -> None:
        self._ledger.end_series(series)
        self._ended.append(series)
        current = self._open.get(series.detector_series)
        if current is not None and current.series is series:
            del self._open[series.detector_series]
        log.info("%s: series %s ended (%s)", self.stream, series.detector_series, series.uid[:8])

    def _close_all(self) -> None:
        for current in list(self._open.values()):
            self._close(current.series)

    def _latest(self) -> _Open | None:
        opened = list(self._open.values())  # in one step: `status` asks from another thread
        return opened[-1] if opened else None

    def _find(self, detector_series: str) -> _Open | None:
        """Return the series if it is under way, or go on with one that was open before."""
        if detector_series in self._open:
            return self._open[detector_series]
        series = self._waiting.pop(detector_series, None)
        if series is None:
            return None
        self._close_all()
        log.info("%s: series %s goes on (%s)", self.stream, detector_series, series.uid[:8])
        self._enter(series, tuple(series.accounts), {})
        return self._open[detector_series]

    # Images.

    def _arrival(self, arrival: Arrival) -> Taken | None:
        now, now_monotonic = time.time(), time.monotonic()
        current = self._find(arrival.detector_series)
        if current is None:
            self._stray(arrival.detector_series, arrival.channel, arrival.frame)
            return None
        again = self._admit(current, arrival.channel, arrival.frame)
        if again is None:
            return None
        series = current.series
        key = FrameKey(self.stream, series.uid, arrival.frame, arrival.channel)
        reason = "" if arrival.mixed else self._form_error(current, arrival)
        if reason:
            self._ledger.end(key, "failed", reason)
            self._say(f"frame {arrival.frame}: {reason}")
            return None
        frame = Frame(
            key=key,
            image=arrival.image,
            acquired=arrival.acquired,
            received=now,
            grid_index=current.walk.index(arrival.frame, arrival.position_um)
            if current.walk
            else arrival.grid_index,
            position_um=arrival.position_um,
            metadata=arrival.metadata,
        )
        return Taken(frame, now_monotonic, again)

    def _admit(self, current: _Open, channel: str, frame: int) -> bool | None:
        """Note a numbered arrival of the open series; None when it may not go on, else `again`."""
        series = current.series
        reason = self._channel_error(current, channel) or _number_error(series, frame)
        if reason:
            self._ledger.beside(series, channel, None, "failed", reason)
            self._say(reason)
            return None
        known = self._ledger.whether_new(series, channel, frame)
        if known == "repeated":
            self._ledger.beside(series, channel, frame, "dropped", "repeated")
            self._say(f"frame {frame} came again: dropped")
            return None
        self._ledger.received(series, channel, frame)
        return known == "lost"

    def _channel_error(self, current: _Open, channel: str) -> str:
        """Say that a channel was not announced; from the first few of them images are taken."""
        if channel in current.channels or channel in current.said:
            return ""
        what = f"channel {channel!r} was not announced at the start of the series"
        if len(current.said) >= MOST_UNANNOUNCED:
            return what
        current.said.add(channel)
        self._say(what)
        return ""

    def _form_error(self, current: _Open, arrival: Arrival) -> str:
        """Hold an image against the first one of its channel."""
        image = arrival.image
        form = (image.shape, image.dtype.name)
        first = current.forms.setdefault(arrival.channel, form)
        if form == first:
            return ""
        ours, begun = (f"{' x '.join(map(str, shape))} {pixels}" for shape, pixels in (form, first))
        return f"image is {ours}, the series began with {begun}"

    def _stray(self, detector_series: str, channel: str, frame: int | None, reason: str = "") -> None:
        """Fail an image of a series that is not open."""
        for series in reversed(self._ended):
            if series.detector_series == detector_series:
                why = reason or f"image after the end of series {detector_series}"
                self._ledger.beside(series, channel, frame, "failed", why)
                self._say(f"frame {frame}: {why}")
                return
        why = reason or f"image of series {detector_series}, which did not start"
        self._ledger.beside(self._ledger.no_series(self.stream), channel, frame, "failed", why)
        self._say(f"frame {frame}: {why}")

    def _bad(self, bad: Bad) -> None:
        current = self._find(bad.detector_series) if bad.detector_series is not None else self._latest()
        if bad.frame is None:
            series = current.series if current else self._ledger.no_series(self.stream)
            self._ledger.beside(series, bad.channel, None, "failed", bad.reason)
            self._say(bad.reason)
        elif current is None:
            self._stray(bad.detector_series or "", bad.channel, bad.frame, bad.reason)
        else:
            # What fails a whole message fails the frame of each channel that it was to bring.
            whole = not bad.channel and "" not in current.channels
            for channel in current.channels if whole else (bad.channel,):
                self._fail(current, channel, bad.frame, bad.reason)

    def _fail(self, current: _Open, channel: str, frame: int, reason: str) -> None:
        if self._admit(current, channel, frame) is not None:
            self._ledger.end(FrameKey(self.stream, current.series.uid, frame, channel), "failed", reason)
            self._say(f"frame {frame}: {reason}")

    def _say(self, what: str) -> None:
        """Tell the operator: always in `status`, in the log when it is news."""
        news = what.split(":")[-1] != self.last_error.split(":")[-1]
        self.last_error, self.last_error_at = what, time.monotonic()
        if news:
            self._complaints.warning("%s: %s", self.stream, what)


def _number_error(series: Series, frame: int) -> str:
    """Say why a number cannot be one of the series, "" when it can."""
    first, highest = series.first_frame, series.highest()
    if series.n_frames is None:
        farthest, expected = highest + FARTHEST_JUMP, f"{first} to about {highest + 1}"
    else:
        last = first + series.n_frames - 1
        farthest, expected = max(last, highest) + FARTHEST_OVERRUN, f"{first} to {max(last, highest + 1)}"
    return "" if first <= frame <= farthest else f"number {frame} makes no sense, expected {expected}"
