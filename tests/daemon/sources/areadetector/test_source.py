"""The areaDetector source on real sockets, with the simulator and with bare messages on the other end."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from testkit.process import LONG_S

from daemon.sources.areadetector.simulator import Options, Report, Simulator, encode_array, encode_exposure
from daemon.sources.areadetector.source import AreaDetectorSource, Config, open_source
from daemon.sources.base import Arrival, Bad, Event, Idle, SeriesEnd, SeriesStart, SourceContext
from grainwatch.config import ConfigError, ScanTable, convert
from tests.wire import golden_areadetector as g

LOOPBACK = "tcp://127.0.0.1:*"
FRAMES = [np.full((12, 16), 3 * k, np.uint16) for k in range(5)]


@contextmanager
def opened(folder: Path, **config: Any) -> Iterator[AreaDetectorSource]:
    source = open_source(Config(**config), "camera", SourceContext(folder))
    try:
        yield source
    finally:
        source.close()


def collect(
    source: AreaDetectorSource, enough: Callable[[list[Event]], bool], timeout_s: float = LONG_S
) -> list[Event]:
    """Return all events but `Idle` until they are enough."""
    events: list[Event] = []
    until = time.monotonic() + timeout_s
    for event in source.events():
        assert time.monotonic() < until, events
        if not isinstance(event, Idle):
            events.append(event)
        if enough(events):
            break
    return events


def until_idle(source: AreaDetectorSource) -> list[Event]:
    """Return what comes until nothing does for a moment."""
    return list(itertools.takewhile(lambda event: not isinstance(event, Idle), source.events()))


def ends(count: int) -> Callable[[list[Event]], bool]:
    return lambda events: sum(isinstance(e, SeriesEnd) for e in events) >= count


@contextmanager
def simulated(**options: Any) -> Iterator[tuple[str, Future[Report]]]:
    """Run a simulator in a thread; gives its address and what it will report."""
    stop = threading.Event()
    frames = options.pop("frames", FRAMES)
    simulator = Simulator(frames, Options(address=LOOPBACK, **options), stop.is_set)
    with ThreadPoolExecutor(1) as pool:
        try:
            yield simulator.address, pool.submit(simulator.run)
        finally:
            stop.set()


@pytest.mark.parametrize(("pattern", "role"), [("pub", "tap"), ("push", "primary")])
@pytest.mark.parametrize("version", ["1.3", "1.4"])
@pytest.mark.parametrize("algorithm", ["none", "bslz4", "lz4hdf5", "lz4"])
def test_arrays_arrive_as_they_were_sent(
    tmp_path: Path, pattern: str, role: str, version: str, algorithm: str
) -> None:
    options: dict[str, Any] = {"pattern": pattern, "version": version, "algorithm": algorithm}
    with (
        simulated(rate_hz=0, repeat=2, first_id=7, attributes={"Gain": 2}, **options) as (address, report),
        opened(tmp_path, address=address, role=role, frames_per_series=10) as source,
    ):
        start, *arrivals, end = collect(source, ends(1))
    assert isinstance(start, SeriesStart)
    assert isinstance(end, SeriesEnd)
    assert (start.first_frame, start.n_frames, start.detector_series) == (7, 10, end.detector_series)
    assert [a.frame for a in arrivals if isinstance(a, Arrival)] == list(range(7, 17))
    for event in arrivals:
        assert isinstance(event, Arrival)
        assert event.image.shape == (12, 16)
        assert (event.image.array() == FRAMES[(event.frame - 7) % 5]).all()
        assert event.metadata == {"ndattr": {"ColorMode": 0, "Gain": 2}}
        assert abs(event.acquired - time.time()) < 60
    sent = report.result()
    assert (sent.images, sent.dropped, sent.series, sent.complete) == (10, 0, 1, True)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint64", "float32", "float64"])
def test_types_of_pixels(tmp_path: Path, kind: str) -> None:
    frames = [(frame + np.arange(16)).astype(kind) for frame in FRAMES]
    with (
        simulated(rate_hz=0, frames=frames) as (address, _),
        opened(tmp_path, address=address, frames_per_series=5) as source,
    ):
        events = collect(source, ends(1))
    arrived = [e.image.array() for e in events if isinstance(e, Arrival)]
    assert [a.dtype.name for a in arrived] == [kind] * 5
    assert np.array_equal(arrived, frames)


def test_a_scan_brings_its_positions_and_the_counter_starts_over(tmp_path: Path) -> None:
    scan = ScanTable(shape=(3, 2), step_um=(2.0, 5.0), snake=True)
    keys = ("SampleX", "SampleY")
    with (
        simulated(rate_hz=0, scan=scan, series=2) as (address, _),
        opened(tmp_path, address=address, position_keys=keys, position_unit_um=10.0) as source,
    ):
        events = collect(source, lambda found: sum(isinstance(e, Arrival) for e in found) == 12)
    positions = [(0, 0), (20, 0), (40, 0), (40, 50), (20, 50), (0, 50)]
    assert [e.position_um for e in events if isinstance(e, Arrival)] == positions * 2
    assert [type(e) for e in events if not isinstance(e, Arrival)] == [SeriesStart, SeriesEnd, SeriesStart]


def test_a_slow_subscriber_loses_arrays_and_the_gap_shows(tmp_path: Path) -> None:
    """A publisher whose buffer is full drops without a word: what is missing is between the numbers."""
    big = np.zeros((1024, 1024), np.uint16)  # 2 MB: the system's own buffers hold few of them
    with (
        zmq.Context() as context,
        context.socket(zmq.XPUB) as publisher,
        ExitStack() as stack,
    ):
        publisher.linger = 0
        publisher.set_hwm(2)
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        address = f"tcp://127.0.0.1:{port}"
        source = stack.enter_context(opened(tmp_path, address=address, high_water_mark=2, series_idle_s=30.0))
        assert publisher.poll(60_000)
        assert publisher.recv()[:1] == b"\x01"
        for number in range(200):  # nobody reads
            publisher.send_multipart(g.image(number, big, g.STAMP + number), copy=False)
        events = until_idle(source)
        for last in range(200, 260):  # once there is room again one comes
            publisher.send_multipart(g.image(last, big, g.STAMP + last))
            events += until_idle(source)
            if any(isinstance(e, Arrival) and e.frame == last for e in events):
                break
    numbers = [e.frame for e in events if isinstance(e, Arrival)]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == last
    assert 2 <= len(numbers) < 150
    assert isinstance(events[0], SeriesStart)
    # One series, so that the accounts count what lies between as missing.
    assert [type(e) for e in events[1:]] == [Arrival] * len(numbers)


def test_the_simulator_drops_as_the_plug_in_does(tmp_path: Path) -> None:
    big = [np.zeros((1024, 1024), np.uint16)]
    simulator = Simulator(big, Options(address=LOOPBACK, high_water_mark=1, rate_hz=2000.0, count=300))
    with (
        ThreadPoolExecutor(1) as pool,
        opened(tmp_path, address=simulator.address, high_water_mark=1, series_idle_s=1.0) as source,
    ):
        report = pool.submit(simulator.run)
        until = time.monotonic() + 40
        while simulator._sent + simulator._dropped < 300:  # nobody reads
            assert time.monotonic() < until
            time.sleep(0.01)
        events = collect(source, ends(1))
        sent = report.result(LONG_S)
    assert sent.dropped > 100
    assert sent.images + sent.dropped == 300
    assert len([e for e in events if isinstance(e, Arrival)]) == sent.images
    assert not [e for e in events if isinstance(e, Bad)]


def test_silence_is_measured_while_somebody_reads(tmp_path: Path) -> None:
    """A daemon that does not ask for a while must not take that for the camera's silence."""
    with (
        zmq.Context() as context,
        context.socket(zmq.PUSH) as push,
        opened(tmp_path, address=LOOPBACK, bind=True, role="primary", series_idle_s=1.0) as source,
    ):
        push.linger = 0
        push.connect(source.address)
        for number in (1, 2):
            push.send_multipart(g.array(number, stamp=number))
        events: list[Event] = []
        for event in source.events():
            if isinstance(event, Idle):
                continue
            events.append(event)
            if event.__class__ is Arrival and len(events) == 2:
                time.sleep(1.5)  # the intake is full
            if isinstance(event, SeriesEnd):
                break
    assert [type(e) for e in events] == [SeriesStart, Arrival, Arrival, SeriesEnd]


