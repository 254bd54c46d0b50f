"""``grainwatch push`` and a daemon, real processes, killed in the middle of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testkit.ports import free_address
from testkit.process import LONG_S, DaemonProcess, environment, eventually
from testkit.push import tiff

pytestmark = pytest.mark.system


class Rig:
    """A daemon that listens for images, and a folder with some."""

    def __init__(self, folder: Path, sleep_s: float, depth: int) -> None:
        folder.mkdir(exist_ok=True)
        self.address = free_address()
        self.images = folder / "scan"
        self.images.mkdir()
        config = f"""
            [daemon]
            name = "test"
            state_dir = "{folder}/state"
            runtime_dir = "{folder}/run"
            workers = 1
            [streams.s.source]
            type = "push"
            address = "{self.address}"
            [streams.s.intake]
            depth = {depth}
            [streams.s.pipeline]
            type = "testkit.slow_pipeline"
            sleep_s = {sleep_s}
            [sinks.lines]
            type = "testkit.sinks"
            path = "{folder}/results.jsonl"
        """
        self.daemon = DaemonProcess(folder, config=config)

    def write(self, *numbers: int, folder: str = "scan") -> None:
        """Write images whose sum of pixels tells their number."""
        for n in numbers:
            pixels = np.zeros((16, 16), np.uint16)
            pixels[1, 1] = n
            path = self.images.with_name(folder) / f"img_{n:04d}.tif"
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".part").write_bytes(tiff(pixels))
            path.with_suffix(".part").rename(path)

    def push(self, *options: str, what: str = "scan") -> subprocess.Popen[str]:
        """Start to push."""
        command = [sys.executable, "-m", "grainwatch", "push", str(self.images.with_name(what)), "--json"]
        command += ["--to", self.address, "--settle", "0.1", *options]
        return subprocess.Popen(
            command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def pushed(self, *options: str, what: str = "scan", status: int = 0) -> dict[str, Any]:
        """Push and return the summary."""
        return finished(self.push(*options, what=what), status)[0]

    def results(self) -> list[dict[str, Any]]:
        return self.daemon.events("result")

    def calm(self) -> int:
        """Wait until all that came has its result; return how many there are."""

        def all_written() -> bool:
            counts = self.daemon.counts()
            return not counts["in_flight"] and counts["done"] == len(self.results())

        eventually(all_written)
        return len(self.results())

    def settled(self, received: int) -> dict[str, Any]:
        """Wait until so many frames have their end; return the counters."""

        def all_done() -> dict[str, Any] | None:
            counts = self.daemon.counts()
            return counts if counts["received"] == received and not counts["in_flight"] else None

        found: dict[str, Any] = eventually(all_done, message=str(self.daemon.counts()))
        return found


def finished(process: subprocess.Popen[str], status: int = 0) -> tuple[dict[str, Any], str]:
    """Wait for a push; return its summary and what it told a person."""
    out, told = process.communicate(timeout=LONG_S)
    assert process.returncode == status, out + told
    summary: dict[str, Any] = json.loads(out) if out else {}
    return summary, told


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    # Slow enough that there is time to kill something.
    made = Rig(tmp_path, sleep_s=0.04, depth=8)
    with made.daemon:
        yield made


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One daemon for the tests that kill nothing."""
    made = Rig(tmp_path_factory.mktemp("push"), sleep_s=0.0, depth=64)
    with made.daemon:
        made.daemon.start()
        yield made


def test_kill_9_of_the_sender(rig: Rig) -> None:
    rig.daemon.start()
    rig.write(*range(1, 81))
    pushing = rig.push()
    eventually(lambda: len(rig.results()) >= 20, message="nothing arrives")
    pushing.kill()
    pushing.communicate()
    summary = rig.pushed()
    assert summary["held"] >= 20
    assert summary["taken"] > 0
    assert summary["held"] + summary["taken"] == 80
    counts = rig.settled(80)
    assert (counts["done"], counts["missing"]) == (80, 0)
    eventually(lambda: rig.daemon.events("closed"))
    assert Counter(r["frame"] for r in rig.results()) == dict.fromkeys(range(1, 81), 1)
    assert all(r["n_peaks"] == r["frame"] for r in rig.results())
    assert len({r["uid"] for r in rig.results()}) == 1
    assert rig.pushed()["held"] == 80
    assert rig.daemon.stop() == 0
    assert rig.daemon.audit() == []


