"""The middle of the front process: frames to the executor, outcomes to the sinks and the ledger."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue

import msgspec

from daemon.flow.executor import Executor, Outcome
from daemon.flow.ledger import Ledger, Series
from daemon.flow.outbox import Outbox
from daemon.flow.series import Taken
from daemon.flow.shadow import Shadow
from daemon.flow.stream import Stream
from daemon.flow.succession import Post, Succession, Switched
from daemon.watchdog import Part
from grainwatch.messages import AnyMessage, AnyResult, FrameResult, Times
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
        self._succession = Succession(executor)
        self._again: deque[tuple[Stream, list[Taken]]] = deque()
        self.shadows: tuple[Shadow, ...] = ()
        self._outbox = outbox
        self._ledger = ledger
        self._closed = closed
        self._wake = wake
        self._finished: SimpleQueue[tuple[Post, Stream, list[Taken], Future[list[Outcome]]]] = SimpleQueue()
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
        waiting = self._again or any(len(s.intake) for s in self._by_name.values())
        return not self._outstanding and not waiting

    @property
    def executor(self) -> Executor:
        """What computes the next batch."""
        return self._succession.post.executor

    def switch(self, executor: Executor, probation: int = 0) -> Future[Switched]:
        """Have another executor, which is warm, compute all batches from the next one on.

        See `Succession.switch`. What failed by a fault of an executor on probation is computed anew by
        the one that is put back.
        """
        switched = self._succession.switch(executor, probation)
        self._wake.set()
        return switched

    @property
    def probation_left(self) -> int:
        """How many frames have to be served still until the executor at work has proved itself."""
        trial = self._succession.post.trial
        return max(0, trial.left) if trial is not None else 0

    def put_back(self, reason: str) -> None:
        """Let the earlier executor compute again, if one is in reserve still."""
        self._succession.ask_to_put_back(reason)
        self._wake.set()

    def settle(self) -> Future[Executor]:
        """End a probation that is on, and say who computes then: see `Succession.settle`."""
        settled = self._succession.settle()
        self._wake.set()
        return settled

    def parts(self) -> list[Part]:
        """Return what could hang here: the loop, and the computation."""
        # In `submit` the loop waits for the computation, in `publish` for a sink whose policy is to
        # block or for a map.
        loop = Part("the dispatcher", self._turns, waits=bool(self._doing))
        computing = self._submitted - self._collected > self._finished.qsize()
        waiting = not self._doing and (self._again or any(len(s.intake) for s in self._by_name.values()))
        executors = [post.executor for post in self._succession.posts()]
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
            while not (self._stop.is_set() and self._outstanding == 0 and not self._can_go_on):
                self._turns += 1
                self._wake.wait(0.05)
                self._wake.clear()
                self._succession.turn()
                while self._collect() or self._feed():
                    self._turns += 1
                    self._succession.turn()
                    self._close_series()
                self._close_series()
            for _, taken in self._again:
                for item in taken:
                    self._ledger.end(item.frame.key, "dropped", "the daemon stopped")
            self._close_series()
        except Exception as error:
            log.exception("the dispatcher broke down")
            self.broken = f"the dispatcher broke down: {type(error).__name__}: {error}"

    @property
    def _can_go_on(self) -> bool:
        """Whether frames wait to be computed anew, and can be."""
        return bool(self._again) and self.executor.free() >= 1

    @property
    def _outstanding(self) -> int:
        return sum(post.outstanding for post in self._succession.posts())

    def _feed(self) -> bool:
        """Give each stream in turn one batch to the executor; return whether any had one."""
        gave = False
        while self._again and self.executor.free() >= 1:
            gave = True
            self._submit(*self._again.popleft())
        for stream in self._streams:
            if self._stop.is_set() or self.executor.free() < 1:
                break
            taken = stream.intake.get_many(stream.plugin.batch)
            if taken:
                gave = True
                self._submit(stream, taken)
                for shadow in self.shadows:
                    shadow.offer(stream.name, [t.frame for t in taken])
        # The one served last goes to the end of the queue.
        self._streams = [*self._streams[1:], *self._streams[:1]]
        return gave

    def _submit(self, stream: Stream, taken: list[Taken]) -> None:
        post = self._succession.post
        post.outstanding += 1
        self._submitted += 1
        self._doing = "submit"
        future = post.executor.submit(stream.name, [t.frame for t in taken])
        self._doing = ""
        future.add_done_callback(partial(self._come_back, post, stream, taken))

    def _come_back(
        self, post: Post, stream: Stream, taken: list[Taken], future: Future[list[Outcome]]
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
        outcomes = future.result()
        unsettled = self._succession.judge(post, outcomes)
        anew = [item for item, bad in zip(taken, unsettled, strict=True) if bad]
        if anew:
            self._again.append((stream, anew))
        for item, outcome, bad in zip(taken, outcomes, unsettled, strict=True):
            if not bad:
                self._settle(stream, item, outcome, post.executor.config_hash)
                for shadow in self.shadows:
                    shadow.note(item.frame.key, outcome)
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
        if isinstance(outcome, FrameResult):
            outcome, reports = stream.watching.take(_located(outcome, frame, config_hash))
        times = Times(acquired=frame.acquired, received=frame.received, processed=time.time())
        self._outbox.publish(stream.name, outcome, times, taken.again)
        for report in reports:
            self._outbox.publish(stream.name, report, Times())
        if stream.aggregation is not None and isinstance(outcome, FrameResult):
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


def _located(result: AnyResult, frame: Frame, config_hash: str) -> AnyResult:
    """Complete what the flow knows better than a pipeline: where the frame lies, which configuration."""
    provenance = result.provenance
    if not provenance.config_hash:
        provenance = msgspec.structs.replace(provenance, config_hash=config_hash)
    return msgspec.structs.replace(
        result, grid_index=frame.grid_index, position_um=frame.position_um, provenance=provenance
    )