def test_bad_messages_between_good_ones(tmp_path: Path) -> None:
    bound: dict[str, Any] = {"address": LOOPBACK, "bind": True, "role": "primary"}
    with (
        zmq.Context() as context,
        context.socket(zmq.PUSH) as push,
        opened(tmp_path, **bound, max_message_bytes=5000, max_image_bytes=1000) as source,
    ):
        push.linger = 0
        push.connect(source.address)
        wide = np.zeros((40, 40), np.uint16)
        messages = [
            [b"noise"],
            g.array(1, stamp=1),
            g.array(2, stamp=2)[:1],
            g.array(3, b"short", stamp=3),
            g.array(-4, stamp=4),
            [*g.array(5, stamp=5), b"x" * 6000],
            g.array(6, g.by_library("bslz4", wide), encoding="bslz4", shape="[40,40]", stamp=6),
            g.array(7, stamp=7, ndattr='{"Path":"C:\\x"}'),
            g.array(8, stamp="nan"),
        ]
        for message in messages:
            push.send_multipart(message)
        events = collect(source, lambda found: len(found) == len(messages) + 2)
    noise, start, one, *rest = events
    assert isinstance(noise, Bad)
    assert isinstance(start, SeriesStart)
    assert one.frame == 1  # type: ignore[union-attr]
    bad = [(e.frame, e.reason) for e in rest if isinstance(e, Bad)]
    for (frame, reason), (number, words) in zip(
        bad,
        [
            (2, "1 parts"),
            (3, "holds 5"),
            (None, "frame: expected a whole number, got -4"),
            (5, "the limit is 5000"),
            (6, "the limit is 1000"),
            (None, "NDAttributes left out: header of"),
        ],
        strict=True,
    ):
        assert frame == number
        assert words in reason
    assert [e.frame for e in rest if isinstance(e, Arrival)] == [7, 8]


