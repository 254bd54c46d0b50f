"""Two detectors, two calibrations, one daemon: each stream has its own, and a flood drowns nobody."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fabio.tifimage
import numpy as np
import pytest
from testkit.process import LONG_S, DaemonProcess, eventually

from pipelines.laue.crystal import load_material
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.lauetools_files import write_det
from pipelines.laue.orientation import SAMPLE_FRAMES, lattice_rotation_of
from pipelines.laue.reflections import build_reflections
from pipelines.laue.render import render_frame
from pipelines.results_files import read_results, results_files
from pipelines.rotations import misorientation_deg, random_rotations

pytestmark = pytest.mark.system
CALIBRATIONS = {
    "near": Calibration(70.0, 511.0, 540.0, 0.4, -0.3, 0.15, (1024, 1024), "near"),
    "far": Calibration(82.0, 380.0, 430.0, -0.5, 0.6, 0.2, (800, 900), "far"),
}
MATERIALS = {"near": "Cu", "far": "Ge"}
FORMS = {"near": "dectris-v2", "far": "dectris-v1"}
FRAMES = 8


@contextmanager
def detector(form: str, *arguments: object) -> Iterator[str]:
    """A simulated detector on a port of its own; gives its address."""
    command = [sys.executable, "-m", "grainwatch", "simulate", form, "--bind", "tcp://127.0.0.1:*"]
    with subprocess.Popen(
        [*command, *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"tcp://\S+", line)
            assert found is not None, line
            yield found.group()
        finally:
            process.kill()


def head(folder: Path) -> str:
    """The beginning of a configuration: a daemon that keeps to its folder."""
    return f"""
[daemon]
name = "test"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = 1
"""


def write_frame(path: Path, pixels: Any) -> Path:
    fabio.tifimage.TifImage(data=pixels).write(str(path))
    return path


def laue_frame(name: str, orientation: Any, folder: Path) -> Path:
    """Render one crystal on the detector of a stream."""
    calibration, material = CALIBRATIONS[name], load_material(MATERIALS[name])
    ub = lattice_rotation_of(orientation, material, SAMPLE_FRAMES["tilt40"]) @ material.B0
    area = DetectorArea.rectangle(calibration.shape)
    spots = simulate_spots(ub, build_reflections(material), calibration, area)
    peak = 4e4 * np.sqrt(spots.intensity / spots.intensity.max())
    rng = np.random.default_rng(4)
    widths = np.full((len(peak), 2), 2.0)
    return write_frame(
        folder / f"{name}.tif", render_frame(calibration.shape, spots.xy_px, peak, widths, rng)
    )


def test_each_stream_has_its_detector_calibration_and_material(tmp_path: Path) -> None:
    truths = dict(zip(CALIBRATIONS, random_rotations(2, np.random.default_rng(8)), strict=True))
    text = head(tmp_path)
    with ExitStack() as stack:
        for name, calibration in CALIBRATIONS.items():
            write_det(tmp_path / f"{name}.det", calibration, material=MATERIALS[name])
            frame = laue_frame(name, truths[name], tmp_path)
            address = stack.enter_context(
                detector(FORMS[name], "--frames", frame, "--repeat", FRAMES, "--rate", 10)
            )
            text += f"""
[streams.{name}]
source = {{type = "{FORMS[name]}", address = "{address}"}}
pipeline = {{type = "laue", materials = ["{MATERIALS[name]}"], geometry = "{tmp_path}/{name}.det"}}
"""
        text += f'[sinks.hdf5]\nfolder = "{tmp_path}/results"\n'
        daemon = stack.enter_context(DaemonProcess(tmp_path, config=text))
        daemon.start()

        def finished() -> bool:
            return all(stream["done"] == FRAMES for stream in daemon.status()["status"]["streams"])

        eventually(finished, LONG_S, daemon.log_path.read_text())
        assert daemon.stop() == 0
        assert daemon.audit() == []
    seen = {
        path.name.partition("-")[0]: list(read_results(path)) for path in results_files(tmp_path / "results")
    }
    assert set(seen) == set(CALIBRATIONS)
    calibrations = set()
    for name, results in seen.items():
        assert len(results) == FRAMES
        for result in results:
            assert result.key.source == name
            (crystal,) = result.crystals
            assert crystal.material == MATERIALS[name]
            group = load_material(MATERIALS[name]).proper_point_group
            assert float(misorientation_deg(crystal.quaternion, truths[name], group)) < 0.05
            calibrations.add((name, result.provenance.calibration_hash))
    assert len(calibrations) == len({of for _, of in calibrations}) == 2


def test_a_flood_of_one_stream_does_not_starve_the_other(tmp_path: Path) -> None:
    frame = write_frame(tmp_path / "dark.tif", np.zeros((32, 32), np.uint16))
    with (
        detector("dectris-v2", "--frames", frame, "--rate", 0, "--count", 10_000_000) as flood,
        detector("dectris-v2", "--frames", frame, "--rate", 10, "--count", 40) as steady,
    ):
        text = head(tmp_path)
        # What the flood brings is more than can be computed; the steady one has a shallow queue that drops.
        for name, address, policy in (
            ("flood", flood, 'policy = "block", depth = 8'),
            ("steady", steady, 'policy = "drop-newest", depth = 20'),
        ):
            text += f"""
[streams.{name}]
source = {{type = "dectris-v2", address = "{address}"}}
pipeline = {{type = "testkit.slow_pipeline", sleep_s = 0.02}}
intake = {{{policy}}}
"""
        with DaemonProcess(tmp_path, config=text) as daemon:
            daemon.start()

            def streams() -> dict[str, Any]:
                return {s["stream"]: s for s in daemon.status()["status"]["streams"]}

            eventually(lambda: streams()["steady"]["received"] == 40, LONG_S)
            eventually(lambda: streams()["steady"]["in_flight"] == 0, LONG_S)
            now = streams()
            assert (now["steady"]["done"], now["steady"]["dropped"]) == (40, 0)
            # The flood was there all the time, and waited more than the other.
            assert now["flood"]["done"] > 40
            assert now["steady"]["latency_p50_s"] < now["flood"]["latency_p50_s"]

            def filled() -> int:
                edges = {e["edge"]: e for e in daemon.status()["status"]["edges"]}
                return int(edges["flood intake"]["filled"])

            eventually(lambda: filled() == 8)  # but for the moments when a frame was just taken out
            begin = time.monotonic()
            assert daemon.stop(LONG_S) == 0
            assert time.monotonic() - begin < LONG_S
            assert daemon.audit() == []