def test_kill_9_of_the_daemon(rig: Rig) -> None:
    rig.write(*range(1, 101))
    pushing = rig.push()  # before there is a daemon
    rig.daemon.start()
    eventually(lambda: len(rig.results()) >= 20)
    rig.daemon.kill()
    assert pushing.poll() is None
    rig.daemon.start()
    summary, told = finished(pushing)
    assert told.count("the daemon is gone: waiting for it") == 1
    assert "images are sent again" in told
    assert summary["taken"] + summary["held"] == 100
    assert summary["ended"]
    eventually(lambda: rig.daemon.events("closed"))
    assert rig.daemon.stop() == 0
    assert rig.daemon.audit() == []
    closed = rig.daemon.events("closed")[-1]["counts"]
    assert (closed["received"], closed["done"], closed["lost"], closed["missing"]) == (100, 100, 0, 0)
    first = [r["frame"] for r in rig.results() if not r["again"]]
    assert {r["frame"] for r in rig.results()} == set(range(1, 101))
    # Published at least once; a repeat says so.
    assert max(Counter(first).values()) <= 2
    assert len({r["uid"] for r in rig.results()}) == 1


def test_kill_9_of_both(rig: Rig) -> None:
    rig.daemon.start()
    rig.write(*range(60))
    pushing = rig.push()
    eventually(lambda: len(rig.results()) >= 10)
    rig.daemon.kill()
    pushing.kill()
    pushing.communicate()
    rig.daemon.start()
    summary = rig.pushed()
    assert summary["held"] + summary["taken"] == 60
    # Acknowledged is in the accounts, not analysed: what a crash takes now, another push finds.
    rig.daemon.kill()
    rig.daemon.start()
    summary = rig.pushed()
    assert summary["held"] + summary["taken"] == 60
    eventually(lambda: {r["frame"] for r in rig.results()} == set(range(60)))
    assert rig.pushed()["held"] == 60
    assert rig.daemon.stop() == 0
    assert rig.daemon.audit() == []


def test_ctrl_c_and_on(rig: Rig) -> None:
    rig.daemon.start()
    rig.write(*range(100), folder="ctrl-c")
    pushing = rig.push("--meta", "sample=Cu", what="ctrl-c")
    eventually(lambda: len(rig.results()) > 5)
    pushing.send_signal(signal.SIGINT)
    summary, told = finished(pushing, status=1)
    assert summary["interrupted"]
    assert "series 'ctrl-c' stays open. The same command goes on" in told
    summary, told = finished(rig.push(what="ctrl-c"))
    assert "is still open and goes on" in told
    assert summary["held"] > 0
    assert summary["held"] + summary["taken"] == 100
    eventually(lambda: {r["frame"] for r in rig.results()} == set(range(100)))


def test_watching_a_folder(running: Rig) -> None:
    folder = running.images.with_name("watched")
    folder.mkdir()
    before = running.calm()
    watching = running.push("--watch", "--number", r"(\d+)\.tif", "--settle", "1.5", what="watched")
    running.write(1, 2, folder="watched")
    eventually(lambda: len(running.results()) == before + 2)
    whole = (folder / "img_0002.tif").read_bytes()
    with (folder / "img_0003.tif").open("wb") as slowly:
        for at in range(0, len(whole), 100):
            slowly.write(whole[at : at + 100])
            slowly.flush()
            time.sleep(0.3)  # in all longer than a file has to stand still
    eventually(lambda: len(running.results()) == before + 3)
    watching.send_signal(signal.SIGINT)
    summary, told = finished(watching)
    assert (summary["taken"], summary["interrupted"], summary["ended"]) == (3, True, False)
    assert "without --watch it sends what is left and ends the series" in told
    running.write(4, folder="watched")
    summary = running.pushed("--number", r"(\d+)\.tif", what="watched")
    assert (summary["held"], summary["taken"], summary["ended"]) == (3, 1, True)
    again = running.pushed("--watch", "--idle", "1", what="watched")
    assert (again["held"], again["taken"], again["ended"]) == (4, 0, True)
    assert len({r["uid"] for r in eventually(lambda: running.results()[before + 3 :])}) == 1


