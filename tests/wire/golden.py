"""Stream V2 messages put together byte by byte, without any encoder or compressor of the product.

CBOR heads follow RFC 8949 §3, typed arrays RFC 8746; LZ4 blocks hold literals only (block format,
"the last sequence"), and bit shuffling is written down from its definition.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

# RFC 8746, table 1, and the numpy types that they mean.
TYPED_ARRAY_TAGS = {
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


def head(major: int, n: int) -> bytes:
    for info, form, limit in ((None, "", 24), (24, ">B", 1 << 8), (25, ">H", 1 << 16), (26, ">I", 1 << 32)):
        if n < limit:
            return bytes([major << 5 | (n if info is None else info)]) + (
                struct.pack(form, n) if form else b""
            )
    return bytes([major << 5 | 27]) + struct.pack(">Q", n)


def uint(n: int) -> bytes:
    return head(0, n)


def raw(data: bytes) -> bytes:
    return head(2, len(data)) + data


def text(value: str) -> bytes:
    return head(3, len(value.encode())) + value.encode()


def array(*items: bytes) -> bytes:
    return head(4, len(items)) + b"".join(items)


def mapping(**pairs: bytes) -> bytes:
    return head(5, len(pairs)) + b"".join(text(key) + value for key, value in pairs.items())


def tag(number: int, item: bytes) -> bytes:
    return head(6, number) + item


def float64(value: float) -> bytes:
    return b"\xfb" + struct.pack(">d", value)


def lz4_literals(data: bytes) -> bytes:
    """One LZ4 sequence that is all literals: token, further length bytes, the bytes."""
    n = len(data)
    if n < 15:
        return bytes([n << 4]) + data
    more, last = divmod(n - 15, 255)
    return b"\xf0" + b"\xff" * more + bytes([last]) + data


def bit_shuffled(data: bytes, size: int) -> bytes:
    """Bit k of every element, then bit k + 1 ...: the transpose of the elements' bits."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8).reshape(-1, size), axis=1, bitorder="little")
    return np.packbits(bits.T.reshape(-1), bitorder="little").tobytes()


def framed(data: bytes, algorithm: str, size: int, block: int, *, stored: bool = False) -> bytes:
    """HDF5 filter framing: bytes in all, bytes per block, then length and block, and so on.

    bslz4 shuffles whole groups of eight elements; what is left over is copied to the end.
    """
    rest = len(data) % (8 * size) if algorithm == "bslz4" else 0
    body, left = (data[:-rest], data[-rest:]) if rest else (data, b"")
    out = struct.pack(">QI", len(data), block)
    for start in range(0, len(body), block):
        piece = body[start : start + block]
        if algorithm == "bslz4":
            piece = bit_shuffled(piece, size)
        packed = piece if stored else lz4_literals(piece)
        out += struct.pack(">I", len(packed)) + packed
    return out + left


def compressed(data: bytes, algorithm: str, size: int, block: int = 64) -> bytes:
    """What stands for a byte string: the string itself (""), or tag 56500."""
    if algorithm == "":
        return raw(data)
    if algorithm == "none":
        return tag(56500, array(text("none"), uint(0), raw(data)))
    modifier = size if algorithm == "bslz4" else 0
    return tag(56500, array(text(algorithm), uint(modifier), raw(framed(data, algorithm, size, block))))


def multi_dim(pixels: npt.NDArray[Any], type_tag: int, algorithm: str, order: str = "C") -> bytes:
    data = np.asarray(pixels, dtype=TYPED_ARRAY_TAGS[type_tag]).tobytes(order="C" if order == "C" else "F")
    rows, columns = pixels.shape
    size = np.dtype(TYPED_ARRAY_TAGS[type_tag]).itemsize
    typed = tag(type_tag, compressed(data, algorithm, size))
    return tag(40 if order == "C" else 1040, array(array(uint(rows), uint(columns)), typed))


IDENTITY = {"series_id": uint(7), "series_unique_id": text("01FZ")}


def start(**extra: bytes) -> bytes:
    fields = {
        "type": text("start"),
        **IDENTITY,
        "arm_date": tag(0, text("2022-04-28T12:00:00.500+02:00")),
        "channels": array(text("threshold_1"), text("threshold_2")),
        "number_of_images": uint(300),
        "image_size_x": uint(5),
        "image_size_y": uint(3),
        "incident_energy": float64(12398.0),
        "image_dtype": text("uint16"),
        "flatfield_enabled": b"\xf5",
    }
    return mapping(**{**fields, **extra})


def image(number: int = 4, **extra: bytes) -> bytes:
    fields = {
        "type": text("image"),
        **IDENTITY,
        "image_id": uint(number),
        "series_date": tag(0, text("2022-04-28T10:00:00Z")),
        "start_time": array(uint(3_000_000), uint(2_000_000)),
        "stop_time": array(uint(3_500_000), uint(2_000_000)),
        "real_time": array(uint(500_000), uint(2_000_000)),
        "data": mapping(threshold_1=multi_dim(PIXELS, 69, "bslz4")),
    }
    return mapping(**{**fields, **extra})


def end() -> bytes:
    return mapping(type=text("end"), **IDENTITY)


PIXELS = np.array([[0, 1, 2, 300, 4], [5, 6, 65535, 8, 9], [10, 11, 12, 13, 0]], dtype=np.uint16)


def corpus() -> list[bytes]:
    """Messages of every kind and coding, to start a fuzzer from."""
    messages = [start(), start(pixel_mask=mapping(threshold_1=multi_dim(PIXELS, 70, "lz4"))), end()]
    big = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50)
    for algorithm in ("", "none", "lz4", "bslz4"):
        for type_tag in (64, 65, 70, 86):
            for order in "CF":
                data = mapping(threshold_1=multi_dim(PIXELS, type_tag, algorithm, order))
                messages.append(image(data=data))
        messages.append(image(data=mapping(a=multi_dim(big, 69, algorithm), b=multi_dim(big, 78, algorithm))))
    messages.append(image(user_data=mapping(position_um=array(float64(1.5), uint(2)))))
    return messages
