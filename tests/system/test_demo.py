"""``grainwatch demo`` as a user starts it, in its short form."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from testkit.process import LONG_S, alive, eventually

from daemon.demo.folder import demo_folder
from daemon.demo.sample import LEAST_SHARE, Sample
from grainwatch.config import ConfigError

pytestmark = pytest.mark.system
COMMAND = [sys.executable, "-m", "grainwatch", "demo", "--scan", "6x5", "--repeat", "2", "--rate", "30"]
LINE = re.compile(
    r"(?:(?P<stream>\w+) +(?P<frame>\d+))? +(?P<material>[A-Z]\w*) +(?P<matched>\d+)/(?P<expected>\d+)"
    r" +\d+ % +(?P<residual>[\d.]+) px +<?[\de.-]+ +[\d.]+ +[\d.]+ +[\d.]+(?: +\d+ ms)?"
)
MICROGRAPH = re.compile(
    r"sem +\d+  bright ([\d.]+) %, free path ([\d.]+) um; ln_cooling_rate ([\d.-]+) \+- ([\d.]+);"
    r" made with ([\d.]+)(?:; \w+)*  \(\d+ ms\)"
)
ACCOUNTS = re.compile(
    r"received (\d+) = done (\d+) \+ failed (\d+) \+ dropped (\d+) \+ lost (\d+) \+ in flight (\d+)"
)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short name: a daemon's socket, further below, may have a path of 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        yield Path(folder)


def crystals(text: str) -> list[re.Match[str]]:
    return [found for line in text.splitlines() if (found := LINE.fullmatch(line))]


def run(tmp_path: Path, *options: str, **environment: str) -> str:
    answer = subprocess.run(
        # Relative, as the default is: the daemon must mean the same folder by it.
        [*COMMAND, "--keep", "kept", *options],
        env={**os.environ, "TMPDIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    # Nothing is left behind but what was to be kept.
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    return answer.stdout


def check(text: str, tmp_path: Path, materials: set[str]) -> None:
    found = crystals(text)
    assert {line["material"] for line in found} == materials
    assert all(float(line["residual"]) < 1.0 for line in found)
    assert {line["stream"] for line in found if line["stream"]} == {"germanium", "nanowire"}
    for stream, model in (
        ("germanium", "laue-Ge-residual"),
        ("nanowire", "laue-Si-residual+laue-GaN-residual"),
        ("scan", "laue-Cu-residual"),
        ("sem", "two-phase-synthetic"),
    ):
        assert f"({stream}: what follows is the work of {model} " in text
    phases = [found for line in text.splitlines() if (found := MICROGRAPH.fullmatch(line))]
    assert len(phases) == 2
    # What the law of the simulator allows.
    assert all(50.0 < float(found[1]) < 85.0 and 2.0 < float(found[2]) < 9.0 for found in phases)
    assert all(abs(float(found[3]) - float(found[5])) < 1.0 for found in phases)
    assert re.search(r"cooling rate of 2 micrographs, read from the image alone: off by [\d.]+ of", text)
    last = ACCOUNTS.findall(text)[-1]
    assert [int(n) for n in last] == [36, 36, 0, 0, 0, 0]
    assert "map 30 of 30 points" in text
    assert "2 of 2 grains found" in text
    assert "leading grain at 30 of 30 points" in text
    misorientation = re.search(r"median misorientation ([\d.]+) deg", text)
    assert misorientation is not None
    assert float(misorientation[1]) < 0.02
    assert f"map written: {tmp_path / 'kept' / 'map.png'}" in text
    picture = matplotlib.image.imread(tmp_path / "kept" / "map.png")
    assert np.ptp(picture[..., :3]) > 0.5
    assert len(list((tmp_path / "kept" / "results").glob("*.h5"))) == 4


def test_simulated_frames(tmp_path: Path) -> None:
    """Also a second time in the same folder: what the first one left gives way."""
    results = tmp_path / "kept" / "results"
    results.mkdir(parents=True)
    for stream in ("scan", "sem"):
        (results / f"{stream}-0123.h5").touch()
    (tmp_path / "kept" / "grainwatch.toml").write_text("# The configuration of grainwatch demo.\n")
    text = run(tmp_path, GRAINWATCH_DATA=str(tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere' / 'laue' / 'Ge_blanc_0000.mccd.gz'} is absent" in text
    assert "SIMULATED frames of a germanium crystal" in text
    assert "compiling" not in text
    assert text.splitlines()[-1].endswith("README.md")
    check(text, tmp_path, {"Ge", "Si", "GaN"})


def test_real_frames(tmp_path: Path, truth_dir: Path) -> None:
    text = run(tmp_path, GRAINWATCH_DATA=str(truth_dir.parent))
    assert "real frames of a germanium crystal" in text
    assert "SIMULATED frames" not in text
    check(text, tmp_path, {"Ge", "Si", "GaN"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_middle_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    with out.open("wb") as lines:
        process = subprocess.Popen(
            [*COMMAND, "--offline", "--rate", "1", "--keep", str(tmp_path / "kept")],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=lines,
            stderr=subprocess.PIPE,
            # A group of its own, as a shell gives it: Ctrl-C goes to all of it.
            start_new_session=True,
        )
    try:
        eventually(lambda: crystals(out.read_text()), 90, "no crystal")
        children = descendants(process.pid)
        assert len(children) >= 4
        if number is signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, said = process.communicate(timeout=90)
        assert process.returncode == 130
        assert b"Traceback" not in said, said.decode()
        eventually(lambda: not any(map(alive, children)), LONG_S, "a process was left")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out.txt"]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rate", "0"), "--rate: expected more than 0, got 0"),
        (("--scan", "24"), "--scan: expected the points along x and y, as 24x18, got '24'"),
        (("--keep", "/dev/null/x"), "--keep /dev/null/x: cannot be made"),
    ],
)
def test_bad_options_are_named(options: tuple[str, ...], words: str) -> None:
    answer = subprocess.run([*COMMAND, *options], capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 2
    assert words in answer.stderr


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        demo_folder(tmp_path),
        pytest.raises(ConfigError, match=r"another demo runs in .* choose another folder with --keep"),
        demo_folder(tmp_path),
    ):
        pass
    with demo_folder(tmp_path):
        pass


@pytest.mark.parametrize(
    "name", ["notes.txt", "grainwatch.toml", "map.png", "results/laue-1.h5", "results/scan-1.h5"]
)
def test_a_folder_with_other_things_is_left_alone(name: str, tmp_path: Path) -> None:
    """Also where only their names are those of the demo: the first line of the configuration decides."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("[daemon]\n")
    with (
        pytest.raises(ConfigError, match=f"--keep .* holds {path}, which no demo wrote"),
        demo_folder(tmp_path),
    ):
        pass
    assert path.read_text() == "[daemon]\n"


def test_the_sample_is_one_beam_on_grains() -> None:
    sample = Sample.make((12, 10), 3)
    np.testing.assert_allclose(sample.shares.sum(axis=2), 1.0, atol=1e-12)
    seen = (sample.shares >= LEAST_SHARE).sum(axis=2)
    assert seen.min() >= 1
    assert (seen > 1).any(), "somewhere the beam falls on several grains"
    assert (seen == 1).any()
    again = Sample.make((12, 10), 3)
    assert np.array_equal(again.shares, sample.shares)
    assert np.array_equal(again.orientations, sample.orientations)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(stat.parent.name)
            found += [child, *descendants(child)]
    return found
