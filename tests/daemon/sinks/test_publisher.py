"""The PUB socket and the catch-up, asked over real sockets as any program would."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from testkit.process import LONG_S

from daemon.sinks import catch_up, publisher, results_file, stored_results
from daemon.sinks.base import SeriesClosed, SeriesOpened, SinkContext
from daemon.sinks.message_ring import MessageRing, Sent
from daemon.sinks.simulator import published, synthetic_health, synthetic_result
from daemon.sinks.stored_results import StoredResults
from grainwatch.config import ConfigError
from grainwatch.messages import AnyMessage, encode

ANY_PORT = "tcp://127.0.0.1:*"
NewSocket: TypeAlias = Callable[[int], zmq.Socket[bytes]]
Sink: TypeAlias = Callable[..., publisher.Publisher]
A, B = "a" * 32, "b" * 32


@pytest.fixture
def new_socket() -> Iterator[NewSocket]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made: list[zmq.Socket[bytes]] = []

    def new(kind: int) -> zmq.Socket[bytes]:
        made.append(context.socket(kind))
        return made[-1]

    yield new
    context.destroy(linger=0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Sink]:
    opened: list[publisher.Publisher] = []

    def open_sink(**keys: Any) -> publisher.Publisher:
        known = {"results": ANY_PORT, "catch_up": ANY_PORT, "results_dir": str(tmp_path)}
        out = publisher.open_sink(publisher.Config(**{**known, **keys}), SinkContext("beamline", tmp_path))
        opened.append(out)
        return out

    yield open_sink
    for out in opened:
        out.close()


def ask(socket: zmq.Socket[bytes], request: Any) -> tuple[dict[str, Any], list[bytes]]:
    socket.send(request if isinstance(request, bytes) else json.dumps(request).encode())
    assert socket.poll(round(1e3 * LONG_S)), "no reply"
    header, *parts = socket.recv_multipart()
    return json.loads(header), parts


def dealer(new_socket: NewSocket, out: publisher.Publisher) -> zmq.Socket[bytes]:
    socket = new_socket(zmq.DEALER)
    socket.connect(out.catch_up_address)
    return socket


def store(folder: Path, messages: list[AnyMessage], uid: str, started: float, name: str = "beamline") -> None:
    files = results_file.open_sink(results_file.Config(folder=str(folder)), SinkContext(name, folder))
    files.handle([SeriesOpened("laue", uid, started, "1"), *map(published, messages)])
    files.handle([SeriesClosed("laue", uid, started + 1, {})])
    files.close()


def test_topic_and_payload(
    new_socket: NewSocket, tmp_path: Path, sink: Sink, rng: np.random.Generator
) -> None:
    out = sink()
    sub = new_socket(zmq.SUB)
    sub.subscribe(b"grainwatch.laue/1:laue")
    sub.connect(out.results_address)
    result = synthetic_result(3, rng, seq=2, series_uid=A)
    deadline = time.monotonic() + LONG_S
    while not sub.poll(50) and time.monotonic() < deadline:
        out.handle([published(synthetic_health(1, 0.0)), published(result)])
    assert sub.recv_multipart() == [b"grainwatch.laue/1:laue", encode(result)]


@pytest.mark.parametrize("key", ["results", "catch_up"])
def test_a_port_in_use_is_named_with_its_key(new_socket: NewSocket, sink: Sink, key: str) -> None:
    taken = new_socket(zmq.PULL)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    address = f"tcp://127.0.0.1:{port}"
    with pytest.raises(ConfigError, match=rf"^{key}: {address}: the port is in use"):
        sink(**{key: address})


def test_bad_addresses_and_numbers_are_named(sink: Sink) -> None:
    for keys, message in (
        ({"results": "127.0.0.1:31100"}, r"^results: 127.*expected an address such as tcp://"),
        ({"catch_up": "tcp://203.0.113.1:31100"}, r"^catch_up: .*no such network interface"),
        ({"ring_messages": 0}, r"^ring_messages: expected 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            sink(**keys)


def test_recent_messages_come_from_memory_in_bounded_chunks(
    new_socket: NewSocket, tmp_path: Path, sink: Sink, rng: np.random.Generator
) -> None:
    out = sink()
    results = [synthetic_result(n, rng, seq=100 + n, series_uid=A) for n in range(600)]
    out.handle([published(r) for r in results])
    socket = dealer(new_socket, out)
    got: list[bytes] = []
    first: int | None = 0
    replies = 0
    while first is not None:
        header, parts = ask(socket, {"id": "x", "from_seq": first})
        assert header["id"] == "x"
        assert header["publisher"] == "beamline"
        assert len(parts) == 2 * len(header["seqs"]) <= 2 * catch_up.CHUNK_MESSAGES
        got += parts[1::2]
        first = header["to_seq"] + 1 if header["more"] else None
        replies += 1
    assert replies == 3
    assert header["last_seq"] == header["to_seq"] == 699
    assert got == [encode(r) for r in results]
    header, parts = ask(socket, {"series_uid": A, "from": 10, "to": 12})
    assert header["seqs"] == [110, 111, 112]
    assert parts[0] == b"grainwatch.laue/1:laue"
    header, _ = ask(socket, {"series_uid": A, "from": 598, "after_seq": 698})
    assert header["seqs"] == [699]


def test_older_messages_come_from_files_also_while_one_is_written(
    new_socket: NewSocket, tmp_path: Path, sink: Sink, rng: np.random.Generator
) -> None:
    old = [synthetic_result(n, rng, seq=1 + n, series_uid=A) for n in range(20)]
    store(tmp_path, old, A, 1000.0)
    out = sink(ring_messages=5)
    files = results_file.open_sink(
        results_file.Config(folder=str(tmp_path), flush_s=0.001), SinkContext("beamline", tmp_path)
    )
    new = [synthetic_result(n, rng, seq=1001 + n, series_uid=B) for n in range(30)]
    files.handle([SeriesOpened("laue", B, time.time(), "2")])
    socket = dealer(new_socket, out)
    for result in new:
        event = published(result)
        out.handle([event])
        files.handle([event])
        time.sleep(0.002)
        header, _ = ask(socket, {"from_seq": 0})
        assert header["seqs"] == [*range(1, 21), *range(1001, result.seq + 1)]
        assert header["unavailable"] == []
    header, parts = ask(socket, {"series_uid": A, "from": 3, "to": 4})
    assert parts[1::2] == [encode(r) for r in old[3:5]]
    header, parts = ask(socket, {"series_uid": B})
    assert parts[1::2] == [encode(r) for r in new]
    files.close()


def test_what_is_gone_is_told_from_what_never_was(
    tmp_path: Path, sink: Sink, rng: np.random.Generator
) -> None:
    store(tmp_path, [synthetic_result(0, rng, seq=3, series_uid=A)], A, 1000.0)
    ring = MessageRing(max_messages=2, max_bytes=10**9)
    server = catch_up.CatchUp(ring, StoredResults(tmp_path, "beamline"), "beamline")

    def unavailable(first: int, last: int) -> tuple[list[int], list[list[int]]]:
        header = json.loads(server.reply(json.dumps({"from_seq": first, "to_seq": last}).encode())[0])
        return header["seqs"], header["unavailable"]

    assert unavailable(0, 50) == ([3], [])  # nothing published yet: nobody can have missed anything
    messages: list[AnyMessage] = [
        synthetic_result(1, rng, seq=1001, series_uid=B),
        synthetic_health(1002, 1.0),
        synthetic_result(2, rng, seq=1003, series_uid=B),
        # 1004 and 1005 were dropped before they came here
        synthetic_result(3, rng, seq=1006, series_uid=B),
        synthetic_health(1007, 2.0),
    ]
    for message in messages:
        ring.append(Sent.of(message, "laue", encode(message)))
    # 1001 and 1003 are in no file; 1002 was health, which no file keeps; below 1001 numbers were reserved.
    assert unavailable(0, 2000) == ([3, 1006, 1007], [[1001, 1001], [1003, 1005]])
    assert unavailable(1002, 1002) == ([], [])


def test_numbers_that_begin_anew_do_not_mix_with_the_past(
    tmp_path: Path, sink: Sink, rng: np.random.Generator
) -> None:
    store(tmp_path, [synthetic_result(0, rng, seq=500, series_uid=A)], A, 1000.0)
    store(tmp_path, [synthetic_result(0, rng, seq=10, series_uid=B)], B, 2000.0)
    store(
        tmp_path,
        [synthetic_result(0, rng, seq=11, series_uid="c" * 32)],
        "c" * 32,
        3000.0,
        name="other daemon",
    )
    stored = StoredResults(tmp_path, "beamline")
    assert [s.seq for s in stored.by_seq(0, 10**6)] == [10]
    assert stored.last_seq() == 10
    assert [s.seq for s in stored.by_series(A, None, 0)] == [500]


def test_thousands_of_files_are_read_with_few_open_and_a_bounded_index(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    uids = [f"{n:02d}".ljust(32, "f") for n in range(40)]
    for n, uid in enumerate(uids):
        seqs = range(10 * n + 1, 10 * n + 11)
        store(tmp_path, [synthetic_result(s % 10, rng, seq=s, series_uid=uid) for s in seqs], uid, 1000.0 + n)
    monkeypatch.setattr(stored_results, "INDEX_ROWS", 50)
    stored = StoredResults(tmp_path, "beamline")
    most_open = 0
    found = []
    for sent in stored.by_seq(0, 10**6):
        found.append(sent.seq)
        open_now = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if os.path.islink(fd)]
        most_open = max(most_open, sum(str(tmp_path) in target for target in open_now))
    assert found == list(range(1, 401))
    assert 1 <= most_open <= 2
    assert sum(len(known.index) for known in stored._known.values()) <= 50 + 10
    assert [s.seq for s in stored.by_series(uids[3], (2, 4), 0)] == [32, 33, 34]


def test_broken_files_are_passed_over(
    tmp_path: Path, sink: Sink, rng: np.random.Generator, caplog: Any
) -> None:
    store(tmp_path, [synthetic_result(0, rng, seq=1, series_uid=A)], A, 1000.0)
    (tmp_path / f"laue-x-{A[:8]}-part2.h5").write_bytes(b"no HDF5")
    stored = StoredResults(tmp_path, "beamline")
    for _ in range(3):
        assert [s.seq for s in stored.by_series(A, None, 0)] == [1]
        assert [s.seq for s in stored.by_seq(0, 9)] == [1]
    assert len(caplog.records) == 1


def test_malformed_requests_get_an_error_and_others_an_answer(
    new_socket: NewSocket, tmp_path: Path, sink: Sink, rng: np.random.Generator
) -> None:
    out = sink()
    out.handle([published(synthetic_result(0, rng, seq=1, series_uid=A))])
    socket = dealer(new_socket, out)
    bad: list[Any] = [
        b"",
        b"\xff\xfe",
        b"[" * 3000,
        [],
        {"id": 5},
        {"id": 5, "from_seq": "1"},
        {"id": 5, "from_seq": -1},
        {"id": 5, "from_seq": 2**63},
        {"id": 5, "from_seq": 1, "to": 2},
        {"id": 5, "series_uid": A, "from": 1.5},
    ]
    for request in bad:
        header, parts = ask(socket, request)
        assert header["status"] == "error"
        assert header["error"].startswith("bad request: ")
        assert parts == []
        assert header["id"] == (5 if isinstance(request, dict) else None)
    req = new_socket(zmq.REQ)  # the simplest client of all
    req.connect(out.catch_up_address)
    assert ask(req, {"from_seq": 0})[0]["seqs"] == [1]
    assert ask(req, {"from_seq": 0, "to_seq": 2**63 - 1})[0]["seqs"] == [1]
    assert ask(req, {"from_seq": 9, "to_seq": 3})[0]["seqs"] == []
    flood = new_socket(zmq.DEALER)
    flood.connect(out.catch_up_address)
    flood.send(b"x" * 100_000)  # longer than any request: that peer alone is cut off
    assert ask(socket, {"from_seq": 0})[0]["status"] == "ok"


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_request_raises_anything_but_bad_request(raw: bytes) -> None:
    with contextlib.suppress(catch_up.BadRequest):
        catch_up.parse_request(raw)


def test_a_subscriber_that_does_not_read_delays_nobody(
    new_socket: NewSocket, tmp_path: Path, sink: Sink, rng: np.random.Generator
) -> None:
    out = sink(high_water_mark=10, ring_messages=10_000, ring_mib=512)
    lazy = new_socket(zmq.SUB)
    lazy.setsockopt(zmq.RCVHWM, 10)
    lazy.setsockopt(zmq.RCVBUF, 4096)
    lazy.subscribe(b"")
    lazy.connect(out.results_address)
    template = synthetic_result(0, rng, seq=0, series_uid=A)
    deadline = time.monotonic() + LONG_S
    while not lazy.poll(50) and time.monotonic() < deadline:
        out.handle([published(template)])
    begun = time.monotonic()
    for _ in range(50):
        out.handle([published(template)] * 100)
    assert time.monotonic() - begun < 20.0
    received = 0
    while lazy.poll(200):
        lazy.recv_multipart()
        received += 1
    assert 0 < received < 5000
