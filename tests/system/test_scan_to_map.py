"""From a detector's own wire format to the picture of a map, by the commands that a user types."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import fabio.tifimage
import matplotlib.image
import numpy as np
import numpy.typing as npt
import pytest
from testkit.ports import free_address, free_ports
from testkit.process import LONG_S, eventually

from pipelines.laue.crystal import load_material
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.lauetools_files import write_det
from pipelines.laue.orientation import SAMPLE_FRAMES, lattice_rotation_of
from pipelines.laue.reflections import build_reflections
from pipelines.laue.render import render_frame
from pipelines.maps.grid import ScanGrid
from pipelines.results_files import ResultsFile, ResultsFileError, results_files
from pipelines.rotations import misorientation_deg, random_rotations

pytestmark = pytest.mark.system
COMMAND = [sys.executable, "-m", "grainwatch"]
GRID = ScanGrid((4, 3), snake=True)
LABELS = np.array([[0, 0, 1], [0, 0, 1], [2, 0, 1], [2, -1, 1]])  # [x, y]; -1: air
DETECTOR = Calibration(70.0, 511.0, 540.0, 0.4, -0.3, 0.15, (1024, 1024), "lab")


def frames(folder: Path) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Rendered frames of three copper grains; return their files and the orientations."""
    rng = np.random.default_rng(12)
    copper = load_material("Cu")
    orientations = random_rotations(3, rng)
    reflections = build_reflections(copper)
    area = DetectorArea.rectangle(DETECTOR.shape)
    files = []
    for number in range(GRID.size):
        label = LABELS[GRID.index(number)]
        xy, intensity = np.empty((0, 2)), np.empty(0)
        if label >= 0:
            ub = lattice_rotation_of(orientations[label], copper, SAMPLE_FRAMES["tilt40"]) @ copper.B0
            spots = simulate_spots(ub, reflections, DETECTOR, area)
            xy, intensity = spots.xy_px, 4e4 * np.sqrt(spots.intensity / spots.intensity.max())
        image = render_frame(DETECTOR.shape, xy, intensity, np.full((len(xy), 2), 2.0), rng)
        path = folder / f"frame_{number:04d}.tif"
        fabio.tifimage.TifImage(data=image).write(str(path))
        files.append(str(path))
    return files, orientations


def test_init_run_simulate_map(tmp_path: Path) -> None:
    files, orientations = frames(tmp_path)
    det, config, png = tmp_path / "lab.det", tmp_path / "grainwatch.toml", tmp_path / "map.png"
    write_det(det, DETECTOR, material="Cu")
    address = free_address()
    options = ["--det", str(det), "--source", address, "--scan", "4x3", "--out", str(config)]
    subprocess.run([*COMMAND, "init", *options], check=True, timeout=60)
    text = config.read_text().replace("snake = false", "snake = true").replace("# step_um", "step_um")
    for port, free in zip(("31100", "31101"), free_ports(2), strict=True):
        text = text.replace(f":{port}", f":{free}")
    config.write_text(re.sub(r"workers = \d+", "workers = 1", text))
    with (
        (tmp_path / "log.txt").open("wb") as log,
        subprocess.Popen([*COMMAND, "run", str(config)], stderr=log) as daemon,
    ):
        try:
            simulate = ["simulate", "dectris-v2", "--bind", address, "--rate", "0", "--frames", *files]
            subprocess.run([*COMMAND, *simulate], check=True, timeout=60, capture_output=True)
            (path,) = eventually(
                lambda: results_files(tmp_path / "results"),
                LONG_S,
                "no results: " + (tmp_path / "log.txt").read_text(),
            )
            eventually(lambda: finished(path), LONG_S, "the series was not closed")
            daemon.terminate()
            assert daemon.wait(LONG_S) == 0
        finally:
            daemon.kill()
    drawn = subprocess.run(
        [*COMMAND, "map", str(path), "--plot", str(png), "--json"],
        check=True,
        timeout=60,
        capture_output=True,
    )
    found = json.loads(drawn.stdout)
    assert found["shape"] == [4, 3]
    assert found["filled"] == 12
    assert found["empty"] == [[3, 1]]
    grain_of = {tuple(p["grid_index"]): p["grain_id"] for p in found["points"] if p["rank"] == 0}
    seen = {
        label: {grain_of[i] for i in map(tuple, np.argwhere(label == LABELS).tolist())} for label in range(3)
    }
    assert all(len(ids) == 1 for ids in seen.values()), seen
    group = load_material("Cu").proper_point_group
    for label, (grain_id,) in seen.items():
        (grain,) = [g for g in found["grains"] if g["grain_id"] == grain_id]
        assert grain["size_points"] == np.count_nonzero(label == LABELS)
        # pixels of 0.15 mm at 70 mm are 0.12 deg; a fit of tens of spots is far better
        miss = float(misorientation_deg(grain["mean_quaternion"], orientations[label], group))
        assert miss < 0.02, miss
        assert grain["spread_deg"] < 0.02
    assert len(found["grains"]) == 3
    assert matplotlib.image.imread(png).shape[2] == 4


def finished(path: Path) -> bool:
    try:
        with ResultsFile(path) as file:
            return file.finished
    except ResultsFileError:
        return False
