"""Messages of areaDetector's ZeroMQ plug-in written down by hand, without any code of the product.

Headers are texts as the plug-in's C++ composes them, blanks included. Blobs come from the definitions of
the formats, or from the compressors that ADCore calls (bitshuffle, lz4).
"""

from __future__ import annotations

import json
from typing import Any, Final

import bitshuffle
import lz4.block
import numpy as np
import numpy.typing as npt

from tests.wire.golden import PIXELS, framed

#: 3 rows and 5 columns: whoever takes one for the other shows.
assert PIXELS.shape == (3, 5)
BLOB: Final = PIXELS.astype("<u2").tobytes()

# NDAttributes: 2026-06-01T12:00:00.25Z in seconds since 1990 is the time stamp.
STAMP: Final = 1149163200.25
UTC: Final = 1780315200.25
NDATTR: Final = '{"ColorMode":0,"AcquireTime":0.5,"SamX":1.25,"SamY":-3,"Sample":"Cu 7"}'

TYPES: Final = {
    "int8": "<i1",
    "uint8": "<u1",
    "int16": "<i2",
    "uint16": "<u2",
    "int32": "<i4",
    "uint32": "<u4",
    "int64": "<i8",
    "uint64": "<u8",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
}


def header(
    frame: Any = 17,
    *,
    version: str = "1.4",
    shape: str = "",
    kind: str = "uint16",
    stamp: Any = STAMP,
    encoding: str = "",
    ndattr: str = NDATTR,
    more: str = "",
) -> bytes:
    """What a version of the plug-in writes of an array of 3 rows and 5 columns."""
    htype = {"1.4": '"array-1.0"', "1.3": '["array-1.0"]', "1.0": '["chunk-1.0"]'}[version]
    shape = shape or ("[3,5]" if version == "1.4" else "[5,3]")
    text = f'{{"htype":{htype}, "type":"{kind}", "shape":{shape}, "frame":{frame}, '
    if version != "1.0":
        text += f'"timeStamp":{stamp}, "encoding":"{encoding}", '
    return (text + more + f'"ndattr":{ndattr}}}').encode()


def array(frame: Any = 17, blob: bytes = BLOB, **said: Any) -> list[bytes]:
    return [header(frame, **said), blob]


def image(frame: int, pixels: npt.NDArray[Any], stamp: Any = STAMP, **said: Any) -> list[bytes]:
    """An array of any size."""
    kind = pixels.dtype.newbyteorder("=").name
    shape = f"[{pixels.shape[0]},{pixels.shape[1]}]"
    return array(frame, pixels.astype(TYPES[kind]).tobytes(), kind=kind, shape=shape, stamp=stamp, **said)


def by_definition(encoding: str, data: bytes = BLOB, size: int = 2) -> bytes:
    """The compressed blob, written down from what ADCore's codecs are."""
    if encoding == "bslz4":
        return framed(data, "bslz4", size, 8192)[12:]
    if encoding == "lz4hdf5":
        return framed(data, "lz4", 0, 64)
    return data


def by_library(encoding: str, pixels: npt.NDArray[Any]) -> bytes:
    """The compressed blob, made by what ADCore calls."""
    if encoding == "bslz4":
        return bytes(bitshuffle.compress_lz4(np.ascontiguousarray(pixels), 0).tobytes())
    return bytes(lz4.block.compress(pixels.tobytes(), store_size=False))


def padded(blob: bytes, size: int) -> bytes:
    """What the plug-in sends of a compressed array: as many bytes as the pixels take, rubbish behind."""
    return blob + np.random.default_rng(3).bytes(size)[: max(0, size - len(blob))]


def corpus() -> list[list[bytes]]:
    """Messages of every kind, to start a fuzzer from."""
    big = np.random.default_rng(5).poisson(0.3, (61, 68)).astype(np.uint16)
    shape = "[61,68]"
    messages = [array(version=version) for version in ("1.0", "1.3", "1.4")]
    small = np.minimum(PIXELS, 60_000)
    messages += [array(kind=kind, blob=small.astype(stored).tobytes()) for kind, stored in TYPES.items()]
    for encoding in ("bslz4", "lz4hdf5"):
        blob = by_definition(encoding)
        messages += [array(blob=blob, encoding=encoding), array(blob=padded(blob, 30), encoding=encoding)]
    for encoding in ("bslz4", "lz4"):
        blob = by_library(encoding, big)
        messages.append(array(18, blob, encoding=encoding, shape=shape))
        messages.append(array(19, padded(blob, big.nbytes), encoding=encoding, shape=shape))
    messages.append(array(ndattr='{"SamX":nan,"SamY":-inf,"Path":"C:\\data\\n"}'))
    messages.append(array(more='"endianness":"big", '))
    return messages


def fields(parts: list[bytes]) -> dict[str, Any]:
    """The header of a message as JSON."""
    found = json.loads(parts[0])
    assert isinstance(found, dict)
    return found
