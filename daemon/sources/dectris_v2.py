"""DECTRIS Stream V2: the socket.

The detector's socket is PUSH: it deals its messages out, each to one reader only. A source is
therefore either the `primary` reader (PULL), which gets every frame and may publish the raw
messages again, or a `tap` (SUB) on somebody's re-publisher. A second PULL socket beside a file
writer would steal half of its frames.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Final, Literal

import zmq

from daemon.sources.base import Arrival, Bad, Event, Idle
from daemon.sources.dectris_v2_codec import decode_message
from grainwatch.config import ConfigError, Table

Role = Literal["primary", "tap"]

_POLL_MS: Final = 100
_HEAD_BYTES: Final = 4096
_ADDRESS: Final = re.compile(
    r"(tcp://(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):([0-9]{1,5}|\*)|ipc://\S+|inproc://\S+)"
)


class Config(Table, frozen=True, kw_only=True):
    """``[streams.NAME.source]`` of type "dectris-v2".

    Attributes
    ----------
    address : str
        "tcp://host:port" of the detector (its port is 31001) or of a re-publisher. "ipc://path" is
        for senders that stay: when one leaves, libzmq drops what the reader has not taken yet.
    bind : bool
        Listen on `address` instead of connecting to it, for senders that connect.
    role : str
        "primary" takes every message from the detector, "tap" listens to a re-publisher.
    republish : str
        Where a primary publishes each message again as it came, for taps ("" for nowhere).
    high_water_mark : int
        Messages that may wait in the socket; a primary's detector keeps the others, a tap loses them.
    max_message_bytes : int
        A message that is larger, compressed as it came, is failed without being decoded.
    max_image_bytes : int
        An image that says it takes more uncompressed is failed before any memory is set aside for it.
    """

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
            if (value or key == "address") and not _is_address(value):
                raise ValueError(f"{key}: expected tcp://host:port or ipc://path, got {value!r}")
        for key in ("high_water_mark", "max_message_bytes", "max_image_bytes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected 1 or more, got {getattr(self, key)}")
        if self.republish and self.role == "tap":
            raise ValueError("republish: only a source with role 'primary' can publish again")


def _is_address(value: str) -> bool:
    found = _ADDRESS.fullmatch(value)
    if found is None:
        return False
    port = found.group(3)
    return port is None or port == "*" or 1 <= int(port) <= 65535


def open_source(config: Config, stream: str) -> DectrisV2Source:
    """Open the sockets, so that an address in use is known at once.

    Raises
    ------
    ConfigError
        If an address cannot be bound or connected to.
    """
    return DectrisV2Source(config, stream)


class DectrisV2Source:
    """Implements `daemon.sources.base.Source`."""

    def __init__(self, config: Config, stream: str) -> None:
        self._config = config
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
            if not self._socket.poll(_POLL_MS):
                yield Idle()
                continue
            parts = self._socket.recv_multipart(copy=False)
            if self._output is not None:
                self._output.send_multipart(parts, copy=False)
            yield from self._decode(parts)

    def describe(self) -> str:
        """Say what it listens to."""
        verb = "bound to" if self._config.bind else "connected to"
        return f"DECTRIS Stream V2, {self._config.role}, {verb} {self._config.address}"

    def close(self) -> None:
        """Close the sockets."""
        self._closed = True
        self._context.destroy(linger=0)

    def _open_input(self, where: str) -> zmq.Socket[bytes]:
        config = self._config
        socket = self._context.socket(zmq.PULL if config.role == "primary" else zmq.SUB)
        socket.set_hwm(config.high_water_mark)
        # Beyond this the transport cuts the line, which costs the peer's queue: a last resort for
        # memory. Smaller messages that are too large still come in and are failed one by one.
        socket.setsockopt(zmq.MAXMSGSIZE, max(4 * config.max_message_bytes, 1 << 30))
        if config.role == "tap":
            socket.setsockopt(zmq.SUBSCRIBE, b"")
        _attach(socket, config.address, config.bind, f"{where}.address")
        return socket

    def _open_output(self, where: str) -> zmq.Socket[bytes] | None:
        if not self._config.republish:
            return None
        socket = self._context.socket(zmq.PUB)
        socket.set_hwm(self._config.high_water_mark)
        _attach(socket, self._config.republish, True, f"{where}.republish")
        return socket

    def _decode(self, parts: list[zmq.Frame]) -> list[Event]:
        if len(parts) != 1:
            return [
                Bad(f"message of {len(parts)} parts, Stream V2 has one (is the detector's format 'cbor'?)")
            ]
        message, limit = parts[0].buffer, self._config.max_message_bytes
        if message.nbytes > limit:
            # Which frame it was stands in its first bytes; the rest is not looked at.
            head = decode_message(message[:_HEAD_BYTES])[0]
            known = (head.detector_series, head.frame) if isinstance(head, Bad | Arrival) else (None, None)
            return [Bad(f"message of {message.nbytes} bytes, the limit is {limit}", *known)]
        return decode_message(message, max_image_bytes=self._config.max_image_bytes)


def _attach(socket: zmq.Socket[bytes], address: str, bind: bool, key: str) -> None:
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
