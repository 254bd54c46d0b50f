"""Real detector, real analysis, real sinks for some seconds: the short form of ``make soak``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from testkit.ports import free_address, free_ports
from testkit.process import LONG_S, DaemonProcess, environment, eventually
from testkit.soak import Soak, write_frames

from grainwatch.messages import MapUpdate
from pipelines.results_files import ResultsFile, ResultsFileError, read_results, results_files

pytestmark = pytest.mark.system


def test_a_simulated_detector_for_some_seconds(tmp_path: Path) -> None:
    soak = Soak(tmp_path, rate_hz=15.0, shape=(512, 512), seed=5, port=free_ports()[0])
    soak.run(8.0, every_s=0.5)
    assert soak.problems(growth_mib=40.0) == [], soak.daemon.log_path.read_text()
    results = [r for path in results_files(tmp_path / "results") for r in read_results(path)]
    assert len(results) == soak.sent
    assert len({r.key for r in results}) == soak.sent
    # The detector's six frames hold two crystals each.
    assert np.median([len(r.crystals) for r in results]) == 2
    assert all(0 < r.times.received < r.times.processed <= r.times.published for r in results)


def kernels(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.suffix in (".nbc", ".nbi")}


def test_after_warm_a_start_compiles_nothing(tmp_path: Path) -> None:
    write_frames(tmp_path, (512, 512), seed=6)
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
[daemon]
state_dir = "{tmp_path}/state"
runtime_dir = "{tmp_path}/run"
workers = 1
[streams.s]
source = {{type = "replay", files = ["{tmp_path}/frames.h5"]}}
pipeline = {{type = "laue", materials = ["Cu"], geometry = "{tmp_path}/geometry.det"}}
scan = {{shape = [3, 2]}}
[sinks.hdf5]
folder = "{tmp_path}/results"
"""
    )
    command = [sys.executable, "-m", "grainwatch"]
    warmed = subprocess.run(
        [*command, "warm", str(config)], capture_output=True, text=True, check=True, env=environment()
    )
    folder = Path(warmed.stdout.split(" in ")[-1].strip())
    before = kernels(folder)
    assert len(before) > 20, warmed.stdout
    subprocess.run(
        [*command, "run", str(config), "--exit-when-done"],
        capture_output=True, check=True, env=environment(), cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert kernels(folder) == before
    (path,) = results_files(tmp_path / "results")
    assert len(list(read_results(path))) == 6


def test_warm_says_when_its_folder_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    env["GRAINWATCH_CACHE_DIR"] = str(blocked / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "grainwatch", "warm"], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("grainwatch: GRAINWATCH_CACHE_DIR: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_map_goes_on_after_kill_9_with_what_it_had(tmp_path: Path) -> None:
    """The map of a series that survives the daemon holds the points of before and after."""
    write_frames(tmp_path, (512, 512), seed=7)
    address = free_address()
    config = f"""
[daemon]
state_dir = "{tmp_path}/state"
runtime_dir = "{tmp_path}/run"
workers = 1
[streams.s]
source = {{type = "dectris-v2", address = "{address}"}}
pipeline = {{type = "laue", materials = ["Cu"], geometry = "{tmp_path}/geometry.det"}}
scan = {{shape = [6, 5]}}
[sinks.hdf5]
folder = "{tmp_path}/results"
"""
    command = [sys.executable, "-m", "grainwatch", "simulate", "dectris-v2", "--bind", address]
    command += ["--frames", f"{tmp_path}/frames.h5", "--count", "30", "--rate", "6"]
    with (
        DaemonProcess(tmp_path, config=config) as daemon,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as detector,
    ):
        try:
            daemon.start()
            # The results file is flushed every half a second.
            eventually(lambda: stored(tmp_path / "results") >= 10)
            daemon.kill()
            daemon.start()
            assert detector.wait(LONG_S) == 0
        finally:
            detector.kill()
        eventually(lambda: daemon.counts()["state"] == "idle" and daemon.counts()["in_flight"] == 0)
        counts = daemon.counts()
        assert daemon.stop() == 0
    assert counts["received"] + counts["missing"] == 30
    parts = results_files(tmp_path / "results")
    assert len(parts) == 2
    results = [r for part in parts for r in read_results(part)]
    assert len({r.key.series_uid for r in results}) == 1
    measured = {r.grid_index for r in results}
    (snapshot,) = [m for part in parts for m in updates(part) if m.kind == "snapshot"]
    assert snapshot.filled == len(measured) > 15
    assert {p.grid_index for p in snapshot.points} | set(snapshot.empty) == measured


def stored(folder: Path) -> int:
    try:
        return sum(1 for path in results_files(folder) for _ in read_results(path))
    except (OSError, ResultsFileError):
        return 0  # it is being made


def updates(path: Path) -> list[MapUpdate]:
    with ResultsFile(path) as file:
        return [m for m in file.messages() if isinstance(m, MapUpdate)]
