"""Reading a detector's ZeroMQ socket: roles, re-publishing, limits, addresses.

The detector's socket is PUSH: it deals its messages out, each to one reader only. A reader is
therefore either the `primary` (PULL), which gets every message and may publish it again as it
came, or a `tap` (SUB) on somebody's re-publisher. A second PULL socket beside a file writer would
steal half of its frames.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from typing import Final, Literal, TypeAlias

import zmq

from daemon.sources.base import Event, Idle
from grainwatch.config import ConfigError, Table

Role = Literal["primary", "tap"]

_WAIT_MS: Final = 100
_ADDRESS: Final = re.compile(
    r"(tcp://(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):([0-9]{1,5}|\*)|ipc://\S+|inproc://\S+)"
)


class ReaderTable(Table, frozen=True, kw_only=True):
    """The keys that every source on a detector's ZeroMQ socket has; each source describes them."""

    address: str
    bind: bool = False
    role: Role = "primary"
    republish: str = ""
    high_water_mark: int = 32
    max_message_bytes: int = 256 * 1024 * 1024
    max_image_bytes: int = 256 * 1024 * 1024

    def __post_init__(self) -> None:
        for key in ("address", "republish"):
            value = getattr(self, key)
            if (value or key == "address") and not is_address(value):
                raise ValueError(f"{key}: expected tcp://host:port or ipc://path, got {value!r}")
        for key in ("high_water_mark", "max_message_bytes", "max_image_bytes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected 1 or more, got {getattr(self, key)}")
        if self.republish and self.role == "tap":
            raise ValueError("republish: only a source with role 'primary' can publish again")


Decode: TypeAlias = Callable[[list[memoryview]], list[Event]]
"""What a wire format adds: the parts of a message to events. It raises nothing."""


class ZmqSource:
    """Implements `daemon.sources.base.Source`. Its sockets are open from the beginning.

    Parameters
    ----------
    format_name : str
        For `describe`.
    config : ReaderTable
    stream : str
        Leads the errors: "streams.STREAM.source.address".
    decode : callable

    Raises
    ------
    ConfigError
        If an address cannot be bound or connected to.
    """

    def __init__(self, format_name: str, config: ReaderTable, stream: str, decode: Decode) -> None:
        self._name = format_name
        self._config = config
        self._decode = decode
        self._closed = False
        self._context = zmq.Context(io_threads=1)
        where = f"streams.{stream}.source"
        try:
            self._socket = self._open_input(where)
            self._output = self._open_output(where)
        except ConfigError:
            self._context.destroy(linger=0)
            raise

    @property
    def address(self) -> str:
        """Where it listens in fact: the port that was taken when the address ended in ``:*``."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def republished_at(self) -> str:
        """Where it publishes again in fact, "" for nowhere."""
        return self._output.getsockopt_string(zmq.LAST_ENDPOINT) if self._output else ""

    def events(self) -> Iterator[Event]:
        """Yield what arrives until the source is closed."""
        while not self._closed:
            # No name holds the message while the next one is waited for: its memory is free by then.
            yield from self._next()

    def describe(self) -> str:
        """Say what it listens to, how and where."""
        verb = "bound to" if self._config.bind else "connected to"
        return f"{self._name}, {self._config.role}, {verb} {self._config.address}"

    def close(self) -> None:
        """Close the sockets."""
        self._closed = True
        self._context.destroy(linger=0)

    def _next(self) -> list[Event]:
        """Return the events of the next message, `Idle` when none came in a moment.

        A message is published again, all parts as they came, before anybody looks into it.
        """
        try:
            part = self._socket.recv(copy=False)
        except zmq.Again:
            return [Idle()]
        parts = [part]
        while part.more:
            part = self._socket.recv(copy=False)
            parts.append(part)
        if self._output is not None:
            self._output.send_multipart(parts, copy=False)
        return self._decode([part.buffer for part in parts])

    def _open_input(self, where: str) -> zmq.Socket[bytes]:
        config = self._config
        socket = self._context.socket(zmq.PULL if config.role == "primary" else zmq.SUB)
        socket.set_hwm(config.high_water_mark)
        # A wait inside of recv costs nothing when a message is there; polling first costs each one.
        socket.setsockopt(zmq.RCVTIMEO, _WAIT_MS)
        # Beyond this the transport cuts the line, which costs the peer's queue: a last resort for
        # memory. Smaller messages that are too large still come in and are failed one by one.
        socket.setsockopt(zmq.MAXMSGSIZE, max(4 * config.max_message_bytes, 1 << 30))
        if config.role == "tap":
            socket.setsockopt(zmq.SUBSCRIBE, b"")
        attach(socket, config.address, config.bind, f"{where}.address")
        return socket

    def _open_output(self, where: str) -> zmq.Socket[bytes] | None:
        if not self._config.republish:
            return None
        socket = self._context.socket(zmq.PUB)
        socket.set_hwm(self._config.high_water_mark)
        attach(socket, self._config.republish, True, f"{where}.republish")
        return socket


def is_address(value: str) -> bool:
    """Say whether a socket can be bound or connected to a text, as far as the text says."""
    found = _ADDRESS.fullmatch(value)
    if found is None:
        return False
    port = found.group(3)
    return port is None or port == "*" or 1 <= int(port) <= 65535


def attach(socket: zmq.Socket[bytes], address: str, bind: bool, key: str) -> None:
    """Bind or connect a socket.

    Raises
    ------
    ConfigError
        Naming the key of the configuration, and why the address cannot be used.
    """
    try:
        if bind:
            socket.bind(address)
        else:
            socket.connect(address)
    except zmq.ZMQError as error:
        reasons = {
            errno.EADDRINUSE: "is in use by another program",
            errno.EADDRNOTAVAIL: "is not an address of this machine",
            errno.ENODEV: "is not an address of this machine",
            errno.EACCES: "is not allowed for this user",
        }
        reason = reasons.get(error.errno or 0, f"cannot be used: {error.strerror}")
        raise ConfigError(f"{key}: {address} {reason}") from error
