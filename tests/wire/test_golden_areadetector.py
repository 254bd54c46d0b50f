"""areaDetector's messages, written down from the plug-in's source, against the decoder."""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import lz4.block
import numpy as np
import pytest

from daemon.sources.areadetector.codec import Array, Decoder
from pipelines.frame import BadFrame
from pipelines.images import EncodedImage
from tests.wire import golden_areadetector as g

BIG = np.random.default_rng(11).poisson(0.2, (203, 122)).astype(np.uint16)


def taken(parts: list[bytes], **options: Any) -> Array:
    """What the decoder makes of an array that can be read."""
    array = Decoder(**options).decode(parts)
    assert array.image is not None, array.reason
    assert array.reason == ""
    return array


def pixels(parts: list[bytes], **options: Any) -> Any:
    image = taken(parts, **options).image
    assert isinstance(image, EncodedImage)
    return image.array()


def refused(parts: list[bytes], **options: Any) -> Array:
    array = Decoder(**options).decode(parts)
    assert array.image is None
    assert 0 < len(array.reason) < 500
    return array


def test_every_version_has_its_columns_first_or_its_rows() -> None:
    """The blob is the same: 5 pixels of the first row, then the next row. The shape is not."""
    for version, shape in (("1.4", [3, 5]), ("1.3", [5, 3]), ("1.0", [5, 3])):
        parts = g.array(version=version)
        assert g.fields(parts)["shape"] == shape
        array = taken(parts)
        assert array.image is not None
        assert array.image.shape == (3, 5)
        assert array.image.array().tolist() == g.PIXELS.tolist()
        assert array.frame == 17
        assert array.attributes == g.fields(parts)["ndattr"]
        assert (array.time_stamp, array.complaint) == (None if version == "1.0" else g.STAMP, "")


def test_the_order_of_the_shape_can_be_told() -> None:
    for version in ("1.3", "1.4"):
        assert (pixels(g.array(version=version, shape="[5,3]"), shape_order="xy") == g.PIXELS).all()
        assert (pixels(g.array(version=version, shape="[3,5]"), shape_order="yx") == g.PIXELS).all()
        # As many pixels, other rows: nothing but this key could tell.
        assert pixels(g.array(version=version, shape="[3,5]"), shape_order="xy").shape == (5, 3)


@pytest.mark.parametrize("kind", g.TYPES)
def test_types_of_pixels(kind: str) -> None:
    values = np.minimum(g.PIXELS, 60_000).astype(g.TYPES[kind])
    if kind.startswith("float"):
        values[1, 2] = np.nan
    found = pixels(g.array(blob=values.tobytes(), kind=kind))
    assert found.dtype == np.dtype(kind)
    assert found.dtype.isnative
    assert np.array_equal(found, values, equal_nan=kind.startswith("float"))


def test_nothing_is_copied() -> None:
    blob = bytearray(BIG.tobytes())
    array = taken([g.header(shape="[203,122]"), memoryview(blob)])  # type: ignore[list-item]
    assert array.image is not None
    view = array.image.array()
    blob[0:2] = b"\x39\x30"
    assert view[0, 0] == 12345


@pytest.mark.parametrize("key", ["endianness", "endianess"])
def test_byte_order(key: str) -> None:
    swapped = g.PIXELS.astype(">u2").tobytes()
    assert (pixels(g.array(blob=swapped, more=f'"{key}":"big", ')) == g.PIXELS).all()
    assert (pixels(g.array(more=f'"{key}":"little", ')) == g.PIXELS).all()
    assert "endianness: expected 'little' or 'big'" in refused(g.array(more=f'"{key}":"middle", ')).reason


