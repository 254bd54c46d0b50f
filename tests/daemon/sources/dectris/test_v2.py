"""The source on real sockets, with the simulator and with bare messages on the other end."""

from __future__ import annotations

import itertools
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
from daemon.sources.dectris.v2 import Config, open_source
from daemon.sources.dectris.v2_simulator import Options
from daemon.sources.simulator import Ahead, Report, Simulator, run_simulator
from daemon.sources.zmq_reader import ZmqSource
from grainwatch.config import ConfigError, convert
from tests.wire import golden

LOOPBACK = "tcp://127.0.0.1:*"
FRAMES = [np.full((12, 16), k, np.uint16) for k in range(5)]


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
def simulated(frames: list[np.ndarray[Any, Any]], **options: Any) -> Iterator[tuple[str, Future[Report]]]:
    """Run a simulator in a thread; gives its address and what it will report."""
    stop = threading.Event()
    simulator = Simulator(frames, Options(address=LOOPBACK, **options), stop=stop.is_set)
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


def test_frames_that_are_made_while_they_are_sent() -> None:
    """The first ones arrive before the last ones exist, and all of them in order."""
    go_on = threading.Event()

    def slowly() -> Iterator[np.ndarray[Any, Any]]:
        yield from FRAMES[:2]
        assert go_on.wait(LONG_S)
        yield from FRAMES[2:]

    options = Options(address=LOOPBACK, rate_hz=0)
    with Ahead(slowly(), len(FRAMES), options) as exposures, ThreadPoolExecutor(1) as pool:
        simulator = Simulator(exposures, options)
        with opened(address=simulator.address) as source:
            report = pool.submit(simulator.run)
            seen = []
            for event in source.events():
                if isinstance(event, Arrival):
                    seen.append(int(event.image.array()[0, 0]))
                    if len(seen) == 2:
                        go_on.set()
                elif isinstance(event, SeriesEnd):
                    break
        assert report.result(LONG_S).complete
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("algorithm", ["none", "lz4", "bslz4"])
def test_a_series_arrives_as_it_was_sent(algorithm: str) -> None:
    options = {"rate_hz": 0, "repeat": 2, "algorithm": algorithm, "channels": ("low", "high")}
    with simulated(FRAMES, **options) as (address, report), opened(address=address) as source:
        start, *arrivals, end = collect(source)
    assert isinstance(start, SeriesStart)
    assert isinstance(end, SeriesEnd)
    assert start.detector_series == end.detector_series
    assert start.n_frames == 10
    assert start.channels == ("low", "high")
    assert [(a.frame, a.channel) for a in arrivals if isinstance(a, Arrival)] == [
        (n, channel) for n in range(10) for channel in ("low", "high")
    ]
    for event in arrivals:
        assert isinstance(event, Arrival)
        assert event.detector_series == start.detector_series
        expected = FRAMES[event.frame % 5] // (1 if event.channel == "low" else 2)
        assert (event.image.array() == expected).all()
        assert abs(event.acquired - time.time()) < 60
    sent = report.result()
    assert (sent.images, sent.series, sent.complete) == (10, 1, True)


def test_series_differ_and_positions_come_along() -> None:
    positions = [(0.5, 1.0), (1.5, 2.0)]
    simulator = Simulator(FRAMES[:2], Options(address=LOOPBACK, rate_hz=0, series=2), positions_um=positions)
    with ThreadPoolExecutor(1) as pool, opened(address=simulator.address) as source:
        pool.submit(simulator.run)
        events = collect(source, ends=2)
    starts = [e for e in events if isinstance(e, SeriesStart)]
    assert len({s.detector_series for s in starts}) == 2
    assert [e.position_um for e in events if isinstance(e, Arrival)] == positions * 2


def test_the_rate_is_that_of_the_schedule() -> None:
    with simulated(FRAMES, rate_hz=50.0, count=25) as (address, report), opened(address=address) as source:
        collect(source)
        began = time.monotonic()
    sent = report.result()
    assert 0.48 <= sent.seconds < 5.0
    assert time.monotonic() - began < 5.0
    assert sent.cpu_s < sent.seconds


def test_push_deals_out_and_a_second_reader_takes_its_share() -> None:
    """Why there are roles: two PULL sockets on a detector get half of the messages each."""
    with (
        simulated(FRAMES, rate_hz=100.0, count=120) as (address, report),
        opened(address=address) as first,
        opened(address=address) as second,
    ):
        shares = []
        for source in (first, second):
            events = list(
                itertools.takewhile(lambda e: not (isinstance(e, Idle) and report.done()), source.events())
            )
            shares.append([e.frame for e in events if isinstance(e, Arrival)])
    assert sorted(shares[0] + shares[1]) == list(range(120))
    assert min(map(len, shares)) >= 10


def test_a_tap_hears_what_the_primary_published_again() -> None:
    with opened(address=LOOPBACK, bind=True, republish=LOOPBACK) as primary:
        output = primary.republished_at
        with opened(address=output, role="tap") as tap, bare_push(primary.address) as push:
            until = time.monotonic() + LONG_S
            heard = Idle()
            while isinstance(heard, Idle):  # a subscription takes a moment
                assert time.monotonic() < until
                push.send(golden.image())
                for event in primary.events():
                    if isinstance(event, Arrival):
                        break
                heard = next(iter(tap.events()))
    assert isinstance(heard, Arrival)
    assert (heard.image.array() == golden.PIXELS).all()


