"""DECTRIS Stream V2 messages: bytes to events, without sockets.

A message is one CBOR map (RFC 8949) that begins with the key ``type``: start, image or end.
Images are typed arrays (RFC 8746) in multi-dimensional arrays (tags 40 and 1040), and DECTRIS
tag 56500 may stand wherever bytes stand. Pixels stay compressed here.

Every claim of a message is checked before it costs memory or time. What is broken becomes a `Bad`
that names the reason, and the frame where the message still said which one it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cbor2 import CBORTag

from daemon.sources.base import Arrival, Bad, Event, SeriesEnd, SeriesStart
from daemon.sources.dectris.cbor_reader import read_map
from daemon.sources.dectris.v2_template import NotUsual, Template
from daemon.sources.fields import (
    LARGEST,
    MAX_IMAGES,
    MAX_METADATA_BYTES,
    is_name,
    need,
    position_um,
    shown,
    text,
    whole,
)
from pipelines.frame import BadFrame
from pipelines.images import MAX_IMAGE_BYTES, EncodedImage

#: numpy types of RFC 8746 typed arrays; 76 is reserved, 83 and 87 (binary128) have no numpy type.
TYPED_ARRAYS: Final[Mapping[int, str]] = {
    64: "|u1",
    65: ">u2",
    66: ">u4",
    67: ">u8",
    68: "|u1",
    69: "<u2",
    70: "<u4",
    71: "<u8",
    72: "|i1",
    73: ">i2",
    74: ">i4",
    75: ">i8",
    77: "<i2",
    78: "<i4",
    79: "<i8",
    80: ">f2",
    81: ">f4",
    82: ">f8",
    84: "<f2",
    85: "<f4",
    86: "<f8",
}
ROW_MAJOR: Final = 40
COLUMN_MAJOR: Final = 1040
COMPRESSED: Final = 56500
KNOWN_TAGS: Final = frozenset({*TYPED_ARRAYS, ROW_MAJOR, COLUMN_MAJOR, COMPRESSED})

#: What tag 56500 may say; the bare lz4 block of Stream V1 is none of it.
ALGORITHMS: Final = ("none", "lz4", "bslz4")

MAX_CHANNELS: Final = 64
#: Images that may be unlike the one before, one after the other, until no pattern is looked for any more.
MAX_TRIES: Final = 4
_NOT_METADATA: Final = frozenset({"type", "series_id", "series_unique_id", "channels", "pixel_mask"})


class Decoder:
    """Decodes the messages of one stream; images that are like the one before take a short way.

    Parameters
    ----------
    max_image_bytes : int
        As for `decode_message`.
    """

    def __init__(self, max_image_bytes: int = MAX_IMAGE_BYTES) -> None:
        self._max_image_bytes = max_image_bytes
        self._template: Template | None = None
        self._tries = 0

    def decode(self, message: memoryview | bytes) -> list[Event]:
        """Read one message; the answer is that of `decode_message`."""
        view = memoryview(message).cast("B").toreadonly()
        events = self._template.read(view) if self._template is not None else None
        if events is not None:
            self._tries = 0
            return events
        events = decode_message(view, max_image_bytes=self._max_image_bytes)
        self._learn(view, events)
        return events

    def _learn(self, message: memoryview, events: list[Event]) -> None:
        """Take a sound image as the pattern of the next ones, unless that has not helped lately."""
        arrivals = [event for event in events if isinstance(event, Arrival)]
        if isinstance(events[0], SeriesStart):
            self._tries = 0
        if len(arrivals) < len(events) or self._tries >= MAX_TRIES:
            return
        self._tries += 1
        date = read_map(message, KNOWN_TAGS)[0].get("series_date")
        try:
            self._template = Template(message, arrivals, _seconds(date))
        except NotUsual:
            self._template = None


def decode_message(message: memoryview | bytes, *, max_image_bytes: int = MAX_IMAGE_BYTES) -> list[Event]:
    """Read one message.

    Parameters
    ----------
    message : bytes-like
    max_image_bytes : int
        Limit on the pixels of one image, and on all pixel masks of a start message together.

    Returns
    -------
    list of Event
        A start or end gives one event, an image one `Arrival` a channel. What cannot be used is a
        `Bad` with the reason, and with series and frame when these could be read. Nothing is raised.
    """
    fields, problem = read_map(message, KNOWN_TAGS)
    series, frame = _identity(fields)
    kind = fields.get("type")
    try:
        if problem is not None:
            raise BadFrame(problem)
        if kind == "start":
            return _start(fields, max_image_bytes)
        if kind == "image":
            return _image(fields, series, frame, max_image_bytes)
        if kind == "end":
            return [SeriesEnd(_series(fields))]
        if kind is None:
            raise BadFrame("message has no key 'type'")
        raise BadFrame(f"message type {shown(kind)} is unknown, expected start, image or end")
    except BadFrame as error:
        return [Bad(str(error), series, frame if kind == "image" else None)]


def _identity(fields: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Return series and frame as far as they can be read."""
    try:
        series = _series(fields)
    except BadFrame:
        return None, None
    try:
        return series, whole(fields, "image_id", _kind(fields))
    except BadFrame:
        return series, None


