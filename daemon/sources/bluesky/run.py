"""One run of Bluesky: its frames, their numbers and places, and what they wait for.

Frame numbers are bluesky's: the first event's frame is 1. Where an event brings several images, these
take a number each.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from daemon.sources.base import Arrival, Bad, Event, SeriesEnd, SeriesStart
from daemon.sources.bluesky.assets import Asset
from daemon.sources.bluesky.hdf5 import NotYet
from daemon.sources.bluesky.scan import PlanGrid, PlanWalk, number, plan_fields, plan_grid
from daemon.sources.fields import LARGEST, is_name, shown
from pipelines.frame import BadFrame, Image, PlainImage
from pipelines.micrograph.frame_acquisition import KEYS

log = logging.getLogger(__name__)

#: Events whose frame has not come, and documents of frames whose file has not: of one run.
MOST_WAITING: Final = 100_000
#: How long to leave a file alone that was not ready, seconds.
RETRY_S: Final = 0.2
#: Images of one event.
MOST_PER_EVENT: Final = 10_000
MAX_METADATA_BYTES: Final = 32 * 1024
_MOST_FRAMES: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Joined:
    """What an event says of its frame. `position` is in the motors' units, x first."""

    position: tuple[float, ...] | None
    acquired: float


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What the events of a descriptor bring.

    Attributes
    ----------
    run : Run
    image : str
        The data key with the images, "" for none.
    external : bool
        The images come by stream_datum, so an event may be without.
    fields : tuple of str
        The data keys with the coordinates, x first; empty where events do not bring all of them.
    um : tuple of (float or None)
        How many um the unit of each is; None for what is no length.
    per_event : int
        Images an event, as announced.
    pixel_type : str
        NumPy's name for the type of the pixels, "" where it was not announced.
    """

    run: Run
    image: str = ""
    external: bool = False
    fields: tuple[str, ...] = ()
    um: tuple[float | None, ...] = ()
    per_event: int = 1
    pixel_type: str = ""


@dataclass(slots=True)
class Span:
    """Frames that lie in files: those of `events` events from `seq_num` on, from image `first` on.

    `done` of their images have been taken.
    """

    descriptor: Descriptor
    asset: Asset
    first: int
    seq_num: int
    events: int
    per_event: int
    since: float
    done: int = 0


@dataclass(slots=True)
class Queue:
    """Frames of one resource, in order, so that a file is read from its front to its end."""

    spans: deque[Span] = field(default_factory=deque)
    retry_at: float = 0.0
    progress_at: float = 0.0


class Run:
    """A run that is under way.

    Parameters
    ----------
    uid : str
    start : mapping
        The start document.
    stream : str
        The event stream with the images.
    now : float
        Monotonic seconds.
    """

    def __init__(self, uid: str, start: Mapping[str, Any], stream: str, now: float) -> None:
        self.uid = uid
        self.heard_at = now
        self.stopped = False
        self.over = False
        self.grid: PlanGrid | None = plan_grid(start, stream)
        fields = plan_fields(start, stream)
        self.fields = self.grid.fields if self.grid else tuple(reversed(fields)) if len(fields) <= 3 else ()
        self.queues: dict[str, Queue] = {}
        self._start = start
        self._acquisition = _acquisition(start)
        self._walk = PlanWalk(self.grid) if self.grid else None
        self._per_event = 0
        self._events: int | None = None
        self._highest = 0
        self._joined: OrderedDict[int, Joined] = OrderedDict()

    @property
    def opened(self) -> bool:
        """Whether a series was started for it: a run without frames is none."""
        return self._per_event > 0

    @property
    def waiting(self) -> int:
        """How many documents of frames in files are waiting."""
        return sum(len(q.spans) for q in self.queues.values())

    def open(self, descriptor: Descriptor, per_event: int) -> list[Event]:
        """Start the series, if that is to be done.

        Raises
        ------
        BadFrame
            If an event brings another number of images than those before.
        """
        if per_event > MOST_PER_EVENT:
            raise BadFrame(f"event with {per_event} images, the limit is {MOST_PER_EVENT}")
        if self.opened:
            if per_event != self._per_event:
                raise BadFrame(f"event with {per_event} images, the run began with {self._per_event}")
            return []
        self._per_event = per_event
        points = self._start.get("num_points")
        n_frames = points * per_event if isinstance(points, int) else 0
        return [
            SeriesStart(
                self.uid,
                n_frames=n_frames if 0 < n_frames <= _MOST_FRAMES else None,
                first_frame=1,
                metadata=_metadata(self._start),
                scan=self.grid.table(descriptor.um or (None,) * len(self.grid.shape)) if self.grid else None,
                beside=True,
            )
        ]

    def inline(self, descriptor: Descriptor, seq_num: int, value: Any, joined: Joined) -> list[Event]:
        """Return the frames of an event that brings its images itself."""
        try:
            pixels = _pixels(value, descriptor.pixel_type)
            stack = pixels[np.newaxis] if pixels.ndim == 2 else pixels
            events = self.open(descriptor, len(stack))
        except BadFrame as error:
            return self.fail(descriptor, seq_num, str(error))
        return events + [
            self._arrival(descriptor, seq_num, i, PlainImage(image), joined) for i, image in enumerate(stack)
        ]

    def fail(self, descriptor: Descriptor, seq_num: int, reason: str) -> list[Event]:
        """Return the failure of all frames of an event."""
        events = [] if self.opened else self.open(descriptor, descriptor.per_event)
        self._highest = max(self._highest, seq_num)
        return events + [Bad(reason, self.uid, self._frame(seq_num, i)) for i in range(self._per_event)]

    def join(self, seq_num: int, joined: Joined) -> None:
        """Keep what an event says until its frame comes, or the other way round."""
        self._joined[seq_num] = joined
        if len(self._joined) > MOST_WAITING:
            self._joined.popitem(last=False)

    def await_files(self, resource: str, span: Span) -> None:
        """Put frames that lie in files at the end of the queue of their resource.

        Raises
        ------
        BadFrame
            If too many wait already.
        """
        if self.waiting >= MOST_WAITING:
            raise BadFrame(f"more than {MOST_WAITING} documents wait for their files")
        self.queues.setdefault(resource, Queue()).spans.append(span)

    def due(self, now: float, position_wait_s: float, asset_wait_s: float, most: int) -> list[Event]:
        """Return frames that can be had by now, about `most`; failed those that were waited for too long."""
        found: list[Event] = []
        for queue in self.queues.values():
            while queue.spans and now >= queue.retry_at and len(found) < most:
                events = self._next(queue, now, position_wait_s, asset_wait_s)
                if not events:
                    break
                found += events
        return found

    def stop(self, events: int | None) -> None:
        """Take note that no more documents will come; `events` is how many there were, where that is said."""
        self.stopped = True
        self._events = events

    def end(self) -> list[Event]:
        """End the series. What waits for its files now is missing."""
        self.over = True
        self.queues = {}
        self._start = {}
        self._joined.clear()
        if not self.opened:
            return []
        events = self._highest if self._events is None else self._events
        return [SeriesEnd(self.uid, events * self._per_event)]

    def _next(
        self, queue: Queue, now: float, position_wait_s: float, asset_wait_s: float
    ) -> list[Event] | None:
        """Return the next frame of a queue, None when it has to wait."""
        span = queue.spans[0]
        descriptor, per_event = span.descriptor, span.per_event
        try:
            opening = self.open(descriptor, per_event)
        except BadFrame as error:
            queue.spans.popleft()
            numbers = range(span.seq_num, span.seq_num + span.events)
            return [bad for n in numbers for bad in self.fail(descriptor, n, str(error))]
        event, image = divmod(span.done, per_event)
        seq_num = span.seq_num + event
        joined = self._joined.get(seq_num)
        if joined is None and descriptor.fields and not self.stopped and now - span.since < position_wait_s:
            return opening or None
        try:
            pixels = span.asset.image(span.first + span.done)
        except NotYet as error:
            waited_s = now - max(span.since, queue.progress_at)
            if waited_s < asset_wait_s:
                queue.retry_at = now + RETRY_S
                return opening or None
            found: Event = Bad(
                f"{error} (waited for {waited_s:.0f} s)", self.uid, self._frame(seq_num, image)
            )
        except (BadFrame, MemoryError) as error:
            found = Bad(str(error) or "image too large for memory", self.uid, self._frame(seq_num, image))
        else:
            queue.progress_at = now
            found = self._arrival(descriptor, seq_num, image, pixels, joined)
        self._highest = max(self._highest, seq_num)
        span.done += 1
        if span.done % per_event == 0:
            self._joined.pop(seq_num, None)
        if span.done == span.events * per_event:
            queue.spans.popleft()
        return [*opening, found]

    def _frame(self, seq_num: int, image: int) -> int:
        """Return the number of an image of an event."""
        return (seq_num - 1) * self._per_event + image + 1

    def _arrival(
        self,
        descriptor: Descriptor,
        seq_num: int,
        image: int,
        pixels: Image,
        joined: Joined | None,
    ) -> Arrival:
        self._highest = max(self._highest, seq_num)
        position = joined.position if joined else None
        metadata: dict[str, Any] = {"run": self.uid, "seq_num": seq_num, **self._acquisition}
        if position is not None:
            metadata["motors"] = dict(zip(descriptor.fields, position, strict=True))
        return Arrival(
            self.uid,
            self._frame(seq_num, image),
            pixels,
            acquired=joined.acquired if joined else 0.0,
            position_um=_in_um(position, descriptor.um),
            metadata=metadata,
            grid_index=self._walk.index(seq_num, position) if self._walk else None,
        )


def joined_of(descriptor: Descriptor, data: Mapping[str, Any], timestamps: Any, taken: Any) -> Joined:
    """Return what the parts of an event say of its frame."""
    values = [number(data.get(name)) for name in descriptor.fields]
    known = [v for v in values if v is not None]
    times = timestamps if isinstance(timestamps, Mapping) else {}
    acquired = number(times.get(descriptor.image))
    if acquired is None:
        acquired = number(taken)
    position = tuple(known) if known and len(known) == len(values) else None
    return Joined(position, acquired if acquired is not None and acquired > 0 else 0.0)


def _in_um(position: tuple[float, ...] | None, um: tuple[float | None, ...]) -> tuple[float, ...] | None:
    known = [f for f in um if f is not None]
    if position is None or len(known) != len(position):
        return None
    return tuple(p * f for p, f in zip(position, known, strict=True))


def _pixels(value: Any, pixel_type: str) -> npt.NDArray[Any]:
    """Return the image (rows, columns) or stack (images, rows, columns) that stands in an event.

    Raises
    ------
    BadFrame
        If it is neither.
    """
    try:
        pixels = np.asarray(value)
        if isinstance(value, list | tuple) and pixels.dtype.kind in "ui":
            # JSON says nothing about the size of numbers.
            wanted = np.dtype(pixel_type or "i4")
            limits = np.iinfo(wanted) if wanted.kind in "ui" else None
            if limits and pixels.size and (pixels.min() < limits.min or pixels.max() > limits.max):
                raise BadFrame(f"image has pixels that are no {wanted.name}")
            pixels = pixels.astype(wanted)
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, BadFrame):
            raise
        raise BadFrame(f"image {shown(value)[:60]} is no array: {str(error)[:100]}") from error
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8)
    if pixels.ndim not in (2, 3) or not pixels.size or pixels.dtype.kind not in "uif":
        raise BadFrame(f"image has {pixels.ndim} dimensions of {pixels.dtype}, expected 2 or 3 of numbers")
    if pixels.dtype.itemsize > 8:
        raise BadFrame(f"image of {pixels.dtype}, expected numbers of up to 64 bits")
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))


def _acquisition(start: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the start document says of how micrographs are taken: it goes with each frame."""
    said = ((key, start.get(key)) for key in KEYS)
    return {k: v for k, v in said if is_name(v) or (isinstance(v, int | float) and abs(v) <= LARGEST)}


def _metadata(start: Mapping[str, Any]) -> dict[str, Any]:
    """Return the start document as plain values; what is too large is left out."""
    found: dict[str, Any] = {}
    left = MAX_METADATA_BYTES
    for key, value in start.items():
        try:
            text = json.dumps(value, default=_plain, allow_nan=False, ensure_ascii=False)
            f"{key}{text}".encode()  # what is no text cannot go into files
        except (TypeError, ValueError, RecursionError):
            continue
        if len(text) + len(key) <= left:
            left -= len(text) + len(key)
            found[key] = json.loads(text)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.size <= 1000:
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain")
