"""Answers those who missed messages: a ROUTER socket in a thread of its own.

A request is one part of JSON, the reply a part of JSON followed by pairs [topic, payload] exactly
as they were published; docs/reference/catch-up.md has the keys. An answer is bounded in messages
and bytes and says where to go on, so that nobody's catching up delays another's for long; the
publisher itself runs in another thread and never waits for it.
"""

from __future__ import annotations

import heapq
import json
import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import zmq

from daemon.sinks.message_ring import MessageRing, Sent
from daemon.sinks.stored_results import StoredResults

log = logging.getLogger("grainwatch.sinks.zmq")

CHUNK_MESSAGES = 256
CHUNK_BYTES = 4 * 1024 * 1024
REQUEST_BYTES = 4096
QUEUED_REPLIES = 16
POLL_MS = 100

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class SeqRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Messages by sequence number, both ends included; without `to_seq` up to the newest."""

    from_seq: Count
    to_seq: Count | None = None
    id: str | int | None = None


class SeriesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """Messages of a series by frame number, both ends included; `after_seq` is where to go on."""

    series_uid: str
    from_: Count | None = None
    to: Count | None = None
    after_seq: Count = 0
    id: str | int | None = None


class BadRequest(ValueError):
    """A request that cannot be understood; the text goes back to who asked."""


def parse_request(raw: bytes) -> SeqRequest | SeriesRequest:
    """Read a request.

    Raises
    ------
    BadRequest
        If it is not JSON, or has not the keys of one of the two kinds.
    """
    try:
        keys = msgspec.json.decode(raw, type=dict[str, Any])
        if "series_uid" in keys:
            return msgspec.json.decode(raw, type=SeriesRequest)
        if "from_seq" in keys:
            return msgspec.json.decode(raw, type=SeqRequest)
    except msgspec.ValidationError as error:
        raise BadRequest(f"bad request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"bad request: not JSON: {error}") from None
    raise BadRequest('bad request: expected "from_seq" (and "to_seq"), or "series_uid" (and "from", "to")')


class CatchUp:
    """Finds what is asked for: in the ring, and beyond it in the results files.

    Parameters
    ----------
    ring : MessageRing
    stored : StoredResults
    publisher : str
        Name of the daemon, sent with each reply.
    """

    def __init__(self, ring: MessageRing, stored: StoredResults, publisher: str) -> None:
        self._ring = ring
        self._stored = stored
        self._publisher = publisher

    def reply(self, raw: bytes) -> list[bytes]:
        """Answer a request with the parts of its reply; never raises for what is in it."""
        try:
            request = parse_request(raw)
        except BadRequest as error:
            header = {"id": _id_of(raw), "status": "error", "error": str(error)}
            return [json.dumps(header).encode()]
        if isinstance(request, SeqRequest):
            header, chunk = self._by_seq(request)
        else:
            header, chunk = self._by_series(request)
        header |= {
            "id": request.id,
            "status": "ok",
            "publisher": self._publisher,
            "seqs": [sent.seq for sent in chunk],
        }
        return [json.dumps(header).encode(), *(part for sent in chunk for part in (sent.topic, sent.payload))]

    def _by_seq(self, request: SeqRequest) -> tuple[dict[str, Any], list[Sent]]:
        recent = self._ring.sent()
        issued = self._ring.issued()
        newest = issued[1] if issued is not None else (self._stored.last_seq() or 0)
        first = request.from_seq
        last = newest if request.to_seq is None else min(request.to_seq, newest)
        near = [sent for sent in recent if first <= sent.seq <= last]
        needs_files = near == [] or len(near) < last - first + 1
        far: Iterable[Sent] = self._stored.by_seq(first, last) if needs_files and first <= last else ()
        chunk, more = _chunk(_union(near, far))
        covered = chunk[-1].seq if more else max(last, first - 1)
        header = {
            "from_seq": first,
            "to_seq": covered,
            "more": more,
            "last_seq": newest,
            "unavailable": self._unavailable(first, covered, chunk, issued),
        }
        return header, chunk

    def _by_series(self, request: SeriesRequest) -> tuple[dict[str, Any], list[Sent]]:
        frames = None if request.from_ is None and request.to is None else (request.from_, request.to)
        near = [
            sent
            for sent in self._ring.sent()
            if sent.series_uid == request.series_uid
            and sent.seq > request.after_seq
            and (frames is None or _in_range(sent.frame, frames))
        ]
        far = self._stored.by_series(request.series_uid, frames, request.after_seq)
        chunk, more = _chunk(_union(near, far))
        after = chunk[-1].seq if chunk else request.after_seq
        return {"series_uid": request.series_uid, "more": more, "after_seq": after}, chunk

    def _unavailable(
        self, first: int, last: int, chunk: list[Sent], issued: tuple[int, int] | None
    ) -> list[tuple[int, int]]:
        """Return the ranges of numbers that this daemon gave out and nobody can bring back.

        Numbers from before its start that are in no file are not among them: they were reserved
        and never used, or belonged to messages that no file keeps.
        """
        if issued is None:
            return []
        low, high = max(first, issued[0]), min(last, issued[1])
        if low > high:
            return []
        present = sorted({sent.seq for sent in chunk} | set(self._ring.transient(low, high)))
        holes = []
        expected = low
        for seq in (*(s for s in present if low <= s <= high), high + 1):
            if seq > expected:
                holes.append((expected, seq - 1))
            expected = seq + 1
        return holes


class CatchUpServer:
    """The ROUTER socket and its thread.

    Parameters
    ----------
    socket : zmq.Socket
        Bound; belongs to the thread from `start` on.
    catch_up : CatchUp
    """

    def __init__(self, socket: zmq.Socket[bytes], catch_up: CatchUp) -> None:
        self._socket = socket
        self._catch_up = catch_up
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catch-up", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering and release the socket."""
        self._stop.set()
        self._thread.join()
        self._socket.close(linger=200)

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._socket.poll(POLL_MS):
                continue
            parts = self._socket.recv_multipart()
            # A REQ socket puts an empty part between the address and its request.
            envelope, body = (
                (parts[:2], parts[2:]) if len(parts) > 2 and not parts[1] else (parts[:1], parts[1:])
            )
            try:
                reply = self._catch_up.reply(b"".join(body))
            except Exception:
                # One strange request or file must not silence the catch-up for everybody else.
                log.exception("a catch-up request could not be answered")
                header = {
                    "id": _id_of(b"".join(body)),
                    "status": "error",
                    "error": "internal error, see the log",
                }
                reply = [json.dumps(header).encode()]
            try:
                self._socket.send_multipart([*envelope, *reply], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                log.info("a catch-up reply was not taken: %s", error)


def bind_catch_up(
    context: zmq.Context[zmq.Socket[bytes]], address: str, ring: MessageRing, folder: Path, publisher: str
) -> tuple[CatchUpServer, str]:
    """Bind the socket; returns the server (not started) and the address it got.

    Raises
    ------
    zmq.ZMQError
        If the address cannot be bound.
    """
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES)
    socket.setsockopt(zmq.SNDHWM, QUEUED_REPLIES)
    try:
        socket.bind(address)
    except zmq.ZMQError:
        socket.close(linger=0)
        raise
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    server = CatchUpServer(socket, CatchUp(ring, StoredResults(folder, publisher), publisher))
    return server, bound.rstrip(b"\0").decode()


def _union(near: list[Sent], far: Iterable[Sent]) -> Iterator[Sent]:
    last = -1
    for sent in heapq.merge(sorted(near, key=lambda s: s.seq), far, key=lambda s: s.seq):
        if sent.seq != last:
            last = sent.seq
            yield sent


def _chunk(messages: Iterator[Sent]) -> tuple[list[Sent], bool]:
    """Take messages up to the bounds of one reply; the flag says that there are more."""
    chunk: list[Sent] = []
    size = 0
    for sent in messages:
        if chunk and (len(chunk) >= CHUNK_MESSAGES or size + len(sent.payload) > CHUNK_BYTES):
            return chunk, True
        chunk.append(sent)
        size += len(sent.payload)
    return chunk, False


def _in_range(frame: int, frames: tuple[int | None, int | None]) -> bool:
    first, last = frames
    return frame >= max(first or 0, 0) and (last is None or frame <= last)


def _id_of(raw: bytes) -> Any:
    """Return the id of a request that may be malformed otherwise."""
    try:
        keys = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    found = keys.get("id")
    return found if isinstance(found, str | int) else None
