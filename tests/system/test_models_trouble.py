"""What goes wrong while models are exchanged: two things at once, workers that cannot start, a stop."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from testkit.model_lab import LONG_S, Lab, versions
from testkit.process import environment, eventually

from grainwatch.commands.status import ask
from grainwatch.config import ConfigError

pytestmark = pytest.mark.system


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, workers=1)
    with lab.daemon:
        yield lab
    lab.registry.close()


def folder_of(lab: Lab, name: str, version: int) -> Path:
    return lab.registry.find(name, str(version)).folder


# Two things at once.


@pytest.mark.parametrize("second", ["first", "second"])
def test_a_model_fails_on_probation_while_the_next_gets_warm(lab: Lab, second: str) -> None:
    """Whatever the next one is: what failed is gone, in what computes and in the registry."""
    lab.bundle("first", 2, raise_from=1)
    lab.bundle(second, 3, warm_s=4.0)
    lab.start()
    lab.ask("activate", "first", 2)
    asked = threading.Thread(target=lab.ask, args=("activate", second, 3))
    asked.start()
    eventually(lambda: len(lab.daemon.workers()) == 3, LONG_S)
    lab.feed(10)  # the old one is put back, and computes them anew
    assert versions(lab.all_done()) == [("101", "101")]
    asked.join(LONG_S)
    lab.feed(20)
    results = lab.all_done()
    assert results[-1]["flags"] == (["103", "101"] if second == "first" else ["101", "103"])
    eventually(lambda: lab.models()["on_probation"] == "", LONG_S)
    assert lab.states(second)["3"] == "active"
    assert lab.states("first")["2"] == "retired"
    said = lab.models()["in_use"]
    assert said[second]["sha256"] == lab.sha256[second, 3]
    # The way back does not lead to the one that failed.
    lab.ask("rollback", second)
    lab.feed(5)
    assert lab.all_done()[-1]["flags"] == ["101", "101"]


def test_a_model_fails_on_probation_while_a_reload_gets_warm(lab: Lab) -> None:
    lab.bundle("second", 2, warm_s=3.0)
    lab.bundle("first", 2, raise_from=1)
    lab.start()
    lab.ask("activate", "second", 2)
    lab.feed(10)
    lab.all_done()
    lab.ask("activate", "first", 2)
    command = [sys.executable, "-m", "grainwatch", "reload", str(lab.daemon.config_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as reload:
        eventually(lambda: len(lab.daemon.workers()) == 3, LONG_S)
        lab.feed(10)
        lab.all_done()
        assert reload.wait(LONG_S) == 0
    lab.feed(10)
    assert lab.all_done()[-1]["flags"] == ["101", "102"]
    assert lab.states("first") == {"2": "retired"}


def test_a_stop_follows_a_fault_on_probation(lab: Lab) -> None:
    """What failed does not serve at the next start."""
    lab.bundle("first", 2, raise_from=1)
    lab.bundle("second", 2, warm_s=20.0)
    lab.start()
    lab.ask("activate", "first", 2)

    def ask_and_be_refused() -> None:
        with pytest.raises(ConfigError, match=r"the daemon stops|stopped before"):
            lab.ask("activate", "second", 2)

    asked = threading.Thread(target=ask_and_be_refused)
    asked.start()
    eventually(lambda: len(lab.daemon.workers()) == 3, LONG_S)
    lab.feed(5)
    lab.all_done()
    assert lab.daemon.stop() == 0
    asked.join(LONG_S)
    assert lab.states("first") == {"2": "retired"}
    assert lab.states("second") == {"2": "candidate"}
    assert lab.daemon.audit() == []


def test_the_last_frames_of_all_fail_on_probation(lab: Lab) -> None:
    """The daemon ends when nothing more comes, not before what failed was computed anew."""
    lab.bundle("first", 2, raise_from=3)
    lab.daemon.start("--exit-when-done")
    lab.daemon.feed(["start", "1/a"])
    lab.ask("activate", "first", 2)
    lab.feed(8)
    lab.daemon.feed(["end", "1/a"], ["exhausted"])
    assert lab.daemon.process is not None
    assert lab.daemon.process.wait(LONG_S) == 0
    results = lab.daemon.events("result")
    assert sorted(r["frame"] for r in results) == list(range(8))
    assert lab.daemon.exceptions() == []
    assert lab.states("first") == {"2": "retired"}
    assert lab.daemon.audit() == []


# Workers that cannot start again.


def test_a_worker_on_probation_that_cannot_start_again_gives_way(lab: Lab) -> None:
    lab.bundle("first", 2, sleep_s=2.0)
    lab.start()
    lab.ask("activate", "first", 2)
    _, new = lab.daemon.workers()  # the first one is in reserve
    lab.feed(3)
    eventually(lambda: lab.daemon.counts()["in_flight"] == 3, LONG_S)
    (folder_of(lab, "first", 2) / "model.onnx").unlink()
    os.kill(new, signal.SIGKILL)
    assert versions(lab.all_done()) == [("101", "101")]
    eventually(lambda: lab.states("first") == {"2": "retired"}, LONG_S)
    errors = lab.daemon.status()["errors"]
    assert "model.onnx" in errors["model first"]
    assert lab.daemon.stop() == 0
    assert lab.daemon.audit() == []


def test_a_reload_helps_where_workers_cannot_start_again(tmp_path: Path) -> None:
    """What waited for them is computed anew by the new ones."""
    lab = Lab(tmp_path, workers=1, sleep_s=3.0)
    with lab.daemon:
        lab.start()
        lab.feed(2)
        eventually(lambda: lab.daemon.status()["status"]["edges"][0]["passed"] == 2, LONG_S)
        shutil.rmtree(lab.folder / "first")
        lab.bundle("first", 1, warm_s=0.01)
        lab.daemon.kill_worker()
        eventually(lambda: "another bundle" in lab.daemon.status()["errors"].get("workers", ""), LONG_S)
        ask(lab.folder / "run" / "control.sock", {"command": "reload"}, LONG_S)
        lab.feed(1)
        assert versions(lab.all_done()) == [("101", "101")]
        assert lab.daemon.status()["errors"] == {}
        assert lab.daemon.exceptions() == []
        assert lab.daemon.stop() == 0
    lab.registry.close()


def test_status_says_why_workers_cannot_start_and_when_they_can_again(lab: Lab) -> None:
    lab.bundle("first", 2)
    lab.start()
    lab.ask("shadow", "first", 2, share=1.0)
    eventually(lambda: len(lab.daemon.workers()) == 2, LONG_S)
    moved = [(lab.folder / "first", lab.folder / "away")]
    moved += [(f := folder_of(lab, "first", 2), f.with_name("away"))]
    for here, there in moved:
        shutil.move(here, there)
    for pid in lab.daemon.workers():
        os.kill(pid, signal.SIGKILL)
    lab.feed(3)
    eventually(lambda: "workers" in lab.daemon.status()["errors"], LONG_S)
    status = lab.daemon.status()
    assert status["status"]["state"] == "fault"
    assert "worker 0 cannot start: " in status["errors"]["workers"]
    assert "first: no such bundle" in status["errors"]["workers"]
    of_shadow = eventually(lambda: lab.daemon.status()["errors"].get("model first"), LONG_S)
    assert "2 in the shadow: worker 0 cannot start: " in of_shadow
    for here, there in moved:
        shutil.move(there, here)
    assert versions(lab.all_done()) == [("101", "101")]
    eventually(lambda: lab.daemon.status()["errors"] == {}, LONG_S)
    status = lab.daemon.status()["status"]
    assert status["state"] == "running"
    # Those of the shadow count, too, and go on counting when it is gone.
    assert status["worker_restarts"] >= 4
    lab.ask("shadow", "first", 2, share=0)
    assert lab.daemon.status()["status"]["worker_restarts"] >= status["worker_restarts"]


# A registry that cannot be written.


@contextmanager
def refusing(registry: Path) -> Iterator[None]:
    """No model changes its state, as on a disk that is full."""
    with closing(sqlite3.connect(registry)) as db:
        db.execute(
            "CREATE TRIGGER full BEFORE UPDATE ON models BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
        yield
        db.execute("DROP TRIGGER full")


def test_a_registry_that_cannot_be_written(lab: Lab) -> None:
    lab.bundle("first", 2, raise_from=1)
    lab.start()
    with refusing(lab.registry.path):
        for do in ("activate", "shadow"):
            with pytest.raises(ConfigError, match="the disk is full"):
                lab.ask(do, "first", 2)
    assert lab.states("first") == {"2": "candidate"}
    assert lab.models()["in_shadow"] == {}
    assert lab.models()["on_probation"] == ""
    eventually(lambda: len(lab.daemon.workers()) == 1, LONG_S)
    lab.ask("activate", "first", 2)
    with refusing(lab.registry.path):
        lab.feed(5)
        assert versions(lab.all_done()) == [("101", "101")]
        errors = eventually(lambda: e if "model first" in (e := lab.daemon.status()["errors"]) else None)
        assert "2 was put back, but is active in the registry" in errors["model first"]
        assert "grainwatch models rollback" in errors["model first"]
        assert lab.models()["in_use"]["first"]["sha256"] == lab.sha256["first", 1]
    lab.ask("rollback", "first")
    assert lab.states("first") == {"2": "retired"}
    assert lab.daemon.status()["errors"] == {}
    lab.feed(5)
    assert versions(lab.all_done()) == [("101", "101")]


# In the shadow.


def test_a_shadow_that_cannot_begin_leaves_the_one_there(lab: Lab) -> None:
    for version, how in ((2, {}), (3, {"off": 0.5}), (4, {})):
        lab.bundle("first", version, **how)
    lab.start()
    lab.ask("activate", "first", 4)
    lab.ask("rollback", "first")  # retired
    lab.ask("shadow", "first", 2, share=0.5)
    of_shadow = lab.daemon.workers()[-1]
    assert os.sched_getscheduler(of_shadow) == os.SCHED_IDLE
    with pytest.raises(ConfigError, match=r"off by 0\.5"):
        lab.ask("shadow", "first", 3, share=0.5)
    with pytest.raises(ConfigError, match="version 4 is retired, not shadow"):
        lab.ask("shadow", "first", 4, share=0)
    assert lab.models()["in_shadow"]["first"]["version"] == "2"
    assert lab.states("first") == {"2": "shadow", "3": "candidate", "4": "retired"}
    command = [sys.executable, "-m", "grainwatch", "models", "shadow", str(lab.daemon.config_path), "first"]
    said = subprocess.run(
        [*command, "--stop"],
        env=environment(),
        cwd=lab.folder,
        timeout=LONG_S,
        capture_output=True,
        text=True,
    )
    assert "is in the shadow no more" in said.stdout, said.stderr
    assert lab.models()["in_shadow"] == {}
    assert lab.states("first")["2"] == "candidate"
    eventually(lambda: len(lab.daemon.workers()) == 1, LONG_S)


# What is left behind.


def test_swaps_leave_nothing_behind(lab: Lab) -> None:
    """Open files, threads and processes after many exchanges are what they were after the first."""
    lab.bundle("first", 2)
    lab.bundle("first", 3)
    lab.start()
    process = Path(f"/proc/{lab.daemon.process.pid}")  # type: ignore[union-attr]

    def held() -> tuple[int, int, int]:
        files, threads = (len(os.listdir(process / what)) for what in ("fd", "task"))
        return files, threads, len(lab.daemon.workers())

    def swap(version: int) -> None:
        lab.ask("activate", "first", version)
        lab.ask("shadow", "first", 5 - version, share=0.5)
        lab.feed(12)
        lab.all_done()
        eventually(lambda: lab.models()["on_probation"] == "", LONG_S)
        eventually(lambda: len(lab.daemon.workers()) == 2, LONG_S)

    swap(2)
    swap(3)
    before = held()
    for version in (2, 3, 2, 3):
        swap(version)
    eventually(lambda: held() <= before, LONG_S, f"{held()} after {before}")
    assert held()[2] == before[2]
