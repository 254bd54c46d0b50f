"""``grainwatch run`` as a process: what goes in, what comes out, how it stops and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from testkit.process import LONG_S, SUPPORT, DaemonProcess, alive, environment, eventually

from grainwatch.commands.status import ask
from grainwatch.config import ConfigError

pytestmark = pytest.mark.system

BAD = 6


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path) as daemon:
        yield daemon


def test_a_series_from_start_to_end(daemon: DaemonProcess) -> None:
    daemon.start()
    daemon.feed(["start", "1/a", 52])
    daemon.images("1/a", range(0, 25))
    daemon.feed(["image", "1/a", 25, BAD], ["image", "1/a", 27, 0, [9, 9]], ["bad", "garbage", None, None])
    daemon.images("1/a", range(28, 52))
    daemon.feed(["end", "1/a"])
    (closed,) = eventually(lambda: daemon.events("closed"))
    counts = {"received": 52, "done": 49, "failed": 3, "dropped": 0, "lost": 0, "missing": 1, "in_flight": 0}
    # The garbage belongs to the series that was under way.
    assert {k: daemon.counts()[k] for k in counts} == counts
    assert closed["counts"] == counts
    results = daemon.events("result")
    assert {r["frame"] for r in results} == set(range(52)) - {25, 26, 27}
    assert {r["uid"] for r in results} == {closed["uid"]}
    assert all(
        r["n_peaks"] == 255 and r["publisher"] == "test" and len(r["config_hash"]) == 64 for r in results
    )
    assert not any(r["again"] for r in results)
    seqs = [e["seq"] for kind in ("result", "health") for e in daemon.events(kind)]
    assert len(set(seqs)) == len(seqs)
    assert [r["seq"] for r in results] == sorted(r["seq"] for r in results)
    assert daemon.stop() == 0
    order = [json.loads(line)["event"] for line in daemon.results_path.read_text().splitlines()]
    order = [kind for kind in order if kind != "health"]
    assert (order[0], order[-1]) == ("opened", "closed")
    assert daemon.audit() == []


def test_status_shows_the_accounts_and_the_last_error(daemon: DaemonProcess) -> None:
    daemon.start()
    daemon.feed(["start", "1/a"], ["image", "1/a", 0, BAD])
    daemon.images("1/a", range(1, 8))
    eventually(lambda: (c := daemon.counts())["done"] == 7 and c["failed"] == 1)
    command = [sys.executable, "-m", "grainwatch", "status", str(daemon.config_path)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "test 0.1.0: running" in table
    assert "received  = done  + failed  + dropped  + lost  + in flight" in table
    (row,) = [line.split() for line in table.splitlines() if line.startswith("s ")]
    assert row[3:10] == ["8", "7", "1", "0", "0", "0", "0"]
    assert "last error: frame 0: the frame says it is bad" in table
    reply = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert reply["status"]["streams"][0]["done"] == 7
    assert reply["sources"]["s"].startswith("follows")


def test_the_control_socket_lists_series_and_stops(daemon: DaemonProcess) -> None:
    daemon.start()
    daemon.feed(["start", "1/a", 3])
    daemon.images("1/a", range(3))
    daemon.feed(["end", "1/a"])
    eventually(lambda: daemon.events("closed"))
    control = daemon.folder / "run" / "control.sock"

    def ended() -> Any:
        (series,) = ask(control, {"command": "series"}, LONG_S)["series"]
        return series["ended"] and series

    series = eventually(ended, message="the end was not written down")
    assert (series["detector_series"], series["counts"]["done"]) == ("1/a", 3)
    assert series["ended"] > series["started"] > 1e9
    ask(control, {"command": "stop"})
    assert daemon.process is not None
    assert daemon.process.wait(LONG_S) == 0
    assert not control.exists()


def test_a_replay_ends_the_daemon_when_done(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, pipeline="sleep_s = 0.005") as daemon:
        daemon.feed(["start", "1/a", 200])
        daemon.images("1/a", range(200))
        daemon.feed(["exhausted"])
        daemon.launch("--exit-when-done")
        assert daemon.process is not None
        assert daemon.process.wait(LONG_S) == 0
        assert len(daemon.events("result")) == 200
        assert len(daemon.events("closed")) == 1
        assert daemon.audit() == []


def test_sigterm_computes_what_was_received(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, pipeline="sleep_s = 0.02") as daemon:
        daemon.start()
        daemon.feed(["start", "1/a", 1000])
        daemon.images("1/a", range(60))
        eventually(lambda: daemon.counts()["received"] >= 40)
        assert daemon.stop() == 0
        (closed,) = daemon.events("closed")
        counts = closed["counts"]
        assert counts["received"] == counts["done"] == len(daemon.events("result")) >= 40
        assert counts["missing"] == 0
        assert daemon.audit() == []


def test_a_stop_is_bounded_and_what_is_left_is_dropped(tmp_path: Path) -> None:
    # All of it would take 30 s.
    with DaemonProcess(tmp_path, pipeline="sleep_s = 1.2") as daemon:
        text = daemon.config_path.read_text()
        daemon.config_path.write_text(text.replace("workers = 2", "workers = 2\nstop_timeout_s = 0.3"))
        daemon.start()
        daemon.feed(["start", "1/a"])
        daemon.images("1/a", range(50))
        eventually(lambda: daemon.counts()["received"] == 50)
        begin = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - begin < 15.0
        (closed,) = daemon.events("closed")
        assert closed["counts"]["dropped"] > 30
        assert closed["counts"]["in_flight"] == 0
        assert daemon.audit() == []


@pytest.mark.parametrize(
    ("policy", "drops"), [("block", False), ("drop-oldest", True), ("drop-newest", True)]
)
def test_a_stream_that_is_too_fast_waits_or_drops_as_its_policy_says(
    tmp_path: Path, policy: str, drops: bool
) -> None:
    stream = f'intake = {{policy = "{policy}", depth = 4}}'
    # Where frames are dropped the few that are not take longer than all of them to come.
    sleep_s = 0.7 if drops else 0.02
    with DaemonProcess(tmp_path, pipeline=f"sleep_s = {sleep_s}", stream=stream) as daemon:
        daemon.start()
        daemon.feed(["start", "1/a", 100])
        daemon.images("1/a", range(100))
        daemon.feed(["end", "1/a"])
        (closed,) = eventually(lambda: daemon.events("closed"))
        counts = closed["counts"]
        assert counts["received"] == counts["done"] + counts["dropped"] == 100
        assert (counts["dropped"] > 0) == drops
        frames = {r["frame"] for r in daemon.events("result")}
        assert (99 in frames) == (policy != "drop-newest")
        daemon.stop()
        assert daemon.audit() == []


def test_decimation_computes_every_nth(tmp_path: Path) -> None:
    stream = 'intake = {policy = "decimate", keep_every = 10}'
    with DaemonProcess(tmp_path, stream=stream) as daemon:
        daemon.start()
        daemon.feed(["start", "1/a", 100])
        daemon.images("1/a", range(100))
        daemon.feed(["end", "1/a"])
        eventually(lambda: daemon.events("closed"))
        assert {r["frame"] for r in daemon.events("result")} == set(range(0, 100, 10))
        assert daemon.counts()["dropped"] == 90


def test_a_slow_sink_delays_only_itself_when_it_may_drop(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        slow = f"""
[sinks.slow]
type = "testkit.sinks"
path = "{tmp_path}/slow.jsonl"
sleep_s = 0.5
edge = {{policy = "drop-oldest", depth = 3}}
"""
        daemon.config_path.write_text(daemon.config_path.read_text() + slow)
        daemon.start()
        daemon.feed(["start", "1/a", 200])
        daemon.images("1/a", range(200))
        begin = time.monotonic()
        eventually(lambda: len(daemon.events("result")) == 200)
        assert time.monotonic() - begin < 50.0  # and not 100 s
        eventually(lambda: daemon.counts()["done"] == 200)  # it is told after its result
        edges = {e["edge"]: e for e in daemon.status()["status"]["edges"]}
        assert edges["sink slow"]["dropped"] > 150
        assert edges["sink lines"]["dropped"] == 0


def test_a_sink_that_raises_is_said_and_goes_on(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        daemon.config_path.write_text(daemon.config_path.read_text() + "raise_on = 3\n")
        daemon.start()
        daemon.feed(["start", "1/a", 50])
        for n in range(50):
            daemon.images("1/a", range(n, n + 1))
        eventually(lambda: daemon.counts()["done"] == 50)
        eventually(lambda: "the disk is full, it says" in daemon.status()["errors"].get("sink lines", ""))
        eventually(lambda: len(daemon.events("result")) == 50)


def test_a_source_that_breaks_down_is_a_fault_and_the_other_stream_goes_on(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        second = """
[streams.t]
source = {type = "testkit.sources", frames = 2000, rate_hz = 100.0}
pipeline = {type = "testkit.slow_pipeline"}
"""
        daemon.config_path.write_text(daemon.config_path.read_text() + second)
        daemon.start()
        daemon.feed(["start", "1/a"], ["image", "1/a", 0, 0], ["raise", "the cable is out"])
        eventually(lambda: daemon.status()["status"]["state"] == "fault")

        def computed() -> Any:
            streams = daemon.status()["status"]["streams"]
            return streams[0]["done"] == 1 and streams

        broken, healthy = eventually(computed)
        assert broken["state"] == "fault"
        assert "the cable is out" in broken["last_error"]
        done = healthy["done"]
        eventually(lambda: daemon.status()["status"]["streams"][1]["done"] > done + 20)
        assert daemon.stop() == 1
        assert daemon.audit() == []


def test_ctrl_c_in_a_terminal_stops_in_order(daemon: DaemonProcess) -> None:
    """A terminal sends SIGINT to the whole group: the workers must leave the stopping to the front."""
    daemon.start()
    daemon.feed(["start", "1/a"])
    daemon.images("1/a", range(20))
    eventually(lambda: daemon.counts()["done"] == 20)
    for pid in daemon.workers():
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.process.wait(LONG_S) == 0
    assert "died" not in daemon.log_path.read_text()
    assert "stopped after" in daemon.log_path.read_text()


def test_without_workers_it_computes_itself(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        daemon.config_path.write_text(daemon.config_path.read_text().replace("workers = 2", "workers = 0"))
        daemon.start()
        assert daemon.workers() == []
        daemon.feed(["start", "1/a", 30])
        daemon.images("1/a", range(30))
        daemon.feed(["end", "1/a"])
        eventually(lambda: daemon.events("closed"))
        assert daemon.counts()["done"] == 30


def test_a_series_is_closed_while_another_stream_keeps_the_daemon_busy(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        busy = """
[streams.t]
source = {type = "testkit.sources", frames = 10000000}
pipeline = {type = "testkit.slow_pipeline"}
"""
        text = daemon.config_path.read_text().replace("workers = 2", "workers = 0\nstop_timeout_s = 0.5")
        daemon.config_path.write_text(text + busy)
        daemon.start()
        daemon.feed(["start", "1/a", 5])
        daemon.images("1/a", range(5))
        daemon.feed(["end", "1/a"])
        (closed,) = eventually(lambda: daemon.events("closed"))
        assert closed["counts"]["done"] == 5
        assert daemon.stop() == 0
        assert daemon.audit() == []


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grainwatch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, env=environment(), cwd=cwd)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line on stderr that names the thing, exit status 2, no traceback."""
    (line,) = [text for text in done.stderr.splitlines() if " INFO " not in text and " WARNING " not in text]
    assert line.startswith("grainwatch: "), done.stderr
    assert all(word in line for word in words), line
    assert done.returncode == 2


