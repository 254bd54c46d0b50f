"""A folder source over a real ledger, and the files that it reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import fabio.tifimage
import numpy as np

from daemon.flow.ledger import Ledger
from daemon.flow.ledger_store import audit
from daemon.flow.series import SeriesTracker, Taken
from daemon.sources.base import Arrival, Bad, Event, Exhausted, Idle, SeriesEnd, SeriesStart, SourceContext
from daemon.sources.folder.source import Config, open_source
from grainwatch.config import ScanTable
from testkit.process import LONG_S

SHAPE = (8, 9)
QUICK = {"poll_s": 0.02, "settle_s": 0.05, "patience_s": 0.6}


def write_tif(path: Path, value: int, shape: tuple[int, int] = SHAPE) -> Path:
    """Write a TIFF file of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fabio.tifimage.TifImage(data=np.full(shape, value, np.uint16)).write(str(path))
    return path


def tif(value: int, folder: Path, shape: tuple[int, int] = SHAPE) -> bytes:
    """Return the bytes of a TIFF, for writers that break off."""
    return write_tif(folder / "whole.tif", value, shape).read_bytes()


class FolderRun:
    """One life of a source: what it says goes through a tracker into the ledger of `state`."""

    def __init__(
        self,
        state: Path,
        path: Path | str,
        *,
        scan: ScanTable | None = None,
        hold: bool = False,
        **config: Any,
    ) -> None:
        state.mkdir(exist_ok=True)
        self.ledger_path = state / "ledger.sqlite"
        self.ledger = Ledger(self.ledger_path)
        self.tracker = SeriesTracker("s", self.ledger, scan, self.ledger.recover(), lambda _: None)
        self.events: list[Event] = []
        self.taken: list[Taken] = []
        self.source = open_source(
            Config(path=str(path), **{**QUICK, **config}),
            "s",
            SourceContext(state, partial(self.ledger.standing, "s")),
        )
        self._hold = hold
        self._coming = self.source.events()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def until(self, what: Callable[[], Any], timeout: float = LONG_S) -> None:
        """Take in what comes until something is true."""
        deadline = time.monotonic() + timeout
        while not what():
            assert time.monotonic() < deadline, f"{self.source.problem}; {self.events}"
            self.step()

    def step(self) -> Event:
        """Take in one event."""
        event = next(self._coming)
        taken = self.tracker.take(event)
        if not isinstance(event, Idle):
            self.events.append(event)
        if taken is not None:
            self.taken.append(taken)
            if not self._hold:
                self.ledger.end(taken.frame.key, "done")
        return event

    def for_a_while(self, seconds: float = 0.4) -> None:
        """Take in what comes for some time, to see that nothing does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.step()

    def frames(self, n: int, timeout: float = LONG_S) -> list[tuple[str, int, int]]:
        """Wait for n frames; return the series, number and value of all."""
        self.until(lambda: len(self.taken) >= n, timeout)
        return self.seen

    @property
    def seen(self) -> list[tuple[str, int, int]]:
        """Series (its last part), number and value of the frames that were taken."""
        arrivals = {(a.detector_series, a.frame): a for a in self.events if isinstance(a, Arrival)}
        return [
            (Path(series).name, number, int(a.image.array()[0, 0]))
            for (series, number), a in arrivals.items()
        ]

    @property
    def numbers(self) -> list[int]:
        """Numbers of the frames that were taken, in order."""
        return [t.frame.key.frame for t in self.taken]

    @property
    def starts(self) -> list[str]:
        """Names of the series that began (their last part)."""
        return [Path(e.detector_series).name for e in self.events if isinstance(e, SeriesStart)]

    @property
    def ends(self) -> list[str]:
        """Names of the series that ended (their last part)."""
        return [Path(e.detector_series).name for e in self.events if isinstance(e, SeriesEnd)]

    @property
    def bad(self) -> list[Bad]:
        """What failed."""
        return [e for e in self.events if isinstance(e, Bad)]

    @property
    def totals(self) -> dict[str, int]:
        """Counters of the ledger, which have to add up."""
        total = self.ledger.totals("s")
        ends = ("done", "failed", "dropped", "lost", "in_flight")
        assert total["received"] == sum(total[k] for k in ends), total
        return total

    def to_the_end(self, timeout: float = LONG_S) -> Self:
        """Take in what comes until the source is exhausted."""
        self.until(lambda: self.events and isinstance(self.events[-1], Exhausted), timeout)
        return self

    def stop(self) -> None:
        """Stop in order."""
        self.source.close()
        self.tracker.stop()
        self.ledger.close()
        assert audit(self.ledger_path) == []

    def kill(self) -> None:
        """End as by kill -9: what is in flight stays so, in the ledger's file."""
        self.source.close()
        self.ledger.close()
