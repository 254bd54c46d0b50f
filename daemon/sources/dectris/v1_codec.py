"""DECTRIS Stream V1 messages: parts to events, without sockets.

A message has several parts, JSON and binary. A header (``dheader-1.0``) opens a series; by its
`header_detail` it brings the configuration ("basic"), and flat field, pixel mask and count rate
table beside it ("all"). An image has four parts: which one it is (``dimage-1.0``), shape and
encoding (``dimage_d-1.0``), the blob, and the times (``dconfig-1.0``). ``dseries_end-1.0`` ends the
series. Headers and images may have one part more, the appendix that the user gave the detector.
Shapes are [x, y], which is columns and rows.

Every claim of a message is checked before it costs memory or time. What is broken becomes a `Bad`
that names the reason, and the frame where the message still said which one it was. A header that
says which series begins opens it, whatever is wrong with the rest: its images can be read without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec

from daemon.sources.base import Arrival, Bad, Event, SeriesEnd, SeriesStart
from daemon.sources.dectris.v1_header import HEADER, PIXEL_TYPES, Date, Header, array_shape, pixel_type
from daemon.sources.fields import LARGEST, need, position_um, shown, whole
from daemon.sources.json_parts import Part, appendix, json_object
from pipelines.frame import BadFrame
from pipelines.images import MAX_IMAGE_BYTES, EncodedImage

IMAGE: Final = "dimage-1.0"
IMAGE_DATA: Final = "dimage_d-1.0"
TIMES: Final = "dconfig-1.0"
END: Final = "dseries_end-1.0"
#: Pixels: "bs16-lz4<" and so on say how they are packed, and < or > the byte order.
PACKINGS: Final[Mapping[str, tuple[str, int]]] = {
    "": ("none", 0),
    "lz4": ("lz4-block", 0),
    "bs8-lz4": ("bslz4", 1),
    "bs16-lz4": ("bslz4", 2),
    "bs32-lz4": ("bslz4", 4),
}
#: Nanoseconds since 1970 from here on (2001); a number below counts from the start of the series.
ABSOLUTE_NS: Final = 10**18
NS: Final = 10**9  # a whole number: the quotient of two is exact to the last bit

_Whole = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
_Pixels = Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]
_Nanoseconds = Annotated[int, msgspec.Meta(ge=-LARGEST, le=LARGEST)]


class Decoder:
    """Reads the messages of one stream.

    The times of an image count from the date that the header of its series gave, so this is kept.

    Parameters
    ----------
    max_image_bytes : int
        Limit on the pixels of one image and on the pixel mask of a header.
    """

    def __init__(self, max_image_bytes: int = MAX_IMAGE_BYTES) -> None:
        self._max_image_bytes = max_image_bytes
        self._date: Date | None = None

    def decode(self, parts: Sequence[Part]) -> list[Event]:
        """Read one message.

        Parameters
        ----------
        parts : sequence of bytes-like
            All parts as they came. Pixels are not copied.

        Returns
        -------
        list of Event
            What cannot be used is a `Bad` with the reason, and with series and frame when these could
            be read. Nothing is raised.
        """
        series: str | None = None
        frame: int | None = None
        try:
            usual = self._usual_image(parts)
            if usual is not None:
                return [usual]
            if not parts:
                raise BadFrame("message without parts")
            first = json_object(parts[0], "first part")
            series, frame = identity(first)
            kind = need(first, "htype", "first part")
            if kind == HEADER:
                return self._header(first, parts)
            if kind == IMAGE:
                return [self._image(first, parts)]
            if kind == END:
                return _end(first, parts)
            raise BadFrame(f"htype {shown(kind)} is unknown, expected {HEADER}, {IMAGE} or {END}")
        except BadFrame as error:
            return [Bad(str(error), series, frame)]

    def _usual_image(self, parts: Sequence[Part]) -> Arrival | None:
        """Return an image as detectors send them; None leaves all else to those who say what is wrong."""
        if not 4 <= len(parts) <= 5:
            return None
        try:
            which = _WHICH.decode(parts[0])
            said = _SAID.decode(parts[1])
            times = _TIMES.decode(parts[3])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        packing = PACKINGS.get(said.encoding[:-1])
        order = said.encoding[-1:]
        data = memoryview(parts[2])
        if packing is None or order not in ("<", ">") or said.size not in (None, data.nbytes):
            return None
        columns, rows = said.shape
        stored = order + PIXEL_TYPES[said.type]
        try:
            image = EncodedImage(
                data, (rows, columns), stored, packing[0], "C", packing[1], self._max_image_bytes
            )
            position, metadata = _beside(times.real_time, parts)
        except BadFrame:
            return None
        series = str(which.series)
        acquired = self._acquired(series, times.start_time)
        return Arrival(series, which.frame, image, "", acquired, position, metadata)

    def _header(self, first: Mapping[str, Any], parts: Sequence[Part]) -> list[Event]:
        series = _series(first, HEADER)
        header = Header(series, self._max_image_bytes)
        header.read(first, parts)
        self._date = header.date
        start = SeriesStart(series, header.n_frames, 0, ("",), header.metadata)
        return [start, *(Bad(f"{HEADER}: {reason}", series) for reason in header.complaints)]

    def _image(self, first: Mapping[str, Any], parts: Sequence[Part]) -> Arrival:
        series, frame = _series(first, IMAGE), whole(first, "frame", IMAGE)
        if not 4 <= len(parts) <= 5:
            raise BadFrame(f"image message of {len(parts)} parts, expected 4, or 5 with an appendix")
        image = encoded_image(parts[1], parts[2], self._max_image_bytes)
        times = json_object(parts[3], TIMES, htype=TIMES)
        acquired = self._acquired(series, _nanoseconds(times, "start_time"))
        position, metadata = _beside(_nanoseconds(times, "real_time"), parts)
        return Arrival(series, frame, image, "", acquired, position, metadata)

    def _acquired(self, series: str, start_ns: float | None) -> float:
        """Return UTC seconds of the start of the exposure, 0 when nobody said."""
        if start_ns is None:
            return 0.0
        if start_ns >= ABSOLUTE_NS:
            return start_ns / NS
        if self._date is None or self._date.series != series:
            return 0.0
        return self._date.began + start_ns / NS


def identity(first: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Return series and frame as far as a first part says them; a frame of images only."""
    try:
        series = _series(first, "")
    except BadFrame:
        return None, None
    try:
        return series, whole(first, "frame", IMAGE) if first.get("htype") == IMAGE else None
    except BadFrame:
        return series, None


