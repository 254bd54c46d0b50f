"""The middle of the front process: frames to the executor, outcomes to the sinks and the ledger."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue

import msgspec

from daemon.flow.executor import Executor, Outcome
from daemon.flow.ledger import Ledger, Series
from daemon.flow.outbox import Outbox
from daemon.flow.series import Taken
from daemon.flow.stream import Stream
from grainwatch.messages import LaueResult, Times
from pipelines.frame import Failure, Frame

log = logging.getLogger(__name__)


class Dispatcher:
    """One thread that feeds the executor and finishes what comes back.

    It takes a new frame only when it is through with what came back, so that a sink whose policy
    is to block holds the computation, the intake and finally the detector, and no queue grows.
    """

    def __init__(
        self,
        streams: dict[str, Stream],
        executor: Executor,
        outbox: Outbox,
        ledger: Ledger,
        closed: Callable[[Series], None],
        wake: threading.Event,
    ) -> None:
        self._streams = list(streams.values())
        self._by_name = streams
        self._executor = executor
        self._outbox = outbox
        self._ledger = ledger
        self._closed = closed
        self._wake = wake
        self._finished: SimpleQueue[tuple[Stream, list[Taken], Future[list[Outcome]]]] = SimpleQueue()
        self._outstanding = 0
        self._stop = threading.Event()
        self.broken = ""
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def calm(self) -> bool:
        """Whether no frame waits or is computed."""
        return self._outstanding == 0 and not any(len(s.intake) for s in self._by_name.values())

    def stop(self, timeout: float) -> bool:
        """Stop after what is outstanding; return whether it did."""
        self._stop.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not (self._stop.is_set() and self._outstanding == 0):
                self._wake.wait(0.05)
                self._wake.clear()
                while self._collect() or self._feed():
                    self._close_series()
                self._close_series()
            self._close_series()
        except Exception as error:
            log.exception("the dispatcher broke down")
            self.broken = f"the dispatcher broke down: {type(error).__name__}: {error}"

    def _feed(self) -> bool:
        """Give each stream in turn one batch to the executor; return whether any had one."""
        gave = False
        for stream in self._streams:
            if self._stop.is_set() or self._executor.free() < 1:
                break
            taken = stream.intake.get_many(stream.plugin.batch)
            if not taken:
                continue
            gave = True
            self._outstanding += 1
            future = self._executor.submit(stream.name, [t.frame for t in taken])
            future.add_done_callback(partial(self._come_back, stream, taken))
        # The one served last goes to the end of the queue.
        self._streams.append(self._streams.pop(0))
        return gave

    def _come_back(self, stream: Stream, taken: list[Taken], future: Future[list[Outcome]]) -> None:
        self._finished.put((stream, taken, future))
        self._wake.set()

    def _collect(self) -> bool:
        """Finish one batch that came back; return whether there was one."""
        try:
            stream, taken, future = self._finished.get_nowait()
        except Empty:
            return False
        for item, outcome in zip(taken, future.result(), strict=True):
            self._settle(stream, item, outcome)
        self._outstanding -= 1
        return True

    def _settle(self, stream: Stream, taken: Taken, outcome: Outcome) -> None:
        frame = taken.frame
        if not isinstance(outcome, Failure):
            try:
                self._publish(stream, taken, outcome)
            except (TypeError, ValueError, OverflowError) as error:
                outcome = Failure(frame.key, f"the result cannot be published: {error}")
        if isinstance(outcome, Failure):
            self._ledger.end(frame.key, "failed", outcome.reason)
            stream.note_failed(frame.key.frame, outcome.reason)
            return
        self._ledger.end(frame.key, "done")
        stream.note_done(taken)

    def _publish(self, stream: Stream, taken: Taken, outcome: Outcome) -> None:
        assert not isinstance(outcome, Failure)
        frame = taken.frame
        if isinstance(outcome, LaueResult):
            outcome = _located(outcome, frame, stream)
        times = Times(acquired=frame.acquired, received=frame.received, processed=time.time())
        self._outbox.publish(stream.name, outcome, times, taken.again)
        if stream.aggregation is not None and isinstance(outcome, LaueResult):
            stream.aggregation.add(outcome)

    def _close_series(self) -> None:
        for series in self._ledger.take_completed():
            self._close_one(series)

    def _close_one(self, series: Series) -> None:
        aggregation = self._by_name[series.stream].aggregation if series.stream in self._by_name else None
        if aggregation is not None:
            aggregation.end(series)
        else:
            self._closed(series)


def _located(result: LaueResult, frame: Frame, stream: Stream) -> LaueResult:
    """Complete what the flow knows better than a pipeline: where the frame lies, which configuration."""
    provenance = result.provenance
    if not provenance.config_hash:
        provenance = msgspec.structs.replace(provenance, config_hash=stream.plugin.context.config_hash)
    return msgspec.structs.replace(
        result, grid_index=frame.grid_index, position_um=frame.position_um, provenance=provenance
    )