@pytest.mark.parametrize("encoding", ["bslz4", "lz4hdf5"])
def test_codecs_by_their_definition(encoding: str) -> None:
    blob = g.by_definition(encoding)
    assert (pixels(g.array(blob=blob, encoding=encoding)) == g.PIXELS).all()


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "float64"])
@pytest.mark.parametrize("encoding", ["bslz4", "lz4"])
def test_codecs_by_their_libraries(encoding: str, kind: str) -> None:
    values = BIG.astype(kind)
    blob = g.by_library(encoding, values)
    parts = g.array(blob=blob, kind=kind, encoding=encoding, shape="[203,122]")
    assert np.array_equal(pixels(parts), values)
    # With the framing of the HDF5 filter too, as other senders of array-1.0 have it.
    if encoding == "bslz4":
        framing = values.nbytes.to_bytes(8, "big") + (8192).to_bytes(4, "big")
        parts = g.array(blob=framing + blob, kind=kind, encoding=encoding, shape="[203,122]")
        assert np.array_equal(pixels(parts), values)


def framed_lz4(data: bytes, block: int = 5000) -> bytes:
    """The HDF5 filter's framing around blocks that lz4 made."""
    blocks = [lz4.block.compress(data[k : k + block], store_size=False) for k in range(0, len(data), block)]
    return struct.pack(">QI", len(data), block) + b"".join(struct.pack(">I", len(b)) + b for b in blocks)


def test_rubbish_behind_a_compressed_blob() -> None:
    """The plug-in sends as many bytes as the pixels take, whatever the codec made of them."""
    for values in (BIG, BIG[:200, :120]):  # with and without a rest that bitshuffle leaves as it is
        shape = f"[{values.shape[0]},{values.shape[1]}]"
        for encoding, blob in (
            ("bslz4", g.by_library("bslz4", values)),
            ("lz4hdf5", framed_lz4(values.tobytes())),
        ):
            assert len(blob) < values.nbytes
            parts = g.array(blob=g.padded(blob, values.nbytes), encoding=encoding, shape=shape)
            assert len(parts[1]) == values.nbytes
            assert np.array_equal(pixels(parts), values)
    bare = g.padded(g.by_library("lz4", BIG), BIG.nbytes)
    reason = refused(g.array(blob=bare, encoding="lz4", shape="[203,122]")).reason
    assert "where it ends is not known" in reason
    assert "Compressor" in reason


