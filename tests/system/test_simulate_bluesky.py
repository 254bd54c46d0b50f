"""``grainwatch simulate bluesky`` as a process of its own, read by a real source."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fabio.tifimage
import numpy as np
import pytest

from daemon.sources.base import Arrival, Event, Idle, SeriesEnd
from daemon.sources.bluesky.simulator import Options, Simulator
from daemon.sources.bluesky.source import Config, open_source

COMMAND = [str(Path(sys.executable).parent / "grainwatch"), "simulate", "bluesky"]

pytestmark = pytest.mark.system


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"frame_{k}.tif" for k in range(3)]
    for k, path in enumerate(paths):
        fabio.tifimage.TifImage(data=np.full((30, 40), k + 5, np.uint16)).write(str(path))
    return [str(path) for path in paths]


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the simulator on a free port; gives the process and the address that it printed."""
    process = subprocess.Popen(
        [*COMMAND, "--bind", "tcp://127.0.0.1:*", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"tcp://\S+", line)
        assert found is not None, line + process.stderr.read()
        yield process, found.group()
    finally:
        process.kill()
        process.communicate()


def read(address: str) -> Iterator[Event]:
    """Yield what comes until a series ends."""
    source = open_source(Config(address=address), "laue")
    try:
        for event in source.events():
            if not isinstance(event, Idle):
                yield event
            if isinstance(event, SeriesEnd):
                return
    finally:
        source.close()


@pytest.mark.parametrize("kind", ["json", "folder"])
def test_a_raster_scan(files: list[str], tmp_path: Path, kind: str) -> None:
    how = ["--folder", str(tmp_path)] if kind == "folder" else ["--encoding", kind]
    scan = ["--scan", "3x2", "--step-um", "2.5", "--snake", "--rate", "0", "--json"]
    with running("--frames", *files, *scan, *how) as (process, address):
        arrivals = [e for e in read(address) if isinstance(e, Arrival)]
        report = json.loads(process.communicate(timeout=90)[0])
        assert process.returncode == 0
    assert (report["frames"], report["complete"]) == (6, True)
    assert report["documents"] == (9 + 7 if kind == "folder" else 9)
    assert [int(a.image.array()[0, 0]) for a in arrivals] == [5, 6, 7, 5, 6, 7]
    assert [a.grid_index for a in arrivals] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    assert [a.position_um for a in arrivals][2:4] == [pytest.approx((5.0, 0.0)), pytest.approx((5.0, 2.5))]


def test_a_stop_aborts_the_plan(files: list[str]) -> None:
    with running("--frames", *files, "--scan", "100x100", "--rate", "50") as (process, address):
        arrivals = 0
        for event in read(address):
            if isinstance(event, Arrival):
                arrivals += 1
                if arrivals == 3:
                    process.send_signal(signal.SIGINT)
            if isinstance(event, SeriesEnd):
                assert event.n_frames == arrivals >= 3
        said, _ = process.communicate(timeout=90)
        assert "stopped early" in said
        assert process.returncode == 1


def test_what_cannot_be_is_one_line(files: list[str]) -> None:
    command = [*COMMAND, "--bind", "tcp://127.0.0.1:*", "--frames", *files, "--encoding", "pickle"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 2
    assert "simulate bluesky: encoding: expected msgpack or json, got 'pickle'" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (0, 2)}, "scan: expected 1 to 3 numbers of points"),
        ({"step_um": 0.0}, "step_um: expected more than 0"),
        ({"rate_hz": -1.0}, "rate: expected 0"),
        ({"prefix": "a b"}, "prefix: expected no spaces"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options("tcp://127.0.0.1:5578", **options)


def test_frames_are_of_one_form() -> None:
    frames = [np.zeros((3, 4), np.uint16), np.zeros((4, 3), np.uint16)]
    for given, message in (([], "there are none"), (frames, "expected one shape and type")):
        with pytest.raises(ValueError, match=message):
            Simulator(given, Options("tcp://127.0.0.1:*", bind=True))
