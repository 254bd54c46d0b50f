"""A daemon as a real process, for tests that kill things."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Self

from daemon.flow.ledger_store import audit
from grainwatch.commands.status import ask
from grainwatch.config import ConfigError

SUPPORT = Path(__file__).resolve().parent.parent
SUMMANDS = ("done", "failed", "dropped", "lost", "in_flight")
#: What is given to a machine that is busy with other things.
LONG_S = 60.0


def environment() -> dict[str, str]:
    """Return the environment in which the plug-ins of this folder are found."""
    return {**os.environ, "PYTHONPATH": str(SUPPORT)}


def eventually(what: Callable[[], Any], timeout: float = LONG_S, message: str = "") -> Any:
    """Wait until `what` returns something true and return that."""
    deadline = time.monotonic() + timeout
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < deadline, message or f"did not happen in {timeout} s: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class DaemonProcess:
    """``grainwatch run`` in a folder of its own, fed by a script, with results as JSON lines."""

    def __init__(self, folder: Path, *, config: str = "", pipeline: str = "", stream: str = "") -> None:
        self.folder = folder
        self.script = folder / "script.jsonl"
        self.results_path = folder / "results.jsonl"
        self.config_path = folder / "config.toml"
        self.log_path = folder / "log.txt"
        self.ledger = folder / "state" / "ledger.sqlite"
        self.config_path.write_text(
            config
            or f"""
[daemon]
name = "test"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = 2
compute_timeout_s = 2.0
[streams.s]
{stream}
[streams.s.source]
type = "testkit.sources"
script = "{self.script}"
[streams.s.pipeline]
type = "testkit.slow_pipeline"
scratch = "{folder}"
{pipeline}
[sinks.lines]
type = "testkit.sinks"
path = "{self.results_path}"
"""
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}  # what it has more than this process
        self.python = sys.executable

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def start(self, *options: str) -> None:
        """Start it and wait until it runs."""
        self.launch(*options)
        eventually(self.runs, message="the daemon did not start:\n" + self.log_path.read_text())

    def launch(self, *options: str) -> None:
        """Start it."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", "grainwatch", "run", str(self.config_path), *options],
                env={**environment(), **self.environment},
                stderr=log,
                cwd=self.folder,
            )

    def runs(self) -> bool:
        """Return whether it answers and is past its start."""
        assert self.process is not None
        assert self.process.poll() is None, self.log_path.read_text()
        try:
            return bool(self.status()["status"]["state"] != "starting")
        except ConfigError:
            return False

    def feed(self, *lines: list[Any]) -> None:
        """Append to the script of the source."""
        with self.script.open("a") as script:
            script.write("".join(json.dumps(line) + "\n" for line in lines))

    def images(self, series: str, numbers: range, code: int = 0) -> None:
        """Feed images."""
        self.feed(*(["image", series, n, code] for n in numbers))

    def status(self) -> dict[str, Any]:
        """Ask for the status."""
        return ask(self.folder / "run" / "control.sock", {"command": "status"}, LONG_S)

    def counts(self) -> dict[str, Any]:
        """Return the counters of the stream, which have to add up."""
        reply = self.status()
        stream: dict[str, Any] = reply["status"]["streams"][0]
        assert stream["received"] == sum(stream[s] for s in SUMMANDS), stream
        assert reply["unbalanced"] == []
        return stream

    def workers(self) -> list[int]:
        """Return the process ids of the workers, the latest one last."""
        assert self.process is not None
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                command = (stat.parent / "cmdline").read_bytes()
            except OSError:
                continue
            if int(fields[1]) == self.process.pid and b"daemon.flow.worker" in command:
                found.append((int(fields[19]), int(stat.parent.name)))
        return [pid for _, pid in sorted(found)]

    def kill_worker(self) -> None:
        """kill -9 of a worker; where one ends by itself meanwhile, of another."""

        def killed() -> bool:
            for pid in self.workers():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return True
            return False

        eventually(killed, message="no worker to be killed")

    def written(self) -> dict[str, int]:
        """Return the counters that the ledger's file has: what kill -9 cannot take away."""
        with closing(sqlite3.connect(self.ledger)) as db:
            found = db.execute("SELECT sum(received), sum(done) FROM accounts").fetchone()
        return dict(zip(("received", "done"), (n or 0 for n in found), strict=True))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return what the sink wrote of one kind."""
        if not self.results_path.exists():
            return []
        lines = self.results_path.read_text().splitlines()
        return [event for event in map(_parsed, lines) if event.get("event") == kind]

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, timeout: float = LONG_S) -> int:
        """SIGTERM; return the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout)

    def exceptions(self) -> list[tuple[str, int | None, str]]:
        """Return state, frame and reason of all that the ledger's file tells one by one, series by series."""
        with closing(sqlite3.connect(self.ledger)) as db:
            return db.execute("SELECT state, first, reason FROM exceptions ORDER BY account, id").fetchall()

    def audit(self) -> list[str]:
        """Return what does not balance in the ledger's file."""
        return audit(self.ledger)


def _parsed(line: str) -> dict[str, Any]:
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}  # half a line of a daemon that was killed
    return event
