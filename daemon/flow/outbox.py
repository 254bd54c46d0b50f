"""The last stretch: messages get their head, and each sink takes them in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from daemon.flow.edge import Edge
from daemon.flow.ledger import Ledger
from daemon.sinks.base import Published, SeriesClosed, SeriesOpened, Sink, SinkContext, SinkEvent
from grainwatch.config import EdgeTable
from grainwatch.messages import AnyMessage, Health, Times, encode

log = logging.getLogger(__name__)

#: How many events a sink gets at once at most.
BATCH = 256
#: How often a sink may look after itself, seconds.
IDLE_S = 0.05


@dataclass(frozen=True, slots=True)
class _Reconfigured:
    context: SinkContext


class SinkRunner:
    """A sink, the edge before it and the thread that it runs in.

    A sink with a method ``path(series_uid)`` writes files: `located` is told where each series is.
    One with a method ``reconfigured(context)`` is told when the daemon takes over another configuration.
    One with an attribute ``fault`` says there what keeps it from its work, "" when nothing does.
    """

    def __init__(self, name: str, sink: Sink, table: EdgeTable, located: Callable[[str, Path], None]) -> None:
        self.name = name
        self._path: Callable[[str], Path | None] | None = getattr(sink, "path", None)
        self._located = located
        self.edge: Edge[SinkEvent | _Reconfigured] = Edge(f"sink {name}", table, weigh=_payload_bytes)
        self._raised = ""
        self._sink = sink
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)

    @property
    def last_error(self) -> str:
        """What is wrong with it now, or what it raised last."""
        return str(getattr(self._sink, "fault", "")) or self._raised

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Let it write what it was given, then close it; return whether it did within `timeout` s."""
        self._stop.set()
        self.edge.close()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        idle_at = 0.0
        while True:
            # Before the look, so that what came before the stop is still seen.
            stopping = self._stop.is_set()
            events = self.edge.get_many(BATCH, 0.0 if stopping else IDLE_S)
            if events:
                self._guarded("take results", partial(self._take, events))
            elif stopping:
                break
            if time.monotonic() >= idle_at:
                self._guarded("do its periodic work", self._sink.idle)
                idle_at = time.monotonic() + IDLE_S
        self._guarded("close", self._sink.close)

    def _take(self, items: list[SinkEvent | _Reconfigured]) -> None:
        events: list[SinkEvent] = []
        for item in items:
            if not isinstance(item, _Reconfigured):
                events.append(item)
                continue
            self._handle(events)
            events = []
            tell = getattr(self._sink, "reconfigured", None)
            if tell is not None:
                tell(item.context)
        self._handle(events)

    def _handle(self, events: list[SinkEvent]) -> None:
        if not events:
            return
        self._sink.handle(events)
        for event in events:
            if isinstance(event, SeriesOpened) and self._path is not None:
                path = self._path(event.series_uid)
                if path is not None:
                    self._located(event.series_uid, path)

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        """Call a sink; what it raises costs that call only. Said once, until it works again."""
        try:
            call()
        except Exception as error:
            said = f"cannot {what}: {type(error).__name__}: {error}"
            if said != self._raised:
                log.exception("sink %s %s", self.name, said)
            self._raised = said


class Outbox:
    """Hands messages to all sinks, in one order. Safe between threads."""

    def __init__(self, publisher: str, ledger: Ledger, sinks: list[SinkRunner]) -> None:
        self.sinks = sinks
        self._publisher = publisher
        self._ledger = ledger
        self._lock = threading.Lock()
        self._unused: int | None = None

    def publish(self, stream: str, message: AnyMessage, times: Times, again: bool = False) -> None:
        """Complete a message's head and put it on the edge of each sink.

        Waits where the policy of a sink's edge is to block, except with the daemon's own health,
        which is not worth waiting for.

        Raises
        ------
        TypeError, ValueError, OverflowError
            If the message cannot be encoded.
        """
        timeout = 0.0 if isinstance(message, Health) else None
        with self._lock:
            seq = self._ledger.next_seq() if self._unused is None else self._unused
            # A number that ends up in no message would look like a loss to subscribers.
            self._unused = seq
            complete = msgspec.structs.replace(
                message,
                publisher=self._publisher,
                seq=seq,
                times=msgspec.structs.replace(times, published=time.time()),
                again=again,
            )
            published = Published(stream, complete, encode(complete))
            self._unused = None
            for sink in self.sinks:
                sink.edge.put(published, timeout)

    def announce(self, event: SeriesOpened | SeriesClosed) -> None:
        """Tell all sinks that a series began or ended; no policy drops that."""
        for sink in self.sinks:
            sink.edge.put_always(event)

    def reconfigure(self, context: SinkContext) -> None:
        """Tell the sinks that want to know by which configuration the daemon goes on."""
        for sink in self.sinks:
            sink.edge.put_always(_Reconfigured(context))

    def start(self) -> None:
        """Start the sinks."""
        for sink in self.sinks:
            sink.start()

    def unblock(self) -> None:
        """Let nobody wait for a sink any longer."""
        for sink in self.sinks:
            sink.edge.close()

    def stop(self, timeout: float) -> None:
        """Let the sinks write what they have and close them."""
        deadline = time.monotonic() + timeout
        for sink in self.sinks:
            if not sink.stop(max(0.1, deadline - time.monotonic())):
                log.error("sink %s did not stop in %.1f s: what it holds is not written", sink.name, timeout)


def _payload_bytes(event: SinkEvent | _Reconfigured) -> int:
    return len(event.payload) if isinstance(event, Published) else 0