def refused(parts: Sequence[Part], reason: str) -> Bad:
    """Return the answer to a message that is not to be decoded; its first part says which frame it was."""
    try:
        return Bad(reason, *identity(json_object(parts[0], "first part")))
    except BadFrame:
        return Bad(reason)


def encoded_image(description: Part, blob: Part, max_bytes: int) -> EncodedImage:
    """Return the image that the second and third part of a message are; pixels are not decoded.

    Raises
    ------
    BadFrame
        If type, encoding, shape or size is none that there is, or they contradict one another.
    """
    said = json_object(description, IMAGE_DATA, htype=IMAGE_DATA)
    rows, columns = array_shape(said, IMAGE_DATA)
    encoding = need(said, "encoding", IMAGE_DATA)
    packing, order = (encoding[:-1], encoding[-1:]) if isinstance(encoding, str) else ("", "")
    if packing not in PACKINGS or order not in ("<", ">"):
        known = ", ".join(f"{name}<" for name in PACKINGS)
        raise BadFrame(f"{IMAGE_DATA}: encoding {shown(encoding)} is not one of {known} (or > for <)")
    algorithm, element_bytes = PACKINGS[packing]
    data = memoryview(blob).cast("B")
    if "size" in said and whole(said, "size", IMAGE_DATA) != data.nbytes:
        raise BadFrame(f"{IMAGE_DATA}: size: {said['size']} bytes announced, the blob has {data.nbytes}")
    return EncodedImage(
        data, (rows, columns), order + pixel_type(said, IMAGE_DATA), algorithm, "C", element_bytes, max_bytes
    )


class _Which(msgspec.Struct):
    """First part of an image."""

    htype: Literal["dimage-1.0"]
    series: _Whole
    frame: _Whole


class _Said(msgspec.Struct):
    """Second part of an image."""

    htype: Literal["dimage_d-1.0"]
    shape: tuple[_Pixels, _Pixels]
    type: Literal["uint8", "uint16", "uint32", "int8", "int16", "int32", "float32"]
    encoding: str
    size: _Whole | None = None


class _Times(msgspec.Struct):
    """Fourth part of an image."""

    htype: Literal["dconfig-1.0"]
    start_time: _Nanoseconds | None = None
    real_time: _Nanoseconds | None = None


_WHICH: Final = msgspec.json.Decoder(_Which)
_SAID: Final = msgspec.json.Decoder(_Said)
_TIMES: Final = msgspec.json.Decoder(_Times)


def _end(first: Mapping[str, Any], parts: Sequence[Part]) -> list[Event]:
    series = _series(first, END)
    end = SeriesEnd(series)
    if len(parts) == 1:
        return [end]
    # The series is over all the same, and somebody is told.
    return [Bad(f"{END}: message of {len(parts)} parts, expected 1", series), end]


def _series(first: Mapping[str, Any], where: str) -> str:
    return str(whole(first, "series", where))


def _beside(
    exposure_ns: float | None, parts: Sequence[Part]
) -> tuple[tuple[float, ...] | None, dict[str, Any]]:
    """Return the scan position in um, if the appendix has one, and the metadata of an image."""
    metadata: dict[str, Any] = {}
    if exposure_ns is not None:
        metadata["real_time_s"] = exposure_ns / NS
    if len(parts) < 5 or not (said := appendix(parts[4])):
        return None, metadata
    metadata["user_data"] = said
    return position_um(said), metadata


def _nanoseconds(times: Mapping[str, Any], key: str) -> float | None:
    value = times.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not -LARGEST <= value <= LARGEST:
        raise BadFrame(f"{TIMES}: {key}: expected nanoseconds, got {shown(value)}")
    return value
