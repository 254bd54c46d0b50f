"""The last messages that were published, in memory, for those who missed them a moment ago."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass

from grainwatch.messages import AnyMessage, FrameResult, Health, series_uid_of, topic

TRANSIENT_KEPT = 1_000_000  # at one message of health a second: eleven days


@dataclass(frozen=True, slots=True)
class Sent:
    """A message as it went out. `frame` is -1 where it has none, `series_uid` "" for health."""

    seq: int
    topic: bytes
    series_uid: str
    frame: int
    payload: bytes

    @classmethod
    def of(cls, message: AnyMessage, stream: str, payload: bytes) -> Sent:
        """Wrap a message and its payload."""
        frame = message.key.frame if isinstance(message, FrameResult) else -1
        return cls(message.seq, topic(message, stream), series_uid_of(message), frame, payload)

    @property
    def transient(self) -> bool:
        """Whether no results file ever holds it."""
        return self.topic.startswith(Health.SCHEMA.encode())


class MessageRing:
    """A bounded memory of sent messages; used by the publisher and by the thread that answers.

    Parameters
    ----------
    max_messages, max_bytes : int
        What is kept at most.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._sent: deque[Sent] = deque()
        self._bytes = 0
        self._transient = array("Q")
        self._issued: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def append(self, sent: Sent) -> None:
        """Keep a message, let go of the oldest when there are too many."""
        with self._lock:
            self._sent.append(sent)
            self._bytes += len(sent.payload)
            first, last = self._issued or (sent.seq, sent.seq)
            self._issued = (min(first, sent.seq), max(last, sent.seq))
            while len(self._sent) > self._max_messages or (
                self._bytes > self._max_bytes and len(self._sent) > 1
            ):
                old = self._sent.popleft()
                self._bytes -= len(old.payload)
                if old.transient:
                    self._transient.append(old.seq)
            if len(self._transient) > TRANSIENT_KEPT:
                del self._transient[: TRANSIENT_KEPT // 10]

    def issued(self) -> tuple[int, int] | None:
        """Return the first and the last sequence number since the daemon started."""
        with self._lock:
            return self._issued

    def sent(self) -> list[Sent]:
        """Return what is kept, oldest first."""
        with self._lock:
            return list(self._sent)

    def transient(self, first: int, last: int) -> list[int]:
        """Return the numbers of health messages in a range that are not kept any more."""
        with self._lock:
            begin = bisect_left(self._transient, first)
            return list(self._transient[begin : bisect_right(self._transient, last)])
