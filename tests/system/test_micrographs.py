"""Micrographs through whole processes: SEM files in a folder, good and bad, and arrays of areaDetector."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from testkit.ports import free_address
from testkit.process import DaemonProcess, environment, eventually

from daemon.sources.folder.microscope import VENDORS, Microscope, data_bar
from pipelines.micrograph.synthetic import MicrographSimulator

pytestmark = pytest.mark.system

SIMULATOR = MicrographSimulator(shape=(200, 320))
BAR = 14

FOLDER = """
[daemon]
name = "sem"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = 1
[streams.sem]
pipeline = {{type = "testkit.micrograph_pipeline"}}
[streams.sem.source]
type = "folder"
path = "{folder}/share"
series = "folder"
mixed = true
poll_s = 0.1
settle_s = 0.2
patience_s = 2.0
once = true
[sinks.lines]
type = "testkit.sinks"
path = "{folder}/results.jsonl"
"""

SOCKET = """
[daemon]
name = "sem"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = 1
[streams.sem]
source = {{type = "areadetector", address = "{address}"}}
pipeline = {{type = "testkit.micrograph_pipeline"}}
[sinks.lines]
type = "testkit.sinks"
path = "{folder}/results.jsonl"
"""


def written(number: int, microscope: Microscope, picture: np.ndarray | None = None) -> dict[str, bytes]:
    picture = SIMULATOR.sample(number).image if picture is None else picture
    return dict(microscope.files(f"sem_{number:02d}.tif", picture))


def saved(folder: Path, pixels: Any, **options: Any) -> bytes:
    path = folder / "one.img"
    Image.fromarray(pixels).save(path, **{"format": "TIFF", **options})
    return path.read_bytes()


def bad_files(folder: Path) -> list[tuple[str, bytes, str]]:
    """Files of everyday trouble: suffix, content, and what is said of each: a flag, or why it fails."""
    picture = SIMULATOR.sample(9).image
    with_nan = picture.astype(np.float32)
    with_nan[3, :9] = np.nan
    colour = np.dstack([picture, picture // 2, picture // 3])
    whole = saved(folder, picture)
    zero = written(0, Microscope(pixel_size_um=0.5))["sem_00.tif"].replace(b"=5e-07", b"=0e-00")
    huge = np.zeros((10_000, 10_000), np.bool_)
    unread = "failed: cannot be read as an image"
    return [
        ("tif", whole[: len(whole) // 2], unread),
        ("tif", b"II*\0", unread),
        ("tiff", saved(folder, picture, format="PNG"), "not_as_named"),
        ("tif", saved(folder, picture > 120), "two_levels"),
        ("tif", saved(folder, with_nan), "not_finite"),
        ("png", saved(folder, colour, format="PNG"), "true_colour"),
        ("bmp", saved(folder, picture[:1, :1], format="BMP"), "too_small"),
        ("png", saved(folder, huge, format="PNG"), "failed: than a slot of 33554432: raise ring.slot_bytes"),
        ("jpg", saved(folder, picture, format="JPEG"), "pixel_size_unknown"),
        ("tif", zero, "metadata_damaged"),
        ("tif", saved(folder, np.full_like(picture, 90)), "one_grey"),
        ("tif", saved(folder, data_bar(Microscope(), 320, 40)), "data_bar_only"),
        ("tif", whole, "sidecar_unreadable"),
    ]


def test_each_file_of_a_microscope_ends_in_one_state(tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    for number, vendor in enumerate(VENDORS):
        for name, content in written(number, Microscope(vendor, 0.1 * (number + 1))).items():
            (share / name).write_bytes(content)
    expected = bad_files(tmp_path)
    for number, (suffix, content, said) in enumerate(expected, start=5):
        (share / f"sem_{number:02d}.{suffix}").write_bytes(content)
        if said == "sidecar_unreadable":
            (share / f"sem_{number:02d}.txt").write_text("PixelSize=a lot")
    failing = [k for k, (_, _, said) in enumerate(expected, start=5) if said.startswith("failed")]
    n = 5 + len(expected)
    with DaemonProcess(tmp_path, config=FOLDER.format(folder=tmp_path)) as daemon:
        daemon.launch("--exit-when-done")
        assert daemon.process is not None
        assert daemon.process.wait(120) == 0, daemon.log_path.read_text()
        (closed,) = daemon.events("closed")
        assert daemon.audit() == []
    states = ("received", "done", "failed", "dropped", "lost", "missing")
    assert [closed["counts"][s] for s in states] == [n, n - len(failing), len(failing), 0, 0, 0]
    results = {r["frame"]: r for r in daemon.events("result")}
    reasons = {frame: why for state, frame, why in daemon.exceptions() if state == "failed"}
    assert (sorted(results), sorted(reasons)) == ([k for k in range(n) if k not in failing], failing)
    for number, vendor in enumerate(VENDORS):
        found = results[number]
        assert found["n_peaks"] == round(1e5 * (number + 1))  # pm
        *flags, bar, named, detector = found["flags"]
        assert (flags, bar, detector) == (
            ["data_bar_guessed"] if vendor == "zeiss" else [], f"bar {BAR}", "SIM-SE",
        )  # fmt: skip
        assert named.lower().startswith(vendor)
    for number, (_, _, said) in enumerate(expected, start=5):
        if said.startswith("failed"):
            assert said.removeprefix("failed: ") in reasons[number]
        else:
            assert said in results[number]["flags"]
            assert results[number]["n_peaks"] == 0


def test_micrographs_of_areadetector_say_how_they_were_taken(tmp_path: Path) -> None:
    address = free_address()
    with DaemonProcess(tmp_path, config=SOCKET.format(folder=tmp_path, address=address)) as daemon:
        daemon.start()
        command = [sys.executable, "-m", "grainwatch", "simulate", "areadetector", "--micrographs", "3"]
        subprocess.run(
            [*command, "--bind", address, "--rate", "0", "--pixel-size-um", "0.5", "--algorithm", "bslz4"],
            check=True, timeout=120, env=environment(),
        )  # fmt: skip
        eventually(lambda: len(daemon.events("result")) == 3)
        assert daemon.stop() == 0
        assert daemon.audit() == []
    for result in daemon.events("result"):
        assert (result["n_peaks"], result["flags"]) == (500_000, ["bar 0", "", "SIM-SE"])
