"""Who sends images: the socket, the table of senders, and whose turn it is.

One sender at a time has the turn, because a stream has one series under way; the others wait in the
order of their asking. Whether a sender is still there is libzmq's to know (its heartbeats): sending
to one that has gone is an error, so it is enough to send something.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Final, NamedTuple

import zmq

from daemon.flow.log_limit import LogLimit
from grainwatch.config import ConfigError
from grainwatch.push_wire import (
    MAX_HEAD_BYTES,
    VERSION,
    BadHead,
    Begin,
    Busy,
    FromDaemon,
    FromSender,
    Hello,
    Ping,
    Refused,
    Welcome,
    pack,
    read_from_sender,
)

log = logging.getLogger(__name__)

#: Senders that may be connected; each costs a little memory, and up to a window of images.
MAX_SENDERS: Final = 64
#: Answers that wait for a sender that does not read them; then it is forgotten.
_QUEUED_ANSWERS: Final = 4000
#: How often those who wait cause a look at whether the one before them is still there, seconds.
_PROBE_S: Final = 1.0
#: Heartbeats of the transport, ms.
_HEARTBEAT_MS: Final = 2000
_HEARTBEAT_TIMEOUT_MS: Final = 10_000


class Incoming(NamedTuple):
    """A message that can be read, and its second part."""

    sender: bytes
    head: FromSender
    data: memoryview | None


@dataclass(slots=True)
class _Sender:
    client: str
    begin: Begin | None = None


class Desk:
    """The ROUTER socket and what is known of those who send to it.

    Parameters
    ----------
    address : str
    max_bytes : int
        The largest image; what is more than twice as large is cut off by the transport.
    welcome : Welcome
    key : str
        Leads the errors: "streams.NAME.source.address".

    Raises
    ------
    ConfigError
        If the address cannot be bound.
    """

    def __init__(self, address: str, max_bytes: int, welcome: Welcome, key: str) -> None:
        self._welcome = welcome
        self._senders: dict[bytes, _Sender] = {}
        self._queue: deque[bytes] = deque()
        self._complaints = LogLimit(log, welcome.stream)
        self._unreadable, self._unreadable_why = 0, ""
        self._probed = 0.0
        self.turn: bytes | None = None
        self.unreadable = 0
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.RCVHWM, welcome.window + 4)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUED_ANSWERS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 2 * max_bytes + MAX_HEAD_BYTES)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            known = {
                errno.EADDRINUSE: "is in use by another program",
                errno.EADDRNOTAVAIL: "is not an address of this machine",
                errno.ENODEV: "is not an address of this machine",
                errno.EACCES: "is not allowed for this user",
            }
            reason = known.get(error.errno or 0, f"cannot be used: {error.strerror}")
            raise ConfigError(f"{key}: {address} {reason}") from error

    @property
    def address(self) -> str:
        """Where it listens in fact."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def senders(self) -> int:
        """How many said hello and are not known to have gone."""
        return len(self._senders)

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._queue)

    def close(self) -> None:
        """Close the socket."""
        self._context.destroy(linger=200)

    def receive(self, wait_ms: int) -> Incoming | None:
        """Return the next message of somebody who may say it; what needs no more is answered here."""
        if not self._socket.poll(wait_ms):
            return None
        sender, *parts = self._socket.recv_multipart(copy=False)
        return self._read(sender.bytes, parts)

    def client(self, sender: bytes) -> str:
        """Return who a sender says it is."""
        known = self._senders.get(sender)
        return known.client if known else ""

    def send(self, sender: bytes, head: FromDaemon) -> bool:
        """Send; return whether the sender is there and reads. One who does not is forgotten."""
        try:
            self._socket.send_multipart([sender, pack(head)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if sender == self.turn:
                why = "has gone" if error.errno == errno.EHOSTUNREACH else "does not read its answers"
                log.info("%s: sender %s %s", self._welcome.stream, self.client(sender), why)
            self.forget(sender)
            return False
        return True

    def forget(self, sender: bytes) -> None:
        """Know a sender no more; its turn goes to the next."""
        self._senders.pop(sender, None)
        self.withdraw(sender)

    # Turns.

    def ask(self, sender: bytes, begin: Begin, series: str) -> None:
        """Put a sender in the row; it is told so when somebody else has the turn, with that `series`."""
        self._senders[sender].begin = begin
        if sender not in self._queue and sender != self.turn:
            self._queue.append(sender)
        self.probe()
        if self.turn is not None and sender != self.turn:
            ahead = list(self._queue).index(sender) + 1
            self.send(sender, Busy(series, self.client(self.turn), ahead))

    def next_turn(self) -> tuple[bytes, Begin] | None:
        """Give the turn to the next in the row, when nobody has it."""
        if self.turn is not None:
            return None
        while self._queue:
            sender = self._queue.popleft()
            known = self._senders.get(sender)
            if known is not None and known.begin is not None:
                self.turn = sender
                return sender, known.begin
        return None

    def withdraw(self, sender: bytes) -> None:
        """Take a sender out of the row, or its turn from it."""
        if sender in self._queue:
            self._queue.remove(sender)
        if self.turn == sender:
            self.turn = None

    def probe(self) -> None:
        """Look whether the one who has the turn is still there."""
        self._probed = time.monotonic()
        if self.turn is not None:
            self.send(self.turn, Ping())

    def probe_if_due(self) -> None:
        """Look for it now and then while others wait."""
        if self._queue and time.monotonic() - self._probed > _PROBE_S:
            self.probe()

    # Messages.

    def take_unreadable(self) -> tuple[int, str]:
        """Return how many messages since the last call could not be read, and why the last could not."""
        count, self._unreadable = self._unreadable, 0
        return count, self._unreadable_why

    def _read(self, sender: bytes, parts: list[zmq.Frame]) -> Incoming | None:
        if not 1 <= len(parts) <= 2:
            self._cannot_read(sender, f"a message of {len(parts)} parts")
            return None
        try:
            head = read_from_sender(parts[0].buffer)
        except BadHead as error:
            self._cannot_read(sender, str(error))
            return None
        if isinstance(head, Hello):
            self._hello(sender, head)
            return None
        if sender not in self._senders:
            # The rest of one who was killed; or one who was forgotten, and connects again when told so.
            self.send(sender, Refused("the first message has to be a hello", fatal=True))
            return None
        return Incoming(sender, head, parts[1].buffer if len(parts) == 2 else None)

    def _cannot_read(self, sender: bytes, why: str) -> None:
        self._unreadable += 1
        self.unreadable += 1
        self._unreadable_why = why
        self._complaints.warning("%s: a message that is not understood: %s", self._welcome.stream, why)
        self.send(sender, Refused(why))

    def _hello(self, sender: bytes, hello: Hello) -> None:
        if hello.version != VERSION:
            spoken = f"{self._welcome.program} speaks version {VERSION}"
            why = f"protocol version {hello.version} is not spoken here: {spoken}"
            self._complaints.warning("%s: sender %s: %s", self._welcome.stream, hello.client, why)
            self.send(sender, Refused(why, fatal=True))
            self.forget(sender)
            return
        if len(self._senders) >= MAX_SENDERS and sender not in self._senders:
            for known in list(self._senders):
                self.send(known, Ping())
        if len(self._senders) >= MAX_SENDERS and sender not in self._senders:
            self.send(sender, Refused(f"{MAX_SENDERS} senders are connected already", fatal=True))
            return
        # A sender that begins anew has left whatever it had begun.
        self.withdraw(sender)
        self._senders[sender] = _Sender(hello.client)
        log.debug("%s: sender %s", self._welcome.stream, hello.client)
        self.send(sender, self._welcome)
