"""One connection to a daemon's image port, from its handshake to its loss, and what was said over it."""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass, field
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from grainwatch.config import ConfigError
from grainwatch.push_wire import (
    DEFAULT_ADDRESS,
    BadHead,
    FromDaemon,
    FromSender,
    Welcome,
    pack,
    read_from_daemon,
)

_MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024
_MAX_READ: Final = 1000


class Link:
    """A DEALER socket whose ups and downs are watched. One that is lost is thrown away.

    Parameters
    ----------
    context : zmq.Context
    address : str

    Attributes
    ----------
    up : bool
        A ZeroMQ socket of the right kind has answered.
    lost : bool
        It was up and is no more.
    strange : bool
        Something is there that is no image port.

    Raises
    ------
    ConfigError
        If the address is none.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.up = False
        self.lost = False
        self.strange = False
        self._socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            # Nothing is queued for a daemon that is not there: what was sent is known to be on its way.
            (zmq.IMMEDIATE, 1),
            (zmq.RCVHWM, 100_000),
            (zmq.MAXMSGSIZE, _MAX_ANSWER_BYTES),
            (zmq.RECONNECT_IVL, 200),
            (zmq.RECONNECT_IVL_MAX, 2000),
            # A daemon whose machine vanished is noticed.
            (zmq.HEARTBEAT_IVL, 2000),
            (zmq.HEARTBEAT_TIMEOUT, 10_000),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_ALL)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"{address!r}: expected an address such as {DEFAULT_ADDRESS} ({error.strerror})"
            ) from None

    def close(self) -> None:
        """Cut the connection."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def receive(self, wait_s: float) -> list[FromDaemon]:
        """Return what has arrived, waiting at most so long for it."""
        readable = dict(self._poller.poll(round(1000 * wait_s)))
        answers = self._read_answers() if self._socket in readable else []
        if self._monitor in readable:
            self._read_events()
        return answers

    def send(self, head: FromSender, data: Any = None) -> bool:
        """Send; return False if it cannot be sent at present."""
        parts = [pack(head)] if data is None else [pack(head), data]
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def _read_answers(self) -> list[FromDaemon]:
        answers: list[FromDaemon] = []
        while len(answers) < _MAX_READ:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                answers.append(read_from_daemon(parts[0]))
            except BadHead:
                self.strange = True  # the port of another program, or of another version
        return answers

    def _read_events(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.up = True
            elif event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                self.strange = True
            elif event == zmq.EVENT_DISCONNECTED and self.up:
                self.lost = True
            elif event == zmq.EVENT_DISCONNECTED:
                self.strange = True


@dataclass(slots=True)
class Session:
    """What has been said over one connection.

    Attributes
    ----------
    link : Link
    greeted, begun, left : bool
        The hello is sent; it is our turn; the turn was given back.
    welcome : Welcome or None
    fresh : bool
        A new series was asked for.
    held : dict
        From the fingerprints of the images that need not be sent to their numbers.
    numbers : dict
        From the numbers of the series that are taken to fingerprints.
    highest : int
        The highest of them, -1 without any.
    """

    link: Link
    greeted: bool = False
    welcome: Welcome | None = None
    begun: bool = False
    left: bool = False
    fresh: bool = False
    held: dict[bytes, int] = field(default_factory=dict)
    numbers: dict[int, bytes] = field(default_factory=dict)
    highest: int = -1

    def note(self, number: int, fingerprint: bytes) -> None:
        """Note that a number is taken."""
        self.numbers[number] = fingerprint
        self.highest = max(self.highest, number)


def client_name() -> str:
    """Return who sends, for a person to read."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such thing in some services and containers
        user = "somebody"
    return f"{user} at {socket.gethostname()}, process {os.getpid()}"[:200]