def test_a_second_daemon_in_the_same_folder_is_refused(daemon: DaemonProcess) -> None:
    daemon.start()
    assert daemon.process is not None
    refused(run("run", daemon.config_path, cwd=daemon.folder), "state_dir", f"process {daemon.process.pid}")
    other = daemon.folder / "other.toml"
    other.write_text(daemon.config_path.read_text().replace("/state", "/state2"))
    refused(run("run", other, cwd=daemon.folder), "runtime_dir", "another daemon answers")
    assert daemon.status()["status"]["state"] == "running"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("workers = 2", "workers = -2", ["daemon.workers", "0 or more"]),
        ("workers = 2", 'workers = "two"', ["daemon.workers", "a whole number"]),
        ("workers = 2", "wokers = 2", ["wokers", "did you mean workers?"]),
        (
            "testkit.sources",
            "dectris-v3",
            ["streams.s.source.type", "'dectris-v3' is not a known type", "dectris-v2"],
        ),
        ("testkit.sources", "testkit.nothing", ["streams.s.source.type", "testkit.nothing"]),
        ("scratch", "scartch", ["streams.s.pipeline", "scartch"]),
        ("[sinks.lines]", 'broken = "config"\n[sinks.lines]', ["streams.s.pipeline.broken"]),
        ("results.jsonl", "no/such/results.jsonl", ["sinks.lines", "no/such/results.jsonl"]),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(
    daemon: DaemonProcess, old: str, new: str, words: list[str]
) -> None:
    text = daemon.config_path.read_text()
    assert old in text
    daemon.config_path.write_text(text.replace(old, new))
    refused(run("run", daemon.config_path, cwd=daemon.folder), *words)
    # Nothing is left behind: the same folder serves the next daemon.
    daemon.config_path.write_text(text)
    daemon.start()


