"""areaDetector through whole processes: simulator, daemon, results; and what may go wrong on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from testkit.ports import free_address
from testkit.process import DaemonProcess, environment, eventually
from testkit.soak import FRAMES, write_frames

from pipelines.results_files import read_results, results_files
from tests.wire import golden_areadetector as g

pytestmark = pytest.mark.system

LAUE = """
[daemon]
name = "areadetector"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = 1
[streams.s]
source = {{type = "areadetector", address = "{address}", series_idle_s = 4.0, {keys}}}
pipeline = {{type = "laue", materials = ["Cu"], geometry = "{folder}/geometry.det"}}
scan = {{shape = [3, 2], step_um = [2.0, 2.0], origin_um = [0.0, 0.0]}}
[sinks.hdf5]
folder = "{folder}/results"
"""

SUMS = """
[daemon]
name = "areadetector"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = 1
[streams.s]
source = {{type = "areadetector", address = "{address}", {source}}}
pipeline = {{type = "testkit.slow_pipeline", sleep_s = {sleep_s}}}
intake = {{policy = "{policy}", depth = 4}}
[sinks.lines]
type = "testkit.sinks"
path = "{folder}/results.jsonl"
"""


def summing(
    folder: Path, address: str, source: str = 'role = "primary"', sleep_s: float = 0.0, policy: str = "block"
) -> DaemonProcess:
    """A daemon that publishes the sum of each image's pixels."""
    config = SUMS.format(folder=folder, address=address, source=source, sleep_s=sleep_s, policy=policy)
    return DaemonProcess(folder, config=config)


@contextmanager
def plug_in(kind: int, **options: Any) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """A bare socket of the plug-in's type, bound, as the plug-in has it."""
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.linger = 0
        for name, value in options.items():
            setattr(socket, name, value)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        yield socket, f"tcp://127.0.0.1:{port}"


def numbered(number: int, size: int = 8) -> list[bytes]:
    """An array whose pixels add up to its number."""
    pixels = np.zeros((size, size + 1), np.uint32)
    pixels[-1, -1] = min(number, 1 << 20)
    return g.image(number, pixels, g.STAMP + number, ndattr='{"ColorMode":0}')


def sum_of(daemon: DaemonProcess, *states: str) -> int:
    counts = daemon.counts()
    return sum(counts[state] for state in states)


def test_simulator_to_map(tmp_path: Path) -> None:
    """The same scan twice, by either version of the plug-in, from processes that publish.

    Frames that are not square: turned they would not fit the calibration. The scan that is sent snakes and
    the configured one does not, so that only positions put the frames where they belong.
    """
    write_frames(tmp_path, (384, 512), seed=11)
    address = free_address()
    keys = 'position_keys = ["SampleX", "SampleY"]'
    command = [sys.executable, "-m", "grainwatch", "simulate", "areadetector", "--bind", address, "--json"]
    command += ["--rate", "20", "--scan", "3x2", "--step-um", "2", "--snake", "--wait", "60"]
    command += ["--frames", str(tmp_path / "frames.h5")]
    with DaemonProcess(tmp_path, config=LAUE.format(folder=tmp_path, address=address, keys=keys)) as daemon:
        daemon.start()
        for version in ("1.3", "1.4"):
            done = subprocess.run(
                [*command, "--version", version],
                env=environment(), cwd=tmp_path, capture_output=True, timeout=90, check=True,
            )  # fmt: skip
            report = json.loads(done.stdout)
            assert (report["images"], report["dropped"]) == (FRAMES, 0)
        eventually(lambda: daemon.counts()["done"] == 2 * FRAMES, timeout=90.0)
        # Nothing says that the series is over, but that nothing comes any more.
        eventually(lambda: not daemon.status()["status"]["streams"][0]["series_uid"])
        counts = daemon.counts()
        assert (counts["failed"], counts["dropped"], counts["missing"]) == (0, 0, 0)
        assert daemon.stop() == 0
        assert daemon.audit() == []
    series = [list(read_results(path)) for path in results_files(tmp_path / "results")]
    assert len(series) == 2
    for results in series:
        assert [len(r.crystals) for r in results] == [2] * FRAMES
        places = {r.key.frame: r.grid_index for r in results}
        assert places == {1: (0, 0), 2: (1, 0), 3: (2, 0), 4: (2, 1), 5: (1, 1), 6: (0, 1)}


