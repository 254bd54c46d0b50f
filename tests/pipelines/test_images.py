"""Images keep their pixels through compression and transport; broken ones are refused by name."""

from __future__ import annotations

import json
from typing import Any

import bitshuffle
import h5py
import hdf5plugin
import lz4.block
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipelines.frame import BadFrame, PlainImage
from pipelines.images import ALGORITHMS, EncodedImage, encode_image, pack_image, unpack_image

TYPES = ["u1", "<u2", ">u2", "<u4", ">i4", "<i8", "<f2", ">f4", "<f8"]
ARRAYS = st.sampled_from(TYPES).flatmap(
    lambda t: hnp.arrays(np.dtype(t), hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))
)

COLOURS = st.sampled_from(TYPES[:3]).flatmap(
    lambda t: hnp.arrays(np.dtype(t), st.tuples(*[st.integers(1, 20)] * 2, st.integers(1, 4)))
)


def encoded(pixels: npt.NDArray[Any], algorithm: str, order: str = "C", **more: Any) -> EncodedImage:
    # Axes in reverse, channels and all.
    wire = pixels if order == "C" else np.ascontiguousarray(pixels.T)
    blob = encode_image(wire, algorithm, **more)
    return EncodedImage(memoryview(blob), pixels.shape, pixels.dtype.str, algorithm, order)


@settings(max_examples=150, deadline=None)
@given(ARRAYS | COLOURS, st.sampled_from(ALGORITHMS), st.sampled_from("CF"))
def test_pixels_survive(pixels: npt.NDArray[Any], algorithm: str, order: str) -> None:
    header, data = pack_image(encoded(pixels, algorithm, order))
    # The header must survive any serialiser, the data a copy into other memory that may be written to.
    image = unpack_image(json.loads(json.dumps(header)), bytearray(data))
    decoded = image.array()
    assert image.shape == pixels.shape
    assert image.dtype == decoded.dtype == pixels.dtype.newbyteorder("=")
    assert decoded.astype(pixels.dtype).tobytes() == pixels.tobytes()


@settings(max_examples=50, deadline=None)
@given(ARRAYS | COLOURS)
def test_plain_images_travel(pixels: npt.NDArray[Any]) -> None:
    for given_pixels in (pixels, pixels.swapaxes(0, 1), pixels[::-1, ::-1]):
        header, data = pack_image(PlainImage(given_pixels))
        decoded = unpack_image(header, bytes(data)).array()
        assert decoded.astype(pixels.dtype).tobytes() == given_pixels.tobytes()


def test_nothing_is_copied_on_the_way() -> None:
    pixels = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    header, data = pack_image(PlainImage(pixels))
    assert np.shares_memory(unpack_image(header, data).array(), pixels)
    image = encoded(pixels, "bslz4")
    packed = pack_image(image)[1]
    assert np.shares_memory(np.frombuffer(packed, np.uint8), np.frombuffer(image.data, np.uint8))


def test_another_buffer_with_the_same_bytes() -> None:
    pixels = np.arange(15, dtype=np.uint16).reshape(3, 5)
    image = encoded(pixels, "bslz4")
    memory = bytearray(image.data)
    moved = image.with_data(memory)
    assert (moved.array() == pixels).all()
    assert moved == image
    with pytest.raises(BadFrame, match="bslz4 blob"):
        image.with_data(memory[:-1]).array()