def test_a_folder_that_is_used_again(running: Rig) -> None:
    """New images under the names of old ones are new images."""
    running.write(0, 1, 2, folder="current")
    first = running.pushed(what="current")
    running.write(1, 2, 3, folder="current")
    second = running.pushed(what="current")
    assert (first["taken"], second["held"], second["taken"]) == (3, 1, 3)
    assert first["series_id"] != second["series_id"]
    # Also while the first series is open.
    running.write(*range(3), folder="live")
    before = running.calm()
    watching = running.push("--watch", what="live")
    eventually(lambda: len(running.results()) == before + 3)
    watching.send_signal(signal.SIGINT)
    finished(watching)
    running.write(*range(3), folder="live")
    summary, told = finished(running.push(what="live"))
    assert summary["taken"] == 3, (summary, told)


def test_some_files_are_bad(running: Rig) -> None:
    running.write(1, 2, folder="some bad")
    folder = running.images.with_name("some bad")
    (folder / "img_0003.tif").write_bytes(b"no image")
    summary, told = finished(running.push(what="some bad"), status=1)
    assert (summary["taken"], summary["failed"]) == (2, 1)
    (problem,) = summary["problems"]
    assert (problem["file"], problem["outcome"]) == ("img_0003.tif", "failed")
    assert "img_0003.tif: failed: img_0003.tif: is of no known image format" in told


def test_names_without_numbers_are_counted(running: Rig) -> None:
    folder = running.images.with_name("names")
    running.write(7, 8, folder="names")
    (folder / "img_0007.tif").rename(folder / "b.tif")
    (folder / "img_0008.tif").rename(folder / "a.tif")
    before = running.calm()
    assert running.pushed(what="names")["taken"] == 2
    eventually(lambda: len(running.results()) == before + 2)
    assert {(r["frame"], r["n_peaks"]) for r in running.results()[before:]} == {(0, 8), (1, 7)}


@pytest.mark.parametrize(
    ("options", "status", "why"),
    [
        (["nowhere", "--to", "tcp://127.0.0.1:1"], 2, "no such file or folder"),
        (["empty", "--to", "tcp://127.0.0.1:1"], 2, "no images there"),
        (["one", "--to", "nonsense"], 2, "expected an address"),
        (["one", "--to", "tcp://127.0.0.1:1", "--patience", "0.5"], 1, "nothing answers at"),
        (["one", "--to", "tcp://127.0.0.1:1", "--meta", "x"], 2, "--meta: expected KEY=VALUE"),
        (["one", "--to", "tcp://127.0.0.1:1", "--position", "("], 2, "--position: is no regular"),
        (["twice", "--to", "tcp://127.0.0.1:1"], 2, "both have the number 1"),
        (["one/a_1.tif", "--watch", "--to", "tcp://127.0.0.1:1"], 2, "--watch: expected one folder"),
    ],
)
def test_what_cannot_be_pushed(options: list[str], status: int, why: str, tmp_path: Path) -> None:
    for name in ("empty/x", "one/a_1.tif", "twice/a_1.tif", "twice/b_1.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    done = subprocess.run(
        [sys.executable, "-m", "grainwatch", "push", "--settle", "0", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == status, done.stderr
    assert why in done.stderr
    assert "Traceback" not in done.stderr
