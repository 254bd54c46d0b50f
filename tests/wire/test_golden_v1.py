"""Decoding of Stream V1 messages that were put together by hand is exact to the bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from daemon.sources.base import Arrival, Bad, Event, SeriesEnd, SeriesStart
from daemon.sources.dectris.v1_codec import Decoder
from pipelines.frame import BadFrame
from tests.wire import golden_v1 as g
from tests.wire.golden import framed

ENCODINGS = [packing + order for packing in ("", "lz4", "bs8-lz4", "bs16-lz4", "bs32-lz4") for order in "<>"]


def decode(parts: list[bytes], **limits: int) -> list[Event]:
    return Decoder(**limits).decode(parts)


def only(events: list[Event]) -> Event:
    assert len(events) == 1, events
    return events[0]


def arrival(parts: list[bytes], **limits: int) -> Arrival:
    event = only(decode(parts, **limits))
    assert isinstance(event, Arrival), event
    return event


def bad(parts: list[bytes], **limits: int) -> Bad:
    event = only(decode(parts, **limits))
    assert isinstance(event, Bad), event
    return event


def started(parts: list[bytes], **limits: int) -> tuple[SeriesStart, list[str]]:
    """Return the start, and the complaints that came with it."""
    start, *rest = decode(parts, **limits)
    assert isinstance(start, SeriesStart), start
    reasons = []
    for event in rest:
        assert isinstance(event, Bad)
        assert (event.detector_series, event.frame) == (start.detector_series, None)
        reasons.append(event.reason)
    return start, reasons


def test_a_series_written_out_in_full() -> None:
    decoder = Decoder()
    header = [
        b'{"header_detail":"basic","htype":"dheader-1.0","series":12}',
        b'{"nimages":2,"ntrigger":1,"photon_energy":8041.0,"data_collection_date":"1970-01-01T00:01:40Z"}',
    ]
    image = [
        b'{"frame":1,"hash":"","htype":"dimage-1.0","series":12}',
        b'{"encoding":"<","htype":"dimage_d-1.0","shape":[3,2],"size":12,"type":"uint16"}',
        bytes.fromhex("0001 0203 ffff 0000 8000 0007"),
        b'{"htype":"dconfig-1.0","real_time":250000000,"start_time":1500000000,"stop_time":1750000000}',
    ]
    start = only(decoder.decode(header))
    assert isinstance(start, SeriesStart)
    assert (start.detector_series, start.n_frames, start.first_frame, start.channels) == ("12", 2, 0, ("",))
    event = only(decoder.decode(image))
    assert isinstance(event, Arrival)
    assert (event.detector_series, event.frame, event.channel) == ("12", 1, "")
    assert event.acquired == 100 + 1.5
    assert event.metadata == {"real_time_s": 0.25}
    # [x, y] = [3, 2] is two rows of three columns.
    assert event.image.array().tolist() == [[0x0100, 0x0302, 0xFFFF], [0, 0x0080, 0x0700]]
    image[1] = image[1].replace(b'"<"', b'">"')
    event = only(decoder.decode(image))
    assert isinstance(event, Arrival)
    assert event.image.array().tolist() == [[0x0001, 0x0203, 0xFFFF], [0, 0x8000, 7]]
    assert decoder.decode([b'{"htype":"dseries_end-1.0","series":12}']) == [SeriesEnd("12")]


@pytest.mark.parametrize("make", [g.by_definition, g.by_library])
@pytest.mark.parametrize("kind", g.TYPES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_and_type(
    encoding: str, kind: str, make: Callable[[npt.NDArray[Any], str], bytes]
) -> None:
    dtype = np.dtype(kind)
    # 4 x 11 elements: for most several blocks, a last one that is shorter, and a rest left unshuffled.
    # Half of the rows repeat, so that a compressor has something to copy.
    rng = np.random.default_rng(len(encoding) + dtype.itemsize)
    patterns = rng.integers(0, 256, (4, 11 * dtype.itemsize), dtype=np.uint8)
    patterns[1:3] = patterns[0]
    pixels = patterns.view(dtype)
    image = arrival(g.image(4, pixels, encoding, blob=make(pixels, encoding))).image
    decoded = image.array()
    assert image.shape == decoded.shape == (4, 11)
    assert decoded.dtype == image.dtype == dtype
    assert decoded.flags.c_contiguous
    assert decoded.tobytes() == pixels.tobytes()  # bits, so that NaN counts as well


@pytest.mark.parametrize("more", [(), (b"",), (b'{"position_um": [1, 2.5]}',), (b"note",)])
def test_the_quick_way_and_the_thorough_one_say_the_same(more: tuple[bytes, ...]) -> None:
    """Usual images take the quick one; a time written as 1.5e9 does not."""
    decoder = Decoder()
    decoder.decode(g.header())
    for encoding in ENCODINGS:
        usual = g.image(4, g.PIXELS.astype(np.uint32), encoding, *more)
        unusual = list(usual)
        unusual[3] = usual[3].replace(b"1500000000", b"1.5e9")
        assert decoder._usual_image(usual) is not None
        assert decoder._usual_image(unusual) is None
        assert decoder.decode(usual) == decoder.decode(unusual)


def test_shape_is_x_y() -> None:
    """A frame that is not square tells columns from rows."""
    parts = g.image(4, g.PIXELS)
    assert json.loads(parts[1])["shape"] == [5, 3]
    assert (arrival(parts).image.array() == g.PIXELS).all()


def test_header_of_each_detail() -> None:
    start, complaints = started(g.header("none"))
    assert (start.detector_series, start.n_frames, dict(start.metadata), complaints) == ("7", None, {}, [])
    start, complaints = started(g.header("basic"))
    assert (start.n_frames, dict(start.metadata), complaints) == (300, g.CONFIG, [])
    start, complaints = started(g.header("all"))
    metadata = dict(start.metadata)
    assert complaints == []
    assert (metadata.pop("pixel_mask")[""] == g.MASK).all()
    assert np.array_equal(np.float32(metadata.pop("flatfield")), g.FLATFIELD)
    assert np.array_equal(np.float32(metadata.pop("countrate_table")), g.COUNTRATE)
    assert metadata == g.CONFIG


def test_a_large_flat_field_is_only_described() -> None:
    config = {k: v for k, v in g.CONFIG.items() if "pixels" not in k}
    parts = g.header("all", config=config)
    parts[2:4] = g.table("dflatfield-1.0", np.ones((100, 200), np.float32))
    start, complaints = started(parts)
    assert complaints == []
    assert start.metadata["flatfield"] == "array of float32, 100 x 200"


@pytest.mark.parametrize("detail", ["none", "basic", "all"])
@pytest.mark.parametrize(
    ("appendix", "meaning"),
    [
        (b'{"run": "a", "points": [1, 2]}', {"run": "a", "points": [1, 2]}),
        (b"sample 3, second spot", "sample 3, second spot"),
        ("Körner µm".encode(), "Körner µm"),
        (b"[1.5]", [1.5]),
    ],
)
def test_appendix_of_a_header(detail: str, appendix: bytes, meaning: Any) -> None:
    start, complaints = started(g.header(detail, appendix))
    assert complaints == []
    assert start.metadata["user_data"] == meaning


def test_appendix_of_an_image() -> None:
    event = arrival(g.image(4, g.PIXELS, "<", b'{"position_um": [-1.5, 20], "note": "edge"}'))
    assert event.position_um == (-1.5, 20.0)
    assert event.metadata["user_data"]["note"] == "edge"
    event = arrival(g.image(4, g.PIXELS, "<", b"edge"))
    assert (event.position_um, event.metadata["user_data"]) == (None, "edge")
    # A detector whose appendix is set to nothing sends an empty part.
    assert "user_data" not in arrival(g.image(4, g.PIXELS, "<", b"")).metadata


def test_end() -> None:
    assert decode(g.end()) == [SeriesEnd("7")]
    complaint, end = decode([*g.end(), b"more"])
    assert complaint == Bad("dseries_end-1.0: message of 2 parts, expected 1", "7")
    assert end == SeriesEnd("7")


def test_times() -> None:
    """From the date that the header gave; not from that of another series; absolute ones as they are."""
    decoder = Decoder()
    assert acquired(decoder, g.image()) == 0.0
    decoder.decode(g.header())
    assert acquired(decoder, g.image()) == g.BEGAN + 1.5
    assert acquired(decoder, g.image(series=8)) == 0.0
    absolute = g.image()
    absolute[3] = g.js(htype="dconfig-1.0", start_time=1_700_000_000_250_000_000)
    assert acquired(decoder, absolute) == 1_700_000_000.25
    absolute[3] = g.js(htype="dconfig-1.0")
    assert acquired(decoder, absolute) == 0.0
    decoder.decode(g.header("none"))
    assert acquired(decoder, g.image()) == 0.0


def acquired(decoder: Decoder, parts: list[bytes]) -> float:
    event = only(decoder.decode(parts))
    assert isinstance(event, Arrival)
    return event.acquired


@pytest.mark.parametrize(
    ("config", "n_frames"),
    [
        ({"nimages": 20, "ntrigger": 4}, 80),
        ({"nimages": 20}, 20),
        ({"ntrigger": 4}, None),
        ({}, None),
    ],
)
def test_how_many_images_will_come(config: dict[str, Any], n_frames: int | None) -> None:
    start, complaints = started(g.header(config=config))
    assert (start.n_frames, complaints) == (n_frames, [])


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (g.header("everything"), "header_detail: expected one of none, basic, all, got 'everything'"),
        (g.header()[:1], "header_detail is 'basic', but there is no configuration"),
        ([*g.header()[:1], b"\xff\xfe"], "left out: configuration of 2 bytes is no text"),
        ([*g.header()[:1], b"{"], "configuration of 1 characters is not JSON"),
        ([*g.header()[:1], b"[1]"], "configuration is not a JSON object: [1]"),
        ([*g.header()[:1], b'{"a":1,"a":2}'], "configuration: has the key 'a' twice"),
        ([*g.header()[:1], b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"], "nested more than 32 times"),
        ([*g.header()[:1], b'{"a":' + b"[" * 100_000], "nested too deeply"),
        ([*g.header()[:1], b'{"a":' + b"1" * 5000 + b"}"], "a number too long"),
        ([*g.header()[:1], b'{"a":' + b"1" * 30 + b"}"], "more than 64 bits"),
        ([*g.header()[:1], b'{"a":"\\ud800"}'], "is no Unicode"),
        ([*g.header()[:1], b" " * (1 << 20) + b"{}"], "configuration of 1048578 bytes, the limit is 1048576"),
        (g.header(config={"nimages": "20"}), "nimages: expected a whole number, got '20'"),
        (g.header(config={"nimages": -1}), "nimages: expected a whole number, got -1"),
        (g.header(config={"nimages": 1 << 40, "ntrigger": 1000}), "images make no sense"),
        (g.header(config={"data_collection_date": "yesterday"}), "expected a date, got 'yesterday'"),
        (g.header(config={"data_collection_date": 5}), "expected a date, got 5"),
        (g.header("basic", b"one", b"two"), "4 parts, 1 more than its detail 'basic' has"),
        (g.header("basic", b"\xff"), "appendix left out: appendix of 1 bytes is no text"),
        (g.header("all")[:-2], "header_detail is 'all', but there is no countrate_table"),
    ],
)
def test_whatever_is_wrong_with_a_header_the_series_opens(parts: list[bytes], reason: str) -> None:
    start, complaints = started(parts)
    assert start.detector_series == "7"
    assert any(reason in complaint for complaint in complaints), complaints
    json.dumps(dict(start.metadata), allow_nan=False, default=str).encode()


@pytest.mark.parametrize(
    ("at", "part", "reason"),
    [
        (3, b"short", "flatfield left out: image of 3 x 5 <f4 pixels needs 60 bytes"),
        (
            2,
            g.js(htype="dflatfield-1.0", shape=[5], type="float32"),
            "flatfield left out: dflatfield-1.0: shape",
        ),
        (2, g.js(htype="dflatfield-1.0", shape=[5, 3], type="complex64"), "type 'complex64' is not one of"),
        (
            4,
            g.js(htype="dpixelmask-1.0", shape=[3, 5], type="uint32"),
            "shape (5, 3), the images have (3, 5)",
        ),
        (4, g.js(htype="dpixelmask-1.0", shape=[1 << 30, 1 << 30], type="uint32"), "the limit is"),
        (4, g.js(htype="dpixelmask-1.0", type="uint32"), "key 'shape' is missing"),
    ],
)
def test_a_bad_table_is_left_out(at: int, part: bytes, reason: str) -> None:
    parts = g.header("all")
    parts[at] = part
    start, complaints = started(parts)
    assert any(reason in complaint for complaint in complaints), complaints
    assert len(start.metadata) == len(g.CONFIG) + 2


def test_many_keys_are_no_trap() -> None:
    """A part of the largest size, with nothing but keys, the last one twice."""
    keys = [f'"{k}":0' for k in range(80_000)]
    began = time.process_time()
    _, complaints = started([g.header()[0], ("{" + ",".join([*keys, keys[-1]]) + "}").encode()])
    assert "'79999' twice" in complaints[0]
    assert time.process_time() - began < 5


def test_not_a_number_is_nothing() -> None:
    """JSON has none; senders in Python write them nevertheless."""
    start, complaints = started([g.header()[0], b'{"a": NaN, "b": [Infinity, 1e999], "c": 1.5}'])
    assert (dict(start.metadata), complaints) == ({"a": None, "b": [None, None], "c": 1.5}, [])


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "message without parts"),
        ([b""], "first part of 0 characters is not JSON"),
        ([b"\x00\xff"], "first part of 2 bytes is no text"),
        ([b"hello"], "first part of 5 characters is not JSON"),
        ([b"null"], "first part is not a JSON object: None"),
        ([b"{}"], "key 'htype' is missing"),
        ([b"[" * 100_000], "nested too deeply"),
        ([g.js(htype="dance-1.0", series=1)], "htype 'dance-1.0' is unknown, expected dheader-1.0"),
        ([g.js(htype=["dimage-1.0"], series=1)], "is unknown"),
        ([g.js(htype="dheader-1.0", header_detail="none")], "dheader-1.0: key 'series' is missing"),
        ([g.js(htype="dseries_end-1.0", series="7")], "dseries_end-1.0: series: expected a whole number"),
        (g.image(series=None), "dimage-1.0: series: expected a whole number, got None"),
        (g.image(series=True), "dimage-1.0: series: expected a whole number, got True"),
        (g.image(series=1 << 63), "dimage-1.0: series: expected a whole number"),
    ],
)
def test_garbage(parts: list[bytes], reason: str) -> None:
    event = bad(parts)
    assert reason in event.reason
    assert event.frame is None


@pytest.mark.parametrize("number", ["4", -1, 1.5, None, True, 1 << 64])
def test_a_number_that_is_none(number: Any) -> None:
    event = bad(g.image(number))
    assert "dimage-1.0: frame: expected a whole number" in event.reason
    assert (event.detector_series, event.frame) == ("7", None)


def claims(**said: Any) -> list[bytes]:
    """An image whose second part says something else."""
    parts = g.image()
    parts[1] = g.js(**{**json.loads(parts[1]), **said})
    return parts


IMAGE = g.image()
TIMES = {"htype": "dconfig-1.0", "start_time": 1}


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (IMAGE[:1], "image message of 1 parts, expected 4, or 5 with an appendix"),
        (IMAGE[:3], "image message of 3 parts"),
        ([*IMAGE, b"", b""], "image message of 6 parts"),
        ([IMAGE[0], IMAGE[2], IMAGE[1], IMAGE[3]], "dimage_d-1.0 of"),
        ([IMAGE[0], IMAGE[3], IMAGE[2], IMAGE[1]], "expected a part dimage_d-1.0, got htype 'dconfig-1.0'"),
        ([*IMAGE[:3], IMAGE[1]], "expected a part dconfig-1.0, got htype 'dimage_d-1.0'"),
        ([*IMAGE[:3], b"{}"], "expected a part dconfig-1.0, got htype None"),
        ([*IMAGE[:3], g.js(**TIMES)[:-1]], "dconfig-1.0 of"),
        ([*IMAGE[:3], g.js(**{**TIMES, "start_time": "1"})], "start_time: expected nanoseconds, got '1'"),
        ([*IMAGE[:3], g.js(**{**TIMES, "real_time": [1]})], "real_time: expected nanoseconds, got [1]"),
        ([*IMAGE[:3], g.js(**{**TIMES, "start_time": 10**400})], "start_time: expected nanoseconds"),
        ([*IMAGE, b'{"position_um": "here"}'], "position_um: expected 1 to 3 numbers, got 'here'"),
        ([*IMAGE, b'{"position_um": [NaN]}'], "position_um: expected 1 to 3 numbers"),
        ([*IMAGE, b"\xff"], "appendix of 1 bytes is no text"),
        (claims(shape=None), "shape: expected [x, y]"),
        (claims(shape=[5]), "shape: expected [x, y]"),
        (claims(shape=[5, 3, 1]), "shape: expected [x, y]"),
        (claims(shape=[5.0, 3.0]), "shape: expected [x, y]"),
        (claims(shape=[True, 30]), "shape: expected [x, y]"),
        (claims(shape=[10**4000, 10**4000]), "shape: expected [x, y]"),
        (claims(shape=[0, 3]), "image has 3 rows and 0 columns"),
        (claims(shape=[-5, -3]), "image has -3 rows and -5 columns"),
        (claims(shape=[3, 6]), "needs 36 bytes, its bslz4 blob declares 30"),
        (claims(shape=[1 << 20, 1 << 20]), "the limit is"),
        (claims(type="uint17"), "type 'uint17' is not one of uint8, uint16, uint32"),
        (claims(type=["uint16"]), "type ['uint16'] is not one of"),
        (claims(type="uint32"), "needs 60 bytes, its bslz4 blob declares 30"),
        (claims(encoding="bs64-lz4<"), "encoding 'bs64-lz4<' is not one of <, lz4<, bs8-lz4<"),
        (claims(encoding="bs16-lz4"), "encoding 'bs16-lz4' is not one of"),
        (claims(encoding="bs16<"), "encoding 'bs16<' is not one of"),
        (claims(encoding=""), "encoding '' is not one of"),
        (claims(encoding=16), "encoding 16 is not one of"),
        (claims(encoding="<"), "needs 30 bytes, its none blob holds"),
        (claims(size=29), "size: 29 bytes announced, the blob has"),
        (claims(size="30"), "size: expected a whole number"),
        ([IMAGE[0], g.js(htype="dimage_d-1.0"), *IMAGE[2:]], "dimage_d-1.0: key 'shape' is missing"),
        (g.image(blob=b""), "bslz4 blob of 0 bytes is shorter than its header"),
        (g.image(blob=b"x" * 11), "bslz4 blob of 11 bytes is shorter than its header"),
    ],
)
def test_bad_images_say_which_frame_and_why(parts: list[bytes], reason: str) -> None:
    event = bad(parts)
    assert reason in event.reason
    assert (event.detector_series, event.frame) == ("7", 4)
    assert len(event.reason) < 500


def test_a_size_is_not_required() -> None:
    parts = g.image()
    description = json.loads(parts[1])
    del description["size"]
    parts[1] = g.js(**description)
    assert (arrival(parts).image.array() == g.PIXELS).all()


def test_lz4_is_a_bare_block_here() -> None:
    """The framing of the HDF5 filter, which Stream V2 means by lz4, is not what V1 means."""
    blob = framed(g.PIXELS.astype("<u2").tobytes(), "lz4", 0, 64)
    with pytest.raises(BadFrame, match="lz4 block"):
        arrival(g.image(4, g.PIXELS, "lz4<", blob=blob)).image.array()


@pytest.mark.parametrize("packing", ["lz4", "bs16-lz4"])
def test_a_truncated_blob_is_refused(packing: str) -> None:
    pixels = np.arange(100, dtype=np.uint16).reshape(10, 10)
    whole = g.by_library(pixels, packing + "<")
    assert (arrival(g.image(4, pixels, packing + "<", blob=whole)).image.array() == pixels).all()
    for cut in range(12, len(whole)):
        event = arrival(g.image(4, pixels, packing + "<", blob=whole[:cut]))
        with pytest.raises(BadFrame, match="lz4 bl"):
            event.image.array()
    event = arrival(g.image(4, pixels, packing + "<", blob=whole + b"\0"))
    with pytest.raises(BadFrame, match="lz4 bl"):
        event.image.array()


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    zeros = np.zeros((2000, 2000), np.uint16)
    for packing in ("lz4", "bs16-lz4"):
        parts = g.image(4, zeros, packing + "<", blob=g.by_library(zeros, packing + "<", block=8192))
        assert len(parts[2]) < 100_000
        assert "the limit is 7999999" in bad(parts, max_image_bytes=7_999_999).reason
    # A block of few bytes cannot hold what the shape says, whatever is in it.
    assert "at most 255" in bad(g.image(4, zeros, "lz4<", blob=b"\0")).reason
    # One that holds more than the shape says is not unpacked beyond it.
    block = g.by_library(zeros, "lz4<")
    parts = g.image(4, zeros, "lz4<", blob=block)
    parts[1] = parts[1].replace(b"[2000, 2000]", b"[1999, 2000]")
    event = arrival(parts)
    with pytest.raises(BadFrame, match="does not decompress to its size"):
        event.image.array()
    huge = (1 << 40).to_bytes(8, "big") + g.by_library(zeros, "bs16-lz4<", block=8192)[8:]
    assert f"declares {1 << 40}" in bad(g.image(4, zeros, "bs16-lz4<", blob=huge)).reason