@pytest.mark.parametrize("encoding", ["bslz4", "lz4"])
def test_a_truncated_blob_does_not_decode(encoding: str) -> None:
    whole = g.by_library(encoding, BIG)
    for cut in (len(whole) - 1, len(whole) // 2, 40, 5, 3, 1, 0):
        array = Decoder().decode(g.array(blob=whole[:cut], encoding=encoding, shape="[203,122]"))
        if array.image is None:
            assert "blob" in array.reason or "lz4" in array.reason
            assert array.frame == 17
        else:
            with pytest.raises(BadFrame, match="lz4 bl"):
                array.image.array()


@pytest.mark.parametrize("encoding", ["jpeg", "blosc", "zlib", "nonsense"])
def test_codecs_that_are_not_read_say_what_to_do(encoding: str) -> None:
    array = refused(g.array(encoding=encoding))
    assert f"encoding '{encoding}' is not read: set the Compressor of NDPluginCodec" in array.reason
    assert (array.frame, array.time_stamp) == (17, g.STAMP)


@pytest.mark.parametrize(
    ("shape", "mode", "name"),
    [
        ("[3,4,3]", 2, "RGB1"),
        ("[3,3,4]", 3, "RGB2"),
        ("[3,3,5]", 4, "RGB3"),
        ("[3,3,5]", None, "unknown"),
        ("[3,5]", 1, "Bayer"),
        ("[3,5]", 6, "YUV422"),
    ],
)
def test_colour_is_refused_by_name(shape: str, mode: int | None, name: str) -> None:
    ndattr = "{}" if mode is None else f'{{"ColorMode":{mode}}}'
    array = refused(g.array(shape=shape, ndattr=ndattr))
    assert f"ColorMode {name}: colour is not read: send Mono" in array.reason
    assert array.frame == 17


def test_a_stack_of_one_is_an_image() -> None:
    assert (pixels(g.array(shape="[1,3,5]")) == g.PIXELS).all()
    assert (pixels(g.array(version="1.3", shape="[5,3,1,1]")) == g.PIXELS).all()
    assert "expected an image of 2 dimensions, got 3" in refused(g.array(shape="[7,4,5]")).reason
    assert "expected an image of 2 dimensions, got 1" in refused(g.array(shape="[15]")).reason


# What the plug-in writes that is no JSON.


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
def test_numbers_that_are_none(value: str) -> None:
    array = taken(g.array(ndattr=f'{{"SamX":{value},"SamY":2.5,"Note":"is nan, \\"inf\\""}}'))
    assert array.attributes == {"SamX": None, "SamY": 2.5, "Note": 'is nan, "inf"'}
    assert array.complaint == ""
    assert taken(g.array(stamp=value)).time_stamp is None


@pytest.mark.parametrize(
    "ndattr",
    [
        '{"Path":"C:\\data\\x"}',  # a backslash that C++ did not escape
        '{"Note":"he said "yes" to it"}',
        '{"Flag":\x01,"SamX":1}',  # an 8-bit number, written as a character
        '{"Gone":,"SamX":1}',  # an undefined one
        '{"A":' + "[" * 50_000,
        '{"A":"\\ud800"}',
        '{"A":' + "9" * 5000 + "}",
        '{"A":' + "9" * 30 + "}",
        '{"A":{"B":' * 40 + "1" + "}" * 80,
        "[1,2]",
        "7",
        "null",
    ],
)
def test_attributes_that_cannot_be_read_cost_no_image(ndattr: str) -> None:
    parts = g.array(ndattr=ndattr)
    array = taken(parts)
    assert array.image is not None
    assert (array.image.array() == g.PIXELS).all()
    assert array.complaint.startswith("NDAttributes left out: ")
    assert len(array.complaint) < 500
    json.dumps(array.attributes, allow_nan=False).encode()
    assert (array.frame, array.time_stamp) == (17, g.STAMP)


def test_attributes_in_another_coding() -> None:
    parts = g.array(ndattr='{"Unit":"@m"}')
    parts[0] = parts[0].replace(b"@", b"\xb5")  # a Latin-1 micro sign
    assert taken(parts).attributes == {"Unit": "�m"}


def test_quotes_are_no_trap() -> None:
    """Headers of the largest size that have to be repaired, in time proportional to their size."""
    began = time.process_time()
    for trap in ('"' + '\\"' * 400_000, '"' * 900_001, "nan" * 300_000, "-" * 900_000, '"\\' * 400_000):
        Decoder().decode(g.array(ndattr='{"A":nan,"B":' + trap))
    assert time.process_time() - began < 10


# Positions.


def test_positions_from_attributes() -> None:
    options: dict[str, Any] = {"position_keys": ("SamX", "SamY"), "position_unit_um": 1000.0}
    assert taken(g.array(), **options).position_um == (1250.0, -3000.0)
    assert taken(g.array()).position_um is None
    for ndattr, got in (
        ('{"SamX":1}', "'SamY', got None"),
        ('{"SamX":nan,"SamY":1}', "'SamX', got None"),
        ('{"SamX":"1","SamY":1}', "'SamX', got '1'"),
        ('{"SamX":true,"SamY":1}', "'SamX', got True"),
    ):
        array = refused(g.array(ndattr=ndattr), **options)
        assert f"position_keys: expected a number in NDAttribute {got}" in array.reason
        assert array.frame == 17
    broken = refused(g.array(ndattr='{"SamX":1,"SamY":,}'), **options)
    assert "NDAttributes left out" in broken.reason


# Bad headers and messages.


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "message without parts"),
        ([b"", g.BLOB], "header of 0 characters is not JSON"),
        ([b"hello", g.BLOB], "header of 5 characters is not JSON"),
        ([b"null", g.BLOB], "header is not a JSON object: None"),
        ([b"[" * 100_000, g.BLOB], "nested too deeply"),
        ([b"\xff\xfe", g.BLOB], "header of 2 bytes is no text"),
        ([b'{"a":' * 5000 + b"1" + b"}" * 5000, g.BLOB], "nested too deeply"),
        ([b"{}", g.BLOB], "header: key 'htype' is missing"),
        ([g.BLOB, g.header()], "header of"),
        ([b" " * (1 << 20) + b"{}", g.BLOB], "the limit is 1048576"),
        ([b'{"htype":"dimage-1.0","series":1,"frame":2}', b""], 'type "dectris-v1" reads it'),
        ([b'{"htype":"bsr_d-1.0"}', b""], "htype 'bsr_d-1.0' is not 'array-1.0'"),
        ([b'{"htype":["array-1.0","chunk-1.0"]}', b""], "is not 'array-1.0'"),
        ([b'{"htype":[["array-1.0"]]}', b""], "is not 'array-1.0'"),
        ([b'{"htype":{"array-1.0":1},"frame":5}', b""], "is not 'array-1.0'"),
    ],
)
def test_what_is_no_array(parts: list[bytes], reason: str) -> None:
    array = refused(parts)
    assert reason in array.reason
    assert array.frame is None


