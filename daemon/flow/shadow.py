"""A model in the shadow: it computes a share of the frames too, and is compared, never published."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Final

import msgspec

from daemon.flow.executor import Executor, Outcome
from grainwatch.messages import AnyMessage, FrameKey, ModelInfo, Provenance
from pipelines.frame import Agreement, Frame

log = logging.getLogger(__name__)

#: Pairs that wait for one of their two results at most; beyond that frames are passed over.
OPEN: Final = 64


@dataclass(slots=True, eq=False)
class Pair:
    """What both said of one frame: the model at work, and the one in the shadow."""

    stream: str
    key: FrameKey
    live: Outcome | None = None
    other: Outcome | None = None


class Shadow:
    """Has an executor of its own compute a share of the frames, where it has room for them.

    The live way waits for nothing here: a frame for which there is no room is passed over.

    Parameters
    ----------
    executor : Executor
        Warm, with the model in the shadow.
    share : float
        Part of the frames, 0 to 1; which ones, their keys say.
    streams : collection of str
        Those that use the model.
    take : callable
        Gets each pair that is complete, in a thread of its own.

    Attributes
    ----------
    problem : str
        Why the last comparison was lost, "" where it was not.
    """

    def __init__(
        self, executor: Executor, share: float, streams: Collection[str], take: Callable[[Pair], None]
    ) -> None:
        self.executor = executor
        self.share = share
        self.offered = 0
        self.passed_over = 0
        self.problem = ""
        self._streams = frozenset(streams)
        self._take = take
        self._lock = threading.Lock()
        self._open: dict[FrameKey, Pair] = {}
        self._complete: SimpleQueue[Pair | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, stream: str, frames: Sequence[Frame]) -> None:
        """Take what it wants of the frames that are being computed."""
        if stream not in self._streams:
            return
        for frame in frames:
            if not is_chosen(frame.key, self.share):
                continue
            self.offered += 1
            if self.executor.free() < 1 or len(self._open) >= OPEN:
                self.passed_over += 1
                continue
            with self._lock:
                self._open[frame.key] = Pair(stream, frame.key)
            future = self.executor.submit(stream, [frame])
            future.add_done_callback(partial(self._came, frame.key))

    def note(self, key: FrameKey, outcome: Outcome) -> None:
        """Take the outcome of the model at work."""
        with self._lock:
            pair = self._open.get(key)
            if pair is not None:
                pair.live = outcome
                self._complete_if_both(pair)

    def close(self, timeout: float = 2.0) -> None:
        """Compare what is complete and stop; the executor is its maker's to close."""
        self._complete.put(None)
        self._thread.join(timeout)

    def _came(self, key: FrameKey, future: Future[list[Outcome]]) -> None:
        with self._lock:
            pair = self._open.get(key)
            if pair is not None:
                (pair.other,) = future.result()
                self._complete_if_both(pair)

    def _complete_if_both(self, pair: Pair) -> None:
        if pair.live is not None and pair.other is not None:
            del self._open[pair.key]
            self._complete.put(pair)

    def _run(self) -> None:
        while (pair := self._complete.get()) is not None:
            try:
                self._take(pair)
            except Exception as error:
                # Said once, until it works again: on a full disk it happens with every frame.
                problem = f"comparisons are lost: {type(error).__name__}: {error}"
                if problem != self.problem:
                    log.exception("frame %d: %s", pair.key.frame, problem)
                self.problem = problem
            else:
                self.problem = ""


def is_chosen(key: FrameKey, share: float) -> bool:
    """Whether a frame is among the share: by its key, so that every run chooses the same ones."""
    name = f"{key.series_uid}/{key.frame}/{key.channel}".encode()
    # Not a checksum: those of neighbouring numbers go together.
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest()) < share * 2.0**32


def equal(live: AnyMessage, other: AnyMessage) -> Agreement:
    """Compare two results by what they say, whoever says it and however long that took."""
    return Agreement(_plain(live) == _plain(other))


def _plain(message: AnyMessage) -> bytes:
    changes = {"provenance": Provenance(ModelInfo("", "")), "compute_ms": 0.0}
    fields = message.__struct_fields__
    known = {name: value for name, value in changes.items() if name in fields}
    return msgspec.msgpack.encode(msgspec.structs.replace(message, **known))
