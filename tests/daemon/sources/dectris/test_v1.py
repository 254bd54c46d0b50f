"""The Stream V1 source on real sockets, with the simulator and with bare messages on the other end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import zmq
from testkit.process import LONG_S

from daemon.sources.base import Arrival, Bad, Event, Idle, SeriesEnd, SeriesStart
from daemon.sources.dectris import v2 as dectris_v2
from daemon.sources.dectris.v1 import Config, open_source
from daemon.sources.dectris.v1_simulator import Options
from daemon.sources.simulator import Report, Simulator
from daemon.sources.zmq_reader import ZmqSource
from grainwatch.config import ConfigError, convert
from tests.wire import golden, golden_v1

LOOPBACK = "tcp://127.0.0.1:*"
FRAMES = [np.full((12, 16), 3 * k, np.uint16) for k in range(5)]


@contextmanager
def opened(**config: Any) -> Iterator[ZmqSource]:
    source = open_source(Config(**config), "laue")
    try:
        yield source
    finally:
        source.close()


def collect(source: ZmqSource, ends: int = 1, timeout_s: float = LONG_S) -> list[Event]:
    """Return all events but `Idle` until so many series ended."""
    events: list[Event] = []
    until = time.monotonic() + timeout_s
    for event in source.events():
        assert time.monotonic() < until, events
        if not isinstance(event, Idle):
            events.append(event)
            ends -= isinstance(event, SeriesEnd)
        if ends == 0:
            break
    return events


@contextmanager
def simulated(
    frames: list[np.ndarray[Any, Any]], positions_um: Any = None, **options: Any
) -> Iterator[tuple[str, Future[Report]]]:
    """Run a simulator in a thread; gives its address and what it will report."""
    stop = threading.Event()
    simulator = Simulator(
        frames, Options(address=LOOPBACK, **options), positions_um=positions_um, stop=stop.is_set
    )
    with ThreadPoolExecutor(1) as pool:
        try:
            yield simulator.address, pool.submit(simulator.run)
        finally:
            stop.set()


@contextmanager
def bare_push(address: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = 0
        socket.connect(address)
        yield socket


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("algorithm", ["none", "lz4", "bslz4"])
def test_a_series_arrives_as_it_was_sent(algorithm: str, kind: type[np.unsignedinteger[Any]]) -> None:
    frames = [frame.astype(kind) for frame in FRAMES]
    with (
        simulated(frames, rate_hz=0, repeat=2, algorithm=algorithm) as (address, report),
        opened(address=address) as source,
    ):
        start, *arrivals, end = collect(source)
    assert isinstance(start, SeriesStart)
    assert isinstance(end, SeriesEnd)
    assert start.detector_series == end.detector_series == "1"
    assert (start.n_frames, start.channels) == (10, ("",))
    assert [a.frame for a in arrivals if isinstance(a, Arrival)] == list(range(10))
    for event in arrivals:
        assert isinstance(event, Arrival)
        assert event.image.dtype == np.dtype(kind)
        assert (event.image.array() == frames[event.frame % 5]).all()
        assert abs(event.acquired - time.time()) < 60
    sent = report.result()
    assert (sent.images, sent.series, sent.complete) == (10, 1, True)


@pytest.mark.parametrize(
    ("detail", "keys"),
    [
        ("none", set()),
        ("basic", {"nimages", "data_collection_date", "x_pixels_in_detector", "photon_energy"}),
        ("all", {"nimages", "photon_energy", "pixel_mask", "flatfield", "countrate_table"}),
    ],
)
def test_every_header_detail_with_appendices_and_positions(detail: str, keys: set[str]) -> None:
    options: dict[str, Any] = {
        "rate_hz": 0,
        "series": 2,
        "header_detail": detail,
        "header_appendix": '{"proposal": "p1"}',
        "image_appendix": "fine",
        "metadata": {"photon_energy": 12398.0},
    }
    positions = [(0.5, 1.0), (1.5, 2.0), (2.5, 3.0)]
    with (
        simulated(FRAMES, positions, **options) as (address, _),
        opened(address=address) as source,
    ):
        events = collect(source, ends=2)
    starts = [e for e in events if isinstance(e, SeriesStart)]
    assert [s.detector_series for s in starts] == ["1", "2"]
    for start in starts:
        assert keys <= set(start.metadata)
        assert start.metadata["user_data"] == {"proposal": "p1"}
        assert start.n_frames == (None if detail == "none" else 5)
    if detail == "all":
        assert starts[0].metadata["pixel_mask"][""].shape == (12, 16)
    arrivals = [e for e in events if isinstance(e, Arrival)]
    assert [a.position_um for a in arrivals] == [*positions, None, None] * 2
    assert [a.metadata["user_data"] for a in arrivals[2:4]] == [
        {"position_um": [2.5, 3.0], "appendix": "fine"},
        "fine",
    ]
    # Without a header's date nothing says when the series began.
    assert all((a.acquired == 0.0) == (detail == "none") for a in arrivals)
    assert not [e for e in events if isinstance(e, Bad)]


def test_a_tap_gets_all_parts_byte_for_byte() -> None:
    messages = [
        golden_v1.header("all", b"note"),
        golden_v1.image(0, golden_v1.PIXELS, "lz4<"),
        golden_v1.image(1, golden_v1.PIXELS, "bs16-lz4<", b'{"position_um": [1]}'),
        [b"noise", b"", b"of three parts"],
        golden_v1.end(),
    ]
    with (
        opened(address=LOOPBACK, bind=True, republish=LOOPBACK) as primary,
        opened(address=primary.republished_at, role="tap") as tap,
        zmq.Context() as context,
        context.socket(zmq.SUB) as viewer,
        bare_push(primary.address) as push,
    ):
        viewer.linger = 0
        viewer.rcvtimeo = 100
        viewer.subscribe(b"")
        viewer.connect(primary.republished_at)
        events, heard = primary.events(), tap.events()
        tuned_in = {"tap": False, "viewer": False}
        until = time.monotonic() + 40
        while not all(tuned_in.values()):  # a subscription takes a moment
            assert time.monotonic() < until
            push.send_multipart([b"are you there"])
            while isinstance(next(events), Idle):
                pass
            tuned_in["tap"] |= isinstance(next(heard), Bad)
            try:
                tuned_in["viewer"] |= viewer.recv_multipart() == [b"are you there"]
            except zmq.Again:
                continue
        for message in messages:
            push.send_multipart(message)
        told = [e for e in collect(primary) if not is_hello(e)]
        tapped = [e for e in collect(tap) if not is_hello(e)]
        assert repr(tapped[0]) == repr(told[0])  # a header has arrays, which have no single equality
        assert tapped[1:] == told[1:]
        viewer.rcvtimeo = round(1e3 * LONG_S)
        seen: list[list[bytes]] = []
        while len(seen) < len(messages):
            message = viewer.recv_multipart()
            if message != [b"are you there"]:
                seen.append(message)
        assert seen == messages
    assert [type(e) for e in told] == [SeriesStart, Arrival, Arrival, Bad, SeriesEnd]


def is_hello(event: Event) -> bool:
    return isinstance(event, Bad) and event.reason.startswith("first part of 13 characters is not JSON")


def test_an_end_before_the_first_header_and_bad_messages_between_good_ones() -> None:
    with (
        opened(address=LOOPBACK, bind=True, max_message_bytes=4500, max_image_bytes=1000) as source,
        bare_push(source.address) as push,
    ):
        push.send_multipart(golden_v1.end(6))
        (stray,) = collect(source)
        assert stray == SeriesEnd("6")  # the daemon finds no such series open, and waits for a header
        push.send_multipart(golden_v1.header())
        push.send_multipart(golden_v1.image(0))
        push.send(b"noise")
        push.send_multipart(golden_v1.image(1)[:3])
        push.send_multipart([*golden_v1.image(2), b"x" * 5000])
        wide = np.zeros((40, 40), np.uint16)
        push.send_multipart(golden_v1.image(3, wide, "lz4<", blob=golden_v1.by_library(wide, "lz4<")))
        push.send(golden.image())
        push.send_multipart(golden_v1.image(5))
        push.send_multipart(golden_v1.end())
        start, first, noise, parts, large, bomb, cbor, last, end = collect(source)
    assert isinstance(start, SeriesStart)
    assert (first.frame, last.frame) == (0, 5)  # type: ignore[union-attr]
    assert noise == Bad("first part of 5 characters is not JSON: Expecting value: line 1 column 1 (char 0)")
    for k, bad, words in (
        (1, parts, "3 parts"),
        (2, large, "the limit is 4500"),
        (3, bomb, "the limit is 1000"),
    ):
        assert isinstance(bad, Bad)
        assert (bad.detector_series, bad.frame, bad.channel) == ("7", k, "")
        assert words in bad.reason
    assert isinstance(cbor, Bad)
    assert '"dectris-v2"' in cbor.reason
    assert end == SeriesEnd("7")


def test_the_other_format_names_this_one() -> None:
    config = dectris_v2.Config(address=LOOPBACK, bind=True)
    source = dectris_v2.open_source(config, "laue")
    try:
        with bare_push(source.address) as push:
            push.send_multipart(golden_v1.image())
            bad = next(e for e in source.events() if not isinstance(e, Idle))
    finally:
        source.close()
    assert isinstance(bad, Bad)
    assert "4 parts" in bad.reason
    assert '"dectris-v1"' in bad.reason


def test_what_the_simulator_sends_is_what_the_format_says() -> None:
    """Read with json and bitshuffle's own words alone: names of keys, order of parts, sizes."""
    options = Options(header_detail="all", header_appendix="note")
    exposure, coder = options.expose(FRAMES[1]), options.coder(9)
    header = coder.start(exposure, 5)
    assert [json.loads(part)["htype"] for part in header[2:8:2]] == [
        "dflatfield-1.0",
        "dpixelmask-1.0",
        "dcountrate_table-1.0",
    ]
    assert json.loads(header[0]) == {"htype": "dheader-1.0", "series": 9, "header_detail": "all"}
    assert len(header) == 9
    assert header[8] == b"note"
    assert [len(header[3]), len(header[5])] == [12 * 16 * 4] * 2
    which, said, blob, times = coder.image(3, exposure, 0.5)
    assert json.loads(which)["frame"] == 3
    described = json.loads(said)
    assert described == {
        "htype": "dimage_d-1.0",
        "shape": [16, 12],
        "type": "uint16",
        "encoding": "bs16-lz4<",
        "size": len(blob),
    }
    assert blob[:12] == (12 * 16 * 2).to_bytes(8, "big") + (8192).to_bytes(4, "big")
    assert json.loads(times)["start_time"] == 1_500_000_000
    assert coder.end() == [b'{"htype": "dseries_end-1.0", "series": 9}']


def test_pixels_that_the_format_has_not() -> None:
    with pytest.raises(ValueError, match="no pixels of type float64"):
        Options().expose(np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "zip"}, "algorithm: expected one of bslz4, lz4, none"),
        ({"header_detail": "some"}, "header detail: expected one of none, basic, all"),
        ({"address": "ipc:///tmp/x"}, "address: expected tcp://host:port"),
        ({"repeat": 0}, "repeat: expected 1 or more"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "the key `address` is missing"),
        ({"address": "127.0.0.1:9999"}, "address: expected tcp://host:port"),
        (
            {"address": "tcp://h:1", "role": "tap", "republish": "tcp://h:2"},
            "only a source with role 'primary'",
        ),
        ({"address": "tcp://h:1", "max_image_bytes": 0}, "max_image_bytes: expected 1 or more"),
    ],
)
def test_configuration_errors_name_the_key(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(table, Config, "config.toml: streams.laue.source")
