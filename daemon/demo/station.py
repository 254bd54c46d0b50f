"""The processes of the demo: a daemon and its detectors, started in a folder, ended for certain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import zmq

from daemon.demo.folder import CONFIG, GEOMETRY, HEADING, RESULTS
from daemon.demo.sample import DETECTOR, MATERIAL, SAMPLE_FRAME, Sample
from daemon.demo.scenes import Scene
from grainwatch.commands.status import ask
from grainwatch.config import ConfigError
from grainwatch.messages import Health
from grainwatch.stream import ResultStream
from pipelines.laue.crystal import load_material
from pipelines.laue.lauetools_files import read_det, write_det
from pipelines.laue.pipeline import Config as PipelineConfig
from pipelines.laue.proposals import shipped_for
from pipelines.micrograph.synthetic import MicrographSimulator

START_S: Final = 120.0
STOP_S: Final = 15.0
#: Names of the stream of the scan and of that of the microscope.
SCAN: Final = "scan"
MICROGRAPHS: Final = "sem"
#: The model of the micrographs, which comes with grainwatch.
FINGERPRINTS: Final = "two-phase-synthetic"


class DemoError(RuntimeError):
    """A part of the demo failed; the message says which and shows its last words."""


@dataclass(frozen=True)
class Accounts:
    """The sums over all streams: where the frames that were received have gone.

    ``received = done + failed + dropped + lost + in_flight``; `missing` are gaps in the numbering.
    """

    received: int = 0
    done: int = 0
    failed: int = 0
    dropped: int = 0
    lost: int = 0
    missing: int = 0
    in_flight: int = 0
    rate_hz: float = 0.0
    latency_p50_s: float = 0.0
    latency_p99_s: float = 0.0
    last_error: str = ""

    @property
    def gone(self) -> int:
        """Frames that will bring no result."""
        return self.failed + self.dropped + self.lost + self.missing

    @property
    def balanced(self) -> bool:
        """Whether every frame that was received is somewhere."""
        return self.received == self.done + self.failed + self.dropped + self.lost + self.in_flight

    def __str__(self) -> str:
        """Return the line that stands below everything."""
        return (
            f"{self.rate_hz:.1f} frames/s, latency {1e3 * self.latency_p50_s:.0f} ms (p99"
            f" {1e3 * self.latency_p99_s:.0f} ms) | received {self.received} = done {self.done} + failed"
            f" {self.failed} + dropped {self.dropped} + lost {self.lost} + in flight {self.in_flight}"
        )


class Process:
    """One program of the demo; what it says on standard error goes to a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, *, talks: bool = False) -> None:
        self.name = name
        self._log = log
        with log.open("ab") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", *command],
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else errors,
                stderr=errors,
                text=True,
                # Libraries leave things in the folder for temporary files; this one is removed.
                env={**os.environ, "TMPDIR": str(log.parent)},
            )

    def check(self, *, may_be_over: bool = False) -> None:
        """Raise `DemoError` if it has ended, or, when it may, ended badly."""
        code = self.popen.poll()
        if code is not None and not (may_be_over and code == 0):
            raise DemoError(f"{self.name} ended with status {code}\n{self.last_words()}")

    def last_words(self) -> str:
        """Return the end of its log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-8:])

    def end(self, timeout: float) -> int:
        """Ask it to stop, by force after a while; return its exit status."""
        if self.popen.poll() is None:
            self.popen.terminate()
        try:
            code = self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            code = self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()
        return code


class Station:
    """A beamline in a folder.

    Parameters
    ----------
    folder : Path
        For the state, the logs and the control socket; short, because of the socket's name.
    keep : Path
        For the configuration and the results.
    scenes : sequence of Scene
    sample : Sample
        What is scanned.
    rate_hz : float
        Frames a second of the scan.
    """

    def __init__(
        self, folder: Path, keep: Path, scenes: Sequence[Scene], sample: Sample, seed: int, rate_hz: float
    ) -> None:
        self._folder = folder
        self._scenes = scenes
        self._seed = seed
        self._processes: list[Process] = []
        self.results = keep / RESULTS
        self.config = keep / CONFIG
        ports = free_ports(len(scenes) + 4)
        self._address = f"tcp://127.0.0.1:{ports.pop()}"
        self._catch_up = f"tcp://127.0.0.1:{ports.pop()}"
        self._detectors = {
            name: f"tcp://127.0.0.1:{ports.pop()}" for name in [SCAN, MICROGRAPHS, *self._streams()]
        }
        geometry = keep / GEOMETRY
        write_det(geometry, DETECTOR, material=MATERIAL, note="grainwatch demo")
        self.config.write_text(self._config_text(sample, geometry), encoding="utf-8")
        points = [str(n) for n in sample.grid.shape]
        self._scanner_arguments = ["--points", *points, "--seed", str(seed), "--rate", str(rate_hz)]

    def __enter__(self) -> Self:
        try:
            self.daemon = self._start("the daemon", ["-m", "grainwatch", "run", str(self.config)])
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_all()

    def true_rate(self, frame: int) -> float:
        """Return the ln(cooling rate) that a micrograph was made with."""
        # areaDetector counts arrays from 1.
        return MicrographSimulator(seed=self._seed).condition(frame - 1).ln_cooling_rate

    def subscribe(self) -> ResultStream:
        """Wait for the daemon and return its results from now on; nothing of a later detector is missed."""
        results = ResultStream(self._address, self._catch_up, schemas="all")
        deadline = time.monotonic() + START_S
        try:
            while not isinstance(results.next(0.2), Health):
                self.daemon.check()
                if time.monotonic() > deadline:
                    raise DemoError(
                        f"the daemon does not run after {START_S:.0f} s\n{self.daemon.last_words()}"
                    )
        except BaseException:
            results.close()
            raise
        return results

    def show_scenes(self, repeat: int, rate_hz: float) -> int:
        """Have the microscope and the detectors of the single frames send; return how many that will be.

        Meanwhile the detector of the scan begins to make its own.
        """
        for scene in self._scenes:
            files = [str(path) for path in scene.files]
            command = ["-m", "grainwatch", "simulate", "dectris-v2", "--bind", self._detectors[scene.stream]]
            times = str(max(1, repeat // len(files)))
            self._start(
                f"the detector of {scene.stream}",
                [*command, "--rate", str(rate_hz), "--repeat", times, "--frames", *files],
            )
        command = ["-m", "grainwatch", "simulate", "areadetector", "--bind", self._detectors[MICROGRAPHS]]
        command += ["--micrographs", str(repeat), "--rate", str(rate_hz), "--seed", str(self._seed)]
        self._start("the microscope", command)
        self.scanner = self._start(
            "the detector of the scan",
            ["-m", "daemon.demo.detector", self._detectors[SCAN], *self._scanner_arguments],
            talks=True,
        )
        return repeat + sum(len(s.files) * max(1, repeat // len(s.files)) for s in self._scenes)

    def scan(self) -> None:
        """Have the scan begin; waits for its first frame, the others are made while it runs."""
        assert self.scanner.popen.stdin is not None
        assert self.scanner.popen.stdout is not None
        if self.scanner.popen.stdout.readline().strip() != "ready":
            raise DemoError(f"{self.scanner.name} has no frames\n{self.scanner.last_words()}")
        self.scanner.popen.stdin.write("go\n")
        self.scanner.popen.stdin.flush()

    def check(self) -> None:
        """Raise `DemoError` if a process has failed."""
        for process in self._processes:
            process.check(may_be_over=process is not self.daemon)

    def accounts(self) -> Accounts:
        """Ask the daemon where its frames are.

        Raises
        ------
        DemoError
            If it does not answer, or its accounts do not balance.
        """
        try:
            reply = ask(self._folder / "run" / "control.sock", {"command": "status"})
        except ConfigError as error:
            self.daemon.check()
            raise DemoError(str(error)) from error
        if reply["unbalanced"]:
            raise DemoError(f"the accounts do not balance: {reply['unbalanced']}")
        return _sum(reply["status"]["streams"])

    def stop_daemon(self) -> None:
        """Stop the daemon in an orderly way, so that its files are complete."""
        code = self.daemon.end(STOP_S)
        if code:
            raise DemoError(f"the daemon stopped with status {code}\n{self.daemon.last_words()}")

    def _end_all(self) -> None:
        while self._processes:
            self._processes[-1].end(STOP_S)
            self._processes.pop()

    def _streams(self) -> list[str]:
        return [scene.stream for scene in self._scenes]

    def _start(self, name: str, command: Sequence[str], *, talks: bool = False) -> Process:
        process = Process(name, command, self._folder / f"{len(self._processes)}.log", talks=talks)
        self._processes.append(process)
        return process

    def _config_text(self, sample: Sample, geometry: Path) -> str:
        tables: dict[str, dict[str, Any]] = {
            "daemon": {
                "name": "demo",
                "state_dir": str(self._folder / "state"),
                "runtime_dir": str(self._folder / "run"),
                "workers": 2,
            },
            "sinks.zmq": {
                "results": self._address,
                "catch_up": self._catch_up,
                "results_dir": str(self.results),
            },
            "sinks.hdf5": {"folder": str(self.results)},
        }
        pipelines = {s.stream: _pipeline(s.materials, s.geometry) for s in self._scenes}
        pipelines[SCAN] = {**_pipeline([MATERIAL], geometry), "sample_frame": SAMPLE_FRAME}
        for stream, pipeline in pipelines.items():
            source = {"type": "dectris-v2", "address": self._detectors[stream]}
            tables[f"streams.{stream}.source"] = source
            tables[f"streams.{stream}.pipeline"] = {"type": "laue", **pipeline}
        tables[f"streams.{MICROGRAPHS}.source"] = {
            "type": "areadetector",
            "address": self._detectors[MICROGRAPHS],
        }
        tables[f"streams.{MICROGRAPHS}.pipeline"] = {
            "type": "micrograph",
            "bundle": [FINGERPRINTS],
        }
        grid = sample.grid
        tables[f"streams.{SCAN}.scan"] = {
            "shape": list(grid.shape),
            "step_um": list(grid.step_um),
            "snake": grid.snake,
        }
        # The values are names, numbers and lists of them: TOML writes them as JSON does.
        blocks = [
            "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())])
            for name, table in tables.items()
        ]
        return "\n\n".join([HEADING, *blocks]) + "\n"


def _pipeline(materials: Sequence[str], geometry: Path) -> dict[str, Any]:
    """Return the table of a pipeline, with the networks that come with grainwatch for it."""
    band = PipelineConfig(materials=(), geometry="").energy_keV
    bundles = shipped_for(map(load_material, materials), read_det(geometry).calibration, band)
    return {"materials": list(materials), "geometry": str(geometry.absolute()), "bundle": bundles}


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that nobody listens on, nor will before they are taken.

    They lie below those that systems hand out to connections (32768 on).
    """
    with zmq.Context() as context:
        sockets = [context.socket(zmq.REP) for _ in range(count)]
        try:
            return [socket.bind_to_random_port("tcp://127.0.0.1", 20_000, 32_000) for socket in sockets]
        finally:
            for socket in sockets:
                socket.close(0)


def _sum(streams: Sequence[dict[str, Any]]) -> Accounts:
    counters = ("received", "done", "failed", "dropped", "lost", "missing", "in_flight")
    busy = [s for s in streams if s["rate_hz"] > 0] or list(streams)
    return Accounts(
        **{name: sum(int(s[name]) for s in streams) for name in counters},
        rate_hz=sum(s["rate_hz"] for s in streams),
        latency_p50_s=max(s["latency_p50_s"] for s in busy),
        latency_p99_s=max(s["latency_p99_s"] for s in busy),
        last_error="; ".join(f"{s['stream']}: {s['last_error']}" for s in streams if s["last_error"]),
    )