def test_it_waits_when_nobody_reads_and_loses_nothing() -> None:
    big = [np.random.default_rng(k).integers(0, 60000, (512, 512), dtype=np.uint16) for k in range(4)]
    options = {"rate_hz": 0, "count": 60, "high_water_mark": 2, "algorithm": "none"}
    with simulated(big, **options) as (address, report):
        time.sleep(0.3)
        assert not report.done()  # not even the start has gone: there is no reader
        before = time.time()
        with opened(address=address, high_water_mark=1) as source:
            events = source.events()
            assert isinstance(next(e for e in events if not isinstance(e, Idle)), SeriesStart)
            time.sleep(0.5)
            assert not report.done()  # buffers of both ends are full
            rest = collect(source)
    arrivals = [e for e in rest if isinstance(e, Arrival)]
    assert [a.frame for a in arrivals] == list(range(60))
    assert arrivals[0].acquired >= before  # the wait is no part of the series
    assert report.result().complete


def test_no_reader_in_time() -> None:
    began = time.monotonic()
    report = run_simulator(FRAMES, Options(address=LOOPBACK, peer_timeout_s=0.2))
    assert not report.complete
    assert report.images == 0
    assert time.monotonic() - began < 20


def test_bad_messages_between_good_ones() -> None:
    with (
        opened(address=LOOPBACK, bind=True, max_message_bytes=4500, max_image_bytes=1000) as source,
        bare_push(source.address) as push,
    ):
        push.send(golden.start())
        push.send(golden.image(0))
        push.send(b"noise")
        push.send_multipart([b'{"htype":"dimage-1.0"}', b"", b""])
        push.send(golden.image(1)[:-5])
        push.send(golden.image(2, user_data=golden.raw(b"x" * 5000)))
        wide = golden.multi_dim(np.zeros((40, 40), np.uint16), 69, "bslz4")
        push.send(golden.image(3, data=golden.mapping(threshold_1=wide)))
        push.send(golden.image(5))
        push.send(golden.end())
        _, first, noise, parts, cut, large, bomb, last, _ = collect(source)
    assert isinstance(first, Arrival)
    assert isinstance(last, Arrival)
    assert (first.frame, last.frame) == (0, 5)
    assert noise == Bad("message of 5 bytes is not a CBOR map")
    assert isinstance(parts, Bad)
    assert "3 parts" in parts.reason
    for k, bad in ((1, cut), (2, large)):
        # A message that failed as a whole names no channel: the daemon fails the frame in all of them.
        assert isinstance(bad, Bad)
        assert (bad.frame, bad.channel) == (k, "")
    assert isinstance(large, Bad)
    assert "the limit is 4500" in large.reason
    assert isinstance(bomb, Bad)
    assert (bomb.frame, bomb.channel) == (3, "threshold_1")
    assert "the limit is 1000" in bomb.reason


def test_idle_comes_in_time() -> None:
    with opened(address=LOOPBACK, bind=True) as source:
        events = source.events()
        began = time.monotonic()
        assert [type(next(events)) for _ in range(3)] == [Idle] * 3
        assert time.monotonic() - began < 5.0


def test_a_closed_source_ends() -> None:
    with opened(address=LOOPBACK, bind=True) as source:
        events = source.events()
        next(events)
        source.close()
        assert list(events) == []


def test_an_address_in_use_is_named() -> None:
    with opened(address=LOOPBACK, bind=True) as source:
        address = source.address
        message = rf"streams\.laue\.source\.address: {address} is in use"
        with pytest.raises(ConfigError, match=message), opened(address=address, bind=True):
            pass
        message = rf"streams\.laue\.source\.republish: {address} is in use"
        with (
            pytest.raises(ConfigError, match=message),
            opened(address="tcp://127.0.0.1:9", republish=address),
        ):
            pass


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "the key `address` is missing"),
        ({"address": "127.0.0.1:31001"}, "address: expected tcp://host:port"),
        ({"address": "tcp://127.0.0.1"}, "address: expected tcp://host:port"),
        ({"address": "tcp://127.0.0.1:99999"}, "address: expected tcp://host:port"),
        (
            {"address": "tcp://h:1", "role": "second"},
            "role: 'second' is not known, expected one of 'primary', 'tap'",
        ),
        ({"address": "tcp://h:1", "high_water_mark": 0}, "high_water_mark: expected 1 or more"),
        (
            {"address": "tcp://h:1", "role": "tap", "republish": "tcp://h:2"},
            "only a source with role 'primary'",
        ),
        ({"address": "tcp://h:1", "adress": 1}, r"unknown key `adress`: did you mean address\?"),
    ],
)
def test_configuration_errors_name_the_key(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(table, Config, "config.toml: streams.laue.source")


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:31001", "tcp://[::1]:5", "tcp://*:5", "ipc:///tmp/x"])
def test_good_addresses(address: str) -> None:
    assert convert({"address": address}, Config, "").address == address
