"""One stream of the front process: its source and receive thread, its intake, its figures."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

from daemon.flow.aggregation import Aggregation
from daemon.flow.edge import Edge
from daemon.flow.ledger import Ledger
from daemon.flow.log_limit import LogLimit
from daemon.flow.plugins import PipelinePlugin
from daemon.flow.series import SeriesTracker, Taken
from daemon.flow.watching import Watching
from daemon.sources.base import Exhausted, Source
from daemon.watchdog import Part
from grainwatch.config import EdgeTable
from grainwatch.messages import StreamHealth
from pipelines.images import EncodedImage

log = logging.getLogger(__name__)

#: Over how many seconds the rate is taken, and over how many frames the latencies.
RATE_S = 5.0
LATENCIES = 2000


class Stream:
    """Reads a source in a thread of its own: source -> tracker -> intake.

    That thread waits for nothing but room in the intake, and only where its policy is to block:
    then the instrument's own buffer fills.
    """

    def __init__(
        self,
        name: str,
        plugin: PipelinePlugin,
        tracker: SeriesTracker,
        intake: EdgeTable,
        ledger: Ledger,
        wake: Callable[[], None],
    ) -> None:
        self.name = name
        self.plugin = plugin
        self._wanted = plugin
        self.tracker = tracker
        self.intake: Edge[Taken] = Edge(f"{name} intake", intake, wake, _frame_bytes)
        self.aggregation: Aggregation | None = None
        self.watching = Watching(name, plugin.watch())
        self.exhausted = False
        self.fault = ""
        self._source: Source | None = None
        self._complaints = LogLimit(log, name)
        self._ledger = ledger
        self._stop = threading.Event()
        self._events = 0
        self._waits = False
        self._thread = threading.Thread(target=self._receive, name=f"receive-{name}", daemon=True)
        self._last_error, self._last_error_at = "", 0.0
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._settled = 0
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._marking = threading.Lock()  # health, STATUS line and `status` ask from threads of their own

    def start(self, source: Source) -> None:
        """Start to receive."""
        self._source = source
        self._thread.start()

    def adopt(self, plugin: PipelinePlugin, intake: EdgeTable, watching: Watching) -> None:
        """Go on by another configuration, and by its scan from the next series on.

        A series that is open keeps its scan, and what sums it up.
        """
        self.intake.set_table(intake)
        self.watching = self.watching.followed_by(watching)
        self._wanted = plugin

    def part(self) -> Part:
        """Return the receive thread, as something that could hang."""
        # For room in the intake it waits for the dispatcher, which is watched itself.
        return Part(f"the source of {self.name}", self._events, self._waits or not self._thread.is_alive())

    def stop(self) -> None:
        """Read no more; what has been read goes on."""
        self._stop.set()

    def join(self, timeout: float) -> bool:
        """Wait for the receive thread; return whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return (self.exhausted or bool(self.fault)) and not self._thread.is_alive()

    def note_done(self, taken: Taken) -> None:
        """Count a published result."""
        self._settled += 1
        self._latencies.append(time.monotonic() - taken.received_monotonic)

    def note_failed(self, frame: int, reason: str) -> None:
        """Count a failed frame and keep its reason for `status`."""
        self._settled += 1
        if reason != self._last_error.partition(": ")[2]:
            self._complaints.warning("%s: frame %d failed: %s", self.name, frame, reason)
        self._last_error, self._last_error_at = f"frame {frame}: {reason}", time.monotonic()

    def health(self) -> StreamHealth:
        """Return the stream's counters and figures."""
        total = self._ledger.totals(self.name)
        latencies = sorted(self._latencies)
        return StreamHealth(
            stream=self.name,
            state=self._state(),
            series_uid=self.tracker.series_uid,
            received=total["received"],
            done=total["done"],
            failed=total["failed"],
            dropped=total["dropped"],
            lost=total["lost"],
            missing=total["missing"],
            in_flight=total["in_flight"],
            rate_hz=self._rate_hz(),
            latency_p50_s=_quantile(latencies, 0.5),
            latency_p99_s=_quantile(latencies, 0.99),
            last_error=self._latest_error(),
            watch=self.watching.text,
        )

    def describe(self) -> str:
        """Say what the source listens to."""
        return self._source.describe() if self._source else "not open"

    @property
    def problem(self) -> str:
        """What keeps the source from its work at present, "" if nothing or if it does not say."""
        return str(getattr(self._source, "problem", ""))

    def _latest_error(self) -> str:
        if self.fault:
            return self.fault
        of_tracker = self.tracker.last_error_at > self._last_error_at
        return self.tracker.last_error if of_tracker else self._last_error

    def _state(self) -> str:
        if self.fault:
            return "fault"
        if self.exhausted:
            return "exhausted"
        if self._stop.is_set():
            return "stopping"
        return "running" if self.tracker.series_uid else "idle"

    def _rate_hz(self) -> float:
        now = time.monotonic()
        with self._marking:
            while len(self._marks) > 1 and self._marks[1][0] < now - RATE_S:
                self._marks.popleft()
            then, count = self._marks[0]
            if now - self._marks[-1][0] > 0.5:
                self._marks.append((now, self._settled))
        return (self._settled - count) / (now - then) if now - then > 0.2 else 0.0

    def _receive(self) -> None:
        assert self._source is not None
        try:
            self._read(self._source)
        except Exception as error:
            log.exception("%s: the source broke down", self.name)
            self.fault = f"the source broke down: {type(error).__name__}: {error}"
        finally:
            self.tracker.stop()
            self._source.close()

    def _read(self, source: Source) -> None:
        for event in source.events():
            self._events += 1
            if self.plugin is not self._wanted:
                # Here, so that no series starts with the scan of one and the map of the other.
                self.plugin = self._wanted
                self.tracker.set_scan(self.plugin.context.scan)
            taken = self.tracker.take(event)
            if taken is not None:
                self._waits = True
                dropped = self.intake.put(taken)
                self._waits = False
                if dropped is not None:
                    self._ledger.end(dropped.item.frame.key, "dropped", dropped.reason)
            if isinstance(event, Exhausted):
                self.exhausted = True
                log.info("%s: the source is exhausted", self.name)
            if self._stop.is_set() or self.exhausted:
                return


def _frame_bytes(taken: Taken) -> int:
    image = taken.frame.image
    if isinstance(image, EncodedImage):
        return image.data.nbytes
    return math.prod(image.shape) * image.dtype.itemsize


def _quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0
