"""Decoding of messages that were put together by hand is exact to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from daemon.sources.base import Arrival, Bad, Event, SeriesEnd, SeriesStart
from daemon.sources.dectris.v2_codec import Decoder, decode_message
from pipelines.frame import BadFrame
from tests.wire import golden as g


def only(events: list[Event]) -> Event:
    assert len(events) == 1, events
    return events[0]


def arrival(message: bytes) -> Arrival:
    event = only(decode_message(message))
    assert isinstance(event, Arrival), event
    return event


def bad(message: bytes, **limits: int) -> Bad:
    event = only(decode_message(message, **limits))
    assert isinstance(event, Bad), event
    return event


def test_a_message_written_out_in_full() -> None:
    message = bytes.fromhex(
        "a7"
        "64 74797065 65 696d616765"  # type: image
        "69 7365726965735f6964 01"  # series_id: 1
        "70 7365726965735f756e697175655f6964 62 6162"  # series_unique_id: ab
        "68 696d6167655f6964 19 0102"  # image_id: 258
        "6a 73746172745f74696d65 82 03 02"  # start_time: 3/2 s
        "6b 7365726965735f64617465 c0 74 323032322d30342d32385431303a30303a30305a"  # 2022-04-28T10:00:00Z
        "64 64617461 a1 61 74"  # data: t:
        "d8 28 82 82 02 03"  # tag 40: two rows, three columns of
        "d8 41 4c 0001 0203 ffff 0000 8000 0007"  # tag 65: uint16, big-endian, 12 bytes
    )
    event = arrival(message)
    assert (event.detector_series, event.frame, event.channel) == ("1/ab", 258, "t")
    assert event.acquired == 1651140000 + 1.5
    assert event.image.dtype == np.dtype("=u2")
    assert event.image.array().tolist() == [[1, 0x0203, 0xFFFF], [0, 0x8000, 7]]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("algorithm", ["", "none", "lz4", "bslz4"])
@pytest.mark.parametrize("type_tag", g.TYPED_ARRAY_TAGS)
def test_every_type_algorithm_and_order(type_tag: int, algorithm: str, order: str) -> None:
    dtype = np.dtype(g.TYPED_ARRAY_TAGS[type_tag])
    # 7 x 11 elements: several blocks, a last one that is shorter, and for bslz4 a rest of 5 elements.
    patterns = np.random.default_rng(type_tag).integers(0, 256, 77 * dtype.itemsize, dtype=np.uint8)
    pixels = np.frombuffer(patterns.tobytes(), dtype=dtype).reshape(7, 11)
    image = arrival(g.image(data=g.mapping(c=g.multi_dim(pixels, type_tag, algorithm, order)))).image
    decoded = image.array()
    assert image.shape == decoded.shape == (7, 11)
    assert decoded.dtype == image.dtype == dtype.newbyteorder("=")
    assert decoded.flags.c_contiguous
    assert decoded.astype(dtype).tobytes() == pixels.tobytes()  # bits, so that NaN counts as well


def test_lz4_blocks_that_are_stored_bare() -> None:
    data = g.PIXELS.astype("<u2").tobytes()
    blob = g.raw(g.framed(data, "lz4", 0, 16, stored=True))
    typed = g.tag(69, g.tag(56500, g.array(g.text("lz4"), g.uint(0), blob)))
    message = g.image(data=g.mapping(c=g.tag(40, g.array(g.array(g.uint(3), g.uint(5)), typed))))
    assert (arrival(message).image.array() == g.PIXELS).all()


def test_bslz4_shuffled_by_bytes() -> None:
    """The element size in tag 56500 is what was shuffled; it need not be the pixel's."""
    data = np.arange(64, dtype="<u2").tobytes()
    blob = g.tag(56500, g.array(g.text("bslz4"), g.uint(1), g.raw(g.framed(data, "bslz4", 1, 64))))
    item = g.tag(40, g.array(g.array(g.uint(8), g.uint(8)), g.tag(69, blob)))
    assert arrival(g.image(data=g.mapping(c=item))).image.array().ravel().tolist() == list(range(64))


