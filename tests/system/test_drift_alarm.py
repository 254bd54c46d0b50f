"""A detector that moves in mid-series: the daemon says so, and recalibrate finds where it stands now."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from testkit.ports import free_address
from testkit.process import DaemonProcess, environment, eventually

from grainwatch.commands.status import ask
from grainwatch.messages import DriftReport, LaueResult
from pipelines.laue.calibration_fit import vector_of, with_vector
from pipelines.laue.crystal import load_material
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.lauetools_files import read_det, write_det
from pipelines.laue.reflections import build_reflections
from pipelines.laue.render import render_frame
from pipelines.results_files import ResultsFile, results_files
from pipelines.rotations import random_rotations, to_matrix

pytestmark = pytest.mark.system

SHAPE = (640, 640)
BEFORE = Calibration(70.0, 318.3, 335.7, 0.4, -0.3, 0.25, SHAPE, "lab")
AFTER = with_vector(BEFORE, vector_of(BEFORE) + np.array([0.05, 0.25, -0.2, 0.02, 0.0]))
STILL, MOVED = 25, 20
COMMAND = [sys.executable, "-m", "grainwatch"]


def write_frames(path: Path) -> None:
    """A germanium wafer; the detector moves after `STILL` frames."""
    rng = np.random.default_rng(4)
    germanium = load_material("Ge")
    reflections = build_reflections(germanium)
    turn = to_matrix(random_rotations(1, rng))[0]
    images = []
    for number in range(STILL + MOVED):
        where = BEFORE if number < STILL else AFTER
        spots = simulate_spots(turn @ germanium.B0, reflections, where, DetectorArea.of(where))
        height = 3e4 * np.sqrt(spots.intensity / spots.intensity.max())
        images.append(render_frame(SHAPE, spots.xy_px, height, np.full((len(spots), 2), 2.2), rng))
    with h5py.File(path, "w") as file:
        file["frames"] = np.stack(images)
        file["after"] = np.stack(images[STILL:])


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=100, env=environment()
    )


def test_a_detector_that_moves_is_noticed_and_found_again(tmp_path: Path) -> None:
    frames, det, new = tmp_path / "frames.h5", tmp_path / "lab.det", tmp_path / "new.det"
    write_frames(frames)
    write_det(det, BEFORE, material="Ge")
    address = free_address()
    config = f"""