def _series(fields: Mapping[str, Any]) -> str:
    number = whole(fields, "series_id", _kind(fields))
    unique = text(fields, "series_unique_id", _kind(fields))
    return f"{number}/{unique}"


def _start(fields: Mapping[str, Any], max_image_bytes: int) -> list[Event]:
    series = _series(fields)
    channels = need(fields, "channels", "start")
    if (
        not isinstance(channels, list | tuple)
        or not 1 <= len(channels) <= MAX_CHANNELS
        or not all(is_name(c) for c in channels)
        or len(set(channels)) != len(channels)
    ):
        raise BadFrame(
            f"start: channels: expected 1 to {MAX_CHANNELS} different names, got {shown(channels)}"
        )
    n_frames: int | None = whole(fields, "number_of_images", _kind(fields))
    metadata = {key: _plain(value) for key, value in fields.items() if key not in _NOT_METADATA}
    events: list[Event] = []
    if n_frames is not None and n_frames > MAX_IMAGES:
        events.append(Bad(f"start: number_of_images: {n_frames} makes no sense, taken as unknown", series))
        n_frames = None
    try:
        mask = _pixel_masks(fields, max_image_bytes)
        if mask:
            metadata["pixel_mask"] = mask
    except BadFrame as error:
        # The frames can be read without their mask, so the series goes on, and somebody is told.
        events.append(Bad(f"start: pixel_mask left out: {error}", series))
    return [SeriesStart(series, n_frames, 0, tuple(channels), metadata), *events]


def _image(
    fields: Mapping[str, Any], series: str | None, frame: int | None, max_image_bytes: int
) -> list[Event]:
    if series is None or frame is None:  # this says why
        series, frame = _series(fields), whole(fields, "image_id", "image")
    data = need(fields, "data", "image")
    if not isinstance(data, Mapping) or not 1 <= len(data) <= MAX_CHANNELS:
        raise BadFrame(f"image: data: expected a map of 1 to {MAX_CHANNELS} channels, got {shown(data)}")
    acquired = _acquired(fields)
    position, metadata = _user_data(fields)
    exposure = _rational(fields, "real_time")
    if exposure is not None:
        metadata["real_time_s"] = exposure
    events: list[Event] = []
    for channel, value in data.items():
        if not is_name(channel):
            raise BadFrame(f"image: data: channel {shown(channel)} is not a name")
        try:
            image = _encoded_image(value, max_image_bytes)
        except BadFrame as error:
            events.append(Bad(str(error), series, frame, channel))
        else:
            events.append(Arrival(series, frame, image, channel, acquired, position, metadata))
    return events


def _encoded_image(value: Any, max_bytes: int) -> EncodedImage:
    """Return a two-dimensional array as an image; pixels are not decoded."""
    if not isinstance(value, CBORTag) or value.tag not in (ROW_MAJOR, COLUMN_MAJOR):
        raise BadFrame(f"image is not an array (CBOR tag 40 or 1040) but {shown(value)}")
    content = value.value
    if not isinstance(content, list | tuple) or len(content) != 2:
        raise BadFrame(f"CBOR tag {value.tag}: expected [dimensions, array]")
    dimensions, typed = content
    if (
        not isinstance(dimensions, list | tuple)
        or len(dimensions) != 2
        or not all(isinstance(d, int) and not isinstance(d, bool) for d in dimensions)
    ):
        raise BadFrame(f"CBOR tag {value.tag}: expected two dimensions, got {shown(dimensions)}")
    pixel_type, algorithm, element_bytes, blob = _typed_array(typed)
    return EncodedImage(
        memoryview(blob),
        (dimensions[0], dimensions[1]),
        pixel_type,
        algorithm,
        "C" if value.tag == ROW_MAJOR else "F",
        element_bytes,
        max_bytes,
    )


def _typed_array(value: Any) -> tuple[str, str, int, bytes | memoryview]:
    """Return numpy type, algorithm, size of shuffled elements (0: that of the type) and blob."""
    if not isinstance(value, CBORTag) or value.tag not in TYPED_ARRAYS:
        raise BadFrame(f"expected a typed array (CBOR tags 64 to 86), got {shown(value)}")
    return TYPED_ARRAYS[value.tag], *_blob(value.value)


