"""Another configuration for a running daemon: no frame is lost, each result says by which it was made."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import fabio.tifimage
import numpy as np
import pytest
from testkit.process import LONG_S, DaemonProcess, environment, eventually
from testkit.service_manager import ServiceManager

from pipelines.results_files import ResultsFile, results_files

pytestmark = pytest.mark.system

RELOADS = 20


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path) as daemon:
        yield daemon


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def reload(daemon: DaemonProcess) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grainwatch", "reload", str(daemon.config_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, env=environment())


def test_twenty_reloads_under_a_detector_lose_no_frame(tmp_path: Path) -> None:
    frame = tmp_path / "frame.tif"
    image = np.ones((30, 40), np.uint16)
    image[0, 0] = 0  # the pipeline's "well"
    fabio.tifimage.TifImage(data=image).write(str(frame))
    simulator = [sys.executable, "-m", "grainwatch", "simulate", "dectris-v2", "--bind", "tcp://127.0.0.1:*"]
    simulator += ["--frames", str(frame), "--rate", "50", "--count", "1000000"]
    with (
        ServiceManager(tmp_path) as manager,
        DaemonProcess(tmp_path) as daemon,
        subprocess.Popen(simulator, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as detector,
    ):
        try:
            assert detector.stderr is not None
            address = re.search(r"tcp://\S+", detector.stderr.readline())
            assert address is not None
            texts = two_configurations(daemon, address.group())
            daemon.environment = manager.environment()
            daemon.start()
            eventually(lambda: daemon.counts()["done"] >= 20, LONG_S)
            assert daemon.process is not None
            for number in range(RELOADS):
                daemon.config_path.write_text(texts[(number + 1) % 2])
                done = daemon.counts()["done"]
                daemon.process.send_signal(signal.SIGHUP)
                eventually(lambda n=number: len(manager.having("READY")) == n + 2, LONG_S)
                eventually(lambda d=done: daemon.counts()["done"] > d, LONG_S)
        finally:
            detector.kill()
        eventually(lambda: daemon.counts()["in_flight"] == 0, LONG_S)
        counts = daemon.counts()
        assert daemon.stop() == 0
        assert daemon.log_path.read_text().count("reloaded in") == RELOADS
        assert "died" not in daemon.log_path.read_text()
        results = daemon.events("result")
        assert {k: counts[k] for k in ("failed", "dropped", "lost", "missing")} == dict.fromkeys(
            ("failed", "dropped", "lost", "missing"), 0
        )
        assert counts["received"] == counts["done"] == len(results)
        # Numbers without a gap: nothing was lost in the socket either.
        assert sorted(r["frame"] for r in results) == list(range(len(results)))
        made_by = {hash_of(text): offset for text, offset in zip(texts, (0, 100_000), strict=True)}
        for result in results:
            # What the configuration adds that the result names.
            assert result["n_peaks"] == image.sum() + made_by[result["config_hash"]]
        changes = sum(a["config_hash"] != b["config_hash"] for a, b in pairwise(results))
        assert changes >= RELOADS
        assert daemon.audit() == []
        kept = tmp_path / "state" / "configurations"
        assert {p.stem: p.read_text() for p in kept.iterdir()} == {hash_of(t): t for t in texts}


def two_configurations(daemon: DaemonProcess, address: str) -> list[str]:
    source = f'type = "testkit.sources"\nscript = "{daemon.script}"'
    text = daemon.config_path.read_text().replace(source, f'type = "dectris-v2"\naddress = "{address}"')
    text = text.replace("workers = 2", "workers = 1")
    daemon.config_path.write_text(text)
    return [text, text.replace("[sinks.lines]", "offset = 100000\nsleep_s = 0.002\n[sinks.lines]")]


def test_what_may_change_changes_and_is_named(daemon: DaemonProcess) -> None:
    files = f'[sinks.hdf5]\nfolder = "{daemon.folder}/results"\n'
    daemon.config_path.write_text(daemon.config_path.read_text() + files)
    daemon.start()
    workers = set(daemon.workers())
    daemon.feed(["start", "1/a", 40])
    daemon.images("1/a", range(20))
    eventually(lambda: daemon.counts()["done"] == 20, LONG_S)
    text = daemon.config_path.read_text()
    changes = {
        "workers = 2": "workers = 1\nstop_timeout_s = 7.5\nstart_timeout_s = 300.0",  # its default
        "[streams.s]\n": "[ring]\nslots = 8\n[streams.s]\nscan = {shape = [2, 2]}\n"
        'intake = {policy = "drop-oldest", depth = 7}\n',
        "[sinks.lines]": "offset = 5\n[sinks.lines]",
    }
    for old, new in changes.items():
        text = text.replace(old, new)
    daemon.config_path.write_text(text)
    done = reload(daemon)
    assert done.returncode == 0, done.stderr
    keys = (
        "daemon.stop_timeout_s, daemon.workers, ring.slots, streams.s.intake.depth,"
        " streams.s.intake.policy, streams.s.pipeline.offset, streams.s.scan"
    )
    assert f"s: {keys}; configuration" in done.stdout
    eventually(lambda: len(daemon.workers()) == 1, LONG_S)
    assert not workers & set(daemon.workers())
    edge = daemon.status()["status"]["edges"][0]
    assert (edge["edge"], edge["policy"], edge["depth"]) == ("s intake", "drop-oldest", 7)
    # The series that is open goes on without a scan; the next one has it.
    daemon.images("1/a", range(20, 21))
    daemon.feed(["end", "1/a"], ["start", "2/a", 2])
    daemon.images("2/a", range(2))
    daemon.feed(["end", "2/a"])
    eventually(lambda: len(daemon.events("closed")) == 2, LONG_S)
    results = daemon.events("result")
    assert [r["n_peaks"] - results[0]["n_peaks"] for r in results[19:]] == [0, 5, 5, 5]
    assert [r["grid_index"] for r in results[19:]] == [None, None, [0, 0], [1, 0]]
    assert daemon.stop() == 0
    assert daemon.audit() == []
    # Each file has the configuration that it was begun with.
    written = sorted(results_files(daemon.folder / "results"), key=lambda path: path.stat().st_mtime_ns)
    hashes = []
    for path in written:
        with ResultsFile(path) as file:
            hashes.append(hash_of(file.config_text))
    assert hashes == [results[0]["config_hash"], results[-1]["config_hash"]]


def test_the_front_may_compute_itself_and_give_it_up_again(daemon: DaemonProcess) -> None:
    text = daemon.config_path.read_text()
    daemon.start()
    daemon.feed(["start", "1/a"])
    for number, workers in enumerate((0, 1)):
        daemon.config_path.write_text(text.replace("workers = 2", f"workers = {workers}"))
        assert reload(daemon).returncode == 0
        daemon.images("1/a", range(10 * number, 10 * number + 10))
        eventually(lambda n=number: daemon.counts()["done"] == 10 * n + 10, LONG_S)
        assert len(daemon.workers()) == workers
    assert daemon.status()["status"]["worker_restarts"] == 0


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "test"', 'name = "other"', ["daemon.name: cannot change while the daemon runs"]),
        ("/state", "/elsewhere", ["daemon.state_dir: cannot"]),
        ("script.jsonl", "other.jsonl", ["streams.s.source.script: cannot", "restart it"]),
        ("[streams.s]", '[sinks.hdf5]\nfolder = "r"\n[streams.s]', ["sinks.hdf5: cannot"]),
        ("[streams.s", "[streams.x", ["streams.s, streams.steady, streams.x, streams.xteady: cannot"]),
        ('"testkit.slow_pipeline"', '"laue"', ["streams.s.pipeline", "unknown key"]),
        ("[streams.s]", "[streams.s", ["is not TOML"]),
        ("workers = 2", "wokers = 2", ["wokers", "did you mean workers?"]),
        ("[sinks.lines]", 'broken = "config"\n[sinks.lines]', ["streams.s.pipeline.broken: it says it is"]),
        ("workers = 2", "workers = 2\nstart_timeout_s = 0.001", ["keeps dying before it is warm"]),
    ],
)
def test_what_cannot_be_taken_over_is_refused_and_the_old_goes_on(
    running: tuple[DaemonProcess, str], old: str, new: str, words: list[str]
) -> None:
    daemon, text = running
    daemon.config_path.write_text(text)
    assert reload(daemon).returncode == 0
    workers = daemon.workers()
    done = steady_done(daemon)
    daemon.config_path.write_text(text.replace(old, new))
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    error = eventually(lambda: daemon.status()["errors"].get("reload"), LONG_S)
    assert error.startswith("reload refused: "), error
    assert all(word in error for word in words), error
    assert daemon.workers() == workers
    eventually(lambda: steady_done(daemon) > done + 3)
    assert {r["config_hash"] for r in daemon.events("result")} == {hash_of(text)}
    # Put right, it is taken over, and the word of it is gone.
    daemon.config_path.write_text(text)
    assert reload(daemon).returncode == 0
    assert daemon.status()["errors"] == {}
    assert daemon.status()["status"]["state"] == "running"


def steady_done(daemon: DaemonProcess) -> int:
    (stream,) = [s for s in daemon.status()["status"]["streams"] if s["stream"] == "steady"]
    return int(stream["done"])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DaemonProcess, str]]:
    """A daemon with a steady stream, and its configuration."""
    folder = tmp_path_factory.mktemp("running")
    with DaemonProcess(folder) as daemon:
        steady = 'source = {type = "testkit.sources", frames = 1000000, rate_hz = 20.0}\n'
        steady += 'pipeline = {type = "testkit.slow_pipeline"}\n'
        text = f"{daemon.config_path.read_text()}[streams.steady]\n{steady}"
        daemon.config_path.write_text(text)
        daemon.start()
        yield daemon, text
        assert daemon.stop() == 0
        assert daemon.audit() == []


def test_the_command_says_why_a_reload_was_refused(daemon: DaemonProcess) -> None:
    daemon.start()
    daemon.config_path.write_text(daemon.config_path.read_text().replace('name = "test"', 'name = "other"'))
    done = reload(daemon)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "reload refused: " in line
    assert "daemon.name: cannot change" in line


def test_a_stop_breaks_a_reload_off(daemon: DaemonProcess) -> None:
    with ServiceManager(daemon.folder) as manager:
        daemon.environment = manager.environment()
        stop_in_a_reload(daemon)
    assert manager.states() == ["READY", "RELOADING", "STOPPING"]


def stop_in_a_reload(daemon: DaemonProcess) -> None:
    daemon.start()
    workers = daemon.workers()
    text = daemon.config_path.read_text()
    daemon.config_path.write_text(text.replace("[sinks.lines]", 'broken = "slow"\n[sinks.lines]'))
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(daemon.workers()) == len(workers) + 2, LONG_S)
    begin = time.monotonic()
    assert daemon.stop(LONG_S) == 0
    assert time.monotonic() - begin < 40.0  # they get warm for 60 s
    assert "reload refused: " in daemon.log_path.read_text()


def test_signals_in_a_burst_are_few_reloads_and_the_last_file_counts(daemon: DaemonProcess) -> None:
    daemon.start()
    text = daemon.config_path.read_text()
    assert daemon.process is not None
    for number in range(10):
        daemon.config_path.write_text(text.replace("[sinks.lines]", f"offset = {number}\n[sinks.lines]"))
        daemon.process.send_signal(signal.SIGHUP)
        time.sleep(0.01)

    last = hash_of(daemon.config_path.read_text())
    # What was asked meanwhile follows; the last one reads the last file.
    eventually(lambda: f"configuration {last[:8]}" in daemon.log_path.read_text(), LONG_S)
    daemon.feed(["start", "1/a", 1], ["image", "1/a", 0, 0], ["end", "1/a"])
    (result,) = eventually(lambda: daemon.events("result"), LONG_S)
    assert result["config_hash"] == last
    assert daemon.log_path.read_text().count("reloaded in") < 10
