"""The simulator writes what the source reads: in pieces, renamed, or into one file that grows."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testkit.folders import FolderRun, write_tif

from daemon.sources.folder.microscope import VENDORS, Microscope, Vendor, checked_vendor, data_bar
from daemon.sources.folder.simulator import Options, Writer, write
from grainwatch.config import ScanTable
from pipelines.files import open_images
from pipelines.micrograph.acquisition import read_acquisition
from pipelines.micrograph.preparation import PreparationParameters, prepare
from pipelines.micrograph.synthetic import MicrographSimulator

SCAN = ScanTable(shape=(3, 2), step_um=(0.5, 2.0), snake=True, origin_um=(10.0, -3.0))
PATTERN = r"_x(?P<x>-?[\d.]+)_y(?P<y>-?\d+(\.\d+)?)"


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("writer", "config"),
    [
        ("slow", {"position_pattern": PATTERN}),
        ("rename", {"position_pattern": PATTERN, "settle_s": 0.0}),
        ("swmr", {"position_keys": ["x", "y"], "dataset": "frames"}),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, writer: Writer, config: dict[str, Any]) -> None:
    images = [np.full((8, 9), value, np.uint16) for value in range(6)]
    data = tmp_path / "data"
    options = Options(data, writer=writer, rate_hz=20.0, scan=SCAN, end_file="scan.done")
    with FolderRun(tmp_path / "state", data / "scan*", scan=SCAN, end_file="*.done", **config) as run:
        thread = threading.Thread(target=write, args=(images, options, never))
        thread.start()
        run.until(lambda: run.ends)
        thread.join()
        assert [(number, value) for _, number, value in run.seen] == [(n, n) for n in range(6)]
        assert [t.frame.grid_index for t in run.taken] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
        assert run.taken[3].frame.position_um == (11.0, -1.0)
        assert run.totals == run.totals | {"done": 6, "failed": 0, "dropped": 0, "missing": 0}


def test_it_can_be_stopped(tmp_path: Path) -> None:
    stops = iter([False, False, False, False, True])
    images = [np.zeros((4, 4), np.uint16)] * 9
    report = write(images, Options(tmp_path, rate_hz=0.0, end_file="END"), lambda: next(stops, True))
    assert (report.frames, report.complete) == (2, False)
    assert not (tmp_path / "END").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate_hz": -1.0}, "rate: expected 0"),
        ({"name": "a/b"}, "name: expected the name of a file"),
        ({"end_file": "../END"}, "end_file: expected the name of a file"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(tmp_path, **options)


@pytest.mark.parametrize(
    ("images", "why"), [(np.zeros((9, 9), np.uint16), "uint16"), (np.zeros((9, 9, 3), np.uint8), "3 dim")]
)
def test_a_microscope_writes_8_bit_grey(tmp_path: Path, images: np.ndarray, why: str) -> None:
    with pytest.raises(ValueError, match=f"--vendor: expected 8-bit grey images, got .*{why}"):
        write([images], Options(tmp_path, microscope=Microscope()), never)
    with pytest.raises(ValueError, match=r"--vendor: expected one of thermo, .*, got 'leica'"):
        checked_vendor("leica")
    with pytest.raises(ValueError, match="microscopes write single files"):
        Options(tmp_path, writer="swmr", microscope=Microscope())


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("pixel_size_um", [0.0031, 0.25, 7.0])
def test_what_a_microscope_writes_is_what_it_was_told(
    tmp_path: Path, vendor: Vendor, pixel_size_um: float
) -> None:
    picture = MicrographSimulator(shape=(300, 400)).sample(0).image
    microscope = Microscope(vendor, pixel_size_um, 5.0, 3.3, "BSD")
    write([picture], Options(tmp_path, rate_hz=0.0, microscope=microscope), never)
    (image,) = open_images(tmp_path / "scan_0000.tif")
    assert image.pixels.shape == (321, 400)
    found = read_acquisition(tmp_path / "scan_0000.tif")
    assert found.pixel_size_um == pytest.approx(pixel_size_um, rel=1e-5)
    assert (found.voltage_kV, found.working_distance_mm, found.detector) == (5.0, pytest.approx(3.3), "BSD")
    assert found.flags == found.remarks == ()
    prepared = prepare(image.pixels, PreparationParameters(median_px=1), found)
    assert prepared.data_bar_px == 21
    assert np.array_equal(prepared.filtered, picture)


def test_a_data_bar_of_any_size_has_a_scale() -> None:
    # 100 of these pixels are a power of ten, but for the last digit.
    bar = data_bar(Microscope(pixel_size_um=1e-6), 400, 36)
    assert bar.shape == (36, 400)
    assert np.count_nonzero(bar[-4] > 200) == pytest.approx(100, abs=5)


@pytest.mark.system
def test_as_a_command(tmp_path: Path) -> None:
    write_tif(tmp_path / "frame.tif", 5)
    command = [sys.executable, "-m", "grainwatch", "simulate", "folder", "--to", str(tmp_path / "out")]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--rate", "0", *more], capture_output=True, text=True, check=False, timeout=60
        )

    answer = run(
        "--frames", str(tmp_path / "frame.tif"), str(tmp_path / "frame.tif"), "--scan", "2x1", "--json"
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["frames"] == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "scan_0000_x0_y0.tif",
        "scan_0001_x1_y0.tif",
    ]
    answer = run("--frames", str(tmp_path / "frame.tif"), "--writer", "quick")
    assert answer.returncode == 2
    assert "simulate folder: --writer: expected one of slow, rename, swmr, got 'quick'" in answer.stderr
    answer = run("--frames", str(tmp_path / "none.tif"))
    assert answer.returncode == 2
    assert "none.tif: cannot be read" in answer.stderr
    answer = run("--micrographs", "2", "--vendor", "jeol", "--name", "sem", "--writer", "rename")
    assert answer.returncode == 0, answer.stderr
    assert sorted(p.name for p in (tmp_path / "out").glob("sem*")) == [
        "sem_0000.tif", "sem_0000.txt", "sem_0001.tif", "sem_0001.txt",
    ]  # fmt: skip
    answer = run("--micrographs", "2", "--frames", str(tmp_path / "frame.tif"))
    assert answer.returncode == 2
    assert "--micrographs: expected 1 or more, and no --frames beside it" in answer.stderr
