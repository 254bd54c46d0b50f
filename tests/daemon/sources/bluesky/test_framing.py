"""Messages of the proxy: three words, msgpack, JSON; pickles and arrays that are pickles refused."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import event_model
import msgpack
import msgpack_numpy
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.sources.bluesky.framing import MAX_CONTAINERS, Document, decode_message
from daemon.sources.bluesky.simulator import Options, Simulator
from daemon.sources.bluesky.source import Config, open_source
from pipelines.frame import BadFrame


def message(payload: bytes, name: str = "event", prefix: str = "") -> bytes:
    return f"{prefix} {name} ".encode() + payload


def decoded(body: Any) -> Any:
    """Send a body as bluesky does with the serializer of msgpack-numpy."""
    document = decode_message(message(msgpack_numpy.dumps(body)))
    assert document is not None
    return document.body


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


ARRAYS = st.sampled_from(["<u2", ">u4", "|i1", "<i8", "<f4", ">f8", "<c16", "|b1", "|S3", "<U4"]).flatmap(
    lambda kind: st.lists(st.integers(0, 4), max_size=3).map(
        lambda shape: np.arange(int(np.prod(shape))).astype(kind).reshape(shape)
    )
)


@settings(max_examples=100, deadline=None)
@given(ARRAYS)
def test_arrays_come_through_as_msgpack_numpy_packs_them(array: np.ndarray[Any, Any]) -> None:
    found = decoded({"a": array, "number": np.float32(1.5), "flag": np.bool_(True), "n": np.int64(-7)})
    assert np.array_equal(found["a"], array)
    assert found["a"].dtype == array.dtype
    assert found["a"].shape == array.shape
    assert (found["number"], found["flag"], found["n"]) == (1.5, True, -7)
    assert [type(found[k]) for k in ("number", "flag", "n")] == [float, bool, int]


def test_older_writers_pack_keys_and_types_as_text() -> None:
    packed = msgpack.packb(
        {"a": {"nd": True, "type": "<u2", "shape": [2], "data": b"\1\0\2\0"}}, use_bin_type=True
    )
    document = decode_message(message(packed))
    assert document is not None
    assert list(document.body["a"]) == [1, 2]


def test_json_and_a_prefix() -> None:
    found = decode_message(message(b'{"x": NaN, "y": [1, 2]}', prefix="lab"), prefix=b"lab")
    assert found is not None
    assert (found.name, found.body["y"]) == ("event", [1, 2])
    assert decode_message(message(b"{}", prefix="other"), prefix=b"lab") is None
    assert decode_message(message(b"{}", prefix="any")) == Document("event", {})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({b"nd": True, b"type": "O", b"kind": b"O", b"shape": [1], b"data": b"x"}, "of Python objects"),
        (
            {b"nd": True, b"type": "|O8", b"kind": b"", b"shape": [1], b"data": b"12345678"},
            "numbers or texts",
        ),
        (
            {b"nd": True, b"type": [["a", "O"]], b"kind": b"V", b"shape": [1], b"data": b"1"},
            "numbers or texts",
        ),
        (
            {b"nd": True, b"type": "(9999999,)i4", b"kind": b"", b"shape": [0], b"data": b""},
            "numbers or texts",
        ),
        ({b"nd": True, b"type": "<f3", b"kind": b"", b"shape": [0], b"data": b""}, "is unknown"),
        ({b"nd": True, b"type": "<u2", b"kind": b"", b"shape": [3], b"data": b"1234"}, "has 4 bytes of data"),
        (
            {b"nd": True, b"type": "<u2", b"kind": b"", b"shape": [1 << 40], b"data": b""},
            "has 0 bytes of data",
        ),
        (
            {b"nd": True, b"type": "<u2", b"kind": b"", b"shape": [-1], b"data": b"12"},
            r"array of shape \[-1\]",
        ),
        ({b"nd": True, b"type": "<u2", b"kind": b"", b"shape": [1] * 40, b"data": b"12"}, "array of shape"),
        ({b"nd": True, b"type": "|S0", b"kind": b"", b"shape": [9], b"data": b""}, "has 0 bytes of data"),
        ({b"nd": False, b"type": "<f8", b"data": b"123"}, "has 3 bytes of data"),
        ({b"nd": True, b"type": "<u2", b"kind": b"", b"shape": [1]}, "array without data"),
    ],
)
def test_arrays_that_are_none_are_refused(body: Any, reason: str) -> None:
    with pytest.raises(BadFrame, match=f"event: .*{reason}"):
        decode_message(message(msgpack.packb({"data": {"camera": body}})))


def test_what_msgpack_numpy_would_unpickle_runs_nothing_here(tmp_path: Path) -> None:
    packed = msgpack_numpy.dumps({"data": np.array([Evil(tmp_path / "ran")], dtype=object)})
    with pytest.raises(BadFrame, match="an array of Python objects is a pickle: refused"):
        decode_message(message(packed))
    assert not (tmp_path / "ran").exists()
    msgpack_numpy.loads(packed)  # the packet is a real attack
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_by_name(protocol: int) -> None:
    with pytest.raises(BadFrame, match=r"event: pickled document refused, .* runs any code .*serializer="):
        decode_message(message(pickle.dumps({"seq_num": 1}, protocol)))


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_that_is_allowed_makes_plain_values_only(tmp_path: Path, protocol: int) -> None:
    body = OrderedDict(a=np.arange(6.0).reshape(2, 3), b=(1, "x"), c=np.float64(2.5), d={"e": {1, 2}})
    found = decode_message(message(pickle.dumps(body, protocol)), allow_pickle=True)
    assert found is not None
    assert np.array_equal(found.body["a"], body["a"])  # type: ignore[arg-type]
    assert (found.body["b"], found.body["c"], found.body["d"]) == ((1, "x"), 2.5, {"e": {1, 2}})
    attack = message(pickle.dumps({"a": Evil(tmp_path / "ran")}, protocol))
    with pytest.raises(BadFrame, match=r"posix\.mkdir, which is neither plain nor an array"):
        decode_message(attack, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    for broken in (pickle.dumps([1], protocol), pickle.dumps(body, protocol)[:-5]):
        with pytest.raises(BadFrame, match=r"pickle holds list|pickled document cannot be read"):
            decode_message(message(broken), allow_pickle=True)


def test_whoever_allows_pickles_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    address = "tcp://127.0.0.1:5578"
    open_source(Config(address=address), "laue").close()
    assert caplog.text == ""
    open_source(Config(address=address, allow_pickle_from_network_which_runs_any_code=True), "laue").close()
    assert f"laue: pickled documents are read: whoever reaches {address} can try to run code" in caplog.text


@pytest.mark.parametrize(
    ("garbage", "reason"),
    [
        (b"", "message of 0 bytes is not 'prefix name document'"),
        (b"GET / HTTP/1.1\r\n\r\n", "document '/' is not known to event-model"),
        (b" event", "is not 'prefix name document'"),
        (b" event ", "event: the document is empty"),
        (b" bulk_events {}", "document 'bulk_events' is no longer sent by bluesky"),
        (b" event \x93\1\2\3", "event: is neither a msgpack map nor a JSON object"),
        (b" event \x81\xa1a", "event: msgpack cannot be read"),
        (b" event \x81\xc0\xc0", "event: keys are expected to be texts"),
        (b' event {"a": ', "event: JSON cannot be read: Expecting value"),
        (b" event {\xff", "event: JSON cannot be read"),
        (b" event " + b'{"a":' * 100_000, "event: JSON is nested too deeply"),
        (b" event " + b"\x81\xa1a" * 100_000, "event: msgpack cannot be read"),
        (b" event \x81\xa1a\xdd\xff\xff\xff\xff", "event: msgpack cannot be read"),
        (b" event " + b"\xdf\xff\xff\xff\xff", "event: msgpack cannot be read"),
        (b" event \x81\xa1a\xdd\0\x04\0\0" + b"\x90" * (1 << 18), "has more parts than any document needs"),
    ],
)
def test_garbage_is_named(garbage: bytes, reason: str) -> None:
    assert MAX_CONTAINERS < 1 << 18
    with pytest.raises(BadFrame) as caught:
        decode_message(garbage)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("folder", [False, True])
def test_the_simulator_sends_what_event_model_demands(tmp_path: Path, folder: bool) -> None:
    """Its documents against the schemas of event-model itself."""
    options = Options(
        "tcp://127.0.0.1:*", bind=True, shape=(2, 2), rate_hz=0, folder=tmp_path if folder else None
    )
    simulator = Simulator([np.zeros((3, 4), np.uint16)], options)
    sent: list[tuple[str, Any]] = []
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber, ThreadPoolExecutor() as pool:
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.setsockopt(zmq.RCVTIMEO, 60_000)
        subscriber.connect(simulator.address)
        report = pool.submit(simulator.run)
        while not sent or sent[-1][0] != "stop":
            document = decode_message(subscriber.recv())
            assert document is not None
            sent.append((document.name, json.loads(json.dumps(document.body, default=np.ndarray.tolist))))
    assert report.result().documents == len(sent)
    names = [name for name, _ in sent]
    assert names[:2] == ["start", "descriptor"]
    assert names[-1] == "stop"
    assert names.count("event") == 4
    assert names.count("stream_datum") == (4 if folder else 0)
    for name, body in sent:
        event_model.schema_validators[event_model.DocumentNames[name]].validate(body)
