"""Stream V1 messages put together by hand, without any decoder, encoder or simulator of the product.

JSON is json's. Blobs are made twice: from the definitions of the formats (as for Stream V2), and
with the compressors that senders use, lz4 and bitshuffle, called directly.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

import bitshuffle
import lz4.block
import numpy as np
import numpy.typing as npt

from tests.wire.golden import PIXELS, framed, lz4_literals

TYPES: Final = {"uint8": "u1", "uint16": "u2", "uint32": "u4", "int16": "i2", "int32": "i4", "float32": "f4"}
SERIES: Final = 7

# The keys of a real header, with values of our own.
CONFIG: Final[dict[str, Any]] = {
    "auto_summation": True,
    "beam_center_x": 2.5,
    "beam_center_y": 1.5,
    "bit_depth_image": 16,
    "compression": "bslz4",
    "count_time": 0.0099,
    "data_collection_date": "2022-04-28T12:00:00.500+02:00",
    "description": "Dectris EIGER2 Si 1M",
    "detector_number": "E-02-0000",
    "detector_translation": [0.0, 0.0, -0.25],
    "element": "",
    "nimages": 100,
    "ntrigger": 3,
    "photon_energy": 12398.0,
    "x_pixels_in_detector": 5,
    "y_pixels_in_detector": 3,
}
#: 2022-04-28T12:00:00.5+02:00 in UTC seconds.
BEGAN: Final = 1651140000.5


def js(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def by_definition(pixels: npt.NDArray[Any], encoding: str, block: int = 64) -> bytes:
    """The blob, written down from what the formats are."""
    data = _stored(pixels, encoding)
    packing = encoding[:-1]
    if packing == "lz4":
        return lz4_literals(data)
    if packing:
        return framed(data, "bslz4", _shuffled_bytes(packing), block)
    return data


def by_library(pixels: npt.NDArray[Any], encoding: str, block: int = 64) -> bytes:
    """The blob, as the libraries of senders make it."""
    data = _stored(pixels, encoding)
    packing = encoding[:-1]
    if packing == "lz4":
        return bytes(lz4.block.compress(data, store_size=False))
    if packing:
        size = _shuffled_bytes(packing)
        elements = np.frombuffer(data, f"u{size}")
        packed = bitshuffle.compress_lz4(elements, block // size).tobytes()
        return struct.pack(">QI", len(data), block) + bytes(packed)
    return data


def _stored(pixels: npt.NDArray[Any], encoding: str) -> bytes:
    """The pixels in the byte order that the encoding ends with."""
    return pixels.astype(pixels.dtype.newbyteorder(encoding[-1])).tobytes()


def _shuffled_bytes(packing: str) -> int:
    return {"bs8-lz4": 1, "bs16-lz4": 2, "bs32-lz4": 4}[packing]


def header(detail: str = "basic", *more: bytes, config: Any = CONFIG, series: Any = SERIES) -> list[bytes]:
    """A header; `more` are parts behind those that its detail brings."""
    parts = [js(htype="dheader-1.0", series=series, header_detail=detail)]
    if detail in ("basic", "all"):
        parts.append(json.dumps(config).encode())
    if detail == "all":
        parts += table("dflatfield-1.0", FLATFIELD) + table("dpixelmask-1.0", MASK)
        parts += table("dcountrate_table-1.0", COUNTRATE)
    return [*parts, *more]


def table(htype: str, values: npt.NDArray[Any]) -> list[bytes]:
    rows, columns = values.shape
    return [js(htype=htype, shape=[columns, rows], type=values.dtype.name), values.tobytes()]


def image(
    number: Any = 4,
    pixels: npt.NDArray[Any] = PIXELS,
    encoding: str = "bs16-lz4<",
    *more: bytes,
    blob: bytes | None = None,
    series: Any = SERIES,
) -> list[bytes]:
    """An image; `more` are parts behind it."""
    data = by_definition(pixels, encoding) if blob is None else blob
    rows, columns = pixels.shape
    description = {
        "htype": "dimage_d-1.0",
        "shape": [columns, rows],
        "type": pixels.dtype.name,
        "encoding": encoding,
        "size": len(data),
    }
    return [
        js(htype="dimage-1.0", series=series, frame=number, hash="fc67f000d08fe6b380ea9434b8362d22"),
        js(**description),
        data,
        js(
            htype="dconfig-1.0",
            start_time=1_500_000_000,
            stop_time=1_750_000_000,
            real_time=250_000_000,
        ),
        *more,
    ]


def end(series: Any = SERIES) -> list[bytes]:
    return [js(htype="dseries_end-1.0", series=series)]


FLATFIELD: Final = np.linspace(0.9, 1.1, 15, dtype="<f4").reshape(3, 5)
MASK: Final = np.array([[0, 1, 0, 0, 0], [0, 0, 0, 4, 0], [0, 0, 0, 0, 1 << 31]], dtype="<u4")
COUNTRATE: Final = np.array([[0, 0], [10, 11], [100, 130]], dtype="<f4")


def corpus() -> list[list[bytes]]:
    """Messages of every kind and encoding, to start a fuzzer from."""
    messages = [header("none"), header("basic"), header("all"), header("basic", b"note"), end()]
    messages.append(header("all", js(run="a", sample={"name": "Cu"})))
    big = np.random.default_rng(5).poisson(0.3, (61, 68))
    for packing in ("", "lz4", "bs8-lz4", "bs16-lz4", "bs32-lz4"):
        for order in "<>":
            messages += [image(4, PIXELS.astype(kind), packing + order) for kind in TYPES]
        for kind in ("uint8", "uint16", "uint32"):
            pixels = big.astype(kind)
            messages.append(
                image(5, pixels, packing + "<", blob=by_library(pixels, packing + "<", block=1024))
            )
    messages.append(image(6, PIXELS, "lz4<", js(position_um=[1.5, 2])))
    return messages
