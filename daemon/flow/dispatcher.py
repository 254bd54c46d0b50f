"""The middle of the front process: frames to the executor, outcomes to the sinks and the ledger."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeGuard

import msgspec

from daemon.flow.executor import Executor, Outcome
from daemon.flow.ledger import Ledger, Series
from daemon.flow.outbox import Outbox
from daemon.flow.series import Taken
from daemon.flow.shadow import Shadow
from daemon.flow.stream import Stream
from daemon.watchdog import Part
from grainwatch.messages import AnyMessage, LaueResult, Times
from pipelines.frame import Failure, Frame

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Switched:
    """How a switch ended.

    Attributes
    ----------
    executor : Executor
        Which computes no more: whoever made it closes it.
    failed : str
        Why the earlier one was put back, "" where the new one serves on.
    """

    executor: Executor
    failed: str = ""


@dataclass(slots=True, eq=False)
class _Trial:
    """The time in which an executor has to prove itself, while the earlier one is held in reserve."""

    left: int
    reserve: _Post
    engines: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Post:
    """An executor, how many batches of it have not been settled, and how the switch to it ends."""

    executor: Executor
    probation: int = 0
    outstanding: int = 0
    trial: _Trial | None = None
    switched: Future[Switched] = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class _Leaving:
    """A post that gets no more batches, and who hears of its end."""

    post: _Post
    failed: str
    switched: Future[Switched]


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
        self._leaving: list[_Leaving] = []
        self._next: SimpleQueue[_Post] = SimpleQueue()
        self._unwanted = ""
        self._again: deque[tuple[Stream, list[Taken]]] = deque()
        self.shadows: tuple[Shadow, ...] = ()
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
        waiting = self._again or any(len(s.intake) for s in self._by_name.values())
        return not self._outstanding and not waiting

    @property
    def executor(self) -> Executor:
        """What computes the next batch."""
        return self._post.executor

    def switch(self, executor: Executor, probation: int = 0) -> Future[Switched]:
        """Have another executor, which is warm, compute all batches from the next one on.

        The switch lies between two batches, so that it costs no frame. The batches that the earlier
        executor has end there.

        Parameters
        ----------
        executor : Executor
        probation : int
            So many frames have to be served without a fault until the earlier executor is let go. A fault
            before that puts the earlier one back, and it computes anew what failed. Another switch ends
            the probation early.

        Returns
        -------
        Future
            Done when one of the two executors has settled its last batch.
        """
        post = _Post(executor, probation)
        self._next.put(post)
        self._wake.set()
        return post.switched

    @property
    def on_probation(self) -> Executor | None:
        """The executor that has to prove itself at present."""
        return self._post.executor if self._post.trial is not None else None

    def put_back(self, reason: str) -> None:
        """Let the earlier executor compute again, if one is in reserve still."""
        self._unwanted = reason
        self._wake.set()

    def parts(self) -> list[Part]:
        """Return what could hang here: the loop, and the computation."""
        # In `submit` the loop waits for the computation, in `publish` for a sink whose policy is to
        # block or for a map.
        loop = Part("the dispatcher", self._turns, waits=bool(self._doing))
        computing = self._submitted - self._collected > self._finished.qsize()
        waiting = not self._doing and any(len(s.intake) for s in self._by_name.values())
        executors = [post.executor for post in self._posts()]
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
                self._relieve()
                while self._collect() or self._feed():
                    self._turns += 1
                    self._relieve()
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
        return bool(self._again) and self._post.executor.free() >= 1

    @property
    def _outstanding(self) -> int:
        return sum(post.outstanding for post in self._posts())

    def _posts(self) -> list[_Post]:
        # Other threads read this: whatever changes hands meanwhile is in it once at least.
        post = self._post
        trial = post.trial
        return [post, *([trial.reserve] if trial else []), *(leaving.post for leaving in self._leaving)]

    def _relieve(self) -> None:
        """Put the next executor in its place, and let go of those that are through."""
        while not self._next.empty():
            self._install(self._next.get())
        reason, self._unwanted = self._unwanted, ""
        if reason:
            self._put_back(reason)
        for leaving in [x for x in self._leaving if not x.post.outstanding]:
            self._leaving.remove(leaving)
            leaving.switched.set_result(Switched(leaving.post.executor, leaving.failed))

    def _install(self, post: _Post) -> None:
        self._accept()
        earlier = self._post
        if post.probation:
            post.trial = _Trial(post.probation, earlier, post.executor.engines)
        else:
            self._leaving.append(_Leaving(earlier, "", post.switched))
        self._post = post

    def _accept(self) -> None:
        """End the probation of the executor at work: it serves on, the one in reserve goes."""
        trial = self._post.trial
        if trial is not None:
            self._leaving.append(_Leaving(trial.reserve, "", self._post.switched))
            self._post.trial = None

    def _put_back(self, reason: str) -> None:
        """Let the executor in reserve compute again, if there is one."""
        failed, trial = self._post, self._post.trial
        if trial is None:
            return
        log.warning("what computed before is put back: %s", reason)
        self._leaving.append(_Leaving(failed, reason, failed.switched))
        self._post = trial.reserve

    def _feed(self) -> bool:
        """Give each stream in turn one batch to the executor; return whether any had one."""
        gave = False
        while self._again and self._post.executor.free() >= 1:
            gave = True
            self._submit(*self._again.popleft())
        for stream in self._streams:
            if self._stop.is_set() or self._post.executor.free() < 1:
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
        post = self._post
        post.outstanding += 1
        self._submitted += 1
        self._doing = "submit"
        future = post.executor.submit(stream.name, [t.frame for t in taken])
        self._doing = ""
        future.add_done_callback(partial(self._come_back, post, stream, taken))

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
        outcomes = future.result()
        if post.trial is not None:
            self._judge(post, stream, taken, outcomes)
        for item, outcome in zip(taken, outcomes, strict=True):
            if not (post.trial is not None and _is_fault(outcome)):
                self._settle(stream, item, outcome, post.executor.config_hash)
                for shadow in self.shadows:
                    shadow.note(item.frame.key, outcome)
        post.outstanding -= 1
        return True

    def _judge(self, post: _Post, stream: Stream, taken: list[Taken], outcomes: list[Outcome]) -> None:
        """Look at what an executor on probation answered, or one that did not stand it.

        What failed by a fault of its own is computed anew by the one that is put back.
        """
        assert post.trial is not None
        faults = [(item, o.reason) for item, o in zip(taken, outcomes, strict=True) if _is_fault(o)]
        if post is self._post:
            post.trial.left -= len(taken)
            if faults:
                self._put_back(f"frame {faults[0][0].frame.key.frame} of {stream.name}: {faults[0][1]}")
            elif post.executor.engines != post.trial.engines:
                changed = [e for e in post.executor.engines if e not in post.trial.engines]
                self._put_back("; ".join(changed) or "an engine gave up")
            elif post.trial.left <= 0:
                self._accept()
        if faults:
            self._again.append((stream, [item for item, _ in faults]))

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


def _is_fault(outcome: Outcome) -> TypeGuard[Failure]:
    return isinstance(outcome, Failure) and outcome.fault


def _located(result: LaueResult, frame: Frame, config_hash: str) -> LaueResult:
    """Complete what the flow knows better than a pipeline: where the frame lies, which configuration."""
    provenance = result.provenance
    if not provenance.config_hash:
        provenance = msgspec.structs.replace(provenance, config_hash=config_hash)
    return msgspec.structs.replace(
        result, grid_index=frame.grid_index, position_um=frame.position_um, provenance=provenance
    )
