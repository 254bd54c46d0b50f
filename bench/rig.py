"""A daemon and a detector in processes of their own, with the frames of geometry C."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.patterns import GEOMETRY_C
from daemon.demo.station import free_ports
from grainwatch.commands.status import ask
from grainwatch.config import ConfigError
from pipelines.laue.lauetools_files import write_det


def write_config(place: Path, workers: int, more: str, bundle: Sequence[str]) -> str:
    """Write calibration and configuration; return the address that the detector binds."""
    write_det(place / "geometry_c.det", GEOMETRY_C, material="Cu")
    detector, results, catch_up = (f"tcp://127.0.0.1:{port}" for port in free_ports(3))
    # All that is not said is as grainwatch init leaves it, but for the network.
    (place / "grainwatch.toml").write_text(
        f"""
[daemon]
state_dir = "{place}/state"
runtime_dir = "{place}/run"
workers = {workers}
[streams.laue.source]
type = "dectris-v2"
address = "{detector}"
[streams.laue.pipeline]
type = "laue"
materials = ["Cu"]
geometry = "{place}/geometry_c.det"
bundle = {json.dumps(list(bundle))}
[sinks.zmq]
results = "{results}"
catch_up = "{catch_up}"
results_dir = "{place}/results"
[sinks.hdf5]
folder = "{place}/results"
{more}
"""
    )
    return detector


@contextmanager
def process(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python with arguments; what it says goes into `log`, and it ends with the block."""
    with log.open("wb") as said:
        started = subprocess.Popen([sys.executable, *arguments], stdout=said, stderr=said)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.terminate()
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()


def tell(place: Path, request: dict[str, Any], timeout_s: float = 10.0) -> dict[str, Any]:
    """Send a control command to the daemon of this place."""
    return ask(place / "run" / "control.sock", request, timeout_s)


def status(place: Path) -> dict[str, Any]:
    """Return what it says of itself."""
    found: dict[str, Any] = tell(place, {"command": "status"})["status"]
    return found


def counts(place: Path) -> dict[str, int]:
    """Return the accounts of its stream."""
    stream = status(place)["streams"][0]
    names = ("received", "done", "failed", "dropped", "lost", "missing", "in_flight")
    return {name: int(stream[name]) for name in names}


def wait_until(
    place: Path, front: subprocess.Popen[bytes], what: Callable[[dict[str, Any]], bool], timeout_s: float
) -> None:
    """Wait until its status is as asked; a daemon that ended is an error."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if what(status(place)):
                return
        except ConfigError:
            pass  # it has not opened its control socket yet
        if front.poll() is not None or time.monotonic() > deadline:
            logs = "\n".join(path.read_text() for path in sorted(place.glob("*.txt")))
            raise RuntimeError(f"the daemon does not get on:\n{logs}")
        time.sleep(0.1)
