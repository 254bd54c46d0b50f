"""Series out of arrays: where one begins and ends, which no message of areaDetector says.

An NDArray has a number (`uniqueId`) and a time stamp. A series begins with the first array that comes, and
anew when the number starts over, when shape or type of the pixels change, and after a silence. Numbers
that were passed over are missing; numbers that come a little late, as plug-ins with several threads
deliver them, belong to the same series.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from daemon.flow.ranges import Ranges
from daemon.sources.areadetector.codec import EARLIEST, EPICS_EPOCH, Array
from daemon.sources.base import Arrival, Bad, Event, SeriesEnd, SeriesStart, Standing

log = logging.getLogger(__name__)

#: A number this far beyond the last one was set by somebody: a series begins with it.
LARGEST_GAP: Final = 1_000_000
#: A number may come so much later than those after it.
DISORDER: Final = 64
#: Series that may begin in a minute: each costs a results file.
MOST_STARTS: Final = 60
_MINUTE_S: Final = 60.0
#: The note for a restart is renewed so often while arrays come.
_NOTE_S: Final = 1.0

Form: TypeAlias = tuple[int, int, str]
"""Rows, columns and type of the pixels, without a byte order."""


@dataclass(slots=True)
class _Series:
    """The series that is under way. `last` is the highest number, `time_stamp` that of it."""

    name: str
    first: int
    last: int
    received: Ranges
    form: Form | None = None
    time_stamp: float | None = None
    complained: bool = False


class _Note(msgspec.Struct, frozen=True):
    """What a restarted daemon has to know; how far the series had come is in the accounts."""

    series: str
    first: int
    form: Form | None


class SeriesBook:
    """Puts arrays into series.

    Parameters
    ----------
    note : Path
        A file that says which series is under way; the time of the file, when the last array came.
    standing : callable
        Says how a series stands in the accounts: see `daemon.sources.base.SourceContext`.
    idle_s : float
        A silence that ends a series, 0 for none.
    n_frames : int
        So many numbers make a series, 0 where that is not known.
    time_epoch : str
        "epics", "unix", or "none": where the time stamps of the driver count from.
    """

    def __init__(
        self,
        note: Path,
        standing: Callable[[str], Standing | None],
        idle_s: float = 0.0,
        n_frames: int = 0,
        time_epoch: str = "epics",
    ) -> None:
        self._note = note
        self._standing = standing
        self._idle_s = idle_s
        self._n_frames = n_frames
        self._epoch = {"epics": EPICS_EPOCH, "unix": 0}.get(time_epoch)
        self._current: _Series | None = None
        self._before: _Series | None = None
        self._starts: deque[float] = deque(maxlen=MOST_STARTS)
        self._noted = 0.0

    def resume(self) -> list[Event]:
        """Go on with the series that an earlier run of the daemon left, or end it if it is over."""
        try:
            noted = msgspec.json.decode(self._note.read_bytes(), type=_Note)
            silent_s = time.time() - self._note.stat().st_mtime
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("%s cannot be read, a new series begins: %s", self._note, error)
            return []
        standing = self._standing(noted.series)
        if standing is None or not standing.open:
            return []
        if 0 < self._idle_s < silent_s:
            return [SeriesEnd(noted.series)]
        highest = standing.held.highest
        last = noted.first - 1 if highest is None else highest
        received = Ranges(standing.held)
        self._current = _Series(noted.series, noted.first, last, received, noted.form)
        return []

    def silent(self, for_s: float) -> list[Event]:
        """Return the end of the series if nothing came for too long."""
        if not 0 < self._idle_s < for_s:
            return []
        events = self._end()
        self._before = None
        return events

    def take(self, array: Array) -> list[Event]:
        """Return what is to be said of an array."""
        frame, image = array.frame, array.image
        if frame is None:
            return [Bad(array.reason)]
        form = (image.shape[0], image.shape[1], image.pixel_type[1:]) if image is not None else None
        events: list[Event] = []
        series = self._of(frame, array.time_stamp, form)
        if series is None:
            if self._too_many():
                return [Bad(f"array {frame}: more than {MOST_STARTS} series began within a minute")]
            events = self._end()
            series = self._begin(frame, form)
            events.append(SeriesStart(series.name, self._n_frames or None, series.first))
        series.form = series.form or form
        if frame > series.last:
            series.last, series.time_stamp = frame, array.time_stamp
        series.received.add(frame)
        self._keep_note()
        if array.complaint and not series.complained:
            series.complained = True
            events.append(Bad(array.complaint, series.name))
        if image is None:
            events.append(Bad(array.reason, series.name, frame))
        else:
            metadata = {"ndattr": array.attributes} if array.attributes else {}
            acquired = self._acquired(array.time_stamp)
            events.append(
                Arrival(series.name, frame, image, "", acquired, array.position_um, metadata=metadata)
            )
        if self._n_frames and len(series.received) >= self._n_frames:
            events += self._end()
        return events

    def _of(self, frame: int, time_stamp: float | None, form: Form | None) -> _Series | None:
        """Return the series that is under way if an array belongs to it."""
        series = self._current
        if series is None or (form is not None and series.form not in (None, form)):
            return None
        if self._n_frames and frame >= series.first + self._n_frames:
            return None
        if frame > series.last:
            return series if frame - series.last <= LARGEST_GAP else None
        if series.last - frame >= DISORDER:
            return None
        if time_stamp is not None and series.time_stamp is not None and time_stamp != series.time_stamp:
            # Taken earlier than the one with the highest number: late. Else the counter started over.
            return series if time_stamp < series.time_stamp else None
        # The last one once more, as ProcessPlugin sends it; or one that was passed over.
        again = frame == series.last
        return series if again or (series.first <= frame and frame not in series.received) else None

    def _too_many(self) -> bool:
        """Return whether no series may begin at present; note one if it may."""
        now = time.monotonic()
        if len(self._starts) == MOST_STARTS and now - self._starts[0] < _MINUTE_S:
            return True
        self._starts.append(now)
        return False

    def _begin(self, frame: int, form: Form | None) -> _Series:
        first, before, n = frame, self._before, self._n_frames
        if before is not None and n and before.first + n <= frame <= before.last + LARGEST_GAP:
            # The next so many numbers: they are a series whether its first arrays came or not.
            first -= (frame - before.first) % n if before.form == form else 0
        name = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        self._current = _Series(name, first, first - 1, Ranges(), form)
        self._write_note()
        return self._current

    def _end(self) -> list[Event]:
        series, self._current = self._current, None
        if series is None:
            return []
        self._before = series
        return [SeriesEnd(series.name)]

    def _acquired(self, time_stamp: float | None) -> float:
        """Return UTC seconds, 0 where nothing tells them."""
        if time_stamp is None or self._epoch is None or time_stamp < EARLIEST:
            return 0.0
        return time_stamp + self._epoch

    def _write_note(self) -> None:
        series = self._current
        if series is None:
            return
        try:
            part = self._note.with_suffix(".part")
            part.write_bytes(msgspec.json.encode(_Note(series.name, series.first, series.form)))
            part.replace(self._note)
        except OSError as error:
            self._give_up(error)
        else:
            self._noted = time.monotonic()

    def _keep_note(self) -> None:
        """Have the time of the note say when an array came, to a second."""
        now = time.monotonic()
        if now - self._noted < _NOTE_S:
            return
        self._noted = now
        try:
            os.utime(self._note)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Do without a note until the next series begins."""
        log.warning("%s: after a restart a new series would begin: %s", self._note, error)
        self._noted = math.inf
