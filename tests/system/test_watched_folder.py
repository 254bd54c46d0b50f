"""``grainwatch run`` on a folder into which a scan is written: crystals, a map, balanced accounts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fabio.tifimage
import numpy as np
import numpy.typing as npt
import pytest
from testkit.folders import write_tif
from testkit.process import DaemonProcess, eventually

from pipelines.laue.crystal import load_material
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.lauetools_files import write_det
from pipelines.laue.orientation import SAMPLE_FRAMES, lattice_rotation_of
from pipelines.laue.reflections import build_reflections
from pipelines.laue.render import render_frame
from pipelines.results_files import ResultsFileError, read_results, results_files
from pipelines.rotations import misorientation_deg, random_rotations

pytestmark = pytest.mark.system

DETECTOR = Calibration(70.0, 511.0, 540.0, 0.4, -0.3, 0.15, (1024, 1024), "lab")
SHAPE, STEP_UM = (3, 2), (0.5, 2.0)
GRAINS = np.array([[0, 0], [0, 1], [1, 1]])  # [x, y]
#: The order in which a scan that jumps about visits the points, and the one that it loses.
VISITS = [(0, 0), (2, 1), (1, 0), (1, 1), (2, 0), (0, 1)]
LOST = 4


def frames(folder: Path) -> tuple[dict[str, bytes], npt.NDArray[np.float64]]:
    """Render frames of two copper grains; return the files by name, and the orientations."""
    rng = np.random.default_rng(5)
    copper = load_material("Cu")
    orientations = random_rotations(2, rng)
    reflections, area = build_reflections(copper), DetectorArea.rectangle(DETECTOR.shape)
    files = {}
    for number, (ix, iy) in enumerate(VISITS):
        ub = lattice_rotation_of(orientations[GRAINS[ix, iy]], copper, SAMPLE_FRAMES["tilt40"]) @ copper.B0
        spots = simulate_spots(ub, reflections, DETECTOR, area)
        intensity = 4e4 * np.sqrt(spots.intensity / spots.intensity.max())
        widths = np.full((len(intensity), 2), 2.0)
        image = render_frame(DETECTOR.shape, spots.xy_px, intensity, widths, rng)
        path = folder / "one.tif"
        fabio.tifimage.TifImage(data=image).write(str(path))
        x_um, y_um = 10.0 + ix * STEP_UM[0], -3.0 + iy * STEP_UM[1]
        files[f"cu_{number:03d}_x{x_um:.1f}_y{y_um:.1f}.tif"] = path.read_bytes()
    return files, orientations


def config(tmp_path: Path) -> str:
    return f"""
[daemon]
name = "test"
state_dir = "{tmp_path}/state"
runtime_dir = "{tmp_path}/run"
workers = 1

[streams.laue.source]
type = "folder"
path = "{tmp_path}/share/scan/*.tif"
poll_s = 0.1
settle_s = 0.2
position_pattern = '_x(?P<x>[-\\d.]+)_y(?P<y>-?\\d+\\.\\d+)'
end_file = "scan.done"

[streams.laue.scan]
shape = [3, 2]
step_um = [0.5, 2.0]
origin_um = [10.0, -3.0]

[streams.laue.pipeline]
type = "laue"
materials = ["Cu"]
geometry = "{tmp_path}/lab.det"
sample_frame = "tilt40"

[sinks.hdf5]
folder = "{tmp_path}/results"
flush_s = 0.1
"""


def test_a_scan_written_into_a_folder_becomes_a_map(tmp_path: Path) -> None:
    files, orientations = frames(tmp_path)
    write_det(tmp_path / "lab.det", DETECTOR, material="Cu")
    scan = tmp_path / "share" / "scan"
    names = [name for number, name in enumerate(files) if number != LOST]
    with DaemonProcess(tmp_path, config=config(tmp_path)) as daemon:
        daemon.start()  # the folder is not there yet
        eventually(lambda: "no such file" in daemon.status()["errors"].get("source laue", ""))
        scan.mkdir(parents=True)
        for name in names[:3]:
            write_slowly(scan / name, files[name])
        # A crash may cost what the results file or the ledger does not have yet.
        eventually(lambda: stored(tmp_path / "results") == daemon.written()["done"] == 3)

        daemon.kill()
        for name in names[3:]:
            write_slowly(scan / name, files[name])
        daemon.start()
        eventually(lambda: daemon.counts()["done"] == 5, 60)

        scan.rename(tmp_path / "elsewhere")
        eventually(lambda: "no such file" in daemon.status()["errors"].get("source laue", ""))
        (tmp_path / "elsewhere").rename(scan)
        eventually(lambda: not daemon.status()["errors"])
        (scan / "scan.done").touch()
        eventually(lambda: daemon.counts()["state"] == "idle")
        counts = {k: daemon.counts()[k] for k in ("received", "done", "failed", "dropped", "lost", "missing")}
        assert counts == {"received": 5, "done": 5, "failed": 0, "dropped": 0, "lost": 0, "missing": 1}
        assert daemon.stop() == 0
        assert daemon.audit() == []
    path = max(results_files(tmp_path / "results"), key=lambda p: p.stat().st_mtime_ns)
    check_map(path, orientations)


def stored(folder: Path) -> int:
    try:
        return sum(1 for path in results_files(folder) for _ in read_results(path))
    except (OSError, ResultsFileError):
        return 0


def write_slowly(path: Path, content: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(content), len(content) // 5):
            file.write(content[at : at + len(content) // 5])
            time.sleep(0.02)


def check_map(path: Path, orientations: npt.NDArray[np.float64]) -> None:
    command = [sys.executable, "-m", "grainwatch", "map", str(path), "--json"]
    answer = subprocess.run(command, check=True, timeout=60, capture_output=True)
    found: dict[str, Any] = json.loads(answer.stdout)
    assert (found["shape"], found["filled"]) == ([3, 2], 5)
    points = {tuple(p["grid_index"]): p["grain_id"] for p in found["points"] if p["rank"] == 0}
    assert set(points) == set(VISITS) - {VISITS[LOST]}
    group = load_material("Cu").proper_point_group
    for label in (0, 1):
        (grain_id,) = {g for point, g in points.items() if GRAINS[point] == label}
        (grain,) = [g for g in found["grains"] if g["grain_id"] == grain_id]
        assert float(misorientation_deg(grain["mean_quaternion"], orientations[label], group)) < 0.02


def test_a_folder_that_is_complete_ends_the_daemon(tmp_path: Path) -> None:
    """`once` with --exit-when-done; a second run finds nothing to do."""
    for n in range(20):
        write_tif(tmp_path / "data" / f"a_{n}.tif", 0 if n % 7 else 6)
    (tmp_path / "data" / "a_20.tif").write_bytes(b"II*\0")
    text = f"""
[daemon]
state_dir = "state"
runtime_dir = "run"
workers = 1
[streams.s]
source = {{type = "folder", path = "data", once = true, poll_s = 0.1, settle_s = 0.1, patience_s = 0.5}}
pipeline = {{type = "testkit.slow_pipeline"}}
[sinks.lines]
type = "testkit.sinks"
path = "{tmp_path}/results.jsonl"
"""
    with DaemonProcess(tmp_path, config=text) as daemon:
        for _ in range(2):
            daemon.launch("--exit-when-done")
            assert daemon.process is not None
            assert daemon.process.wait(60) == 0
            (closed,) = daemon.events("closed")
            assert (closed["counts"]["done"], closed["counts"]["failed"]) == (17, 4)
            assert len(daemon.events("result")) == 17
            assert daemon.audit() == []
