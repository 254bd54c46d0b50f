"""Computing in worker processes on this machine, with the frames in a shared-memory ring.

One thread looks after the workers: it takes their results, notices their deaths and starts them
again. Each worker has one task to compute and one that waits, so that it never idles.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from os import close, pipe, read, write

import msgspec

from daemon.flow.child import Child
from daemon.flow.executor import ExecutorStatus, Outcome
from daemon.flow.quarantine import Quarantine
from daemon.flow.ring import FrameTooLarge, Ring
from daemon.flow.transport import (
    MAX_TASK_BYTES,
    Answer,
    Done,
    Fatal,
    FrameTask,
    Ready,
    Setup,
    Task,
    frame_task,
    outcome_of,
    pack,
    read_in_front,
)
from grainwatch.config import Config, ConfigError
from pipelines.frame import BadFrame, Failure, Frame, ModelRef
from pipelines.images import pack_image

log = logging.getLogger(__name__)

#: What a worker holds: one task to compute, one that waits.
DEPTH = 2
#: A frame whose worker died runs this often in all.
ATTEMPTS = 2
#: Pauses between starts of a worker that dies before it is warm, seconds.
BACKOFF_S = (0.5, 2.0, 10.0)
#: How long a stop waits for what is being computed, seconds.
CLOSE_S = 2.0
#: Why a frame fails that a stop finds here.
STOPPED = "the daemon stopped before it was computed"


@dataclass(slots=True, eq=False)
class _Batch:
    """What `submit` promised: outcomes in order."""

    stream: str
    outcomes: list[Outcome | None]
    future: Future[list[Outcome]] = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class _Task:
    """A part of a batch that runs in one go: frames at positions `at`, pixels in the ring."""

    batch: _Batch
    at: list[int]
    frames: list[FrameTask]
    payload: bytes
    attempt: int = 1


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    child: Child | None = None
    ready: bool = False
    engines: tuple[str, ...] = ()
    tasks: deque[_Task] = field(default_factory=deque)
    since: float = 0.0  # when its first task, or its start, began, monotonic
    starts: int = 0  # starts without getting warm
    start_at: float = 0.0  # when to start it again
    verdict: str = ""  # why the front killed it
    trouble: str = ""  # why it did not get warm the last time


class WorkersExecutor:
    """Implements `daemon.flow.executor.Executor` with `config.daemon.workers` processes.

    Parameters
    ----------
    config : Config
    raw : bytes
        The configuration file, from which each worker builds its own pipelines.
    where : str
        The file's name, for errors.
    quarantine : Quarantine
        Takes the frames that killed workers.
    models : mapping, optional
        Which bundle a name means, for all workers that it will ever have.
    background : bool
        Compute only while nobody else wants the cores.
    """

    def __init__(
        self,
        config: Config,
        raw: bytes,
        where: str,
        quarantine: Quarantine,
        models: Mapping[str, ModelRef] | None = None,
        background: bool = False,
    ) -> None:
        self.config_hash = hashlib.sha256(raw).hexdigest()
        self.progress = 0
        self._count = config.daemon.workers
        self._timeout_s = config.daemon.compute_timeout_s
        self._start_timeout_s = config.daemon.start_timeout_s
        self._quarantine = quarantine
        self._ring = Ring(config.ring.slots, config.ring.slot_bytes)
        self._setup = Setup(
            raw, where, self._ring.slots, self._ring.slot_bytes, dict(models or {}), background
        )
        self._lock = threading.Condition()
        self._workers = [_Worker(n) for n in range(self._count)]
        self._pending: deque[_Task] = deque()
        self._settled: list[_Batch] = []
        self._restarts = 0
        self._fatal = ""
        self._given_up = ""
        self._closing = False
        self._started = False
        self._wake_r, self._wake_w = pipe()
        self._thread = threading.Thread(target=self._look_after, name="workers", daemon=True)

    def start(self) -> None:
        """Start the workers and wait until all are warm.

        Raises
        ------
        ConfigError
            If a worker says that it cannot start, or keeps dying before it is warm; or if it was
            closed meanwhile.
        """
        self._thread.start()
        with self._lock:
            self._lock.wait_for(lambda: self._fatal or self._closing or all(w.ready for w in self._workers))
            fatal = self._fatal or ("it was stopped before the workers were warm" if self._closing else "")
        if fatal:
            self.close()
            raise ConfigError(fatal)
        self._started = True

    @property
    def engines(self) -> tuple[str, ...]:
        """Return what runs the networks, in any of the workers."""
        return tuple(dict.fromkeys(line for worker in self._workers for line in worker.engines))

    @property
    def problem(self) -> str:
        """Return why a worker does not get warm again."""
        return next((f"worker {w.number} {w.trouble}" for w in self._workers if w.trouble), "")

    @property
    def patience_s(self) -> float:
        """Return how long a worker may compute, or get ready where none is."""
        computes = any(w.ready for w in self._workers)
        return self._timeout_s if computes else max(self._timeout_s, self._start_timeout_s)

    def free(self) -> int:
        """Return how many more batches can be taken now without waiting."""
        with self._lock:
            room = sum(DEPTH - len(w.tasks) for w in self._workers if w.ready)
            return max(0, min(room - len(self._pending), self._ring.free()))

    def submit(self, stream: str, batch: Sequence[Frame]) -> Future[list[Outcome]]:
        """Compute a batch; waits while the ring is full."""
        held = _Batch(stream, [None] * len(batch))
        at: list[int] = []
        tasks: list[FrameTask] = []
        for position, frame in enumerate(batch):
            try:
                header, data = pack_image(frame.image)
                slot = self._ring.put(data)
                if slot is None:
                    # The batch's own frames may fill the ring: let them run.
                    self._enqueue(held, at, tasks)
                    at, tasks = [], []
                    slot = self._wait_for_slot(data)
            except (BadFrame, FrameTooLarge) as error:
                held.outcomes[position] = Failure(frame.key, str(error))
                continue
            if slot is None:
                held.outcomes[position] = Failure(frame.key, STOPPED)
                continue
            at.append(position)
            tasks.append(frame_task(frame, header, slot, data.nbytes))
        self._enqueue(held, at, tasks)
        with self._lock:
            self._settle_if_complete(held)
        self._resolve()
        return held.future

    def give_up(self, reason: str) -> None:
        """Let workers finish what they have in hand; what waits, or comes back from one that dies, fails."""
        with self._lock:
            self._given_up = reason
            self._fail_pending()
        self._resolve()

    def status(self) -> ExecutorStatus:
        """Return counters."""
        with self._lock:
            return ExecutorStatus(
                workers=self._count,
                alive=sum(w.ready for w in self._workers),
                restarts=self._restarts,
                busy=sum(bool(w.tasks) for w in self._workers),
            )

    def pids(self) -> list[int]:
        """Return the process ids of the workers that run."""
        with self._lock:
            return [w.child.pid for w in self._workers if w.child is not None]

    def close(self) -> None:
        """Let what runs finish, for at most `CLOSE_S`; what does not fails. Stop the workers."""
        with self._lock:
            if any(w.ready for w in self._workers):
                self._lock.wait_for(lambda: self._closing or self._is_calm(), CLOSE_S)
            if self._closing:  # by another thread, perhaps while this one waited
                return
            self._closing = True
            self._lock.notify_all()
        write(self._wake_w, b"x")
        if self._thread.is_alive():  # it may be closed before it was started
            self._thread.join()
        close(self._wake_r)
        close(self._wake_w)
        self._ring.close()

    # Tasks.

    def _is_calm(self) -> bool:
        return not self._pending and not any(w.tasks for w in self._workers)

    def _enqueue(self, batch: _Batch, at: list[int], frames: list[FrameTask]) -> None:
        """Queue frames of a batch as one task."""
        if not frames:
            return
        try:
            payload = pack(Task(batch.stream, frames))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            self._refuse(batch, at, frames, f"its metadata cannot travel: {error}")
            return
        if len(payload) > MAX_TASK_BYTES:
            much = f"its metadata take {len(payload)} bytes, limit {MAX_TASK_BYTES}"
            return self._refuse(batch, at, frames, much)
        with self._lock:
            self._pending.append(_Task(batch, at, frames, payload))
            if self._closing:
                self._fail_pending()
            self._assign()

    def _refuse(self, batch: _Batch, at: list[int], frames: list[FrameTask], reason: str) -> None:
        if len(frames) > 1:  # too much for one task, or one of them: find out which
            for position, frame in zip(at, frames, strict=True):
                self._enqueue(batch, [position], [frame])
            return
        with self._lock:
            self._finish(batch, at[0], frames[0], Failure(frames[0].key, reason))

    def _wait_for_slot(self, data: memoryview) -> int | None:
        while True:
            with self._lock:
                if self._closing:
                    return None
                self._lock.wait_for(lambda: self._ring.free() or self._closing, 1.0)
            slot = self._ring.put(data)
            if slot is not None:
                return slot

    def _assign(self) -> None:
        """Hand pending tasks to workers. The lock is held."""
        while self._pending:
            able = [w for w in self._workers if w.ready and len(w.tasks) < DEPTH]
            if not able:
                return
            worker = min(able, key=lambda w: len(w.tasks))
            task = self._pending.popleft()
            assert worker.child is not None
            try:
                worker.child.connection.send_bytes(task.payload)
            except OSError:
                # It died a moment ago and its end of file has not been read: not this task's doing.
                worker.ready = False
                self._pending.appendleft(task)
                continue
            if not worker.tasks:
                worker.since = time.monotonic()
            worker.tasks.append(task)

    def _finish(self, batch: _Batch, at: int, frame: FrameTask, outcome: Outcome) -> None:
        """Note an outcome and free the frame's slot. The lock is held."""
        batch.outcomes[at] = outcome
        self._ring.release(frame.slot)
        self._settle_if_complete(batch)
        self._lock.notify_all()

    def _settle_if_complete(self, batch: _Batch) -> None:
        if all(o is not None for o in batch.outcomes) and batch not in self._settled:
            self._settled.append(batch)

    def _resolve(self) -> None:
        """Resolve futures, without the lock: their callbacks may call back."""
        with self._lock:
            settled, self._settled = self._settled, []
        for batch in settled:
            if not batch.future.done():
                batch.future.set_result([o for o in batch.outcomes if o is not None])

    # The thread that looks after the workers.

    def _look_after(self) -> None:
        while not self._closing:
            with self._lock:
                self._start_due()
                by_connection: dict[Connection, _Worker] = {
                    w.child.connection: w for w in self._workers if w.child is not None
                }
            for ready in wait([*by_connection, self._wake_r], self._patience()):
                if isinstance(ready, Connection):
                    self._hear(by_connection[ready])
                elif ready == self._wake_r:
                    read(self._wake_r, 4096)
            self._kill_hung()
            self._resolve()
        self._stop_all()
        self._resolve()

    def _hear(self, worker: _Worker) -> None:
        assert worker.child is not None
        try:
            message = read_in_front(worker.child.connection.recv_bytes())
        except (EOFError, OSError):
            self._died(worker)
            return
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            worker.verdict = f"sent garbage: {error}; killed"
            worker.child.kill()
            return
        with self._lock:
            self.progress += 1
            match message:
                case Ready(engines):
                    worker.ready = True
                    worker.trouble = ""
                    worker.engines = engines
                    worker.starts = 0
                case Fatal(reason):
                    self._fatal = self._fatal or reason
                    worker.verdict = f"cannot start: {reason}"
                case Done(answers, engines):
                    worker.engines = worker.engines if engines is None else engines
                    self._take(worker, answers)
            self._assign()
            self._lock.notify_all()

    def _take(self, worker: _Worker, answers: list[Answer]) -> None:
        assert worker.child is not None
        if not worker.tasks or len(answers) != len(worker.tasks[0].frames):
            worker.verdict = "answered what it was not asked; killed"
            worker.child.kill()
            return
        task = worker.tasks.popleft()
        worker.since = time.monotonic()
        for at, frame, answer in zip(task.at, task.frames, answers, strict=True):
            self._finish(task.batch, at, frame, outcome_of(answer, frame.key))

    def _died(self, worker: _Worker) -> None:
        assert worker.child is not None
        pid = worker.child.pid
        how = worker.child.bury()
        if worker.verdict:
            how = worker.verdict
        with self._lock:
            self.progress += 1
            tasks, worker.tasks = worker.tasks, deque()
            if worker.starts:
                worker.trouble = worker.verdict or f"died before it was warm ({how})"
            worker.child, worker.ready, worker.verdict = None, False, ""
            self._restarts += 1
            if worker.starts >= len(BACKOFF_S) and not self._fatal:
                self._fatal = f"worker {worker.number} keeps dying before it is warm ({how})"
            pause = BACKOFF_S[min(worker.starts, len(BACKOFF_S)) - 1] if worker.starts else 0.0
            worker.start_at = time.monotonic() + pause
            # Only the first task was being computed; the one behind it is innocent.
            self._pending.extendleft(reversed(list(tasks)[1:]))
            if tasks:
                self._again_or_fail(tasks[0], how)
            if self._given_up:
                self._fail_pending()
            self._assign()
            self._lock.notify_all()
        if self._fatal and not self._started:
            return  # `start` says it
        at_work = f", at work on {_names(tasks[0])}" if tasks else ""
        log.error("worker %d (pid %d) died: %s%s", worker.number, pid, how, at_work)

    def _again_or_fail(self, task: _Task, how: str) -> None:
        """Queue the frames of a dead worker once more, or fail them. The lock is held.

        Each runs alone, so that one that kills workers takes no other with it.
        """
        for at, frame in zip(task.at, task.frames, strict=True):
            if task.attempt < ATTEMPTS:
                payload = pack(Task(task.batch.stream, [frame]))
                self._pending.appendleft(_Task(task.batch, [at], [frame], payload, task.attempt + 1))
                continue
            reason = f"worker died ({how}), {task.attempt} times on this frame"
            self._quarantine.put(task.batch.stream, frame, self._ring.view(frame.slot, frame.nbytes), reason)
            self._finish(task.batch, at, frame, Failure(frame.key, reason, fault=True))

    def _fail_pending(self) -> None:
        """Let nothing wait any more. The lock is held."""
        pending, self._pending = self._pending, deque()
        # What is given up, another one can compute; a stop leaves nobody.
        reason, fault = (self._given_up, True) if self._given_up else (STOPPED, False)
        for task in pending:
            for at, frame in zip(task.at, task.frames, strict=True):
                self._finish(task.batch, at, frame, Failure(frame.key, reason, fault))

    def _start_due(self) -> None:
        """Start workers that are due. The lock is held."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.child is None and worker.start_at <= now:
                worker.starts += 1
                worker.since = now
                try:
                    worker.child = Child(self._setup, self._ring)
                except OSError as error:
                    worker.start_at = now + BACKOFF_S[-1]
                    worker.trouble = f"cannot be started: {error}"
                    log.error("worker %d cannot be started: %s", worker.number, error)
                    if worker.starts >= len(BACKOFF_S) and not self._started:
                        self._fatal = self._fatal or f"worker {worker.number} cannot be started: {error}"
                        self._lock.notify_all()

    def _kill_hung(self) -> None:
        now = time.monotonic()
        with self._lock:
            for worker in self._workers:
                if worker.child is None or now <= self._due(worker):
                    continue
                worker.verdict = (
                    f"computed for more than {self._timeout_s:g} s; killed"
                    if worker.tasks
                    else f"was not ready {self._start_timeout_s:g} s after its start; killed"
                )
                worker.child.kill()

    def _due(self, worker: _Worker) -> float:
        """Return when a worker has had time enough for what it does, monotonic."""
        if worker.tasks:
            return worker.since + self._timeout_s
        return math.inf if worker.ready else worker.since + self._start_timeout_s

    def _patience(self) -> float:
        """Return how long nothing can be due, seconds."""
        now = time.monotonic()
        with self._lock:
            due = [w.start_at for w in self._workers if w.child is None]
            due += [self._due(w) for w in self._workers if w.child is not None]
        return min(1.0, max(0.0, min(due, default=now + 1.0) - now) + 1e-3)

    def _stop_all(self) -> None:
        with self._lock:
            children = [w.child for w in self._workers if w.child is not None]
            for worker in self._workers:
                self._pending += worker.tasks
                if worker.child is not None and (worker.tasks or not worker.ready):
                    worker.child.kill()
                worker.tasks.clear()
                worker.child, worker.ready = None, False
            self._fail_pending()
        for child in children:
            child.connection.close()
        for child in children:
            child.bury()


def _names(task: _Task) -> str:
    return ", ".join(f"frame {f.key.frame} of {task.batch.stream}" for f in task.frames)
