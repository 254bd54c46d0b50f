"""Images as they come off the wire: still compressed, decoded when the pixels are asked for.

The algorithms are those of DECTRIS tag 56500: ``none``; ``lz4`` and ``bslz4`` in the framing of
the HDF5 filters of the same names, which is a big-endian header ``>QI`` (bytes in all, bytes per
block) followed by blocks that each carry their compressed length as ``>I``. The older Stream V1
says ``lz4`` for one bare block without any framing: that is ``lz4-block`` here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final, Self

import bitshuffle
import lz4.block
import numpy as np
import numpy.typing as npt

from pipelines.frame import BadFrame, Image
from pipelines.kernels import kernel

ALGORITHMS: Final = ("none", "lz4", "bslz4", "lz4-block")
ORDERS: Final = ("C", "F")

#: The largest image that is decoded unless the caller says otherwise, in bytes of pixels.
MAX_IMAGE_BYTES: Final = 1 << 30

#: Red, green, blue, alpha.
MAX_CHANNELS: Final = 4

#: The filter refuses larger blocks, and no writer needs them: whole images are smaller.
MAX_BLOCK_BYTES: Final = (1 << 31) - 1

_HEADER: Final = struct.Struct(">QI")
_LENGTH: Final = struct.Struct(">I")

#: A byte of a bare lz4 block stands for at most so many of its content (block format, "match length").
MAX_LZ4_RATIO: Final = 255

#: More lz4 blocks than this are no image: each costs a call.
MAX_LZ4_BLOCKS: Final = 1 << 16

# Bitshuffle transposes groups of eight elements; a rest of fewer is stored as it is.
_GROUP: Final = 8


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """Pixels as the instrument sent them. Implements `pipelines.frame.Image`.

    What can be known without decompressing is checked when the object is made, so that a source
    refuses a bad image before it costs anything.

    Attributes
    ----------
    data : bytes-like
        The blob; never copied. Held as a read-only memoryview of bytes.
    shape : tuple of int
        Rows and columns; of a colour image rows, columns and channels.
    pixel_type : str
        numpy type string with the byte order of the wire ("<u2", ">f4", "|u1").
    algorithm : str
        "none", "lz4", "bslz4" or "lz4-block".
    order : str
        "C" when columns vary fastest (CBOR tag 40), "F" when rows do (tag 1040).
    element_bytes : int
        Size of the elements that bslz4 shuffled; 0 takes it from `pixel_type`.
    max_bytes : int
        Limit on the size of the pixels, against decompression bombs.

    Raises
    ------
    BadFrame
        If the type or algorithm is unknown, the image is larger than `max_bytes`, or the size
        that the blob declares is not what the shape and type need. A bare lz4 block declares none;
        it is held against the most that so many bytes can stand for.
    """

    data: memoryview
    shape: tuple[int, ...]
    pixel_type: str
    algorithm: str = "none"
    order: str = "C"
    element_bytes: int = 0
    max_bytes: int = field(default=MAX_IMAGE_BYTES, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", memoryview(self.data).cast("B").toreadonly())
        stored = _stored_type(self.pixel_type)
        if self.algorithm not in ALGORITHMS:
            raise BadFrame(f"compression {self.algorithm!r} is not one of {', '.join(ALGORITHMS)}")
        if self.order not in ORDERS:
            raise BadFrame(f"order {self.order!r} is not C or F")
        rows, columns, *channels = self.shape
        if rows < 1 or columns < 1:
            raise BadFrame(f"image has {rows} rows and {columns} columns")
        if len(channels) > 1 or not all(1 <= n <= MAX_CHANNELS for n in channels):
            raise BadFrame(f"image of {self._size}: expected rows, columns and 1 to {MAX_CHANNELS} channels")
        needed = self._needed_bytes
        if needed > self.max_bytes:
            raise BadFrame(
                f"image of {self._size} pixels of {stored.itemsize} bytes declares {needed} bytes,"
                f" the limit is {self.max_bytes}"
            )
        if self.algorithm == "lz4-block":
            self._check_bare_block(needed)
            return
        declared = self._declared_bytes()
        if declared != needed:
            raise BadFrame(
                f"image of {self._size} {stored.str} pixels needs {needed} bytes,"
                f" its {self.algorithm} blob {'holds' if self.algorithm == 'none' else 'declares'} {declared}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a pixel, in native byte order."""
        return _stored_type(self.pixel_type).newbyteorder("=")

    def array(self) -> npt.NDArray[Any]:
        """Return the pixels [row, column(, channel)], C order, native byte order.

        For uncompressed native pixels this is a read-only view of `data`: copy it when it has to
        outlive them.

        Raises
        ------
        BadFrame
            If the blob is truncated or does not decode.
        """
        stored = _stored_type(self.pixel_type)
        flat = np.frombuffer(self._decoded(), dtype=stored)
        pixels = flat.reshape(self.shape, order="C" if self.order == "C" else "F")
        return np.ascontiguousarray(pixels, dtype=self.dtype)

    def with_data(self, data: memoryview | bytes | bytearray) -> Self:
        """Return the same image over another buffer that holds the same bytes."""
        return replace(self, data=memoryview(data))

    def header(self) -> dict[str, Any]:
        """Return all but the data, as plain values that any serialiser takes."""
        return {
            "shape": list(self.shape),
            "pixel_type": self.pixel_type,
            "algorithm": self.algorithm,
            "order": self.order,
            "element_bytes": self.element_bytes,
            "max_bytes": self.max_bytes,
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any], data: memoryview | bytes | bytearray) -> Self:
        """Put together what `header` took apart.

        Raises
        ------
        BadFrame
            As the constructor.
        """
        return cls(memoryview(data), **{**header, "shape": tuple(map(int, header["shape"]))})

    @property
    def _size(self) -> str:
        return " x ".join(map(str, self.shape))

    @property
    def _needed_bytes(self) -> int:
        return math.prod(self.shape) * _stored_type(self.pixel_type).itemsize

    def _shuffled_bytes(self) -> int:
        return self.element_bytes or _stored_type(self.pixel_type).itemsize

    def _declared_bytes(self) -> int:
        """Return how many bytes of pixels the blob says it holds; check its header."""
        if self.algorithm == "none":
            return self.data.nbytes
        if self.data.nbytes < _HEADER.size:
            raise BadFrame(f"{self.algorithm} blob of {self.data.nbytes} bytes is shorter than its header")
        declared, block = _HEADER.unpack_from(self.data)
        if not 1 <= block <= MAX_BLOCK_BYTES:
            raise BadFrame(f"{self.algorithm} blob declares blocks of {block} bytes")
        if self.algorithm == "bslz4":
            element = self._shuffled_bytes()
            if not 1 <= element <= 16 or block % (_GROUP * element):
                raise BadFrame(
                    f"bslz4 blob has blocks of {block} bytes, which are not whole groups of"
                    f" {_GROUP} elements of {element} bytes"
                )
        return int(declared)

    def _check_bare_block(self, needed: int) -> None:
        most = min(MAX_LZ4_RATIO * self.data.nbytes, MAX_BLOCK_BYTES)
        if needed > most:
            raise BadFrame(
                f"image of {self._size} {_stored_type(self.pixel_type).str} pixels needs"
                f" {needed} bytes, an lz4 block of {self.data.nbytes} bytes holds at most {most}"
            )

    def _decoded(self) -> memoryview | bytearray | bytes:
        if self.algorithm == "none":
            return self.data
        if self.algorithm == "lz4-block":
            return _unpacked_block(self.data, self._needed_bytes, "lz4 block")
        declared, block = _HEADER.unpack_from(self.data)
        element = self._shuffled_bytes()
        # The shuffle leaves a rest of fewer than eight elements as it is, behind the last block.
        rest = declared % (_GROUP * element) if self.algorithm == "bslz4" else 0
        blob = np.frombuffer(self.data, dtype=np.uint8)
        self._check_blocks(blob, declared - rest, block, rest)
        return (
            self._unshuffled(blob, declared, block, element)
            if self.algorithm == "bslz4"
            else self._unpacked(block)
        )

    def _check_blocks(self, blob: npt.NDArray[np.uint8], packed: int, block: int, rest: int) -> None:
        # The decompressor trusts the length of a block: all of them must lie inside the blob.
        blocks = -(-packed // block)
        number, missing = _walk(blob, _HEADER.size, blocks)
        if number < blocks:
            raise BadFrame(
                f"{self.algorithm} blob: truncated: {missing} bytes of block {number} of {blocks} are missing"
            )
        if missing + rest != 0:
            raise BadFrame(
                f"{self.algorithm} blob: {-missing} bytes after the last of {blocks} blocks, expected {rest}"
            )

    def _unshuffled(self, blob: npt.NDArray[np.uint8], declared: int, block: int, element: int) -> memoryview:
        count, over = divmod(declared, element)
        if over:
            raise BadFrame(
                f"bslz4 blob declares {declared} bytes, which are no whole elements of {element} bytes"
            )
        try:
            decoded = bitshuffle.decompress_lz4(
                blob[_HEADER.size :], (count,), np.dtype(f"V{element}"), block // element
            )
        except (RuntimeError, ValueError, MemoryError) as error:
            raise BadFrame("bslz4 blob: a block does not decompress to its size") from error
        return memoryview(decoded.view(np.uint8))

    def _unpacked(self, block: int) -> bytearray:
        declared = _HEADER.unpack_from(self.data)[0]
        if declared > block * MAX_LZ4_BLOCKS:
            raise BadFrame(f"lz4 blob has blocks of {block} bytes, too small for {declared} bytes of pixels")
        decoded = bytearray(declared)
        at = _HEADER.size
        for start in range(0, declared, block):
            size = min(block, declared - start)
            length = int(_LENGTH.unpack_from(self.data, at)[0])
            piece = self.data[at + _LENGTH.size : at + _LENGTH.size + length]
            at += _LENGTH.size + length
            # A block that would not shrink is stored bare.
            stored = length == size
            decoded[start : start + size] = (
                piece if stored else _unpacked_block(piece, size, "lz4 blob: a block")
            )
        return decoded


def _unpacked_block(block: memoryview, size: int, what: str) -> bytes:
    """Return what an lz4 block holds, which has to be `size` bytes."""
    try:
        plain: bytes = lz4.block.decompress(block, uncompressed_size=size)
    except (lz4.block.LZ4BlockError, ValueError, MemoryError) as error:
        raise BadFrame(f"{what} does not decompress to its size of {size} bytes") from error
    if len(plain) != size:
        raise BadFrame(f"{what} decompresses to {len(plain)} bytes, expected {size}")
    return plain


@kernel("UniTuple(int64, 2)(Array(uint8, 1, 'C', readonly=True), int64, int64)")
def _walk(blob: npt.NDArray[np.uint8], at: int, blocks: int) -> tuple[int, int]:
    # From block to block. How many lie inside the blob, and how many bytes of the next one are
    # missing (below 0: bytes that are left behind the last block).
    end = blob.shape[0]
    for number in range(blocks):
        if at + 4 > end:
            return number, at + 4 - end
        length = 0
        for i in range(4):
            length = 256 * length + blob[at + i]
        at += 4 + length
        if at > end:
            return number, at - end
    return blocks, at - end


@lru_cache(64)
def _stored_type(pixel_type: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(pixel_type)
    except (TypeError, ValueError, SyntaxError) as error:
        raise BadFrame(f"pixel type {pixel_type!r} is unknown") from error
    if dtype.kind not in "uif" or dtype.itemsize > 8 or dtype.shape:
        raise BadFrame(f"pixel type {pixel_type!r} is not a whole or floating number of up to 64 bits")
    return dtype


def pack_image(image: Image) -> tuple[dict[str, Any], memoryview]:
    """Take an image apart for transport to another process.

    Returns
    -------
    header : dict
        Plain values (numbers, strings, lists).
    data : memoryview
        The bytes, not copied where the image holds them in one piece.

    Raises
    ------
    BadFrame
        If the pixels are of a type that cannot travel.
    """
    if not isinstance(image, EncodedImage):
        pixels = np.ascontiguousarray(image.array())
        _stored_type(pixels.dtype.str)
        flat = pixels.reshape(-1).view(np.uint8).data
        limit = max(MAX_IMAGE_BYTES, flat.nbytes)
        image = EncodedImage(flat, image.shape, pixels.dtype.str, max_bytes=limit)
    return image.header(), image.data


def unpack_image(header: Mapping[str, Any], data: memoryview | bytes | bytearray) -> Image:
    """Return the image that `pack_image` took apart, over `data` (not copied).

    Raises
    ------
    BadFrame
        If header and data do not belong together.
    """
    return EncodedImage.from_header(header, data)


def encode_image(array: npt.NDArray[Any], algorithm: str, *, block_bytes: int | None = None) -> bytes:
    """Compress pixels as a detector does, for simulators and tests.

    Parameters
    ----------
    array : ndarray
        Any shape; taken in C order, its byte order kept.
    algorithm : str
        "none", "lz4", "bslz4" or "lz4-block".
    block_bytes : int, optional
        Size of a block before compression; 8 KiB for bslz4 and 1 MiB for lz4 by default.

    Raises
    ------
    ValueError
        If the algorithm is unknown.
    """
    raw = np.ascontiguousarray(array)
    if algorithm == "none":
        return raw.tobytes()
    if algorithm == "lz4-block":
        bare: bytes = lz4.block.compress(raw.reshape(-1).view(np.uint8).data, store_size=False)
        return bare
    if algorithm == "bslz4":
        block = block_bytes or 8192
        elements = raw.reshape(-1).view(f"u{raw.itemsize}")
        blob: bytes = bitshuffle.compress_lz4(elements, block // raw.itemsize).tobytes()
        return _HEADER.pack(raw.nbytes, block) + blob
    if algorithm == "lz4":
        block = block_bytes or 1 << 20
        data = raw.reshape(-1).view(np.uint8).data
        parts = [_HEADER.pack(raw.nbytes, block)]
        for start in range(0, raw.nbytes, block):
            piece = data[start : start + block]
            packed = lz4.block.compress(piece, store_size=False)
            # A block that does not shrink is stored bare; its length tells the reader so.
            stored = packed if len(packed) < len(piece) else bytes(piece)
            parts += [_LENGTH.pack(len(stored)), stored]
        return b"".join(parts)
    raise ValueError(f"compression {algorithm!r} is not one of {', '.join(ALGORITHMS)}")
