"""Summing up a series (a map) beside the flow, in a thread of its own for each stream."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from operator import methodcaller

from daemon.flow.edge import Edge
from daemon.flow.ledger import Series
from daemon.flow.outbox import Outbox
from daemon.sinks.base import SeriesOpened
from grainwatch.config import EdgeTable, ScanTable
from grainwatch.messages import AnyMessage, LaueResult, Times
from pipelines.frame import Aggregator

log = logging.getLogger(__name__)


class Aggregation:
    """Feeds each result of a stream to the aggregator of its series and publishes what that says.

    Parameters
    ----------
    stream : str
    make : callable
        Makes the aggregator of a series from its uid and scan; None where there is nothing to sum up.
    outbox : Outbox
    closed : callable
        Told of each series that is complete, after its last message was published.
    history : callable
        Yields the results of a series that an earlier daemon published.
    """

    def __init__(
        self,
        stream: str,
        make: Callable[[str, ScanTable | None], Aggregator | None],
        outbox: Outbox,
        closed: Callable[[Series], None],
        history: Callable[[str], Iterable[LaueResult]],
    ) -> None:
        self._stream = stream
        self._make = make
        self._outbox = outbox
        self._closed = closed
        self._history = history
        self.edge: Edge[LaueResult | Series | SeriesOpened] = Edge(f"{stream} maps", EdgeTable())
        self._scans: dict[str, ScanTable] = {}
        self._aggregators: dict[str, Aggregator | None] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"maps-{stream}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def begin(self, series: SeriesOpened) -> None:
        """Take note that a series opened, with the scan that it may bring."""
        self.edge.put_always(series)

    def add(self, result: LaueResult) -> None:
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
            for item in items:
                if isinstance(item, SeriesOpened):
                    if item.scan is not None:
                        self._scans[item.series_uid] = item.scan
                elif isinstance(item, Series):
                    self._finish(item)
                else:
                    self._guarded(item.key.series_uid, methodcaller("add", item))

    def _finish(self, series: Series) -> None:
        if series.uid in self._aggregators:
            self._guarded(series.uid, methodcaller("finish"))
            self._aggregators.pop(series.uid, None)
        self._scans.pop(series.uid, None)
        self._closed(series)

    def _begin(self, uid: str) -> Aggregator | None:
        aggregator = self._make(uid, self._scans.get(uid))
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
            for message in call(aggregator):
                self._outbox.publish(self._stream, message, Times())
        except Exception:
            log.exception("%s: the map of series %s is given up", self._stream, uid[:8])
            self._aggregators[uid] = None
