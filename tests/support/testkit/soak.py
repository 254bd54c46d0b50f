"""A daemon under a simulated detector for a while, watched: its memory, its accounts, its figures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from pipelines.laue.crystal import load_material
from pipelines.laue.forward import simulate_pattern
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.lauetools_files import write_det
from pipelines.laue.reflections import build_reflections
from pipelines.laue.render import render_frame
from pipelines.rotations import random_rotations, to_matrix
from testkit.process import LONG_S, DaemonProcess, environment

MIB = 1 << 20
#: Frames that the detector repeats.
FRAMES = 6

_CONFIG = """
[daemon]
name = "soak"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = {workers}
[streams.s]
intake = {{policy = "block", depth = 32}}
source = {{type = "dectris-v2", address = "{address}"}}
pipeline = {{type = "laue", materials = ["Cu"], geometry = "{folder}/geometry.det"}}
scan = {{shape = [20, 10000], snake = true}}
[sinks.zmq]
results = "tcp://127.0.0.1:*"
catch_up = "tcp://127.0.0.1:*"
results_dir = "{folder}/results"
[sinks.hdf5]
folder = "{folder}/results"
"""


def write_frames(folder: Path, shape: tuple[int, int], seed: int) -> None:
    """Render frames of two Cu crystals each, with the calibration beside them."""
    rng = np.random.default_rng(seed)
    pixel_mm = 2048 * 0.08 / shape[0]
    calibration = Calibration(70.0, shape[1] / 2, shape[0] / 2, 0.4, 0.3, pixel_mm, shape, "sCMOS")
    write_det(folder / "geometry.det", calibration, material="Cu")
    material = load_material("Cu")
    reflections = build_reflections(material)
    area = DetectorArea.of(calibration)
    frames = []
    for _ in range(FRAMES):
        ubs = to_matrix(random_rotations(2, rng)) @ material.B0
        pattern = simulate_pattern([reflections] * 2, ubs, calibration, area, rng)
        height = 2e4 * pattern.intensity / pattern.intensity.max() + 300.0
        frames.append(render_frame(shape, pattern.xy_px, height, 2.2, rng))
    with h5py.File(folder / "frames.h5", "w") as file:
        file["entry/data/data"] = np.stack(frames)


@dataclass
class Watch:
    """What was seen, a sample every so often."""

    seconds: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)


class Soak:
    """Runs it; `report` and `problems` say how it went."""

    def __init__(
        self, folder: Path, *, rate_hz: float, shape: tuple[int, int], seed: int, port: int, workers: int = 1
    ) -> None:
        self.folder = folder
        self.rate_hz = rate_hz
        self.address = f"tcp://127.0.0.1:{port}"
        self.watch = Watch()
        self.sent = 0
        self.wrong: list[str] = []
        write_frames(folder, shape, seed)
        config = _CONFIG.format(folder=folder, address=self.address, workers=workers)
        self.daemon = DaemonProcess(folder, config=config)

    def run(self, seconds: float, every_s: float = 2.0, series: int = 3) -> None:
        """Stream `series` series one after the other."""
        with self.daemon:
            self.daemon.start()
            each = max(FRAMES, int(seconds * self.rate_hz / series))
            detector = subprocess.Popen(
                [sys.executable, "-m", "grainwatch", "simulate", "dectris-v2", "--frames",
                 str(self.folder / "frames.h5"), "--bind", self.address, "--rate", str(self.rate_hz),
                 "--count", str(each), "--series", str(series), "--json"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), cwd=self.folder,
            )  # fmt: skip
            begin = time.monotonic()
            while detector.poll() is None:
                self._look(time.monotonic() - begin)
                time.sleep(every_s)
            out, _ = detector.communicate()
            if detector.returncode:
                self.wrong.append(f"the simulator ended with status {detector.returncode}")
                return
            self.sent = each * series
            self.report_of_detector = json.loads(out)
            deadline = time.monotonic() + LONG_S
            while self.daemon.counts()["done"] < self.sent and time.monotonic() < deadline:
                time.sleep(0.1)
            self.counts = self.daemon.counts()
            self._look(time.monotonic() - begin)
            if self.daemon.stop() != 0:
                self.wrong.append("the daemon did not stop in order")

    def problems(self, growth_mib: float) -> list[str]:
        """Return what does not hold: accounts, losses, descriptors or memory that grow."""
        wrong = self.wrong + self.daemon.audit()
        if self.wrong:
            return wrong
        if self.counts["received"] != self.sent or self.counts["done"] != self.sent:
            wrong.append(f"{self.sent} sent, accounts say {self.counts}")
        settled = len(self.watch.memory_mib) // 3
        growth = self.growth_mib()
        if growth > growth_mib:
            wrong.append(f"memory grew by {growth:.0f} MiB after the first third: {self.watch.memory_mib}")
        if max(self.watch.descriptors[settled:]) > self.watch.descriptors[settled] + 8:
            wrong.append(f"open files grow: {self.watch.descriptors}")
        return wrong

    def growth_mib(self) -> float:
        """Return by how much the memory of the last third exceeds that of the second."""
        third = max(1, len(self.watch.memory_mib) // 3)
        early, late = self.watch.memory_mib[third : 2 * third], self.watch.memory_mib[-third:]
        return float(np.median(late) - np.median(early))

    def report(self) -> str:
        """Say how it went in a few lines."""
        return (
            f"{self.counts['done']} of {self.sent} frames done at {self.rate_hz:g}/s;"
            f" p50 {1e3 * self.counts['latency_p50_s']:.0f} ms,"
            f" p99 {1e3 * self.counts['latency_p99_s']:.0f} ms;"
            f" memory {self.watch.memory_mib[0]:.0f} to {self.watch.memory_mib[-1]:.0f} MiB"
            f" (growth {self.growth_mib():+.1f}), at most {max(self.watch.memory_mib):.0f};"
            f" {self.watch.descriptors[-1]} open files"
        )

    def _look(self, at: float) -> None:
        counts = self.daemon.counts()  # which have to add up
        assert self.daemon.process is not None
        pids = [self.daemon.process.pid, *self.daemon.workers()]
        self.watch.seconds.append(at)
        self.watch.memory_mib.append(sum(_memory_bytes(pid) for pid in pids) / MIB)
        self.watch.descriptors.append(len(list(Path(f"/proc/{pids[0]}/fd").iterdir())))
        self.watch.done.append(counts["done"])


def _memory_bytes(pid: int) -> int:
    """Return the proportional memory of a process: shared pages counted once over all."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
