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

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy.typing as npt

from daemon.sources.base import Arrival, Bad, Event, SeriesEnd, SeriesStart
from daemon.sources.fields import (
    LARGEST,
    MAX_IMAGES,
    MAX_METADATA_BYTES,
    need,
    position_um,
    shown,
    whole,
)
from pipelines.frame import BadFrame
from pipelines.images import MAX_IMAGE_BYTES, EncodedImage

HEADER: Final = "dheader-1.0"
IMAGE: Final = "dimage-1.0"
IMAGE_DATA: Final = "dimage_d-1.0"
TIMES: Final = "dconfig-1.0"
END: Final = "dseries_end-1.0"
DETAILS: Final = ("none", "basic", "all")

#: Pixels: "bs16-lz4<" and so on say how they are packed, and < or > the byte order.
PACKINGS: Final[Mapping[str, tuple[str, int]]] = {
    "": ("none", 0),
    "lz4": ("lz4-block", 0),
    "bs8-lz4": ("bslz4", 1),
    "bs16-lz4": ("bslz4", 2),
    "bs32-lz4": ("bslz4", 4),
}
PIXEL_TYPES: Final[Mapping[str, str]] = {
    "uint8": "u1",
    "uint16": "u2",
    "uint32": "u4",
    "int8": "i1",
    "int16": "i2",
    "int32": "i4",
    "float32": "f4",
}
#: The tables of a header with all details, and what they are called among the metadata.
TABLES: Final[Mapping[str, str]] = {
    "dflatfield-1.0": "flatfield",
    "dpixelmask-1.0": "pixel_mask",
    "dcountrate_table-1.0": "countrate_table",
}

#: A part of JSON that is larger describes nothing that a detector could mean.
MAX_JSON_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 32
#: Nanoseconds since 1970 from here on (2001); a number below counts from the start of the series.
ABSOLUTE_NS: Final = 10**18
NS: Final = 10**9  # a whole number: the quotient of two is exact to the last bit

Part = memoryview | bytes


@dataclass(frozen=True, slots=True)
class _Date:
    """When a series began, in UTC seconds."""

    series: str
    began: float


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
        self._date: _Date | None = None

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
            if not parts:
                raise BadFrame("message without parts")
            first = _object(parts[0], "first part")
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

    def _header(self, first: Mapping[str, Any], parts: Sequence[Part]) -> list[Event]:
        series = _series(first, HEADER)
        header = _Header(series, self._max_image_bytes)
        header.read(first, parts)
        self._date = header.date
        start = SeriesStart(series, header.n_frames, 0, ("",), header.metadata)
        return [start, *(Bad(f"{HEADER}: {reason}", series) for reason in header.complaints)]

    def _image(self, first: Mapping[str, Any], parts: Sequence[Part]) -> Arrival:
        series, frame = _series(first, IMAGE), whole(first, "frame", IMAGE)
        if not 4 <= len(parts) <= 5:
            raise BadFrame(f"image message of {len(parts)} parts, expected 4, or 5 with an appendix")
        image = encoded_image(parts[1], parts[2], self._max_image_bytes)
        times = _object(parts[3], TIMES, htype=TIMES)
        acquired = self._acquired(series, _nanoseconds(times, "start_time"))
        metadata: dict[str, Any] = {}
        exposure = _nanoseconds(times, "real_time")
        if exposure is not None:
            metadata["real_time_s"] = exposure / NS
        position = None
        if len(parts) == 5 and (appendix := _appendix(parts[4])):
            metadata["user_data"] = appendix
            position = position_um(appendix)
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
        return Bad(reason, *identity(_object(parts[0], "first part")))
    except BadFrame:
        return Bad(reason)


def encoded_image(description: Part, blob: Part, max_bytes: int) -> EncodedImage:
    """Return the image that the second and third part of a message are; pixels are not decoded.

    Raises
    ------
    BadFrame
        If type, encoding, shape or size is none that there is, or they contradict one another.
    """
    said = _object(description, IMAGE_DATA, htype=IMAGE_DATA)
    rows, columns = _shape(said, IMAGE_DATA)
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
        data, (rows, columns), order + _pixel_type(said, IMAGE_DATA), algorithm, "C", element_bytes, max_bytes
    )


