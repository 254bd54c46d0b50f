"""Subscribe to a daemon's results: `ResultStream`.

The daemon numbers all its messages in one row. A stream hands them out in that order, each once,
and asks the daemon's catch-up address for those that did not arrive; what nobody can bring back
is counted, never passed over in silence. docs/reference/catch-up.md has the protocol.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import msgspec
import zmq

from grainwatch.config import ConfigError
from grainwatch.messages import AnyMessage, FrameKey, FrameResult
from grainwatch.sequence import Sequencer
from grainwatch.wire import (
    UNREADABLE,
    Gap,
    Reply,
    StreamError,
    catch_up_address,
    common,
    decoded,
    message_types,
    parsed_since,
    stream_of,
)

if TYPE_CHECKING:
    import pandas as pd

    from grainwatch.table import Rows

log = logging.getLogger("grainwatch.stream")

DEFAULT_ADDRESS = "tcp://127.0.0.1:31100"
SLICE_S = 0.1  # a wait is cut into slices, so that Ctrl-C and a timeout work on Windows too
RESEND_S = 1.0
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
MAX_HELD = 20_000
MAX_READ = 1000
RECENT_SEQS = 4096
RECENT_KEYS = 65_536
RECENT_GAPS = 1000

_Item: TypeAlias = tuple[str, AnyMessage | None]


@dataclass(slots=True)
class _Ask:
    """A request under way. `kind` is "series" (where does it begin), "since" or "hole"."""

    kind: str
    request: dict[str, Any]
    begun: float
    sent: float


class ResultStream:
    """The results of a daemon, as they come.

    Iterate over it with ``for`` or ``async for``; it reconnects by itself. Not for use by
    several threads at once.

    Parameters
    ----------
    address : str
        Where the daemon publishes (``sinks.zmq.results``).
    catch_up : str, optional
        Where missed messages are asked for; by default one port above `address`. "" asks nobody.
    since : int or str, optional
        Where to begin: a sequence number, a series_uid, or "start" for all that is stored.
        Without it, the next message is the first.
    streams : iterable of str, optional
        Only results of these streams.
    schemas : "all" or iterable of str, optional
        Only messages of these schemas ("grainwatch.map/1", or "grainwatch.map" for any version);
        without it, results of frames.
    timeout : float, optional
        The iteration ends after so many seconds without a message that was asked for; without
        it, it waits for ever.
    fill_timeout : float
        How long later messages are held back while missed ones are asked for, in seconds.

    Attributes
    ----------
    gaps : list of Gap
        What is lost for good (the last 1000 gaps).
    lost : int
        How many messages that were in all.
    filled, repeats, undecodable, restarts : int
        Messages brought back through the catch-up; dropped because they had come before; not of
        a form known here; times that the publisher began to number anew.
    last_seq : int or None
        Number of the last message looked at; ``since=last_seq + 1`` goes on there.

    Raises
    ------
    ConfigError
        If an address, a schema or `since` cannot be understood.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        catch_up: str | None = None,
        *,
        since: int | str | None = None,
        streams: Iterable[str] | None = None,
        schemas: str | Iterable[str] | None = None,
        timeout: float | None = None,
        fill_timeout: float = 5.0,
    ) -> None:
        self._closed = True  # until the sockets exist
        self.address = address
        self.catch_up = catch_up_address(address) if catch_up is None else catch_up
        self.gaps: list[Gap] = []
        self.lost = self.filled = self.repeats = self.undecodable = self.restarts = 0
        self.last_seq: int | None = None
        self._streams = None if streams is None else frozenset(streams)
        self._types = message_types(schemas)
        self._timeout = timeout
        self._fill_timeout = fill_timeout
        self._since = parsed_since(since)
        if self._since is not None and not self.catch_up:
            raise ConfigError(f"since={since!r} needs the catch-up address of the daemon at {address}")
        self._sequencer: Sequencer[_Item] = Sequencer(self._since if isinstance(self._since, int) else None)
        self._ready: deque[AnyMessage] = deque()
        self._recent: OrderedDict[int, int] = OrderedDict()
        self._keys: OrderedDict[FrameKey, None] = OrderedDict()
        self._last_live: int | None = None
        self._newest_published = 0.0
        self._ask: _Ask | None = None
        self._requests = 0
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sub = self._socket(zmq.SUB)
        self._dealer: zmq.Socket[bytes] | None = None
        try:
            # All topics: only the whole row of numbers shows what is missing.
            self._sub.subscribe(b"")
            self._connect(self._sub, self.address, "address")
            if self.catch_up:
                self._dealer = self._socket(zmq.DEALER)
                self._connect(self._dealer, self.catch_up, "catch_up")
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._closed = False

    @property
    def complete(self) -> bool:
        """Whether nothing was lost so far."""
        return self.lost == 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AnyMessage:
        message = self.next(self._timeout)
        if message is None:
            raise StopIteration
        return message

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AnyMessage:
        message = await self._next_async(self._timeout)
        if message is None:
            raise StopAsyncIteration
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; an iteration that runs ends."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            self._context.destroy(linger=0)
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def next(self, timeout: float | None = None) -> AnyMessage | None:
        """Return the next message, or None after `timeout` seconds (None: wait for ever).

        Raises
        ------
        StreamError
            If the results from `since` on cannot be had; the next call goes on with what comes.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._ready and not self._closed:
            left = SLICE_S if deadline is None else min(SLICE_S, max(0.0, deadline - time.monotonic()))
            self._pump(left)
            if deadline is not None and time.monotonic() >= deadline:
                break
        return self._ready.popleft() if self._ready else None

    def latest(self, timeout: float | None = None) -> AnyMessage | None:
        """Return the newest message that has arrived and pass over those before it.

        Waits `timeout` seconds for one when there is none (None: for ever).
        """
        newest = self.next(timeout)
        while newest is not None and (later := self.next(0.0)) is not None:
            newest = later
        return newest

    def read(self, count: int | None = None, idle_s: float = 1.0) -> list[AnyMessage]:
        """Return the next messages: `count` of them, or until none has come for `idle_s` seconds."""
        messages: list[AnyMessage] = []
        while count is None or len(messages) < count:
            message = self.next(idle_s)
            if message is None:
                break
            messages.append(message)
        return messages

    def to_dataframe(
        self, count: int | None = None, idle_s: float = 1.0, rows: Rows = "crystals"
    ) -> pd.DataFrame:
        """Return the next results as a pandas table; its columns are those of `grainwatch.table`.

        Takes `count` results, or those that come until none has come for `idle_s` seconds.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        from grainwatch.table import dataframe, need_pandas

        need_pandas()
        return dataframe(self.read(count, idle_s), rows)

    async def _next_async(self, timeout: float | None) -> AnyMessage | None:
        # A thread waits, because asyncio on Windows cannot watch these sockets. What it finds goes
        # into the queue of ready messages, so a cancelled wait loses nothing.
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="grainwatch")
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._ready and not self._closed:
            if deadline is not None and time.monotonic() >= deadline:
                break
            await asyncio.get_running_loop().run_in_executor(self._executor, self._pump, SLICE_S)
        return self._ready.popleft() if self._ready else None

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, MAX_HELD)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        # A daemon whose machine vanished is noticed, and connected to when it is back.
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        return socket

    def _connect(self, socket: zmq.Socket[bytes], address: str, what: str) -> None:
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"{what}: {address!r}: expected an address such as {DEFAULT_ADDRESS} ({error.strerror})"
            ) from None

    def _pump(self, wait_s: float) -> None:
        """Wait at most `wait_s` for something to arrive and deal with all that has."""
        with self._lock:
            if self._closed:
                return
            self._advance()
            readable = self._wait(wait_s)
            if self._sub in readable:
                self._read_live()
            if self._dealer in readable:
                self._read_replies()
            self._advance()

    def _wait(self, wait_s: float) -> list[zmq.Socket[bytes] | None]:
        poller = zmq.Poller()
        if len(self._sequencer) < MAX_HELD:
            poller.register(self._sub, zmq.POLLIN)
        if self._dealer is not None:
            poller.register(self._dealer, zmq.POLLIN)
        return [socket for socket, _ in poller.poll(round(wait_s * 1000))]

    def _read_live(self) -> None:
        for _ in range(MAX_READ):
            try:
                parts = self._sub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(parts) == 2:
                self._live(parts[0], parts[1])
            else:
                self.undecodable += 1

    def _live(self, topic: bytes, payload: bytes) -> None:
        message, head = decoded(payload)
        if message is None:
            self.undecodable += 1
        if head is None:
            return
        digest = zlib.crc32(payload)
        if self._last_live is not None and head.seq <= self._last_live:
            published = head.times.published
            if self._recent.get(head.seq) == digest or published <= self._newest_published:
                self.repeats += 1
                return
            # A smaller number on a newer message: the daemon has lost its state and counts anew.
            self.restarts += 1
            log.warning("%s numbers its messages anew from %d", self.address, head.seq)
            self._ask = None
            items, skipped = self._sequencer.restart(min(1, head.seq))
            self._deliver(items)
            self._count_lost(skipped, "the daemon lost its state")
            self._recent.clear()
        self._last_live = head.seq
        self._newest_published = max(self._newest_published, head.times.published)
        _remember(self._recent, head.seq, digest, RECENT_SEQS)
        if self._since is not None and self._sequencer.expected is None:
            # Where the series begins is not known yet: nothing may set the first number but that.
            self._sequencer.expected = 0
        if self._sequencer.offer(head.seq, (stream_of(topic), message)):
            if self._since is None:
                self._deliver(self._sequencer.take())
        else:
            self.repeats += 1

    def _advance(self) -> None:
        """Ask for what is missing, ask again, or stop waiting."""
        now = time.monotonic()
        if self._ask is None:
            hole = self._sequencer.hole() if self._since is None else None
            if isinstance(self._since, str):
                self._send("series", {"series_uid": self._since}, now)
            elif self._since is not None:
                self._send("since", {"from_seq": self._since}, now)
            elif hole is not None and self._dealer is not None:
                self._send("hole", {"from_seq": hole[0], "to_seq": hole[1]}, now)
            elif hole is not None:
                self._give_up("there is no catch-up address")
            return
        # Nothing is held up before the first message: a daemon that is not there yet may come.
        if now - self._ask.begun > self._fill_timeout and len(self._sequencer):
            self._give_up(f"no answer from {self.catch_up}")
        elif now - self._ask.sent > RESEND_S:
            self._transmit(self._ask, now)

    def _send(self, kind: str, request: dict[str, Any], now: float) -> None:
        self._requests += 1
        self._ask = _Ask(kind, {"id": self._requests, **request}, now, now)
        self._transmit(self._ask, now)

    def _transmit(self, ask: _Ask, now: float) -> None:
        ask.sent = now
        assert self._dealer is not None
        try:
            self._dealer.send(json.dumps(ask.request).encode(), zmq.NOBLOCK)
        except zmq.Again:
            log.debug("the catch-up queue to %s is full", self.catch_up)

    def _give_up(self, reason: str) -> None:
        """Go on without the messages that are being waited for.

        Raises
        ------
        StreamError
            If that is where the stream was to begin: how much is missing is not known then.
        """
        self._ask = None
        if self._since is not None:
            since, self._since = self._since, None
            self._sequencer.begin(None)
            raise StreamError(f"the results since {since!r} cannot be had: {reason}")
        hole = self._sequencer.hole()
        if hole is not None:
            items, skipped = self._sequencer.cover(hole[1])
            self._count_lost(skipped, reason)
            self._deliver(items)

    def _read_replies(self) -> None:
        assert self._dealer is not None
        for _ in range(MAX_READ):
            try:
                parts = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                reply = msgspec.json.decode(parts[0], type=Reply)
            except UNREADABLE:
                self.undecodable += 1
                continue
            if self._ask is None or reply.id != self._ask.request["id"]:
                continue  # an answer to what was asked twice, or is not wanted any more
            if reply.status != "ok" or len(parts) != 1 + 2 * len(reply.seqs):
                self._give_up(f"{self.catch_up} answers: {reply.error or 'something unreadable'}")
                continue
            ask, self._ask = self._ask, None
            if ask.kind == "series":
                self._begin_at_series(reply)
            else:
                self._fill(ask, reply, parts)

    def _begin_at_series(self, reply: Reply) -> None:
        if not reply.seqs:
            uid, self._since = self._since, None
            self._sequencer.begin(None)
            raise StreamError(f"no results of series {uid} are known to {self.catch_up}")
        self._since = reply.seqs[0]
        self._sequencer.begin(reply.seqs[0])

    def _fill(self, ask: _Ask, reply: Reply, parts: list[bytes]) -> None:
        for seq, topic, payload in zip(reply.seqs, parts[1::2], parts[2::2], strict=True):
            message, head = decoded(payload)
            if message is None:
                self.undecodable += 1
            if head is not None:
                self._newest_published = max(self._newest_published, head.times.published)
            if self._sequencer.offer(seq, (stream_of(topic), message)):
                self.filled += 1
        items, skipped = self._sequencer.cover(reply.to_seq)
        self._count_lost(common(skipped, reply.unavailable), "not kept by the daemon")
        self._deliver(items)
        if ask.kind == "hole":
            if not reply.more and reply.to_seq < ask.request["to_seq"]:
                self._give_up(f"{self.catch_up} belongs to a daemon that has not come that far")
            return
        if reply.more:
            self._since = reply.to_seq + 1
            return
        if isinstance(self._since, int) and reply.last_seq + 1 < self._since:
            log.warning(
                "%s has not come to number %d yet: its last is %d", self.address, self._since, reply.last_seq
            )
            self._sequencer.begin(reply.last_seq + 1)
        self._since = None

    def _count_lost(self, ranges: Iterable[tuple[int, int]], reason: str) -> None:
        for first, last in ranges:
            gap = Gap(first, last, reason)
            self.lost += len(gap)
            self.gaps = [*self.gaps[-RECENT_GAPS + 1 :], gap]
            log.warning("%d messages lost (%d to %d): %s", len(gap), first, last, reason)

    def _deliver(self, items: list[_Item]) -> None:
        for stream, message in items:
            if message is None:
                continue
            self.last_seq = message.seq
            elsewhere = self._streams is not None and stream not in self._streams
            if elsewhere or not isinstance(message, self._types):
                continue
            if isinstance(message, FrameResult):
                if message.again and message.key in self._keys:
                    self.repeats += 1
                    continue
                _remember(self._keys, message.key, None, RECENT_KEYS)
            self._ready.append(message)


def _remember(memory: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    memory[key] = value
    if len(memory) > most:
        memory.popitem(last=False)
