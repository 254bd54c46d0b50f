"""kill -9 of workers and of the front process; short forms of ``make faults`` and ``make soak``."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testkit.faults import Faults
from testkit.process import DaemonProcess, alive, eventually

pytestmark = pytest.mark.system

KILL, KILL_ONCE = 1, 7


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, pipeline="sleep_s = 0.04") as daemon:
        yield daemon


def test_kill_9_of_a_worker_in_mid_frame_costs_no_frame(daemon: DaemonProcess) -> None:
    daemon.start()
    daemon.feed(["start", "1/a", 100])
    daemon.images("1/a", range(100))
    daemon.feed(["end", "1/a"])
    for done in (10, 50):
        eventually(lambda least=done: daemon.counts()["done"] >= least)
        daemon.kill_worker()
    (closed,) = eventually(lambda: daemon.events("closed"))
    assert closed["counts"]["done"] == 100
    assert {r["frame"] for r in daemon.events("result")} == set(range(100))
    # The second may have hit one that was only starting.
    eventually(lambda: daemon.status()["status"]["worker_restarts"] == 2)
    assert daemon.stop() == 0
    assert daemon.audit() == []


def test_a_frame_that_kills_its_worker_fails_and_is_kept(daemon: DaemonProcess) -> None:
    daemon.start()
    daemon.feed(["start", "1/a", 20])
    daemon.images("1/a", range(10))
    daemon.feed(["image", "1/a", 10, KILL], ["image", "1/a", 11, KILL_ONCE])
    daemon.images("1/a", range(12, 20))
    daemon.feed(["end", "1/a"])
    (closed,) = eventually(lambda: daemon.events("closed"))
    assert (closed["counts"]["done"], closed["counts"]["failed"]) == (19, 1)
    assert "frame 10: worker died (signal SIGKILL)" in daemon.counts()["last_error"]
    assert len(list((daemon.folder / "state" / "quarantine").glob("s-*-000010.bin"))) == 1


def shared_memory(pids: list[int]) -> list[Path]:
    """Return the shared memory with a name, which outlives its processes, that these have mapped."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return [Path(name) for name in re.findall(r"/dev/shm/\S+", maps)]


def test_kill_9_of_the_front_in_mid_series(daemon: DaemonProcess) -> None:
    daemon.start()
    daemon.feed(["start", "1/a", 200])
    daemon.images("1/a", range(100))
    eventually(lambda: daemon.counts()["done"] >= 20)
    workers = daemon.workers()
    eventually(lambda: daemon.written()["done"] >= 20)
    assert daemon.process is not None
    named = shared_memory([daemon.process.pid, *workers])
    daemon.kill()
    eventually(lambda: not any(map(alive, workers)), message="workers outlive the front")
    assert not any(path.exists() for path in named)
    assert daemon.audit() == []
    first = daemon.events("result")

    daemon.images("1/a", range(120, 200))
    daemon.feed(["end", "1/a"])
    daemon.start()
    (closed,) = eventually(lambda: daemon.events("closed"))
    counts = closed["counts"]
    assert counts["in_flight"] == 0
    assert counts["lost"] > 0
    assert counts["received"] == counts["done"] + counts["lost"]
    assert counts["received"] + counts["missing"] == 200
    opened = daemon.events("opened")
    assert [o["uid"] for o in opened] == [closed["uid"]] * 2
    second = [r for r in daemon.events("result") if r not in first]
    assert {r["uid"] for r in second} == {closed["uid"]}
    assert {r["frame"] for r in second} >= set(range(120, 200))
    seqs = [r["seq"] for r in (*first, *second)]
    assert seqs == sorted(set(seqs))
    assert second[0]["seq"] > first[-1]["seq"]
    # A result that is in no account was published in the last moment before the kill.
    published = len({r["frame"] for r in (*first, *second)})
    assert counts["done"] <= published <= counts["done"] + counts["lost"] + counts["missing"]
    assert daemon.stop() == 0
    assert daemon.audit() == []


def test_kill_9_during_the_start_and_a_start_after_it(daemon: DaemonProcess) -> None:
    for pause in (0.1, 0.3, 0.5, 0.7):
        daemon.launch()
        time.sleep(pause)
        daemon.kill()
    daemon.feed(["start", "1/a", 5])
    daemon.images("1/a", range(5))
    daemon.feed(["end", "1/a"])
    daemon.start()
    eventually(lambda: daemon.events("closed"))
    assert daemon.stop() == 0
    assert daemon.audit() == []


def test_random_kills_for_a_while(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    with DaemonProcess(tmp_path, pipeline="sleep_s = 0.005") as daemon:
        faults = Faults(daemon, random.Random(seed))
        faults.run(seconds=8.0, kills=4)
        assert faults.problems() == []