@pytest.mark.parametrize("algorithm", ["lz4", "bslz4"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_the_framing_is_that_of_the_hdf5_filters(tmp_path: Any, algorithm: str, dtype: str) -> None:
    """A blob written into a chunk of an HDF5 file is read by the filter of that name, and back."""
    pixels = np.random.default_rng(3).poisson(2.0, (61, 77)).astype(dtype)
    filters = {"lz4": hdf5plugin.LZ4(), "bslz4": hdf5plugin.Bitshuffle(cname="lz4")}[algorithm]
    with h5py.File(tmp_path / "frame.h5", "w") as file:
        ours = file.create_dataset("ours", pixels.shape, pixels.dtype, chunks=pixels.shape, **filters)
        ours.id.write_direct_chunk((0, 0), encode_image(pixels, algorithm))
        theirs = file.create_dataset("theirs", data=pixels, chunks=pixels.shape, **filters)
        blob = theirs.id.read_direct_chunk((0, 0))[1]
    with h5py.File(tmp_path / "frame.h5") as file:
        assert (file["ours"][()] == pixels).all()
    read = EncodedImage(memoryview(blob), pixels.shape, pixels.dtype.str, algorithm)
    assert (read.array() == pixels).all()


def test_bitshuffle_reads_what_we_write() -> None:
    pixels = np.random.default_rng(4).poisson(0.1, (100, 100)).astype(np.uint32)
    blob = np.frombuffer(encode_image(pixels, "bslz4")[12:], np.uint8)
    assert (bitshuffle.decompress_lz4(blob, pixels.shape, pixels.dtype, 8192 // 4) == pixels).all()


BLOB = encode_image(np.arange(100, dtype="<u2"), "bslz4", block_bytes=64)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm": "gzip"}, "compression 'gzip' is not one of none, lz4, bslz4"),
        ({"order": "A"}, "order 'A'"),
        ({"shape": (10, 11)}, "needs 220 bytes, its bslz4 blob declares 200"),
        ({"shape": (-10, -10)}, "-10 rows"),
        ({"shape": (0, 10)}, "0 rows"),
        ({"shape": (2, 10, 5)}, "expected rows, columns and 1 to 4 channels"),
        ({"shape": (10, 10, 0)}, "expected rows, columns and 1 to 4 channels"),
        ({"shape": (5, 5, 2, 2)}, "expected rows, columns and 1 to 4 channels"),
        ({"shape": (1 << 40, 1 << 40)}, "the limit is"),
        ({"pixel_type": "<u4"}, "needs 400 bytes"),
        ({"pixel_type": "O"}, "not a whole or floating number"),
        ({"pixel_type": "c16"}, "not a whole or floating number"),
        ({"pixel_type": "(2,)u1"}, "not a whole or floating number"),
        ({"pixel_type": "nonsense"}, "is unknown"),
        ({"max_bytes": 199}, "declares 200 bytes, the limit is 199"),
        ({"data": memoryview(b"")}, "shorter than its header"),
        ({"data": memoryview(BLOB[:8] + b"\0\0\0\0" + BLOB[12:])}, "blocks of 0 bytes"),
        ({"data": memoryview(BLOB[:8] + b"\0\0\0\x09" + BLOB[12:])}, "not whole groups of 8"),
        ({"element_bytes": 99}, "not whole groups of 8"),
    ],
)
def test_what_cannot_be_is_refused_at_once(changes: dict[str, Any], reason: str) -> None:
    fields = {"data": memoryview(BLOB), "shape": (10, 10), "pixel_type": "<u2", "algorithm": "bslz4"}
    assert EncodedImage(**fields).array().ravel().tolist() == list(range(100))  # type: ignore[arg-type]
    with pytest.raises(BadFrame, match=reason.replace("(", r"\(")):
        EncodedImage(**{**fields, **changes})


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (BLOB[:12], "truncated: 4 bytes of block 0 of 3"),
        (BLOB[:40], "truncated: [0-9]+ bytes of block 0 of 3"),
        (BLOB + b"12345678", "after the last"),
        (BLOB[:12] + b"\0\0\0\x01" + BLOB[16:], "bslz4 blob: "),
    ],
)
def test_what_only_decoding_shows(blob: bytes, reason: str) -> None:
    image = EncodedImage(memoryview(blob), (10, 10), "<u2", "bslz4")
    with pytest.raises(BadFrame, match=reason):
        image.array()


def test_a_bare_lz4_block_is_what_lz4_itself_writes() -> None:
    pixels = np.random.default_rng(6).poisson(0.2, (50, 60)).astype("<u2")
    theirs = lz4.block.compress(pixels.tobytes(), store_size=False)
    assert (EncodedImage(memoryview(theirs), (50, 60), "<u2", "lz4-block").array() == pixels).all()
    ours = encode_image(pixels, "lz4-block")
    assert lz4.block.decompress(ours, uncompressed_size=pixels.nbytes) == pixels.tobytes()


@pytest.mark.parametrize(
    ("shape", "cut", "reason"),
    [
        ((10, 10), 1, "lz4 block does not decompress to its size of 200 bytes"),
        ((9, 10), 0, "lz4 block does not decompress to its size of 180 bytes"),
        ((11, 10), 0, "lz4 block decompresses to 200 bytes, expected 220"),
    ],
)
def test_a_bare_lz4_block_that_is_not_right(shape: tuple[int, int], cut: int, reason: str) -> None:
    block = encode_image(np.arange(100, dtype="<u2"), "lz4-block")
    image = EncodedImage(memoryview(block[: len(block) - cut]), shape, "<u2", "lz4-block")
    with pytest.raises(BadFrame, match=reason):
        image.array()


def test_a_bare_lz4_block_cannot_claim_more_than_it_can_hold() -> None:
    """The format's own bound, so that few bytes set aside no gigabyte."""
    best = encode_image(np.zeros(1 << 20, np.uint8), "lz4-block")
    assert (1 << 20) / len(best) <= 255
    EncodedImage(memoryview(best), (1 << 10, 1 << 10), "|u1", "lz4-block")
    with pytest.raises(BadFrame, match=r"an lz4 block of 10 bytes holds at most 2550"):
        EncodedImage(memoryview(best[:10]), (1 << 10, 1 << 10), "|u1", "lz4-block")
    with pytest.raises(BadFrame, match="the limit is 100"):
        EncodedImage(memoryview(best), (1 << 10, 1 << 10), "|u1", "lz4-block", max_bytes=100)


def test_an_unknown_algorithm_to_encode() -> None:
    with pytest.raises(ValueError, match="'zip' is not one of"):
        encode_image(np.zeros((2, 2)), "zip")
