"""The codec of the push protocol: what is packed comes back, what is not understood is refused."""

from __future__ import annotations

import math
import pickle
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwatch.push_wire import (
    MAX_HEAD_BYTES,
    MAX_METADATA_BYTES,
    MAX_NUMBER,
    Ack,
    BadHead,
    Begin,
    Begun,
    Busy,
    FromDaemon,
    FromSender,
    Held,
    HeldImage,
    Hello,
    ImageHead,
    Leave,
    Left,
    Ping,
    Refused,
    Welcome,
    array_fingerprint,
    file_fingerprint,
    metadata_error,
    pack,
    read_from_daemon,
    read_from_sender,
)

NUMBERS = st.integers(0, MAX_NUMBER)
IDS = st.integers(0, 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)
FLOATS = st.floats(allow_nan=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
IMAGES = st.builds(
    ImageHead,
    id=IDS,
    number=NUMBERS,
    name=NAMES,
    fingerprint=st.binary(min_size=16, max_size=16),
    sha256=st.binary(min_size=32, max_size=32),
    form=st.sampled_from(["file", "array"]),
    dtype=st.sampled_from(["", "<u2", "|u1", "<f4"]),
    shape=st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple),
    acquired=FLOATS,
    modified=FLOATS,
    position_um=st.none() | st.lists(FLOATS, max_size=3).map(tuple),
    metadata=st.dictionaries(TEXT, PLAIN, max_size=3),
    sidecars=st.dictionaries(TEXT, TEXT, max_size=2),
)
FROM_SENDER: st.SearchStrategy[FromSender] = (
    st.builds(Hello, st.integers(0, 1000), NAMES)
    | st.builds(Begin, NAMES, NUMBERS, TEXT, st.booleans())
    | IMAGES
    | st.builds(Leave, st.booleans())
)
HELD = st.builds(HeldImage, NUMBERS, st.binary(min_size=16, max_size=16), st.booleans())
FROM_DAEMON: st.SearchStrategy[FromDaemon] = (
    st.builds(Welcome, st.just(1), TEXT, TEXT, st.integers(1, 1000), IDS, st.lists(TEXT).map(tuple))
    | st.builds(Busy, TEXT, TEXT, st.integers(0, 64))
    | st.builds(Held, st.lists(HELD, max_size=4).map(tuple))
    | st.builds(Begun, TEXT, NUMBERS, st.booleans())
    | st.builds(Ack, IDS, st.sampled_from(["taken", "held", "failed", "refused"]), TEXT)
    | st.just(Left())
    | st.builds(Refused, TEXT, st.booleans())
    | st.just(Ping())
)


@given(FROM_SENDER)
def test_what_a_sender_says_comes_back(head: FromSender) -> None:
    assert read_from_sender(pack(head)) == head


@given(FROM_DAEMON)
def test_what_a_daemon_says_comes_back(head: FromDaemon) -> None:
    assert read_from_daemon(pack(head)) == head


@settings(max_examples=300)
@given(st.binary(max_size=200), FROM_SENDER, st.integers(0, 200))
def test_any_bytes_are_read_or_refused(noise: bytes, head: FromSender, at: int) -> None:
    sound = pack(head)
    for raw in (noise, sound[:at], sound[:at] + noise, sound[:at] + noise + sound[at:]):
        for read in (read_from_sender, read_from_daemon):
            with suppress(BadHead):
                read(raw)


class Sly:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "truncated"),
        (pickle.dumps(Sly()), "type"),
        (b"\x81" * MAX_HEAD_BYTES, "str"),
        (b"\xc4" + bytes(MAX_HEAD_BYTES), "limit"),
        (msgspec.msgpack.encode({"type": "nonsense"}), "nonsense"),
        (msgspec.msgpack.encode({"type": "hello"}), "version"),
        (msgspec.msgpack.encode({"type": "hello", "version": 1, "admin": True}), "admin"),
        (msgspec.msgpack.encode({"type": "begin", "series": "a\nb"}), "series"),
        (msgspec.msgpack.encode({"type": "begin", "series": "a\n"}), "series"),
        (msgspec.msgpack.encode({"type": "hello", "version": 1, "client": "a\nb"}), "client"),
        (msgspec.msgpack.encode({"type": "hello", "version": 1, "\n\x1b[2J": 1}), "??[2J"),
        (msgspec.msgpack.encode({"type": "begin", "series": "a", "first": -1}), "first"),
        (msgspec.msgpack.encode({"type": "leave", "end": "yes"}), "end"),
        (pack(Left()), "left"),
    ],
)
def test_what_no_sender_may_say(raw: bytes, why: str) -> None:
    with pytest.raises(BadHead) as found:
        read_from_sender(raw)
    assert why in str(found.value)


def test_numbers_that_are_none_are_refused() -> None:
    sound = msgspec.msgpack.decode(pack(ImageHead(1, 2, "a", bytes(16), bytes(32), "file")))
    for key, value in {
        "number": -1,
        "id": -1,
        "sha256": b"",
        "fingerprint": bytes(17),
        "form": "pickle",
    }.items():
        with pytest.raises(BadHead, match=key):
            read_from_sender(msgspec.msgpack.encode({**sound, key: value}))
    with pytest.raises(BadHead, match="number"):
        read_from_sender(msgspec.msgpack.encode({**sound, "number": MAX_NUMBER + 1}))


def test_what_cannot_be_sent_beside_an_image() -> None:
    assert metadata_error({"a": [1, 2.5, None, "x"]}, {"a.txt": "text"}) == ""
    assert "limit is" in metadata_error({"a": "x" * MAX_METADATA_BYTES}, {})
    assert "limit is" in metadata_error({}, {"a.txt": "x" * MAX_METADATA_BYTES})
    assert "metadata" in metadata_error({"a": object()}, {})
    with pytest.raises(BadHead, match="metadata"):
        pack(ImageHead(1, 2, "a", bytes(16), bytes(32), "file", metadata={"a": math}))


@given(NAMES, IDS, IDS)
def test_fingerprints_tell_apart(name: str, size: int, modified: int) -> None:
    print_ = file_fingerprint(name, size, modified)
    assert len(print_) == 16
    assert print_ == file_fingerprint(name, size, modified)
    others = {
        file_fingerprint(name + "x", size, modified),
        file_fingerprint(name, size + 1, modified),
        file_fingerprint(name, size, modified + 1),
    }
    assert len(others) == 3
    assert print_ not in others
    arrays = {array_fingerprint(bytes(32), d, s) for d in ("<u2", "<i2") for s in ((2, 3), (3, 2))}
    assert len(arrays) == 4
