"""A real daemon under a real stream: frames a second, losses, latency, memory."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from bench.patterns import BAND_KEV, GEOMETRY_C, Condition, pattern
from bench.report import Report
from daemon.flow.ledger_store import audit
from grainwatch.commands.status import ask
from grainwatch.config import ConfigError
from pipelines.laue.lauetools_files import write_det
from pipelines.laue.render import Background, render_frame
from pipelines.results_files import read_results, results_files

GRAINS = 5
#: What was asked.
ASKED_HZ, ASKED_GIB = 12.0, 1.5
#: What the detector offers in the run whose latencies are shown.
OFFERED_HZ = 13.0
WORKERS = 2
AIR = Background(50.0, (0.01, 0.005), 60.0, 1200.0)
GIB = 1 << 30

_CONFIG = """
[daemon]
name = "bench"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = {workers}
[streams.laue]
intake = {{policy = "block", depth = 16}}
source = {{type = "dectris-v2", address = "{address}"}}
[streams.laue.pipeline]
type = "laue"
materials = ["Cu"]
geometry = "{folder}/geometry.det"
energy_keV = {band}
[sinks.zmq]
results = "tcp://127.0.0.1:*"
catch_up = "tcp://127.0.0.1:*"
results_dir = "{folder}/results"
[sinks.hdf5]
folder = "{folder}/results"
"""


def rows(report: Report) -> None:
    """Stream different frames through a daemon, at a fixed rate and as fast as it takes them."""
    different = report.scale(full=300, quick=20)
    seconds = report.scale(full=60, quick=8)
    Path(".out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=".out", prefix="daemon-") as name:
        folder = Path(name).resolve()
        _write_frames(report, folder, different)
        _one_run(report, folder / "paced", folder, different, seconds, OFFERED_HZ)
        _one_run(report, folder / "flat-out", folder, different, seconds, 0.0)


def _write_frames(report: Report, folder: Path, different: int) -> None:
    write_det(folder / "geometry.det", GEOMETRY_C, material="Cu")
    condition = Condition("Cu", GRAINS)
    with h5py.File(folder / "frames.h5", "w") as file:
        stack = file.create_dataset(
            "entry/data/data", (different, *GEOMETRY_C.shape), np.uint16,
            chunks=(1, *GEOMETRY_C.shape), **hdf5plugin.Bitshuffle(cname="lz4"),
        )  # fmt: skip
        for n in range(different):
            rng, peaks = report.rng("daemon", n), pattern(report, condition, n)
            counts = 1e5 * peaks.intensity / peaks.intensity.max() + 600.0
            stack[n] = render_frame(GEOMETRY_C.shape, peaks.xy_px, counts, 2.2, rng, background=AIR)


def _one_run(
    report: Report, folder: Path, source: Path, different: int, seconds: int, rate_hz: float
) -> None:
    folder.mkdir()
    (folder / "geometry.det").write_bytes((source / "geometry.det").read_bytes())
    # As fast as it takes them: enough frames for about as long, at twice what was asked.
    count = int(seconds * (rate_hz or 2 * ASKED_HZ))
    address = f"tcp://127.0.0.1:{_free_port()}"
    with _daemon(folder, address) as (process, control):
        watch = _MemoryWatch(process.pid)
        simulated = subprocess.run(
            [sys.executable, "-m", "grainwatch", "simulate", "dectris-v2", "--bind", address, "--json",
             "--frames", f"{source}/frames.h5", "--count", str(count), "--rate", str(rate_hz)],
            capture_output=True, check=True, text=True, timeout=600,
        )  # fmt: skip
        stream = _settled(control, count)
        memory_gib = watch.stop() / GIB
        process.terminate()
        process.wait(60)
    results = [r for path in results_files(folder / "results") for r in read_results(path)]
    published = sorted(r.times.published for r in results)
    rate = (len(published) - 1) / (published[-1] - published[0])
    gone = count - stream["done"]
    wrong = audit(folder / "state" / "ledger.sqlite")
    if wrong:
        raise RuntimeError("; ".join(wrong))
    found = float(np.mean([len(r.crystals) for r in results]))
    detector = json.loads(simulated.stdout)
    offered = f"{rate_hz:g} frames/s offered" if rate_hz else "as fast as taken"
    said = (
        f"{offered}, {count} frames of {different} different, {GRAINS} Cu grains, {WORKERS} workers, 2 cores,"
        f" {found:.2f} crystals found a frame"
    )
    data = {"stream": stream, "detector": detector, "rate_hz": rate, "memory_gib": memory_gib}
    report.add(
        f"daemon, 4-Mpixel bslz4, {offered}",
        rate,
        "frames/s",
        at_least=ASKED_HZ,
        conditions=said,
        data=data,
    )
    report.add("daemon, frames not computed", gone, "frames", at_most=0, conditions=offered)
    report.add("daemon, memory in all", memory_gib, "GiB", at_most=ASKED_GIB, conditions=offered)
    latency = np.quantile([r.times.published - r.times.received for r in results], [0.5, 0.99])
    report.add(
        "daemon, latency p50 / p99", f"{1e3 * latency[0]:.0f} / {1e3 * latency[1]:.0f} ms", conditions=offered
    )
    share = 100 * detector["cpu_s"] / detector["seconds"]
    report.add("simulator beside it, share of a core", share, "%", conditions=offered)


@contextmanager
def _daemon(folder: Path, address: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    config = folder / "config.toml"
    config.write_text(_CONFIG.format(folder=folder, address=address, workers=WORKERS, band=list(BAND_KEV)))
    control = folder / "run" / "control.sock"
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "grainwatch", "run", str(config)], stderr=log)
    try:
        while _state(control) != "running":
            if process.poll() is not None:
                raise RuntimeError((folder / "log.txt").read_text())
            time.sleep(0.1)
        yield process, control
    finally:
        process.kill()
        process.wait()


def _state(control: Path) -> str:
    try:
        return str(ask(control, {"command": "status"})["status"]["state"])
    except ConfigError:
        return ""


def _settled(control: Path, count: int) -> dict[str, Any]:
    """Wait until every frame has its end; return the stream's counters."""
    while True:
        stream: dict[str, Any] = ask(control, {"command": "status"})["status"]["streams"][0]
        if stream["received"] >= count and not stream["in_flight"]:
            time.sleep(1.5)  # the results file is flushed within a second
            return stream
        time.sleep(0.1)


class _MemoryWatch:
    """Looks at the memory of a daemon and its workers; shared pages count once."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._highest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Return the highest sum, bytes."""
        self._stop.set()
        self._thread.join()
        return self._highest

    def _watch(self) -> None:
        children = Path(f"/proc/{self._pid}/task")
        while not self._stop.wait(0.5):
            pids = {self._pid}
            try:
                for listed in children.glob("*/children"):
                    pids |= {int(p) for p in listed.read_text().split()}
                self._highest = max(self._highest, sum(map(_memory_bytes, pids)))
            except OSError:
                continue  # a thread or a worker ended while it was looked at


def _memory_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