def test_an_environment_that_cannot_be_used_is_one_line(daemon: DaemonProcess) -> None:
    config = daemon.config_path
    refused(run("run", daemon.folder / "none.toml", cwd=daemon.folder), "none.toml", "cannot be read")
    text = config.read_text()
    config.write_text(text.replace(f"{daemon.folder}/state", "/proc/state"))
    refused(run("run", config, cwd=daemon.folder), "daemon.state_dir", "/proc/state")
    config.write_text(text.replace(f"{daemon.folder}/run", str(config)))
    refused(run("run", config, cwd=daemon.folder), "daemon.runtime_dir", "config.toml")
    config.write_text("[daemon\n")
    refused(run("run", config, cwd=daemon.folder), "config.toml", "is not TOML")


def test_a_port_in_use_is_one_line(daemon: DaemonProcess) -> None:
    text = daemon.config_path.read_text()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        daemon.config_path.write_text(f'{text}[sinks.zmq]\nresults = "{address}"\n')
        refused(run("run", daemon.config_path, cwd=daemon.folder), "sinks.zmq", address)
        source = f'type = "testkit.sources"\nscript = "{daemon.script}"'
        assert source in text
        ours = f'type = "dectris-v2"\nbind = true\naddress = "{address}"'
        daemon.config_path.write_text(text.replace(source, ours))
        refused(run("run", daemon.config_path, cwd=daemon.folder), "streams.s.source", address)


