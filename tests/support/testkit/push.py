"""A push source with the accounts behind it, for tests: real sockets, ledger and judge, no workers."""

from __future__ import annotations

import struct
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zmq

from daemon.flow.ledger import Ledger
from daemon.flow.series import SeriesTracker, Taken
from daemon.sources.base import Bad, Event, Idle, SeriesEnd, SeriesStart, SourceContext
from daemon.sources.push.source import Config, open_source
from grainwatch.push_wire import VERSION, FromDaemon, FromSender, Hello, Ping, pack, read_from_daemon
from testkit.process import LONG_S


class Receiver:
    """What a stream of the daemon does with a source: a thread that feeds the accounts."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.frames: list[Taken] = []
        self.events: list[Event] = []
        self.open = threading.Event()  # not set: the intake is full
        self.open.set()
        self.ledger = Ledger(folder / "ledger.sqlite")
        context = SourceContext(folder, standing=partial(self.ledger.standing, "s"))
        self.tracker = SeriesTracker("s", self.ledger, None, self.ledger.recover(), lambda opened: None)
        self.source = open_source(Config(**{"address": "tcp://127.0.0.1:*", **config}), "s", context)
        self.address = self.source.address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()
        self._stop.set()
        self._thread.join(LONG_S)
        assert not self._thread.is_alive()
        self.source.close()
        self.ledger.close()

    def _run(self) -> None:
        for event in self.source.events():
            taken = self.tracker.take(event)
            if taken is not None:
                self.frames.append(taken)
                while not self.open.wait(0.05) and not self._stop.is_set():
                    pass
                self.ledger.end(taken.frame.key, "done")
            if not isinstance(event, Idle):
                self.events.append(event)
            if self._stop.is_set():
                self.tracker.stop()
                return

    @property
    def numbers(self) -> list[int]:
        """The numbers of the frames that arrived."""
        return [taken.frame.key.frame for taken in self.frames]

    @property
    def bad(self) -> list[str]:
        """The reasons of what could not be used."""
        return [event.reason for event in self.events if isinstance(event, Bad)]

    @property
    def series(self) -> list[str]:
        """What began and ended, in order."""
        told = []
        for event in self.events:
            if isinstance(event, SeriesStart):
                told.append(f"start {event.detector_series.split('/')[1]}")
            elif isinstance(event, SeriesEnd):
                told.append(f"end {event.detector_series.split('/')[1]}")
        return told

    def latest(self) -> dict[str, int]:
        """The accounts of the latest series, as the file has them."""
        self.ledger.standing("s", "")  # writes what is new
        return self.ledger.latest(1)[0][1]

    def totals(self) -> dict[str, int]:
        """The accounts of the stream."""
        return self.ledger.totals("s")


class RawSender:
    """A client that says what it likes."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def hello(self) -> FromDaemon:
        """Say hello as one should."""
        return self.ask(Hello(VERSION, "raw"))

    def ask(self, *parts: FromSender | bytes) -> FromDaemon:
        """Send and wait for an answer; a ping, which comes when it was silent for long, is none."""
        self.say(*parts)
        while isinstance(answer := self.answer(), Ping):
            pass
        return answer

    def say(self, *parts: FromSender | bytes) -> None:
        """Send."""
        self.socket.send_multipart([p if isinstance(p, bytes) else pack(p) for p in parts])

    def answer(self, timeout_s: float = LONG_S) -> FromDaemon:
        """Wait for an answer."""
        assert self.socket.poll(round(1000 * timeout_s)), "no answer"
        return read_from_daemon(self.socket.recv())

    def quiet(self, seconds: float = 0.3) -> bool:
        """Whether no answer comes."""
        return not self.socket.poll(round(1000 * seconds))


def tiff(pixels: npt.NDArray[np.uint16], shape: tuple[int, int] | None = None) -> bytes:
    """Return an uncompressed TIFF file, which may claim to be of another shape (rows, columns)."""
    rows, columns = shape or pixels.shape
    data = pixels.astype("<u2").tobytes()
    entries = [
        (256, 4, columns),
        (257, 4, rows),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, rows),
        (279, 4, min(2 * rows * columns, 2**32 - 1)),
    ]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory + bytes(4)


def wait_for(what: Any, timeout: float = LONG_S) -> Any:
    """Wait until `what` returns something true."""
    deadline = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < deadline, f"did not happen in {timeout} s"
        time.sleep(0.01)
    return found
