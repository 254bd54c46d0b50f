"""``grainwatch simulate`` as a process of its own, read by a real source."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fabio.tifimage
import numpy as np
import pytest
from testkit.process import LONG_S

from daemon.sources.base import Arrival, Idle, SeriesEnd, SeriesStart
from daemon.sources.dectris import v1 as dectris_v1
from daemon.sources.dectris import v2 as dectris_v2
from daemon.sources.zmq_reader import ZmqSource

SIMULATE = [str(Path(sys.executable).parent / "grainwatch"), "simulate"]
SOURCES = {"dectris-v1": dectris_v1, "dectris-v2": dectris_v2}

pytestmark = pytest.mark.system


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"frame_{k}.tif" for k in range(3)]
    for k, path in enumerate(paths):
        fabio.tifimage.TifImage(data=np.full((30, 40), k, np.uint16)).write(str(path))
    return [str(path) for path in paths]


@contextmanager
def running(*arguments: str, name: str = "dectris-v2") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the simulator on a free port; gives the process and the address that it printed."""
    process = subprocess.Popen(
        [*SIMULATE, name, "--bind", "tcp://127.0.0.1:*", *arguments],
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


def opened(address: str, name: str = "dectris-v2") -> ZmqSource:
    module = SOURCES[name]
    return module.open_source(module.Config(address=address), "laue")


def read_all(address: str, name: str = "dectris-v2") -> list[Arrival]:
    source = opened(address, name)
    arrivals = []
    for event in source.events():
        if isinstance(event, Arrival):
            arrivals.append(event)
        if isinstance(event, SeriesEnd):
            break
    source.close()
    return arrivals


@pytest.mark.parametrize("name", SOURCES)
def test_files_stream_at_a_rate_and_it_reports(files: list[str], name: str) -> None:
    arguments = ["--frames", *files, "--rate", "40", "--repeat", "4", "--json"]
    with running(*arguments, name=name) as (process, address):
        arrivals = read_all(address, name)
        output = process.communicate(timeout=LONG_S)[0]
    assert process.returncode == 0
    assert [int(a.image.array()[0, 0]) for a in arrivals] == [0, 1, 2] * 4
    report = json.loads(output)
    assert report["images"] == 12
    assert report["complete"] is True
    assert 11 / 40 <= report["seconds"] < 10  # at 1 Hz it would be 11


def test_header_detail_and_appendix_of_stream_v1(files: list[str]) -> None:
    options = ["--header-detail", "all", "--header-appendix", "run 5", "--image-appendix", '{"dose": 2}']
    arguments = ["--frames", *files, "--rate", "0", "--algorithm", "lz4", *options]
    with running(*arguments, name="dectris-v1") as (process, address):
        source = opened(address, "dectris-v1")
        events = []
        for event in source.events():
            if not isinstance(event, Idle):
                events.append(event)
            if isinstance(event, SeriesEnd):
                break
        source.close()
        process.communicate(timeout=LONG_S)
    start, *arrivals, _ = events
    assert isinstance(start, SeriesStart)
    assert start.metadata["user_data"] == "run 5"
    assert start.metadata["pixel_mask"][""].shape == (30, 40)
    assert [a.metadata["user_data"] for a in arrivals] == [{"dose": 2}] * 3


def test_a_stop_reports_what_was_sent(files: list[str]) -> None:
    with running("--frames", files[0], "--rate", "20", "--count", "100000") as (process, address):
        source = opened(address)
        arrivals = (event for event in source.events() if isinstance(event, Arrival))
        assert [next(arrivals).frame for _ in range(3)] == [0, 1, 2]
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=LONG_S)[0]
        source.close()
    assert process.returncode == 1
    assert re.match(r"sent \d+ images in 0 series, .* stopped before all of it was taken", output)


def test_it_outlives_a_reader_that_goes_away(files: list[str]) -> None:
    with running("--frames", *files, "--rate", "50", "--count", "150") as (process, address):
        source = opened(address)
        next(event for event in source.events() if not isinstance(event, Idle))
        source.close()
        arrivals = read_all(address)
        assert process.wait(LONG_S) == 0
    assert arrivals
    assert arrivals[-1].frame == 149


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "absent.tif"], "absent.tif: cannot be read"),
        (["--frames", "none*.tif"], "none*.tif: no file there"),
        ([], "--frames: give at least one file"),
        (["--frames", "FILE", "--algorithm", "zip"], "algorithm: expected one of "),
        (["--frames", "FILE", "--rate", "-1"], "rate: expected 0"),
        (["--frames", "FILE", "--bind", "nonsense"], "address: expected tcp://host:port, got 'nonsense'"),
        (["--frames", "FILE", "--bind", "tcp://192.0.2.1:31001"], "tcp://192.0.2.1:31001 cannot be used"),
        (["--frames", "FILE", "--bind", "tcp://*:1", "--connect", "tcp://a:1"], "not both"),
    ],
)
@pytest.mark.parametrize("name", SOURCES)
def test_errors_are_one_line(files: list[str], name: str, arguments: list[str], message: str) -> None:
    arguments = [files[0] if a == "FILE" else a for a in arguments]
    done = subprocess.run(
        [*SIMULATE, name, *arguments], capture_output=True, text=True, timeout=LONG_S, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("grainwatch: ")
    assert len(done.stderr.splitlines()) == 1
