"""What changes from one image message of Stream V2 to the next: a few numbers and the pixels.

The images of a series say the same but for their number, their times and their blobs, so a message
need not be taken apart item by item again. A `Template` is made of an image that was decoded
thoroughly. It holds the bytes between the changing items; a message that has exactly these bytes in
these places is of the same structure, whatever stands in the gaps, because CBOR (RFC 8949 §3) is
read from the front and each gap is one whole item: a number or a byte string.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from daemon.sources.base import Arrival, Event
from daemon.sources.fields import LARGEST
from pipelines.frame import BadFrame
from pipelines.images import EncodedImage

_TIMES: Final = ("start_time", "stop_time", "real_time")
_WIDTHS: Final = (*range(24), 1, 2, 4, 8)
_LONGEST_HEAD: Final = 9

Name = Literal["image_id", "start_time", "stop_time", "real_time", "blob"]


@dataclass(frozen=True, slots=True)
class _Gap:
    """An item that changes: bytes `head` to `end` of the message, its head included."""

    name: Name
    head: int
    end: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes up to a blob: what stays, in pieces, with a number behind each but the last."""

    pieces: tuple[bytes, ...]
    names: tuple[Name, ...]
    longest: int


@dataclass(frozen=True, slots=True)
class _Channel:
    """What an image of a channel is, but for its pixels."""

    name: str
    form: tuple[tuple[int, ...], str, str, str, int, int]

    @classmethod
    def of(cls, arrival: Arrival) -> _Channel:
        image = arrival.image
        if not isinstance(image, EncodedImage):
            raise NotUsual
        form = image.shape, image.pixel_type, image.algorithm, image.order, image.element_bytes
        return cls(arrival.channel, (*form, image.max_bytes))


class NotUsual(ValueError):
    """A message that no template can be made of."""


class Template:
    """Reads messages that differ from the one it was made of in numbers and pixels only.

    Parameters
    ----------
    message : memoryview
    arrivals : sequence of Arrival
        What the thorough decoder made of it, one a channel.
    began : float or None
        UTC seconds that its times count from, None where it has no date.

    Raises
    ------
    NotUsual
        If none can be made of it.
    """

    def __init__(self, message: memoryview, arrivals: Sequence[Arrival], began: float | None) -> None:
        gaps, self._denominators = _gaps(message)
        self._runs, self._rest = _runs(message, gaps)
        self._began = began
        self._series = arrivals[0].detector_series
        self._position = arrivals[0].position_um
        self._metadata = arrivals[0].metadata
        self._channels = [_Channel.of(arrival) for arrival in arrivals]
        if len(self._runs) != len(self._channels):
            raise NotUsual

    def read(self, message: memoryview) -> list[Event] | None:
        """Return what the thorough decoder would, or None for a message of another structure."""
        numbers: dict[str, int] = {}
        blobs = []
        at = 0
        try:
            for run in self._runs:
                head = bytes(message[at : at + run.longest])
                here = 0
                for piece, name in zip(run.pieces, run.names, strict=True):
                    if not head.startswith(piece, here):
                        return None
                    here += len(piece)
                    first = head[here]
                    width = _WIDTHS[first & 0x1F]
                    here += 1
                    if first >> 5 != (2 if name == "blob" else 0):
                        return None
                    if first & 0x1F < 24:
                        value = width
                    else:
                        value = int.from_bytes(head[here : here + width], "big")
                        here += width
                    numbers[name] = value
                at += here
                blobs.append(message[at : at + value])
                at += value
        except IndexError:  # it breaks off, or has a length of no definite size
            return None
        if at > message.nbytes or message[at:] != self._rest or numbers["image_id"] > LARGEST:
            return None
        return self._events(numbers, blobs)

    def _events(self, numbers: dict[str, int], blobs: list[memoryview]) -> list[Event] | None:
        over = self._denominators
        acquired = 0.0
        if self._began is not None and "start_time" in over:
            acquired = self._began + numbers["start_time"] / over["start_time"]
        metadata: dict[str, Any] = dict(self._metadata)
        if "real_time" in over:
            metadata["real_time_s"] = numbers["real_time"] / over["real_time"]
        frame = numbers["image_id"]
        try:
            return [
                Arrival(
                    self._series,
                    frame,
                    EncodedImage(blob, *channel.form),
                    channel.name,
                    acquired,
                    self._position,
                    metadata,
                )
                for channel, blob in zip(self._channels, blobs, strict=True)
            ]
        except BadFrame:
            return None


