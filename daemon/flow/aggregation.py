"""Summing up a series (a map) beside the flow, in a thread of its own for each stream."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import TypeAlias

from daemon.flow.edge import Edge
from daemon.flow.ledger import Series
from daemon.flow.outbox import Outbox
from daemon.watchdog import Part
from grainwatch.config import EdgeTable
from grainwatch.messages import AnyMessage, AnyResult, Times
from pipelines.frame import Aggregator

log = logging.getLogger(__name__)

#: Makes the aggregator of a series; None where there is nothing to sum up.
Maker: TypeAlias = Callable[[], Aggregator | None]


@dataclass(frozen=True, slots=True)
class _Begun:
    series_uid: str
    make: Maker


class Aggregation:
    """Feeds each result of a stream to the aggregator of its series and publishes what that says.

    Parameters
    ----------
    stream : str
    outbox : Outbox
    closed : callable
        Told of each series that is complete, after its last message was published.
    history : callable
        Yields the results of a series that an earlier daemon published.
    """

    def __init__(
        self,
        stream: str,
        outbox: Outbox,
        closed: Callable[[Series], None],
        history: Callable[[str], Iterable[AnyResult]],
    ) -> None:
        self._stream = stream
        self._outbox = outbox
        self._closed = closed
        self._history = history
        self.edge: Edge[AnyResult | Series | _Begun] = Edge(f"{stream} maps", EdgeTable())
        self._makers: dict[str, Maker] = {}
        self._aggregators: dict[str, Aggregator | None] = {}
        self._stop = threading.Event()
        self._turns = 0
        self._publishes = False
        self._thread = threading.Thread(target=self._run, name=f"maps-{stream}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def begin(self, series_uid: str, make: Maker) -> None:
        """Take note that a series opened, and of how its aggregator is made.

        By the configuration of this moment: another one counts from the next series on.
        """
        self.edge.put_always(_Begun(series_uid, make))

    def part(self) -> Part:
        """Return the thread, as something that could hang."""
        # With a message in hand it waits for a sink whose policy is to block.
        waits = self._publishes or not self._thread.is_alive()
        return Part(f"the map of {self._stream}", self._turns, waits)

    def add(self, result: AnyResult) -> None:
        """Take a result; waits when the aggregator cannot follow."""
        self.edge.put(result)

    def end(self, series: Series) -> None:
        """Take note that a series is complete."""
        self.edge.put_always(series)

    def stop(self, timeout: float) -> None:
        """Finish what was given and stop."""
        self._stop.set()
        self.edge.close()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            stopping = self._stop.is_set()
            items = self.edge.get_many(64, 0.0 if stopping else 0.2)
            if stopping and not items:
                return
            self._turns += 1
            for item in items:
                self._turns += 1
                if isinstance(item, _Begun):
                    self._makers[item.series_uid] = item.make
                elif isinstance(item, Series):
                    self._finish(item)
                else:
                    self._guarded(item.key.series_uid, methodcaller("add", item))

    def _finish(self, series: Series) -> None:
        if series.uid in self._aggregators:
            self._guarded(series.uid, methodcaller("finish"))
            self._aggregators.pop(series.uid, None)
        self._makers.pop(series.uid, None)
        self._closed(series)

    def _begin(self, uid: str) -> Aggregator | None:
        make = self._makers.get(uid)
        aggregator = make() if make is not None else None
        if aggregator is not None:
            for result in self._history(uid):
                aggregator.add(result)  # what it says has been published before
        return aggregator

    def _guarded(self, uid: str, call: Callable[[Aggregator], Sequence[AnyMessage]]) -> None:
        """Call an aggregator and publish; one that raises is given up for its series."""
        try:
            if uid not in self._aggregators:
                self._aggregators[uid] = self._begin(uid)
            aggregator = self._aggregators[uid]
            if aggregator is None:
                return
            messages = call(aggregator)
            self._publishes = True
            for message in messages:
                self._outbox.publish(self._stream, message, Times())
        except Exception:
            log.exception("%s: the map of series %s is given up", self._stream, uid[:8])
            self._aggregators[uid] = None
        finally:
            self._publishes = False
