"""Real detector, real analysis, real sinks for some seconds: the short form of ``make soak``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from testkit.process import environment
from testkit.soak import Soak, write_frames

from pipelines.results_files import read_results, results_files

pytestmark = pytest.mark.system


def test_a_simulated_detector_for_some_seconds(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    soak = Soak(tmp_path, rate_hz=15.0, shape=(512, 512), seed=5, port=port)
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
