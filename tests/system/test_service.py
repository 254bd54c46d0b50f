"""``grainwatch run`` under a service manager: what it says, when, and what it does not say when it hangs."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from testkit.ports import free_address
from testkit.process import LONG_S, DaemonProcess, environment, eventually
from testkit.service_manager import ServiceManager

pytestmark = pytest.mark.system

HALF_ANSWER = 8


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with ServiceManager(tmp_path) as manager:
        yield manager


def under(manager: ServiceManager, daemon: DaemonProcess, watchdog_s: float | None = None) -> DaemonProcess:
    daemon.environment = manager.environment(watchdog_s)
    return daemon


def connects(address: str) -> bool:
    url = urlsplit(address)
    with socket.socket() as probe:
        return probe.connect_ex((url.hostname, url.port)) == 0


def test_ready_comes_when_all_is_warm_and_bound(tmp_path: Path, manager: ServiceManager) -> None:
    with under(manager, DaemonProcess(tmp_path, pipeline="warm_s = 2.5")) as daemon:
        detector, results = free_address(), free_address()
        text = daemon.config_path.read_text() + f'[sinks.zmq]\nresults = "{results}"\n'
        source = f'type = "testkit.sources"\nscript = "{daemon.script}"'
        ours = f'type = "dectris-v2"\nbind = true\naddress = "{detector}"'
        daemon.config_path.write_text(text.replace(source, ours))
        begin = time.monotonic()
        daemon.launch()
        (ready,) = eventually(lambda: manager.having("READY"), LONG_S)
        assert connects(detector)
        assert connects(results)
        assert daemon.status()["status"]["state"] == "running"
        assert ready.at - begin > 2.5
        extended = [m for m in manager.having("EXTEND_TIMEOUT_USEC") if m.at < ready.at]
        assert extended
        assert all(int(m.fields["EXTEND_TIMEOUT_USEC"]) >= 5_000_000 for m in extended)
        (warming, *_) = manager.having("STATUS", "warming the pipelines in 2 worker processes")
        assert warming.at < ready.at
        assert ready.fields["STATUS"].startswith("running; s idle, 0.0 frames/s")
        assert daemon.stop() == 0


def test_a_signal_at_the_moment_of_ready_is_a_stop_in_order(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib; from daemon.service import Service; ready = Service.ready\n"
        "Service.ready = lambda *a: (ready(*a), os.kill(os.getpid(), signal.SIGTERM))\n"
        "from daemon.commands.run import run; run(pathlib.Path(sys.argv[1]))"
    )
    daemon = DaemonProcess(tmp_path)
    command = [sys.executable, "-c", script, str(daemon.config_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=LONG_S)
    assert done.returncode == 0, done.stderr
    assert re.search(r"stopped after [\d.]+ s", done.stderr), done.stderr


def test_a_start_that_fails_says_why_and_is_never_ready(tmp_path: Path, manager: ServiceManager) -> None:
    with under(manager, DaemonProcess(tmp_path, pipeline='broken = "config"')) as daemon:
        daemon.launch()
        assert daemon.process is not None
        assert daemon.process.wait(LONG_S) == 2
        (last,) = eventually(lambda: manager.having("STATUS", "it says it is"))
        assert "streams.s.pipeline.broken" in last.fields["STATUS"]
        assert manager.states() == []


def test_the_life_of_a_service(tmp_path: Path) -> None:
    with ServiceManager(tmp_path, abstract=True) as manager:
        with under(manager, DaemonProcess(tmp_path), watchdog_s=8.0) as daemon:
            daemon.start()
            assert daemon.process is not None
            eventually(lambda: len(manager.having("WATCHDOG")) >= 2, LONG_S)
            daemon.feed(["start", "1/a", 4], ["image", "1/a", 3, 6])
            daemon.images("1/a", range(3))
            eventually(lambda: manager.having("STATUS", "done 3, failed 1"), LONG_S)
            daemon.process.send_signal(signal.SIGHUP)
            eventually(lambda: manager.states() == ["READY", "RELOADING", "READY"], LONG_S)
            (reloading,) = manager.having("RELOADING")
            since = 1e-6 * int(reloading.fields["MONOTONIC_USEC"])
            assert 0 <= reloading.at - since < LONG_S
            assert daemon.stop() == 0
            eventually(lambda: manager.states()[-1] == "STOPPING")
            assert "NOTIFY_SOCKET" not in daemon.log_path.read_text()
        # A line at most once a second, and at each change of state.
        lines = [m.at for m in manager.having("STATUS")]
        assert len(lines) < 10 + 2 * (lines[-1] - lines[0])


def test_a_stop_that_takes_long_is_extended_and_served(tmp_path: Path, manager: ServiceManager) -> None:
    with under(manager, DaemonProcess(tmp_path, pipeline="sleep_s = 0.3"), watchdog_s=2.0) as daemon:
        daemon.start()
        daemon.feed(["start", "1/a"])
        daemon.images("1/a", range(16))
        eventually(lambda: daemon.counts()["received"] == 16, LONG_S)
        assert daemon.stop(LONG_S) == 0
        (stopping,) = manager.having("STOPPING")
        assert manager.having("EXTEND_TIMEOUT_USEC", since=stopping.at)
        assert manager.having("WATCHDOG", since=stopping.at)
        assert daemon.events("closed")[0]["counts"]["done"] == 16


def hung(manager: ServiceManager, daemon: DaemonProcess, what: str) -> None:
    """Wait until the log says what hangs; then no ping may come, and the manager's SIGABRT shows where."""
    said = f"{what} hangs, nothing moved there for"
    eventually(lambda: said in daemon.log_path.read_text(), LONG_S, daemon.log_path.read_text())
    time.sleep(0.5)  # a ping that was on its way
    since = time.monotonic()
    time.sleep(1.5)  # three times the pause between pings
    assert manager.having("WATCHDOG", since=since) == []
    assert manager.having("WATCHDOG")
    text = daemon.log_path.read_text()
    # What waits for it may hang next; it is said first what did.
    assert re.findall(r"CRITICAL (.*) hangs, nothing", text)[0] == what
    eventually(lambda: manager.having("STATUS", f"{what}: hangs for"))
    assert what in daemon.status()["errors"]
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGABRT)
    # Python writes down where the threads are while they run on, and may trip over one of them.
    assert daemon.process.wait(LONG_S) in (-signal.SIGABRT, -signal.SIGSEGV)
    assert "most recent call first" in daemon.log_path.read_text()