def test_what_the_simulator_sends_is_what_the_plug_in_sends() -> None:
    """By json and numpy's own words alone."""
    image = np.arange(15, dtype=np.uint16).reshape(3, 5)
    new, blob = encode_array(encode_exposure(image), 9, 1000.5, "1.4", {"ColorMode": 0})
    assert json.loads(new) == {
        "htype": "array-1.0",
        "type": "uint16",
        "shape": [3, 5],
        "frame": 9,
        "timeStamp": 1000.5,
        "encoding": "",
        "ndattr": {"ColorMode": 0},
    }
    assert (np.frombuffer(blob, "<u2").reshape(3, 5) == image).all()
    old, packed = encode_array(encode_exposure(image, "bslz4"), 9, 1000.5, "1.3", {})
    assert json.loads(old)["htype"] == ["array-1.0"]
    assert json.loads(old)["shape"] == [5, 3]
    assert packed == g.by_library("bslz4", image)


def test_pixels_that_areadetector_has_not() -> None:
    with pytest.raises(ValueError, match="no pixels of type complex64"):
        Simulator([np.zeros((2, 2), np.complex64)], Options(address=LOOPBACK))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "zip"}, "algorithm: expected one of none, lz4, lz4hdf5, bslz4"),
        ({"pattern": "req"}, "pattern: expected one of pub, push"),
        ({"version": "2"}, "version: expected one of 1.3, 1.4"),
        ({"address": "ipc:///tmp/x"}, "address: expected tcp://host:port"),
        ({"series": 0}, "series: expected 1 or more"),
        ({"first_id": -1}, "first id: expected 0 or more"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "the key `address` is missing"),
        ({"address": "127.0.0.1:1234"}, "address: expected tcp://host:port"),
        ({"address": "tcp://h:1", "republish": "tcp://h:2"}, "only a source with role 'primary'"),
        ({"address": "tcp://h:1", "series_idle_s": -1}, "series_idle_s: expected 0 or more"),
        ({"address": "tcp://h:1", "frames_per_series": -1}, "frames_per_series: expected 0 or more"),
        ({"address": "tcp://h:1", "position_unit_um": 0}, "position_unit_um: expected more than 0"),
        ({"address": "tcp://h:1", "position_keys": ["a", "b", "c", "d"]}, "position_keys: expected up to 3"),
        ({"address": "tcp://h:1", "shape_order": "zyx"}, "shape_order"),
    ],
)
def test_configuration_errors_name_the_key(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(table, Config, "config.toml: streams.camera.source")
