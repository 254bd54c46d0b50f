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
from grainwatch.messages import MicrographResult
from pipelines.micrograph.synthetic import MicrographSimulator
from pipelines.results_files import ResultsFile, results_files

pytestmark = pytest.mark.system

SIMULATOR = MicrographSimulator(shape=(200, 320))
BAR = 14

CONFIG = """
[daemon]
name = "sem"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = 1
[streams.sem]
pipeline = {{type = "micrograph"}}
[streams.sem.source]
type = "folder"
path = "{folder}/share"
series = "folder"
mixed = true
poll_s = 0.1
settle_s = 0.2
patience_s = 2.0
once = true
[streams.camera]
source = {{type = "areadetector", address = "{address}"}}
pipeline = {{type = "micrograph"}}
[sinks.hdf5]
folder = "{folder}/results"
flush_s = 0.1
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


def stored(folder: Path, stream: str) -> tuple[dict[int, MicrographResult], dict[str, int]]:
    """Results by frame, and the accounts, of the one series that a stream has."""
    (path,) = (p for p in results_files(folder / "results") if p.name.startswith(stream))
    with ResultsFile(path) as file:
        found = [m for m in file.messages() if isinstance(m, MicrographResult)]
        assert len({m.key for m in found}) == len(found)
        return {m.key.frame: m for m in found}, file.counts()


def ended(daemon: DaemonProcess) -> dict[str, int]:
    """How many frames of each stream have come to an end."""
    streams = daemon.status()["status"]["streams"]
    return {s["stream"]: s["done"] + s["failed"] for s in streams}


def test_each_micrograph_ends_in_one_state(tmp_path: Path) -> None:
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
    n, address = 5 + len(expected), free_address()
    simulator = [sys.executable, "-m", "grainwatch", "simulate", "areadetector", "--micrographs", "3"]
    with DaemonProcess(tmp_path, config=CONFIG.format(folder=tmp_path, address=address)) as daemon:
        daemon.start()
        subprocess.run(
            [*simulator, "--bind", address, "--rate", "0", "--pixel-size-um", "0.5", "--algorithm", "bslz4"],
            check=True, timeout=120, env=environment(),
        )  # fmt: skip
        eventually(lambda: ended(daemon) == {"sem": n, "camera": 3})
        assert daemon.stop() == 0
        assert daemon.audit() == []
    results, counts = stored(tmp_path, "sem")
    states = ("received", "done", "failed", "dropped", "lost", "missing")
    assert [counts[s] for s in states] == [n, n - len(failing), len(failing), 0, 0, 0]
    reasons = {frame: why for state, frame, why in daemon.exceptions() if state == "failed"}
    assert (sorted(results), sorted(reasons)) == ([k for k in range(n) if k not in failing], failing)
    for number, vendor in enumerate(VENDORS):
        check_a_microscopes(results[number], vendor, 0.1 * (number + 1))
    for number, (_, _, said) in enumerate(expected, start=5):
        if said.startswith("failed"):
            assert said.removeprefix("failed: ") in reasons[number]
        else:
            assert {said, "pixel_size_unknown"} <= set(results[number].flags)
            assert results[number].pixel_size_um is None
            morphology = results[number].morphology
            assert morphology is None or morphology.free_path_um is None
    results, counts = stored(tmp_path, "camera")
    assert [counts[s] for s in states] == [3, 3, 0, 0, 0, 0]
    assert sorted(results) == [1, 2, 3]
    for result in results.values():
        assert (result.pixel_size_um, result.data_bar_px, result.instrument) == (0.5, 0, "SIM-SE")
        assert result.flags == ()


def check_a_microscopes(found: MicrographResult, vendor: str, pixel_size_um: float) -> None:
    assert found.pixel_size_um == pytest.approx(pixel_size_um)
    assert (found.shape_px, found.data_bar_px) == ((200 + BAR, 320), BAR)
    assert found.flags == (("data_bar_guessed",) if vendor == "zeiss" else ())
    assert found.instrument.lower().startswith(vendor)
    assert found.instrument.endswith("SIM-SE")
    assert found.morphology is not None
    assert found.morphology.free_path_um == pytest.approx(found.morphology.free_path_px * pixel_size_um)