def _runs(message: memoryview, gaps: list[_Gap]) -> tuple[list[_Run], bytes]:
    """Return what stands between the gaps, and what is behind the last one."""
    runs, pieces, names = [], [], []
    at = 0
    for gap in gaps:
        pieces.append(bytes(message[at : gap.head]))
        names.append(gap.name)
        at = gap.end
        if gap.name == "blob":
            longest = sum(map(len, pieces)) + _LONGEST_HEAD * len(pieces)
            runs.append(_Run(tuple(pieces), tuple(names), longest))
            pieces, names = [], []
    if names:  # a number behind the pixels
        raise NotUsual
    return runs, bytes(message[at:])


def _gaps(message: memoryview) -> tuple[list[_Gap], dict[str, int]]:
    """Return the items that change, in order, and the denominators of the times."""
    gaps: list[_Gap] = []
    denominators: dict[str, int] = {}
    major, pairs, at = _head(message, 0)
    if major != 5:
        raise NotUsual
    for _ in range(pairs):
        key, at = _text(message, at)
        major, value, inner = _head(message, at)
        end = _end(message, at)
        if key == "image_id":
            gaps.append(_Gap("image_id", at, end))
        elif key in _TIMES:
            numerator, _, behind = _head(message, inner)
            denominator_major, denominator, _ = _head(message, behind)
            if (major, value, numerator, denominator_major) != (4, 2, 0, 0) or not denominator:
                raise NotUsual
            name: Name = "start_time" if key == "start_time" else "stop_time"
            gaps.append(_Gap("real_time" if key == "real_time" else name, inner, behind))
            denominators[key] = denominator
        elif key == "data":
            gaps += _blobs(message, inner, value)
        at = end
    if [gap.name for gap in gaps].count("image_id") != 1:
        raise NotUsual
    return gaps, denominators


def _blobs(message: memoryview, at: int, channels: int) -> Iterator[_Gap]:
    """Yield the last item of each channel, which is its byte string."""
    for _ in range(channels):
        _, at = _text(message, at)
        end = _end(message, at)
        while at < end:
            major, value, inner = _head(message, at)
            behind = inner + value if major in (2, 3) else inner
            if behind == end and major == 2:
                yield _Gap("blob", at, end)
            at = behind


def _end(message: memoryview, at: int) -> int:
    """Return where an item ends, with all that is in it."""
    items = 1
    while items:
        major, value, at = _head(message, at)
        items -= 1
        if major in (2, 3):
            at += value
        elif major in (4, 5):
            items += value * (major - 3)
        elif major == 6:
            items += 1
    return at


def _text(message: memoryview, at: int) -> tuple[str, int]:
    major, length, at = _head(message, at)
    if major != 3:
        raise NotUsual
    return str(message[at : at + length], "utf-8"), at + length


def _head(message: memoryview, at: int) -> tuple[int, int, int]:
    """Return major type, argument, and where what follows begins."""
    if at >= message.nbytes or message[at] & 0x1F >= len(_WIDTHS):
        raise NotUsual
    major, info = message[at] >> 5, message[at] & 0x1F
    if info < 24:
        return major, info, at + 1
    behind = at + 1 + _WIDTHS[info]
    return major, int.from_bytes(message[at + 1 : behind], "big"), behind