class _Header:
    """What a header says: filled by `read`, which notes complaints instead of raising."""

    def __init__(self, series: str, max_image_bytes: int) -> None:
        self.n_frames: int | None = None
        self.date: _Date | None = None
        self.metadata: dict[str, Any] = {}
        self.complaints: list[str] = []
        self._series = series
        self._max_bytes = max_image_bytes
        self._config: dict[str, Any] = {}

    def read(self, first: Mapping[str, Any], parts: Sequence[Part]) -> None:
        """Read all parts of a header, the first one being known."""
        rest = list(parts[1:])
        detail = first.get("header_detail")
        if detail not in DETAILS:
            self._complain(f"header_detail: expected one of {', '.join(DETAILS)}, got {shown(detail)}")
        if detail in ("basic", "all"):
            if not rest:
                self._complain(f"header_detail is {detail!r}, but there is no configuration")
                return
            self._read_config(rest.pop(0))
        if detail == "all":
            rest = self._read_tables(rest)
        if rest:
            self._read_appendix(rest.pop(0))
        if rest:
            self._complain(f"{len(parts)} parts, {len(rest)} more than its detail {shown(detail)} has")

    def _complain(self, reason: str) -> None:
        self.complaints.append(reason)

    def _read_config(self, part: Part) -> None:
        try:
            self._config = _object(part, "configuration")
        except BadFrame as error:
            self._complain(f"left out: {error}")
            return
        unusable = []
        for key, value in self._config.items():
            try:
                self.metadata[plain(key)] = plain(value)
            except BadFrame as error:
                unusable.append(f"{shown(key)}: {error}")
        if unusable:
            more = f", and {len(unusable) - 1} more" if len(unusable) > 1 else ""
            self._complain(f"configuration: left out: {unusable[0]}{more}")
        self._count_frames()
        self._find_date()

    def _count_frames(self) -> None:
        config, each = self._config, []
        try:
            each = [whole(config, key, "configuration") for key in ("nimages", "ntrigger") if key in config]
        except BadFrame as error:
            self._complain(f"{error}; the number of images is taken as unknown")
            return
        if "nimages" not in config:
            return
        n_frames = math.prod(each)
        if n_frames > MAX_IMAGES:
            self._complain(f"configuration: {n_frames} images make no sense, taken as unknown")
        else:
            self.n_frames = n_frames

    def _find_date(self) -> None:
        given = self._config.get("data_collection_date")
        if not given:
            return
        try:
            date = datetime.fromisoformat(given)
            if date.tzinfo is None:
                date = date.replace(tzinfo=UTC)
            self.date = _Date(self._series, date.timestamp())
        except (TypeError, ValueError, OverflowError):
            self._complain(f"configuration: data_collection_date: expected a date, got {shown(given)}")

    def _read_tables(self, rest: list[Part]) -> list[Part]:
        """Read the pairs of description and blob; return what is behind them."""
        seen = set()
        while len(rest) >= 2:
            try:
                said = _object(rest[0], "table")
            except BadFrame:
                break
            kind = said.get("htype")
            if not isinstance(kind, str) or kind not in TABLES:
                break
            blob = rest[1]
            rest = rest[2:]
            seen.add(kind)
            try:
                self.metadata[TABLES[kind]] = self._table(kind, said, blob)
            except BadFrame as error:
                self._complain(f"{TABLES[kind]} left out: {error}")
        missing = [name for kind, name in TABLES.items() if kind not in seen]
        if missing:
            self._complain(f"header_detail is 'all', but there is no {', no '.join(missing)}")
        return rest

    def _table(self, kind: str, said: Mapping[str, Any], blob: Part) -> Any:
        """Return a pixel mask as an array, a small table as lists of numbers, else what it is."""
        data = memoryview(blob).cast("B")
        # Tables are not encoded and the format says no byte order for them: it is the detector's own.
        image = EncodedImage(
            data, _shape(said, kind), "<" + _pixel_type(said, kind), max_bytes=self._max_bytes
        )
        if TABLES[kind] == "pixel_mask":
            self._compare_with_images(image.shape)
            return {"": image.array()}
        if data.nbytes <= MAX_METADATA_BYTES:
            return _numbers(image.array())
        return f"array of {image.dtype.name}, {image.shape[0]} x {image.shape[1]}"

    def _compare_with_images(self, shape: tuple[int, int]) -> None:
        rows, columns = (self._config.get(f"{k}_pixels_in_detector") for k in "yx")
        if (rows is not None and rows != shape[0]) or (columns is not None and columns != shape[1]):
            raise BadFrame(f"shape {shape}, the images have ({shown(rows)}, {shown(columns)})")

    def _read_appendix(self, part: Part) -> None:
        try:
            appendix = _appendix(part)
        except BadFrame as error:
            self._complain(f"appendix left out: {error}")
        else:
            if appendix:
                self.metadata["user_data"] = appendix