def test_start() -> None:
    mask = g.mapping(threshold_1=g.multi_dim(g.PIXELS, 70, "lz4"))
    table = g.tag(85, g.raw(np.array([1.0, 2.5], "<f4").tobytes()))
    event = only(
        decode_message(
            g.start(pixel_mask=mask, countrate_correction_lookup_table=table, user_data=g.text("hi"))
        )
    )
    assert isinstance(event, SeriesStart)
    assert event.detector_series == "7/01FZ"
    assert event.n_frames == 300
    assert event.first_frame == 0
    assert event.channels == ("threshold_1", "threshold_2")
    metadata = dict(event.metadata)
    assert (metadata.pop("pixel_mask")["threshold_1"] == g.PIXELS).all()
    assert metadata == {
        "arm_date": "2022-04-28T12:00:00.500000+02:00",
        "number_of_images": 300,
        "image_size_x": 5,
        "image_size_y": 3,
        "incident_energy": 12398.0,
        "image_dtype": "uint16",
        "flatfield_enabled": True,
        "countrate_correction_lookup_table": [1.0, 2.5],
        "user_data": "hi",
    }


def test_end() -> None:
    assert decode_message(g.end()) == [SeriesEnd("7/01FZ")]


def test_a_map_without_a_length() -> None:
    """Some senders of the format write maps of indefinite length."""
    message = g.end()
    assert decode_message(b"\xbf" + message[1:] + b"\xff") == [SeriesEnd("7/01FZ")]
    assert "breaks off" in bad(b"\xbf").reason or "broken" in bad(b"\xbf").reason


def test_several_channels_times_and_position() -> None:
    other = (g.PIXELS + 1).astype(np.uint32)
    data = g.mapping(low=g.multi_dim(g.PIXELS, 69, "bslz4"), high=g.multi_dim(other, 70, "lz4"))
    user_data = g.mapping(position_um=g.array(g.float64(-1.5), g.uint(20)), note=g.text("edge"))
    low, high = decode_message(g.image(data=data, user_data=user_data))
    assert isinstance(low, Arrival)
    assert isinstance(high, Arrival)
    assert (low.channel, high.channel) == ("low", "high")
    assert (low.image.array() == g.PIXELS).all()
    assert (high.image.array() == other).all()
    assert low.position_um == high.position_um == (-1.5, 20.0)
    assert low.acquired == 1651140000 + 1.5
    assert low.metadata["real_time_s"] == 0.25
    assert low.metadata["user_data"]["note"] == "edge"


