"""Stream V1 through whole processes: simulator, daemon, tap, results; and what may go wrong on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zmq
from testkit.ports import free_address
from testkit.process import LONG_S, DaemonProcess, environment, eventually
from testkit.soak import FRAMES, write_frames

from daemon.sources.dectris.v1_simulator import SeriesCoder, encode_exposure
from pipelines.results_files import read_results, results_files
from tests.wire import golden_v1

pytestmark = pytest.mark.system
SIZE = 512

CONFIG = """
[daemon]
name = "{name}"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = 1
compute_timeout_s = 20.0
[streams.s]
source = {{type = "dectris-v1", address = "{address}", {source}}}
pipeline = {{type = "laue", materials = ["Cu"], geometry = "{geometry}"}}
[sinks.hdf5]
folder = "{folder}/results"
"""


def daemon_in(folder: Path, geometry: Path, address: str, source: str) -> DaemonProcess:
    folder.mkdir(exist_ok=True)
    text = CONFIG.format(name=folder.name, folder=folder, address=address, source=source, geometry=geometry)
    return DaemonProcess(folder, config=text)


def crystals_of(folder: Path) -> dict[tuple[str, int], int]:
    """How many crystals each frame of each series has."""
    found = {}
    for path in results_files(folder / "results"):
        found.update({(r.key.series_uid, r.key.frame): len(r.crystals) for r in read_results(path)})
    return found


def test_simulator_to_daemon_to_tap(tmp_path: Path) -> None:
    """Two daemons: one reads the detector and publishes again, the other listens there."""
    write_frames(tmp_path, (SIZE, SIZE), seed=11)
    detector, again = free_address(), free_address()
    geometry = tmp_path / "geometry.det"
    primary = daemon_in(tmp_path / "primary", geometry, detector, f'republish = "{again}"')
    tap = daemon_in(tmp_path / "tap", geometry, again, 'role = "tap", high_water_mark = 1000')
    with ExitStack() as stack:
        for daemon in (primary, tap):
            stack.enter_context(daemon)
            daemon.start()
        # A subscription takes a moment, and nobody is told: knock until the tap has heard it.
        knocks = 0
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.linger = 0
            push.bind(detector)
            until = time.monotonic() + LONG_S
            while not tap.counts()["failed"]:
                assert time.monotonic() < until, "the tap hears nothing"
                push.send(b"knock")
                knocks += 1
                time.sleep(0.05)
            eventually(lambda: primary.counts()["failed"] == knocks)
        options = ["--rate", "20", "--series", "2", "--repeat", "2", "--header-detail", "all", "--json"]
        options += ["--frames", str(tmp_path / "frames.h5"), "--image-appendix", '{"note": "x"}']
        command = [sys.executable, "-m", "grainwatch", "simulate", "dectris-v1", "--bind", detector, *options]
        done = subprocess.run(
            command, env=environment(), cwd=tmp_path, capture_output=True, timeout=90, check=True
        )
        sent = 2 * 2 * FRAMES
        assert json.loads(done.stdout)["images"] == sent
        for daemon in (primary, tap):
            eventually(lambda daemon=daemon: daemon.counts()["done"] == sent, timeout=90.0)
            eventually(lambda daemon=daemon: not daemon.status()["status"]["streams"][0]["series_uid"])
        counts = primary.counts()
        assert (counts["failed"], counts["dropped"], counts["missing"]) == (knocks, 0, 0)
        assert tap.counts()["missing"] == tap.counts()["dropped"] == 0
        for daemon in (primary, tap):
            assert daemon.stop() == 0
            assert daemon.audit() == []
    of_primary, of_tap = crystals_of(primary.folder), crystals_of(tap.folder)
    assert len(of_primary) == sent
    assert set(of_primary.values()) == {2}  # the two grains that were rendered into each frame
    # Each daemon makes its own series uids; the rest is the same.
    assert sorted(frame for _, frame in of_tap) == sorted(frame for _, frame in of_primary)
    assert set(of_tap.values()) == {2}


@pytest.fixture
def detector() -> Iterator[tuple[zmq.Socket[bytes], str]]:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        yield socket, f"tcp://127.0.0.1:{port}"


def test_nothing_that_a_detector_says_stops_the_daemon(
    tmp_path: Path, detector: tuple[zmq.Socket[bytes], str]
) -> None:
    socket, address = detector
    write_frames(tmp_path, (SIZE, SIZE), seed=11)
    with h5py.File(tmp_path / "frames.h5") as file:
        good = file["entry/data/data"][0]
    right = encode_exposure(good, "bslz4")
    first = SeriesCoder(1, datetime.now(UTC))

    def image(number: int, coder: SeriesCoder = first) -> list[bytes]:
        return coder.image(number, right, 0.1)

    def changed(number: int, **said: Any) -> list[bytes]:
        parts = image(number)
        parts[1] = json.dumps({**json.loads(parts[1]), **said}).encode()
        return parts

    bare = encode_exposure(good, "lz4")
    cut = first.image(6, bare, 0.1)
    cut[2] = cut[2][:-1000]
    cut[1] = json.dumps({**json.loads(cut[1]), "size": len(cut[2])}).encode()
    messages = [
        golden_v1.end(99), golden_v1.end(1),  # ends of what never began
        [b"\xff\x00 garbage"], [b""], [b"{}"], [b"[" * 50_000], [golden_v1.js(htype="dance-1.0", series=1)],
        image(33, SeriesCoder(9, datetime.now(UTC))),
        first.start(right, 15), image(0),
        image(1)[:3], [*image(2)[:1], b"{", *image(2)[2:]], changed(3, shape=[SIZE, SIZE + 1]),
        changed(4, shape=[1 << 20, 1 << 20]),
        first.image(5, encode_exposure(good[:256, :300], "bslz4"), 0.1), cut,
        changed(7, encoding="zip<"), changed(8, type="uint32"), [b"two", b"parts"],
        first.image(11, encode_exposure(np.zeros((SIZE, SIZE), np.uint16), "none"), 0.1),
        image(0), image(10), image(9), first.image(13, bare, 0.1), image(1 << 40), first.end(), image(14),
    ]  # fmt: skip
    second = SeriesCoder(2, datetime.now(UTC), header_detail="none")
    messages += [second.start(right, 0), image(0, second), image(1, second)]  # no end comes
    third = SeriesCoder(3, datetime.now(UTC), header_detail="all")
    spoiled = third.start(right, 2)
    spoiled[1] = b"no configuration"
    messages += [spoiled, image(0, third), image(1, third), third.end()]
    with daemon_in(tmp_path, tmp_path / "geometry.det", address, "max_image_bytes = 100000000") as daemon:
        daemon.start()
        for parts in messages:
            socket.send_multipart(parts)
        eventually(lambda: daemon.counts()["done"] == 8, timeout=60.0)
        assert daemon.status()["status"]["state"] == "running"
        assert daemon.status()["status"]["worker_restarts"] == 0
        counts = eventually(lambda: not daemon.counts()["in_flight"] and daemon.counts())
        assert daemon.stop() == 0
        assert daemon.audit() == []
    said = daemon.exceptions()
    failed = {n: reason for state, n, reason in said if state == "failed" and n is not None}
    for frame, words in {
        1: "message of 3 parts", 2: "is not JSON", 3: "declares 524288", 4: "the limit is 100000000",
        5: "256 x 300 uint16, the series began with", 6: "lz4 block does not decompress",
        7: "encoding 'zip<'", 8: "declares 524288", 11: "all pixels are zero",
        14: "after the end of series 1", 33: "image of series 9, which did not start",
    }.items():  # fmt: skip
        assert words in failed[frame], said
    assert [n for state, n, _ in said if state == "dropped"] == [0]
    assert [n for state, n, _ in said if state == "missing"] == [12, 14]
    reasons = [reason for state, n, reason in said if state == "failed" and n is None]
    assert any("configuration of 16 characters is not JSON" in reason for reason in reasons)
    assert any("htype 'dance-1.0' is unknown" in reason for reason in reasons)
    crystals = crystals_of(tmp_path)
    assert counts["done"] == len(crystals)
    of_series = [sorted(n for (uid, n) in crystals if uid == one) for one in {uid for uid, _ in crystals}]
    # What was right came through, between all of that and after it, whatever its encoding.
    assert sorted(of_series) == [[0, 1], [0, 1], [0, 9, 10, 13]]
    assert set(crystals.values()) == {2}
