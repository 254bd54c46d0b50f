"""Random kills of a daemon that computes, and what must hold afterwards."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from typing import Any

from testkit.process import DaemonProcess, alive, eventually


class Faults:
    """Feeds series without end, kills workers and the front at random, and keeps book beside it."""

    def __init__(self, daemon: DaemonProcess, rng: random.Random) -> None:
        self.daemon = daemon
        self.rng = rng
        self.kills = 0
        self.front_kills = 0
        self.fed = 0
        self.series = 0
        self._frame = 0
        self._wrong: list[str] = []

    def run(self, seconds: float, kills: int = 0) -> None:
        """Kill for a while, and so often at least; then let everything end."""
        self.daemon.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end or self.kills < kills:
            self._feed()
            time.sleep(self.rng.uniform(0.05, 0.3))
            choice = self.rng.random()
            if choice < 0.45:
                self._kill_worker()
            elif choice < 0.55:
                self._kill_front()
        self.daemon.feed(["end", self._name])
        eventually(self._calm, message="frames are in flight for ever")
        if self.daemon.stop() != 0:
            self._wrong.append("the daemon did not stop in order")

    def problems(self) -> list[str]:
        """Return what does not hold."""
        wrong = self._wrong + self.daemon.audit()
        results = self.daemon.events("result")
        keys = [(r["uid"], r["frame"]) for r in results if not r["again"]]
        if len(keys) != len(set(keys)):
            wrong.append("a frame was published twice and does not say so")
        seqs = [r["seq"] for r in results]
        if seqs != sorted(set(seqs)):
            wrong.append("sequence numbers are not monotone")
        return wrong

    @property
    def _name(self) -> str:
        return f"{self.series}/fault"

    def _feed(self) -> None:
        if self.series == 0 or self.rng.random() < 0.1:
            if self.series and self.rng.random() < 0.5:
                self.daemon.feed(["end", self._name])
            self.series += 1
            self._frame = 0
            self.daemon.feed(["start", self._name])
        n = self.rng.randrange(1, 40)
        self.daemon.images(self._name, range(self._frame, self._frame + n))
        self._frame += n
        self.fed += n

    def _kill_worker(self) -> None:
        workers = self.daemon.workers()
        if workers:
            with suppress(ProcessLookupError):  # it was being buried
                os.kill(self.rng.choice(workers), signal.SIGKILL)
                self.kills += 1

    def _kill_front(self) -> None:
        workers = self.daemon.workers()
        self.daemon.kill()
        self.kills += 1
        self.front_kills += 1
        eventually(lambda: not any(map(alive, workers)), message="workers outlive the front")
        self._wrong += [f"after a kill of the front: {w}" for w in self.daemon.audit()]
        self.daemon.start()

    def _calm(self) -> Any:
        self.daemon.counts()  # which have to add up at every moment
        consumed = self.daemon.script.with_suffix(".consumed")
        if not consumed.exists() or int(consumed.read_text() or 0) < self.daemon.script.stat().st_size:
            return False
        return self.daemon.counts()["in_flight"] == 0
