"""Messages of areaDetector's ZeroMQ plug-in: two parts, header and pixels, to images; without sockets.

Compressed arrays (``encoding``, the codec of ADCore's NDPluginCodec) stay compressed. The plug-in takes
their size to be that of the pixels, so that rubbish may stand behind a blob: where blobs say themselves
how long they are, it is cut off.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from daemon.sources.areadetector.header import (
    Header,
    ShapeOrder,
    header_fields,
    identity,
    read_header,
    usual_header,
)
from daemon.sources.fields import shown
from daemon.sources.json_parts import Part
from pipelines.frame import BadFrame
from pipelines.images import MAX_IMAGE_BYTES, MAX_LZ4_BLOCKS, EncodedImage

#: Encodings that are read, and what they are called among images.
ENCODINGS: Final[Mapping[str, str]] = {"": "none", "lz4": "lz4-block", "lz4hdf5": "lz4", "bslz4": "bslz4"}
#: What bitshuffle takes for a block where nobody says otherwise, as NDPluginCodec does; in bytes.
BITSHUFFLE_BLOCK_BYTES: Final = 8192
#: Between the epochs of EPICS (1990) and of Unix (1970), in seconds.
EPICS_EPOCH: Final = 631_152_000
#: Time stamps below (three years) do not count from an epoch, but from the start of something.
EARLIEST: Final = 1e8

_FRAMING: Final = struct.Struct(">QI")
_LENGTH: Final = struct.Struct(">I")


class Array(msgspec.Struct, frozen=True):
    """What became of a message: an image, or the reason why there is none.

    Attributes
    ----------
    frame : int or None
        None where the message does not even say which array it is.
    time_stamp : float or None
        Of the driver, as it came.
    image : EncodedImage or None
    reason : str
        Why there is no image.
    attributes : dict
    position_um : tuple of float or None
    complaint : str
        What was left out of an image's metadata, "" for nothing.
    """

    frame: int | None = None
    time_stamp: float | None = None
    image: EncodedImage | None = None
    reason: str = ""
    attributes: dict[str, Any] = {}
    position_um: tuple[float, ...] | None = None
    complaint: str = ""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Reads messages, one by one.

    Attributes
    ----------
    max_message_bytes, max_image_bytes : int
        Limits on a message as it comes and on the pixels of an image.
    shape_order : str
        "xy", "yx", or "auto" for what the version of the plug-in sends.
    position_keys : tuple of str
        NDAttributes that are the position, x first.
    position_unit_um : float
    """

    max_message_bytes: int = MAX_IMAGE_BYTES
    max_image_bytes: int = MAX_IMAGE_BYTES
    shape_order: ShapeOrder = "auto"
    position_keys: tuple[str, ...] = ()
    position_unit_um: float = 1.0

    def decode(self, parts: Sequence[Part]) -> Array:
        """Read one message; pixels are not copied. Nothing is raised."""
        frame: int | None = None
        time_stamp: float | None = None
        try:
            if not parts:
                raise BadFrame("message without parts")
            header = usual_header(parts[0], self.shape_order)
            if header is None:
                fields, complaint = header_fields(parts[0])
                frame, time_stamp = identity(fields)
                header = read_header(fields, self.shape_order, complaint)
            frame, time_stamp = header.frame, header.time_stamp
            nbytes = sum(map(len, parts))
            if nbytes > self.max_message_bytes:
                raise BadFrame(f"message of {nbytes} bytes, the limit is {self.max_message_bytes}")
            if len(parts) != 2:
                raise BadFrame(f"message of {len(parts)} parts, expected 2: header and pixels")
            image = encoded_image(header, parts[1], self.max_image_bytes)
            position = self._position_um(header) if self.position_keys else None
        except BadFrame as error:
            return Array(frame, time_stamp, reason=str(error))
        return Array(frame, time_stamp, image, "", header.attributes, position, header.complaint)

    def _position_um(self, header: Header) -> tuple[float, ...]:
        """Return the position; a frame without it would be put at a wrong place by its number."""
        found = []
        for key in self.position_keys:
            value = header.attributes.get(key)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                known = f"; {header.complaint}" if header.complaint else ""
                raise BadFrame(
                    f"position_keys: expected a number in NDAttribute {key!r}, got {shown(value)}{known}"
                )
            found.append(value * self.position_unit_um)
        return tuple(found)


def encoded_image(header: Header, blob: Part, max_bytes: int) -> EncodedImage:
    """Return the image of a header and a blob; pixels are not decoded.

    Raises
    ------
    BadFrame
        If the encoding is not read, or header and blob contradict one another.
    """
    if header.encoding not in ENCODINGS:
        known = ", ".join(repr(name) for name in ENCODINGS)
        raise BadFrame(
            f"header: encoding {shown(header.encoding)} is not read: set the Compressor of NDPluginCodec to"
            f" BSLZ4, LZ4HDF5 or None (read are {known})"
        )
    algorithm = ENCODINGS[header.encoding]
    data = memoryview(blob).cast("B")
    if algorithm != "none":
        data = _alone(data, header, algorithm, max_bytes)
    return EncodedImage(data, header.shape, header.pixel_type, algorithm, max_bytes=max_bytes)


def _alone(data: memoryview, header: Header, algorithm: str, max_bytes: int) -> memoryview:
    """Return a compressed blob without what stands behind it, with the framing of the HDF5 filters.

    ADCore's bslz4 is bitshuffle's without a framing: it begins with the length of the first block, which is
    not zero, where a framing begins with the upper half of a number of bytes, which is.
    """
    element_bytes = np.dtype(header.pixel_type).itemsize
    needed = header.shape[0] * header.shape[1] * element_bytes
    if needed > max_bytes:
        return data  # refused in a moment
    if algorithm == "lz4-block":
        if data.nbytes == needed:
            raise BadFrame(
                f"lz4 blob of {needed} bytes is as long as its pixels: where it ends is not known."
                " Set the Compressor of NDPluginCodec to BSLZ4, LZ4HDF5 or None"
            )
        return data
    # Of elements that are shuffled, fewer than eight are left as they are.
    shuffled_bytes = element_bytes if algorithm == "bslz4" else 0
    bare = shuffled_bytes > 0 and any(data[: _LENGTH.size])
    if data.nbytes == needed:
        declared, block, at = needed, BITSHUFFLE_BLOCK_BYTES, 0
        if not bare and data.nbytes >= _FRAMING.size:
            declared, block = _FRAMING.unpack_from(data)
            at = _FRAMING.size
        rest = declared % (8 * shuffled_bytes) if shuffled_bytes else 0
        data = data[: _end(data, at, declared - rest, block) + rest]
    return memoryview(b"".join((_FRAMING.pack(needed, BITSHUFFLE_BLOCK_BYTES), data))) if bare else data


def _end(data: memoryview, at: int, packed: int, block: int) -> int:
    """Return where the last block of a blob ends, or all of it where that cannot be told."""
    if block < 1 or packed // block > MAX_LZ4_BLOCKS:
        return data.nbytes
    for _ in range(-(-packed // block)):
        if at + _LENGTH.size > data.nbytes:
            return data.nbytes
        at += _LENGTH.size + int(_LENGTH.unpack_from(data, at)[0])
    return at