[daemon]
name = "drift"
state_dir = "state"
runtime_dir = "run"
workers = 2
[streams.laue]
source = {{type = "dectris-v2", address = "{address}"}}
pipeline = {{type = "laue", materials = ["Cu", "Ge"], geometry = "lab.det", drift = {{material = "Ge"}}}}
[sinks.hdf5]
folder = "results"
"""
    with DaemonProcess(tmp_path, config=config) as daemon:
        daemon.launch()
        eventually(daemon.runs, 90, "the daemon did not start")
        assert "no Ge crystal yet" in daemon.counts()["watch"]
        detector = ("dectris-v2", "--bind", address, "--rate", 0)
        sent = command("simulate", *detector, "--frames", f"{frames}::/frames")
        assert sent.returncode == 0, sent.stderr
        eventually(lambda: daemon.counts()["done"] == STILL + MOVED, 100, daemon.log_path.read_text())
        said = eventually(lambda: "detector moved" in (w := daemon.counts()["watch"]) and w)
        assert "run grainwatch recalibrate" in said
        assert said in " ".join(command("status", daemon.config_path).stdout.split())
        assert "detector moved, seen at frame" in daemon.log_path.read_text()
        (path,) = eventually(lambda: results_files(tmp_path / "results"))
        eventually(lambda: len(messages(path, LaueResult)) == STILL + MOVED)

        # With the daemon running, from its configuration alone.
        report = tmp_path / "new.json"
        done = command("recalibrate", daemon.config_path, "--out", new, "--json", report)
        assert done.returncode == 0, done.stderr

        # The daemon takes the new calibration over: where the detector stands is right again.
        daemon.config_path.write_text(config.replace("lab.det", "new.det"))
        ask(tmp_path / "run" / "control.sock", {"command": "reload"}, 60.0)
        again = command("simulate", *detector, "--frames", f"{frames}::/after")
        assert again.returncode == 0, again.stderr
        eventually(lambda: daemon.counts()["done"] == STILL + 2 * MOVED, 100)
        assert f"still over {MOVED} frames of Ge" in daemon.counts()["watch"]
        assert daemon.stop() == 0
    results, reports = messages(path, LaueResult), messages(path, DriftReport)
    results.sort(key=lambda result: result.seq)
    check_alarm(results, reports, path)
    check_calibration(json.loads(report.read_text()), new, done.stdout)
    (second,) = (p for p in results_files(tmp_path / "results") if p != path)
    assert not any(result.flags for result in messages(second, LaueResult))
    # The same frames, so that the offset is not an independent test, but it has to vanish.
    offset = messages(second, DriftReport)[-1].offset
    assert np.all(np.abs(offset) < [0.01, 0.05, 0.05]), offset


def messages(path: Path, kind: type) -> list:  # type: ignore[type-arg]
    with ResultsFile(path) as file:
        return list(file.messages(schemas=(kind.SCHEMA,)))


def check_alarm(results: list[LaueResult], reports: list[DriftReport], path: Path) -> None:
    """No alarm before the move; after it within the frames that theory says; then on every result."""
    assert all(result.drift is not None for result in results)
    flagged = [n for n, result in enumerate(results) if "detector_moved" in result.flags]
    assert flagged == list(range(flagged[0], len(results)))
    by_number = sorted(results, key=lambda result: result.key.frame)
    seen = [r.drift for r in by_number if r.drift is not None]
    a, b, c, d, e, f = np.mean([s.covariance for s in seen[:STILL]], axis=0)
    variance = sum(s.square_sum_px2 for s in seen[:STILL]) / sum(s.freedom for s in seen[:STILL])
    covariance = np.array([[a, b, c], [b, d, e], [c, e, f]]) * variance * (1 + 1 / STILL)
    # A change of the tilts shows in the three that are watched, too: what the frames say they moved.
    changes = np.array([s.change for s in seen])
    move = changes[STILL:].mean(0) - changes[:STILL].mean(0)
    size = float(np.sqrt(move @ np.linalg.solve(covariance, move)))
    (limit,) = {report.limit for report in reports}
    expected = math.ceil(math.log(1 - limit / min(size, 5.0)) / math.log(0.9))
    # Two workers may overtake each other: frames of after the move that came up to the alarm are counted.
    needed = sum(result.key.frame >= STILL for result in results[: flagged[0] + 1])
    assert 2 <= needed <= expected + 2
    alarm = next(report for report in reports if report.state == "moved")
    assert alarm.alarm_frame == results[flagged[0]].key.frame
    assert all(report.state == "still" for report in reports if report.seq < alarm.seq)
    with ResultsFile(path) as file:
        table = file.drift()
    assert table["alarm_frame"].tolist() == [report.alarm_frame for report in reports]
    # Told without the frames from before the move.
    assert np.all(np.abs(reports[-1].change - move) < 4 * np.array(reports[-1].sigma) + 0.02 * np.abs(move))


def check_calibration(said: dict, det: Path, printed: str) -> None:  # type: ignore[type-arg]
    sigma = np.array(list(said["sigma"].values()))
    found = read_det(det).calibration
    off = (vector_of(found) - vector_of(AFTER)) / sigma
    assert np.all(np.abs(off) < 3.0), off
    assert np.all(sigma < [0.05, 0.2, 0.2, 0.05, 0.05])
    assert min(said["frames"]) >= STILL
    assert said["unchanged_probability"] < 1e-6
    assert "the detector has moved" in printed
    assert "old" in printed
