"""The middle of the front process: frames to the executor, outcomes to the sinks and the ledger."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

import msgspec

from daemon.flow.executor import Executor, Outcome
from daemon.flow.ledger import Ledger, Series
from daemon.flow.outbox import Outbox
from daemon.flow.series import Taken
from daemon.flow.stream import Stream
from daemon.watchdog import Part
from grainwatch.messages import AnyMessage, LaueResult, Times
from pipelines.frame import Failure, Frame

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Post:
    """An executor, and how many batches of it have not been settled."""

    executor: Executor
    outstanding: int = 0
    relieved: Future[Executor] = field(default_factory=Future)


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
        self._post = _Post(executor)
        self._earlier: list[_Post] = []
        self._next: _Post | None = None
        self._outbox = outbox
        self._ledger = ledger
        self._closed = closed
        self._wake = wake
        self._finished: SimpleQueue[tuple[_Post, Stream, list[Taken], Future[list[Outcome]]]] = SimpleQueue()
        self._turns = 0
        self._submitted = 0
        self._collected = 0
        self._doing = ""
        self._stop = threading.Event()
        self.broken = ""
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def calm(self) -> bool:
        """Whether no frame waits or is computed."""
        return not self._outstanding and not any(len(s.intake) for s in self._by_name.values())

    @property
    def executor(self) -> Executor:
        """What computes the next batch."""
        return self._post.executor

    def switch(self, executor: Executor) -> Future[Executor]:
        """Have another executor, which is warm, compute all batches from the next one on.

        The switch lies between two batches, so that it costs no frame. The batches that the earlier
        executor has end there.

        Returns
        -------
        Future
            Has the earlier executor when its last batch is settled: whoever made it closes it then.
        """
        # Read before the thread can take the next one over.
        relieved = self._post.relieved
        self._next = _Post(executor)
        self._wake.set()
        return relieved

    def parts(self) -> list[Part]:
        """Return what could hang here: the loop, and the computation."""
        # In `submit` the loop waits for the computation, in `publish` for a sink whose policy is to
        # block or for a map.
        loop = Part("the dispatcher", self._turns, waits=bool(self._doing))
        computing = self._submitted - self._collected > self._finished.qsize()
        waiting = not self._doing and any(len(s.intake) for s in self._by_name.values())
        executors = [post.executor for post in (self._post, *self._earlier)]
        mark = (self._collected, *(e.progress for e in executors))
        patience_s = max(e.patience_s for e in executors)
        return [loop, Part("inference", mark, not computing and not waiting, patience_s)]

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
                self._turns += 1
                self._wake.wait(0.05)
                self._wake.clear()
                self._relieve()
                while self._collect() or self._feed():
                    self._turns += 1
                    self._relieve()
                    self._close_series()
                self._close_series()
            self._close_series()
        except Exception as error:
            log.exception("the dispatcher broke down")
            self.broken = f"the dispatcher broke down: {type(error).__name__}: {error}"

    @property
    def _outstanding(self) -> int:
        return sum(post.outstanding for post in (self._post, *self._earlier))

    def _relieve(self) -> None:
        """Put the next executor in its place, and let go of those that are through."""
        if self._next is not None:
            self._earlier.append(self._post)
            self._post, self._next = self._next, None
        for post in [p for p in self._earlier if not p.outstanding]:
            self._earlier.remove(post)
            post.relieved.set_result(post.executor)

    def _feed(self) -> bool:
        """Give each stream in turn one batch to the executor; return whether any had one."""
        gave, post = False, self._post
        for stream in self._streams:
            if self._stop.is_set() or post.executor.free() < 1:
                break
            taken = stream.intake.get_many(stream.plugin.batch)
            if not taken:
                continue
            gave = True
            post.outstanding += 1
            self._submitted += 1
            self._doing = "submit"
            future = post.executor.submit(stream.name, [t.frame for t in taken])
            self._doing = ""
            future.add_done_callback(partial(self._come_back, post, stream, taken))
        # The one served last goes to the end of the queue.
        self._streams.append(self._streams.pop(0))
        return gave

    def _come_back(
        self, post: _Post, stream: Stream, taken: list[Taken], future: Future[list[Outcome]]
    ) -> None:
        self._finished.put((post, stream, taken, future))
        self._wake.set()

    def _collect(self) -> bool:
        """Finish one batch that came back; return whether there was one."""
        try:
            post, stream, taken, future = self._finished.get_nowait()
        except Empty:
            return False
        self._collected += 1
        for item, outcome in zip(taken, future.result(), strict=True):
            self._settle(stream, item, outcome, post.executor.config_hash)
        post.outstanding -= 1
        return True

    def _settle(self, stream: Stream, taken: Taken, outcome: Outcome, config_hash: str) -> None:
        frame = taken.frame
        if not isinstance(outcome, Failure):
            self._doing = "publish"
            try:
                self._publish(stream, taken, outcome, config_hash)
            except (TypeError, ValueError, OverflowError) as error:
                outcome = Failure(frame.key, f"the result cannot be published: {error}")
            self._doing = ""
        if isinstance(outcome, Failure):
            self._ledger.end(frame.key, "failed", outcome.reason)
            stream.note_failed(frame.key.frame, outcome.reason)
            return
        self._ledger.end(frame.key, "done")
        stream.note_done(taken)

    def _publish(self, stream: Stream, taken: Taken, outcome: Outcome, config_hash: str) -> None:
        assert not isinstance(outcome, Failure)
        frame = taken.frame
        reports: Sequence[AnyMessage] = ()
        if isinstance(outcome, LaueResult):
            outcome, reports = stream.watching.take(_located(outcome, frame, config_hash))
        times = Times(acquired=frame.acquired, received=frame.received, processed=time.time())
        self._outbox.publish(stream.name, outcome, times, taken.again)
        for report in reports:
            self._outbox.publish(stream.name, report, Times())
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


def _located(result: LaueResult, frame: Frame, config_hash: str) -> LaueResult:
    """Complete what the flow knows better than a pipeline: where the frame lies, which configuration."""
    provenance = result.provenance
    if not provenance.config_hash:
        provenance = msgspec.structs.replace(provenance, config_hash=config_hash)
    return msgspec.structs.replace(
        result, grid_index=frame.grid_index, position_um=frame.position_um, provenance=provenance
    )
