"""How long a daemon takes from its start until it says that it is ready."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.daemon import START_S, WORKERS
from bench.report import Report
from bench.rig import write_config

ASKED_S = 10.0


def rows(report: Report) -> None:
    """Add the rows."""
    count = report.scale(full=7, quick=2)
    start_s()  # brings files into memory, and compiles where that was not done
    times_s = [start_s() for _ in range(count)]
    report.add(
        "daemon, start to READY, warm",
        max(times_s),
        "s",
        at_most=ASKED_S,
        conditions=f"longest of {count} starts, shortest {min(times_s):.1f} s; kernels compiled, files in"
        f" memory; Laue pipeline for Cu with its network, {WORKERS} workers, sinks zmq and hdf5",
        data={"start_s": times_s},
    )
    front_s, worker_s = import_s("daemon.daemon"), import_s("pipelines.laue.pipeline")
    report.add(
        "daemon, part of the start that is imports",
        front_s + worker_s,
        "s",
        conditions=f"in a process of their own: front {front_s:.1f} s, then worker {worker_s:.1f} s",
    )


def start_s() -> float:
    """Return the seconds from the start of the process to READY=1.

    Raises
    ------
    RuntimeError
        If it does not get ready, or does not stop in order.
    """
    with tempfile.TemporaryDirectory(prefix="grainwatch-bench-") as scratch:
        place = Path(scratch)
        write_config(place, WORKERS, "", ["Cu"])
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, (place / "log").open("wb") as log:
            manager.bind(str(place / "notify"))
            manager.settimeout(START_S)
            begin = time.monotonic()
            daemon = subprocess.Popen(
                [sys.executable, "-m", "grainwatch", "run", str(place / "grainwatch.toml")],
                env={**os.environ, "NOTIFY_SOCKET": str(place / "notify")},
                stderr=log,
            )
            try:
                while b"READY=1" not in manager.recv(65536):
                    if daemon.poll() is not None:
                        break
                took_s = time.monotonic() - begin
                daemon.send_signal(signal.SIGTERM)
                status = daemon.wait(START_S)
            finally:
                daemon.kill()
                daemon.wait()
        if status:
            raise RuntimeError(f"the daemon ended with {status}: {(place / 'log').read_text()}")
    return took_s


def import_s(module: str) -> float:
    """Return the seconds that a fresh interpreter takes to import a module."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.monotonic() - begin