def _end(first: Mapping[str, Any], parts: Sequence[Part]) -> list[Event]:
    series = _series(first, END)
    end = SeriesEnd(series)
    if len(parts) == 1:
        return [end]
    # The series is over all the same, and somebody is told.
    return [Bad(f"{END}: message of {len(parts)} parts, expected 1", series), end]


def _series(first: Mapping[str, Any], where: str) -> str:
    return str(whole(first, "series", where))


def _shape(said: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Return rows and columns of what says [x, y]."""
    given = need(said, "shape", where)
    if (
        not isinstance(given, list)
        or len(given) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and abs(n) < 1 << 32 for n in given)
    ):
        raise BadFrame(f"{where}: shape: expected [x, y] in pixels, got {shown(given)}")
    return given[1], given[0]


def _pixel_type(said: Mapping[str, Any], where: str) -> str:
    given = need(said, "type", where)
    if not isinstance(given, str) or given not in PIXEL_TYPES:
        raise BadFrame(f"{where}: type {shown(given)} is not one of {', '.join(PIXEL_TYPES)}")
    return PIXEL_TYPES[given]


def _nanoseconds(times: Mapping[str, Any], key: str) -> float | None:
    value = times.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not -LARGEST <= value <= LARGEST:
        raise BadFrame(f"{TIMES}: {key}: expected nanoseconds, got {shown(value)}")
    return value


def _appendix(part: Part) -> Any:
    """Return what a user appended: JSON as what it says, other text as it is."""
    text = _text(part, "appendix")
    try:
        return plain(_JSON.decode(text))
    except BadFrame:
        raise
    except (ValueError, RecursionError):
        return text


def _object(part: Part, where: str, htype: str = "") -> dict[str, Any]:
    """Return the fields of a part that is a JSON object, of a kind if one is asked for."""
    text = _text(part, where)
    try:
        fields = _JSON.decode(text)
    except BadFrame as error:
        raise BadFrame(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        at_once = isinstance(error, json.JSONDecodeError)
        said = str(error) if at_once else "nested too deeply or a number too long"
        raise BadFrame(f"{where} of {len(text)} characters is not JSON: {said}") from error
    if not isinstance(fields, dict):
        raise BadFrame(f"{where} is not a JSON object: {shown(fields)}")
    if htype and fields.get("htype") != htype:
        raise BadFrame(f"expected a part {htype}, got htype {shown(fields.get('htype'))}")
    return fields


def _text(part: Part, where: str) -> str:
    view = memoryview(part)
    if view.nbytes > MAX_JSON_BYTES:
        raise BadFrame(f"{where} of {view.nbytes} bytes, the limit is {MAX_JSON_BYTES}")
    try:
        return str(view, "utf-8")
    except UnicodeDecodeError as error:
        raise BadFrame(f"{where} of {view.nbytes} bytes is no text") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadFrame(f"has the key {shown(twice)} twice")
    return fields


# JSON has no NaN and no infinity; where a sender writes one, nothing is known.
_JSON: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=lambda _name: None)


def plain(value: Any, depth: int = 0) -> Any:
    """Return metadata that any writer can take: numbers of 64 bits, text in Unicode, lists and maps.

    Raises
    ------
    BadFrame
        If a number is larger, a text is none, or lists and maps are nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise BadFrame(f"nested more than {MAX_DEPTH} times")
    if isinstance(value, Mapping):
        return {plain(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise BadFrame("a number needs more than 64 bits")
    if isinstance(value, str) and not _is_unicode(value):
        raise BadFrame(f"text {shown(value)} is no Unicode")
    return value


def _is_unicode(value: str) -> bool:
    """Return whether a text can be written: JSON can spell halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _numbers(table: npt.NDArray[Any]) -> list[list[Any]]:
    """Return a table as lists of numbers, nothing in place of what is no number."""
    return [[x if math.isfinite(x) else None for x in row] for row in table.tolist()]