def test_a_signal_breaks_off_the_start(daemon: DaemonProcess) -> None:
    text = daemon.config_path.read_text()
    daemon.config_path.write_text(text.replace("[sinks.lines]", 'broken = "slow"\n[sinks.lines]'))
    daemon.launch()
    eventually(lambda: len(daemon.workers()) == 2)
    workers = daemon.workers()
    assert daemon.status()["status"]["state"] == "starting"
    begin = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - begin < 30.0  # they get warm for 60 s
    assert not any(map(alive, workers))
    assert not (daemon.folder / "run" / "control.sock").exists()


def test_relative_paths_count_from_the_folder_of_the_configuration(tmp_path: Path) -> None:
    inner, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    (inner / "plugins").mkdir(parents=True)
    elsewhere.mkdir()
    (inner / "config.toml").write_text("""
[daemon]
workers = 1
[streams.s]
source = {type = "testkit.sources", frames = 3}
pipeline = {type = "testkit.slow_pipeline"}
[sinks.hdf5]
""")
    environment_ = {**environment(), "PYTHONPATH": os.path.relpath(SUPPORT, elsewhere)}
    for command in (["check-config"], ["run", "--exit-when-done"]):
        done = subprocess.run(
            [sys.executable, "-m", "grainwatch", *command, "../here/config.toml"],
            cwd=elsewhere, env=environment_, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert list(elsewhere.iterdir()) == []
    assert len(list((inner / "results").glob("s-*.h5"))) == 1
    assert (inner / "state" / "ledger.sqlite").exists()


def test_status_answers_while_the_daemon_starts(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, pipeline='broken = "slow"') as daemon:
        daemon.launch()

        def answered() -> Any:
            with suppress(ConfigError):  # the socket is there a moment before it is listened to
                return daemon.status()
            return None

        assert eventually(answered)["status"]["state"] == "starting"
        assert ask(tmp_path / "run" / "control.sock", {"command": "series"})["series"] == []
        done = run("status", daemon.config_path, cwd=tmp_path)
        assert (done.returncode, ": starting" in done.stdout) == (0, True)
        assert daemon.stop() == 0


def test_status_without_a_daemon_is_one_line(daemon: DaemonProcess) -> None:
    refused(run("status", daemon.config_path, cwd=daemon.folder), "no daemon listens", "control.sock")