def test_a_source_that_hangs_ends_the_pings(tmp_path: Path, manager: ServiceManager) -> None:
    with under(manager, DaemonProcess(tmp_path), watchdog_s=2.0) as daemon:
        daemon.start()
        eventually(lambda: manager.having("WATCHDOG"), LONG_S)
        daemon.feed(["sleep", 600.0])
        hung(manager, daemon, "the source of s")


@pytest.mark.parametrize("workers", [1, 0])
def test_a_computation_that_hangs_ends_the_pings(
    tmp_path: Path, manager: ServiceManager, workers: int
) -> None:
    with under(manager, DaemonProcess(tmp_path), watchdog_s=2.0) as daemon:
        text = daemon.config_path.read_text()
        if not workers:
            text = text.replace("[sinks.lines]", "sleep_s = 600.0\n[sinks.lines]")
        daemon.config_path.write_text(text.replace("workers = 2", f"workers = {workers}"))
        daemon.start()
        eventually(lambda: manager.having("WATCHDOG"), LONG_S)
        daemon.feed(["start", "1/a"], ["image", "1/a", 0, HALF_ANSWER if workers else 0])
        hung(manager, daemon, "inference")


def test_a_map_that_hangs_ends_the_pings(tmp_path: Path, manager: ServiceManager) -> None:
    with under(manager, DaemonProcess(tmp_path, pipeline="hang_at = 3"), watchdog_s=2.0) as daemon:
        daemon.start()
        daemon.feed(["start", "1/a"])
        daemon.images("1/a", range(8))
        hung(manager, daemon, "the map of s")


def test_a_dispatcher_that_hangs_ends_the_pings(tmp_path: Path, manager: ServiceManager) -> None:
    with under(manager, DaemonProcess(tmp_path), watchdog_s=2.0) as daemon:
        daemon.config_path.write_text(daemon.config_path.read_text() + "hang_dispatcher_at = 3\n")
        daemon.start()
        daemon.feed(["start", "1/a"])
        daemon.images("1/a", range(8))
        hung(manager, daemon, "the dispatcher")


def test_waiting_for_a_sink_that_may_block_is_no_hang(tmp_path: Path, manager: ServiceManager) -> None:
    with under(manager, DaemonProcess(tmp_path), watchdog_s=2.0) as daemon:
        slow = f'[sinks.slow]\ntype = "testkit.sinks"\npath = "{tmp_path}/slow.jsonl"\nsleep_s = 2.5\n'
        slow += 'edge = {policy = "block", depth = 1}\n'
        stream = '[streams.s]\nintake = {policy = "block", depth = 1}\n'
        text = daemon.config_path.read_text().replace("[streams.s]\n", stream) + slow
        daemon.config_path.write_text(text.replace("workers = 2", "workers = 1\nstop_timeout_s = 0.1"))
        daemon.start()
        daemon.feed(["start", "1/a"])
        daemon.images("1/a", range(20))
        eventually(lambda: daemon.status()["status"]["edges"][0]["filled"] == 1, LONG_S)
        time.sleep(3.0)
        assert "hangs" not in daemon.log_path.read_text()
        assert manager.having("WATCHDOG", since=time.monotonic() - 2.0)


def test_lines_of_the_log_have_priorities_in_the_journal(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, (tmp_path / "log.txt").open("ab") as log:
        status = os.fstat(log.fileno())
        daemon.environment = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        daemon.start()
        daemon.feed(["raise", "the cable is out"])
        assert daemon.process is not None
        assert daemon.process.wait(LONG_S) == 1
        lines = daemon.log_path.read_text().splitlines()
    assert all(re.match(r"<[2-7]>", line) for line in lines), lines
    assert any(re.match(r"<6>test runs: streams s", line) for line in lines)
    (where,) = [i for i, line in enumerate(lines) if "the source broke down" in line]
    # A traceback belongs to its message, line by line.
    assert [line[:3] for line in lines[where : where + 3]] == ["<3>"] * 3
    assert "Traceback" in lines[where + 1]


def test_a_terminal_that_is_closed_stops_the_daemon(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        ours, theirs = pty.openpty()
        daemon.process = subprocess.Popen(
            [sys.executable, "-m", "grainwatch", "run", str(daemon.config_path)],
            env=environment(), cwd=tmp_path, stderr=theirs,
        )  # fmt: skip
        eventually(daemon.runs)
        # With the terminal still there it is a reload.
        daemon.process.send_signal(signal.SIGHUP)
        said = b""
        while b"reloaded in" not in said:
            said += os.read(ours, 4096)
        os.close(theirs)
        os.close(ours)
        daemon.process.send_signal(signal.SIGHUP)
        assert daemon.process.wait(LONG_S) == 0