def test_images_like_the_one_before_are_read_the_same() -> None:
    """Numbers of every width, other times and pixels, after an image of the same structure."""
    other = (g.PIXELS + 1).astype(np.uint32)
    decoder = Decoder()
    for number in (4, 23, 24, 255, 256, 70_000, 1 << 40, (1 << 63) - 1, 1 << 63):
        times = {
            "start_time": g.array(g.uint(number // 3), g.uint(2_000_000)),
            "real_time": g.array(g.uint(number % 1000), g.uint(2_000_000)),
        }
        data = g.mapping(low=g.multi_dim(g.PIXELS, 69, "bslz4"), high=g.multi_dim(other, 70, "lz4"))
        message = g.image(number, data=data, **times)
        assert decoder.decode(message) == decode_message(message), number
        for spoiled in (message[:-1], message + b"\0", message[:40], message[:-400]):
            assert decoder.decode(spoiled) == decode_message(spoiled)
    assert decoder._template is not None
    assert decoder._template.read(memoryview(g.image(300, data=data))) is not None


def test_the_pattern_of_images_is_looked_for_now_and_then_only() -> None:
    decoder = Decoder()
    moving = [g.image(n, user_data=g.mapping(position_um=g.array(g.uint(n)))) for n in range(20)]
    for message in moving:
        assert decoder.decode(message) == decode_message(message)
    steady = [g.image(n) for n in range(3)]
    decoder.decode(steady[0])
    assert decoder._template is not None
    assert decoder._template.read(memoryview(steady[1])) is None  # it has given up
    decoder.decode(g.start())
    decoder.decode(steady[0])
    assert decoder._template.read(memoryview(steady[1])) is not None


def test_times_are_not_required() -> None:
    message = g.mapping(
        type=g.text("image"),
        **g.IDENTITY,
        image_id=g.uint(0),
        data=g.mapping(c=g.multi_dim(g.PIXELS, 69, "")),
    )
    assert arrival(message).acquired == 0.0
    assert arrival(g.image(start_time=g.array(g.uint(0), g.uint(0)))).acquired == 0.0


def test_one_broken_channel_leaves_the_other() -> None:
    broken = g.tag(40, g.array(g.array(g.uint(3), g.uint(5)), g.tag(69, g.raw(b"12345"))))
    data = g.mapping(low=broken, high=g.multi_dim(g.PIXELS, 69, ""))
    low, high = decode_message(g.image(data=data))
    assert isinstance(low, Bad)
    assert (low.detector_series, low.frame, low.channel) == ("7/01FZ", 4, "low")
    assert "needs 30 bytes" in low.reason
    assert isinstance(high, Arrival)


SIZES = g.array(g.uint(3), g.uint(5))
BAD_FIELDS = {
    "tag 76 has no type": (g.tag(40, g.array(SIZES, g.tag(76, g.raw(b"")))), "tag 76 is unknown"),
    "binary128": (g.tag(40, g.array(SIZES, g.tag(83, g.raw(b"")))), "tag 83 is unknown"),
    "unknown tag": (g.tag(41, g.array(SIZES, g.raw(b""))), "tag 41 is unknown"),
    "tag that means a regular expression": (g.tag(35, g.text("(")), "tag 35 is unknown"),
    "tag that means a big number": (g.tag(2, g.raw(b"\xff" * 9000)), "tag 2 is unknown"),
    "shared reference": (g.tag(28, g.array(g.tag(29, g.uint(0)))), "tag 28 is unknown"),
    "no array": (g.uint(3), "is not an array"),
    "three dimensions": (
        g.tag(40, g.array(g.array(g.uint(1), g.uint(1), g.uint(1)), g.tag(64, g.raw(b"1")))),
        "two dimensions",
    ),
    "no dimensions": (g.tag(40, g.array(g.uint(1), g.tag(64, g.raw(b"1")))), "two dimensions"),
    "size 0": (g.tag(40, g.array(g.array(g.uint(0), g.uint(5)), g.tag(64, g.raw(b"")))), "0 rows"),
    "no typed array": (g.tag(40, g.array(SIZES, g.array(g.uint(1)))), "expected a typed array"),
    "text for bytes": (g.tag(40, g.array(SIZES, g.tag(64, g.text("a" * 15)))), "expected bytes"),
    "one byte too few": (g.tag(40, g.array(SIZES, g.tag(64, g.raw(b"1" * 14)))), "needs 15 bytes"),
    "one byte too many": (g.tag(40, g.array(SIZES, g.tag(64, g.raw(b"1" * 16)))), "needs 15 bytes"),
    "another algorithm": (
        g.tag(40, g.array(SIZES, g.tag(64, g.tag(56500, g.array(g.text("zip"), g.uint(0), g.raw(b"")))))),
        "'zip' is not one of",
    ),
    "no element size": (
        g.tag(40, g.array(SIZES, g.tag(64, g.tag(56500, g.array(g.text("bslz4"), g.uint(0), g.raw(b"")))))),
        "element size",
    ),
    "blob without a header": (
        g.tag(40, g.array(SIZES, g.tag(64, g.tag(56500, g.array(g.text("lz4"), g.uint(0), g.raw(b"123")))))),
        "shorter than its header",
    ),
}


@pytest.mark.parametrize(("item", "reason"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_arrays_say_which_frame_and_why(item: bytes, reason: str) -> None:
    event = bad(g.image(data=g.mapping(c=item)))
    assert reason in event.reason
    assert (event.detector_series, event.frame) == ("7/01FZ", 4)


@pytest.mark.parametrize("algorithm", ["lz4", "bslz4"])
def test_a_bomb_is_refused_before_it_is_decoded(algorithm: str) -> None:
    pixels = np.zeros((64, 64), np.uint16)
    message = g.image(data=g.mapping(c=g.multi_dim(pixels, 69, algorithm)))
    assert "declares 8192 bytes, the limit is 8191" in bad(message, max_image_bytes=8191).reason
    huge = g.framed(b"", algorithm, 2, 64)[8:]
    huge = (1 << 40).to_bytes(8, "big") + huge
    blob = g.tag(56500, g.array(g.text(algorithm), g.uint(2), g.raw(huge)))
    small = g.tag(40, g.array(SIZES, g.tag(69, blob)))
    assert f"declares {1 << 40}" in bad(g.image(data=g.mapping(c=small))).reason
    large = g.tag(40, g.array(g.array(g.uint(1 << 19), g.uint(1 << 20)), g.tag(69, blob)))
    assert "the limit is" in bad(g.image(data=g.mapping(c=large))).reason


@pytest.mark.parametrize("algorithm", ["lz4", "bslz4"])
def test_a_truncated_blob_names_its_block(algorithm: str) -> None:
    data = np.arange(100, dtype="<u2").tobytes()
    blob = g.framed(data, algorithm, 2, 64)
    for cut in range(12, len(blob)):
        item = g.raw(blob[:cut])
        typed = g.tag(69, g.tag(56500, g.array(g.text(algorithm), g.uint(2), item)))
        event = arrival(g.image(data=g.mapping(c=g.tag(40, g.array(g.array(g.uint(10), g.uint(10)), typed)))))
        with pytest.raises(BadFrame, match=rf"{algorithm} blob: "):
            event.image.array()


def test_every_truncation_is_bad_and_keeps_what_it_said() -> None:
    message = g.image()
    told = message.index(b"\x68image_id") + len(b"\x68image_id") + 1
    for cut in range(len(message)):
        event = bad(message[:cut])
        assert (event.frame == 4) == (cut >= told), cut
    assert "after its end" in bad(message + b"\0").reason


@pytest.mark.parametrize("key", ["series_id", "series_unique_id", "image_id", "data", "type"])
def test_missing_keys_are_named(key: str) -> None:
    fields = {
        "type": g.text("image"),
        **g.IDENTITY,
        "image_id": g.uint(4),
        "data": g.mapping(c=g.multi_dim(g.PIXELS, 69, "")),
    }
    del fields[key]
    event = bad(g.mapping(**fields))
    assert f"'{key}'" in event.reason
    assert event.frame == (4 if key == "data" else None)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("image_id", g.text("4"), "image_id: expected a whole number"),
        ("image_id", b"\x20", "image_id: expected a whole number"),
        ("image_id", b"\xf5", "image_id: expected a whole number"),
        ("image_id", g.uint((1 << 64) - 1), "image_id: expected a whole number"),
        ("series_unique_id", g.text("a\0b"), "series_unique_id: expected text"),
        ("series_unique_id", g.text("x" * 257), "series_unique_id: expected text"),
        ("data", g.mapping(**{"a\nb": g.uint(1)}), "is not a name"),
        ("data", g.mapping(), "expected a map of 1 to"),
        ("data", g.array(), "expected a map of 1 to"),
        ("start_time", g.uint(4), "start_time: expected [numerator, denominator]"),
        ("series_date", g.tag(0, g.text("yesterday")), "broken"),
        ("user_data", g.mapping(position_um=g.text("here")), "position_um: expected 1 to 3 numbers"),
        ("user_data", g.mapping(position_um=g.array(g.float64(float("nan")))), "position_um"),
    ],
)
def test_wrong_values_are_named(field: str, value: bytes, reason: str) -> None:
    event = bad(g.image(**{field: value}))
    assert reason in event.reason


def test_a_bad_mask_does_not_cost_the_series() -> None:
    begun, complaint = decode_message(g.start(pixel_mask=g.mapping(threshold_1=g.uint(1))))
    assert isinstance(begun, SeriesStart)
    assert isinstance(complaint, Bad)
    assert "pixel_mask" in complaint.reason
    wrong = g.mapping(threshold_1=g.multi_dim(g.PIXELS.T, 70, ""))
    complaint = decode_message(g.start(pixel_mask=wrong))[1]
    assert isinstance(complaint, Bad)
    assert "(5, 3)" in complaint.reason


@pytest.mark.parametrize(
    "channels", [g.array(), g.text("a"), g.array(g.uint(1)), g.array(g.text("a"), g.text("a"))]
)
def test_bad_channels(channels: bytes) -> None:
    assert "channels" in bad(g.start(channels=channels)).reason


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "not a CBOR map"),
        (b"\x00", "not a CBOR map"),
        (b'{"htype":"dheader-1.0"}', "not a CBOR map"),
        (g.mapping(type=g.text("dance")), "message type 'dance' is unknown"),
        (g.mapping(type=g.uint(1)), "message type 1 is unknown"),
        (b"\xbb" + b"\xff" * 8, "broken"),
        (b"\xa1\x64type" + b"\x5b" + b"\x7f" * 8, "broken"),
        (b"\xa1\x64type" + b"\x9b" + b"\x7f" * 8, "broken"),
        (b"\xa1\x64type" + b"\x81" * 100_000, "depth"),
        (b"\xa1\x64type" + b"\x9a\x00\x10\x00\x00" + b"\x80" * (1 << 20), "more than 200000 data items"),
        (b"\xa2\x64type\x63end\x64type\x63end", "twice"),
        (b"\xa1\x01\x02", "key that is not text"),
    ],
)
def test_garbage(message: bytes, reason: str) -> None:
    event = bad(message)
    assert reason in event.reason
    assert event.frame is None