def _blob(value: Any) -> tuple[str, int, bytes | memoryview]:
    """Return algorithm, size of shuffled elements and blob of what stands for a byte string."""
    if isinstance(value, bytes | memoryview):
        return "none", 0, value
    if not isinstance(value, CBORTag) or value.tag != COMPRESSED:
        raise BadFrame(f"expected bytes, got {shown(value)}")
    content = value.value
    if not isinstance(content, list | tuple) or len(content) != 3:
        raise BadFrame(f"CBOR tag {COMPRESSED}: expected [algorithm, element size, bytes]")
    algorithm, element_bytes, blob = content
    if not isinstance(algorithm, str) or not isinstance(blob, bytes | memoryview):
        raise BadFrame(f"CBOR tag {COMPRESSED}: expected [algorithm, element size, bytes]")
    if algorithm not in ALGORITHMS:
        raise BadFrame(f"compression {shown(algorithm)} is not one of {', '.join(ALGORITHMS)}")
    if algorithm != "bslz4":
        return algorithm, 0, blob
    if not isinstance(element_bytes, int) or not 1 <= element_bytes <= 8:
        raise BadFrame(f"bslz4: expected an element size of 1 to 8 bytes, got {shown(element_bytes)}")
    return algorithm, int(element_bytes), blob


def _pixel_masks(fields: Mapping[str, Any], max_bytes: int) -> dict[str, npt.NDArray[Any]]:
    """Return the masks by channel, (rows, columns), as the instrument coded them; empty if it sent none."""
    masks = fields.get("pixel_mask")
    if masks is None:
        return {}
    if not isinstance(masks, Mapping) or not all(isinstance(c, str) for c in masks):
        raise BadFrame(f"expected a map of channels, got {shown(masks)}")
    encoded = {channel: _encoded_image(value, max_bytes) for channel, value in masks.items()}
    total = sum(math.prod(m.shape) * m.dtype.itemsize for m in encoded.values())
    if total > max_bytes:
        raise BadFrame(f"masks of {total} bytes, the limit is {max_bytes}")
    for channel, mask in encoded.items():
        size = (fields.get("image_size_y", mask.shape[0]), fields.get("image_size_x", mask.shape[1]))
        if mask.shape != size:
            raise BadFrame(f"{shown(channel)}: shape {mask.shape}, the images have {shown(size)}")
    return {channel: mask.array() for channel, mask in encoded.items()}


def _user_data(fields: Mapping[str, Any]) -> tuple[tuple[float, ...] | None, dict[str, Any]]:
    """Return the scan position in um, if the user data carry one, and the metadata of a frame."""
    user_data = _plain(fields.get("user_data"))
    if not user_data:
        return None, {}
    return position_um(user_data), {"user_data": user_data}


def _acquired(fields: Mapping[str, Any]) -> float:
    """Return UTC seconds of the start of the exposure, 0 when the message does not say."""
    began, start = _seconds(fields.get("series_date")), _rational(fields, "start_time")
    return 0.0 if start is None or began is None else began + start


def _seconds(date: Any) -> float | None:
    """Return UTC seconds of a date, None of anything else."""
    if not isinstance(date, datetime):
        return None
    return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()


def _rational(fields: Mapping[str, Any], key: str) -> float | None:
    """Return ``[numerator, denominator]`` as a float; None when absent or over zero."""
    value = fields.get(key)
    if value is None:
        return None
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    ):
        raise BadFrame(f"image: {key}: expected [numerator, denominator], got {shown(value)}")
    numerator, denominator = value
    return numerator / denominator if denominator else None


def _plain(value: Any) -> Any:
    """Return metadata as numbers, text, lists and maps; large arrays only by what they are."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        if not -LARGEST <= value <= LARGEST:
            raise BadFrame(f"number {value} needs more than 64 bits")
        return value
    if isinstance(value, Mapping):
        return {_text_key(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes | memoryview):
        return value.hex() if len(value) <= MAX_METADATA_BYTES else f"{len(value)} bytes"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, CBORTag):
        return _plain_array(value)
    return None  # undefined and simple values say nothing


def _plain_array(tag: CBORTag) -> Any:
    if tag.tag in (ROW_MAJOR, COLUMN_MAJOR):
        content = tag.value
        return f"array {shown(content[0])}" if isinstance(content, list | tuple) and content else "array"
    if tag.tag == COMPRESSED:
        return f"{len(_blob(tag)[2])} compressed bytes"
    pixel_type, algorithm, _, blob = _typed_array(tag)
    if algorithm != "none" or len(blob) > MAX_METADATA_BYTES or len(blob) % np.dtype(pixel_type).itemsize:
        return f"array of {pixel_type}, {len(blob)} bytes"
    return np.frombuffer(blob, dtype=pixel_type).tolist()


def _text_key(key: Any) -> str:
    if not isinstance(key, str):
        raise BadFrame(f"map with a key that is not text: {shown(key)}")
    return key


def _kind(fields: Mapping[str, Any]) -> str:
    """Return what a message calls itself, for errors."""
    return str(fields.get("type", "message"))


def typed_array_tag(dtype: np.dtype[Any]) -> int:
    """Return the CBOR tag of a numpy type in its own byte order.

    Raises
    ------
    ValueError
        If the format has no such type.
    """
    for tag, name in TYPED_ARRAYS.items():
        if np.dtype(name) == dtype:
            return tag
    raise ValueError(f"Stream V2 has no pixels of type {dtype}")