def test_nothing_that_a_plug_in_sends_stops_the_daemon(tmp_path: Path) -> None:
    sound = numbered(4)
    nan = np.full((8, 9), np.nan, np.float32)
    nan[0, 0] = 0
    messages = [
        [b"\xff\x00 garbage"], [b""], [b"[" * 50_000, b""], [b'{"htype":"dimage-1.0","frame":1}', b"", b""],
        numbered(2), [b"{", sound[1]], numbered(3),
        [g.header(4, kind="uint32", shape="[8,9]", stamp=g.STAMP + 4), sound[1][:-1]],
        [g.header(5, kind="uint32", shape="[80000,90000]", stamp=g.STAMP + 5), sound[1]],
        [g.header(6, kind="uint32", shape="[8,3,3]", stamp=g.STAMP + 6), sound[1]],
        [g.header(7, kind="uint32", shape="[8,9]", stamp=g.STAMP + 7, encoding="blosc"), sound[1]],
        [g.header(8, kind="uint32", shape="[8,9]", stamp=g.STAMP + 8, encoding="bslz4"), sound[1]],
        [g.header(-9, kind="uint32", shape="[8,9]"), sound[1]], [g.header("1e30"), sound[1]],
        numbered(9)[:1], [*numbered(10), b"a third part"],
        [g.header(11, kind="uint32", shape="[8,9]", stamp="nan", ndattr='{"A":nan,"B":"\\x"}'), sound[1]],
        numbered(14), numbered(13), numbered(14),
        g.image(15, nan, g.STAMP + 15), g.image(16, nan[:4], g.STAMP + 16), numbered(1 << 40), numbered(1),
    ]  # fmt: skip
    with plug_in(zmq.PUSH) as (socket, address), summing(tmp_path, address) as daemon:
        daemon.start()
        for parts in messages:
            socket.send_multipart(parts)
        eventually(
            lambda: daemon.counts()["received"] == len(messages) + 1 and not daemon.counts()["in_flight"]
        )
        assert daemon.status()["status"]["state"] == "running"
        assert daemon.status()["status"]["worker_restarts"] == 0
        assert daemon.stop() == 0
        assert daemon.audit() == []
    said = daemon.exceptions()
    failed = {n: reason for state, n, reason in said if state == "failed" and n is not None}
    for frame, words in {
        4: "needs 288 bytes, its none blob holds 287", 5: "the limit is", 6: "colour is not read",
        7: "encoding 'blosc' is not read", 8: "bslz4 bl", 9: "message of 1 parts", 10: "message of 3 parts",
    }.items():  # fmt: skip
        assert words in failed[frame], said
    assert [n for state, n, _ in said if state == "dropped"] == [14]
    assert sorted({n for state, n, _ in said if state == "missing"}) == [12]
    reasons = " ".join(reason for state, n, reason in said if state == "failed" and n is None)
    for words in (
        "is no text", "header of 0 characters is not JSON", "nested too deeply", 'type "dectris-v1" reads it',
        "header of 1 characters is not JSON", "expected a whole number, got -9", "NDAttributes left out",
    ):  # fmt: skip
        assert words in reasons, said
    sums = [(e["frame"], e["n_peaks"]) for e in daemon.events("result") if e["frame"] < 15]
    # What was right came through, between all of that and after it, late ones included.
    assert sorted(sums) == [(1, 1), (2, 2), (3, 3), (11, 4), (13, 13), (14, 14)]
    # Ends of series: another type (15), other rows (16), another type and a jump, the counter anew (1).
    assert len(daemon.events("opened")) == 5


def test_what_a_slow_daemon_loses_is_counted_as_missing(tmp_path: Path) -> None:
    """PUB drops without a word. The daemon answers all the while, and its accounts show each loss."""
    with (
        plug_in(zmq.XPUB, sndhwm=2) as (socket, address),
        summing(tmp_path, address, "high_water_mark = 2", sleep_s=0.02) as daemon,
    ):
        daemon.start()
        assert socket.poll(60_000)
        assert socket.recv()[:1] == b"\x01"
        for number in range(300):
            socket.send_multipart(numbered(number, size=512), copy=False)

        def comes(number: int) -> bool:
            socket.send_multipart(numbered(number, size=512))
            until = time.monotonic() + 1.0
            while (came := sum_of(daemon, "received", "missing")) <= number and time.monotonic() < until:
                time.sleep(0.02)
            return came == number + 1

        # Once there is room again one comes, and says how many did not.
        assert any(comes(number) for number in range(300, 360))
        counts = daemon.counts()
        assert counts["missing"] > 50
        assert counts["received"] == counts["done"] + counts["in_flight"]
        eventually(lambda: not daemon.counts()["in_flight"])
        assert daemon.stop() == 0
        assert daemon.audit() == []
    sums = {e["frame"]: e["n_peaks"] for e in daemon.events("result")}
    assert len(sums) == counts["received"]
    assert all(frame == total for frame, total in sums.items())


def test_a_policy_that_drops_keeps_the_socket_empty(tmp_path: Path) -> None:
    """The computation is slow, the reading is not: nothing is missing, what was dropped is counted."""
    with (
        plug_in(zmq.XPUB) as (socket, address),
        summing(tmp_path, address, "series_idle_s = 0.0", 0.1, "drop-oldest") as daemon,
    ):
        daemon.start()
        assert socket.poll(60_000)
        assert socket.recv()[:1] == b"\x01"
        for number in range(200):
            socket.send_multipart(numbered(number))
        counts = eventually(lambda: daemon.counts()["received"] == 200 and daemon.counts())
        assert counts["missing"] == 0
        counts = eventually(lambda: not daemon.counts()["in_flight"] and daemon.counts())
        assert counts["dropped"] > 100
        assert counts["dropped"] + counts["done"] == 200
        assert daemon.stop() == 0
        assert daemon.audit() == []


def test_a_series_goes_on_after_a_crash(tmp_path: Path) -> None:
    with plug_in(zmq.PUSH) as (socket, address), summing(tmp_path, address) as daemon:
        daemon.start()
        for number in (7, 8, 9):
            socket.send_multipart(numbered(number))
        # A crash may cost what is not written yet.
        eventually(lambda: daemon.written() == {"received": 3, "done": 3})
        eventually(lambda: len(daemon.events("result")) == 3)
        daemon.kill()
        daemon.start()
        for number in (12, 13):  # 10 and 11 were taken while nobody listened
            socket.send_multipart(numbered(number))
        eventually(lambda: len(daemon.events("result")) == 5)
        assert daemon.counts()["missing"] == 2
        restarted = [g.header(3, kind="uint32", shape="[8,9]", stamp=g.STAMP + 20), numbered(3)[1]]
        socket.send_multipart(restarted)
        eventually(lambda: len(daemon.events("result")) == 6)
        assert daemon.stop() == 0
        assert daemon.audit() == []
    results = daemon.events("result")
    uids = [e["uid"] for e in results]
    assert len(set(uids[:5])) == 1
    assert uids[5] != uids[0]
    assert [n for state, n, _ in daemon.exceptions() if state == "missing"] == [10]
