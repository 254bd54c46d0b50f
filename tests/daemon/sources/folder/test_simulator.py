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

from daemon.sources.folder.simulator import Options, Writer, write
from grainwatch.config import ScanTable

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