@pytest.mark.parametrize("number", ["-1", "1.5", '"4"', "null", "true", "1e300", str(1 << 63), "nan", "[]"])
def test_a_number_that_is_none(number: str) -> None:
    array = refused(g.array(number))
    assert "header: frame: expected a whole number, got" in array.reason
    assert array.frame is None


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (g.array()[:1], "message of 1 parts, expected 2: header and pixels"),
        ([*g.array(), b""], "message of 3 parts"),
        (g.array(blob=g.BLOB[:-1]), "needs 30 bytes, its none blob holds 29"),
        (g.array(blob=b""), "needs 30 bytes, its none blob holds 0"),
        (g.array(blob=g.BLOB + b"\0"), "its none blob holds 31"),
        (g.array(kind="uint32"), "needs 60 bytes"),
        (g.array(kind="complex64"), "type 'complex64' is not one of int8, uint8"),
        (g.array(shape="[3,6]"), "needs 36 bytes"),
        (g.array(shape="[]"), "shape: expected the numbers of columns and rows, got []"),
        (g.array(shape="[0,5]"), "shape: expected"),
        (g.array(shape="[-3,-5]"), "shape: expected"),
        (g.array(shape="[3.0,5]"), "shape: expected"),
        (g.array(shape="[true,15]"), "shape: expected"),
        (g.array(shape='"3x5"'), "shape: expected"),
        (g.array(shape="[1,1,1,1,1,1,1,1,1,3,5]"), "shape: expected"),
        (g.array(shape="[" + "9" * 400 + ",1]"), "shape: expected"),
        (g.array(shape="[1048576,1048576]"), "the limit is"),
        (g.array(shape="[4294967295,4294967295]", encoding="bslz4"), "the limit is"),
        (g.array(encoding="bslz4", blob=b"\0" * 11), "shorter than its header"),
        (g.array(encoding="lz4hdf5", blob=b""), "shorter than its header"),
        (g.array(more='"encoding":7, '), "header: has the key 'encoding' twice"),
    ],
)
def test_bad_arrays_say_which_and_why(parts: list[bytes], reason: str) -> None:
    array = refused(parts)
    assert reason in array.reason
    if "twice" not in reason:
        assert array.frame == 17


def test_limits() -> None:
    assert "message of" in refused(g.array(), max_message_bytes=100).reason
    assert refused(g.array(), max_message_bytes=100).frame == 17
    zeros = np.zeros((2000, 2000), np.uint16)
    for encoding in ("bslz4", "lz4"):
        parts = g.array(blob=g.by_library(encoding, zeros), encoding=encoding, shape="[2000,2000]")
        assert len(parts[1]) < 100_000
        assert (pixels(parts) == zeros).all()
        assert "the limit is 7999999" in refused(parts, max_image_bytes=7_999_999).reason
