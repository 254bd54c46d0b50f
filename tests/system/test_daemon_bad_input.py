"""Everything that a detector may do wrong, through a real socket into a real daemon that stays alive."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cbor2
import h5py
import numpy as np
import pytest
import zmq
from testkit.process import DaemonProcess, eventually
from testkit.soak import write_frames

from daemon.sources.dectris.v2_simulator import Exposure, SeriesCoder, encode_exposure
from pipelines.images import encode_image
from pipelines.results_files import read_results, results_files

pytestmark = pytest.mark.system
SIZE = 512


class Detector:
    """A PUSH socket, and messages both right and wrong."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PUSH)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"

    def say(self, *messages: list[bytes]) -> None:
        for parts in messages:
            self.socket.send_multipart(parts)

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def detector() -> Iterator[Detector]:
    detector = Detector()
    yield detector
    detector.close()


@pytest.fixture
def daemon(tmp_path: Path, detector: Detector) -> Iterator[DaemonProcess]:
    write_frames(tmp_path, (SIZE, SIZE), seed=11)
    config = f"""
[daemon]
state_dir = "{tmp_path}/state"
runtime_dir = "{tmp_path}/run"
workers = 1
compute_timeout_s = 20.0
[streams.s]
source = {{type = "dectris-v2", address = "{detector.address}", max_image_bytes = 100000000}}
pipeline = {{type = "laue", materials = ["Cu"], geometry = "{tmp_path}/geometry.det"}}
[sinks.hdf5]
folder = "{tmp_path}/results"
"""
    with DaemonProcess(tmp_path, config=config) as daemon:
        daemon.start()
        yield daemon


def good_frame(folder: Path) -> Any:
    with h5py.File(folder / "frames.h5") as file:
        return file["entry/data/data"][0]


def exposure(pixels: Any, algorithm: str = "bslz4") -> Exposure:
    return encode_exposure(np.ascontiguousarray(pixels), ["threshold_1"], algorithm)


def exposure_of(shape: tuple[int, int], blob: bytes, tag: int = 56500) -> Exposure:
    """An image whose blob is not what it says."""
    packed = cbor2.CBORTag(tag, ["bslz4", 2, blob])
    data = {"threshold_1": cbor2.CBORTag(40, [list(shape), cbor2.CBORTag(69, packed)])}
    return Exposure(shape, np.dtype("u2"), cbor2.dumps("data") + cbor2.dumps(data))


def test_nothing_that_a_detector_says_stops_the_daemon(daemon: DaemonProcess, detector: Detector) -> None:
    good = good_frame(daemon.folder)
    right, blob = exposure(good), encode_image(good, "bslz4")
    rows, columns = np.mgrid[:SIZE, :SIZE]
    many = np.where((rows % 4 == 1) & (columns % 4 == 1), 5000, 20).astype(np.uint16)
    bomb = struct.pack(">QI", 1 << 41, 8192) + bytes(1000)
    first = SeriesCoder(1, "one", datetime.now(UTC))
    no_start = SeriesCoder(9, "nine", datetime.now(UTC))
    odd = [
        (1, exposure(np.zeros((SIZE, SIZE), np.uint16))),
        (2, exposure(np.full((SIZE, SIZE), 65535, np.uint16))),
        (3, exposure_of((SIZE, SIZE), encode_image(good[:100], "bslz4"))),
        (4, exposure_of((1 << 20, 1 << 20), bomb)),
        (5, exposure(good[:256, :300])),
        (6, exposure_of((SIZE, SIZE), blob[:-1000])),
        (7, exposure(many)),
        (8, exposure_of((SIZE, SIZE), blob, tag=4711)),
    ]
    detector.say(
        [b"\xff\x00 garbage"], [b""], [cbor2.dumps({"type": "dance"})], [cbor2.dumps([1, 2])],
        [first.image(0, right, 0.1)[0][:300]], [b"\x9b" + b"\xff" * 8], [b"\x81" * 5000],
        no_start.image(3, right, 0.1),
        first.start(right, 14), first.image(0, right, 0.1),
        *(first.image(n, e, 0.1) for n, e in odd),
        first.image(0, right, 0.1), first.image(10, right, 0.1), first.image(9, right, 0.1),
        first.image(12, right, 0.1), first.end(), first.image(13, right, 0.1),
        [b"two", b"parts"],
    )  # fmt: skip
    nan = np.where(np.arange(SIZE) % 50 == 0, np.nan, good.astype(np.float32)).astype(np.float32)
    second = SeriesCoder(2, "two", datetime.now(UTC))
    floats = exposure(nan, "none")
    detector.say(second.start(floats, 1), second.image(0, floats, 0.1), second.end())
    last = SeriesCoder(3, "three", datetime.now(UTC))
    detector.say(last.start(right, 2), last.image(0, right, 0.1))
    detector.say(last.image(1, right, 0.1), last.end())

    eventually(lambda: (c := daemon.counts())["received"] == 26 and not c["in_flight"])
    counts = daemon.counts()
    assert daemon.status()["status"]["state"] == "running"
    assert daemon.status()["status"]["worker_restarts"] == 0
    assert daemon.stop() == 0
    assert daemon.audit() == []
    said = daemon.exceptions()
    failed = {n: reason for state, n, reason in said if state == "failed" and n is not None}
    for frame, words in {
        3: "needs 524288 bytes", 4: "the limit is 100000000", 5: "256 x 300 uint16, the series began with",
        6: "truncated", 8: "4711", 13: "after the end of series 1/one",
    }.items():  # fmt: skip
        assert words in failed[frame], said
    assert [n for state, n, _ in said if state == "dropped"] == [0]
    assert [n for state, n, _ in said if state == "missing"] == [11, 13]
    assert sum(state == "failed" and n is None for state, n, _ in said) >= 7
    results = [r for path in results_files(daemon.folder / "results") for r in read_results(path)]
    assert len(results) == counts["done"]
    crystals: dict[int, set[int]] = {}
    for r in results:
        crystals.setdefault(r.key.frame, set()).add(len(r.crystals))
    # What was right came through, between all of that and after it.
    assert {n: crystals[n] for n in (9, 10, 12)} == {9: {2}, 10: {2}, 12: {2}}
    assert 2 in crystals[0]


def test_a_calibration_of_another_detector_is_said_for_each_frame(
    daemon: DaemonProcess, detector: Detector
) -> None:
    other = exposure(good_frame(daemon.folder)[:400, :300])
    coder = SeriesCoder(1, "one", datetime.now(UTC))
    detector.say(coder.start(other, 1), coder.image(0, other, 0.1), coder.end())
    error = eventually(lambda: daemon.counts()["last_error"])
    assert daemon.counts()["failed"] == 1
    assert "400" in error
    assert "512" in error
