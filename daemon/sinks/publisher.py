"""Sink "zmq": publishes every message on a PUB socket, and answers those who missed some.

A PUB socket that cannot get rid of messages to one slow subscriber drops them for that one, and
tells nobody; the alternative (XPUB with NODROP) would let the slowest subscriber stop all others.
So the loss is made visible instead: `seq` grows by one with each message, whatever its topic, a
subscriber to all topics sees a gap, and asks for it at the catch-up address.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import zmq

from daemon.sinks.base import Published, SinkContext, SinkEvent
from daemon.sinks.catch_up import bind_catch_up
from daemon.sinks.message_ring import MessageRing, Sent
from grainwatch.config import ConfigError, EdgeTable, Table
from grainwatch.messages import topic

log = logging.getLogger("grainwatch.sinks.zmq")

LINGER_MS = 1000
HEARTBEAT_MS = 5000
LOOPBACK = ("tcp://127.", "tcp://localhost:", "tcp://[::1]:", "ipc://", "inproc://")


class Config(Table, frozen=True, kw_only=True):
    """``[sinks.zmq]``.

    Attributes
    ----------
    results : str
        Address of the PUB socket. Only this machine can reach the default: whoever can reach it
        may read all results, so name another interface only on a network of one's own.
    catch_up : str
        Address of the ROUTER socket for missed messages, "" for none. Clients look for it one
        port above `results`.
    results_dir : str
        Where older results are read from: the folder of the sink "hdf5".
    high_water_mark : int
        Messages that wait for one slow subscriber before its next ones are dropped.
    ring_messages : int
        How many of the last messages are kept in memory to catch up from. They must hold what is
        published within the flush_s of the sink "hdf5".
    ring_mib : int
        How many MiB these messages take together at most; the oldest leave first.
    edge : EdgeTable
        By default the oldest messages give way: they can be asked for afterwards.
    """

    results: str = "tcp://127.0.0.1:31100"
    catch_up: str = "tcp://127.0.0.1:31101"
    results_dir: str = "results"
    high_water_mark: int = 10_000
    ring_messages: int = 10_000
    ring_mib: int = 64
    edge: EdgeTable = EdgeTable(policy="drop-oldest", depth=4096)


class Publisher:
    """The PUB socket and the catch-up thread.

    Attributes
    ----------
    results_address, catch_up_address : str
        What was bound (the config may leave the port to the system with ``:*``).

    Raises
    ------
    ConfigError
        If an address cannot be bound: names the key, the address and the reason.
    """

    def __init__(self, config: Config, context: SinkContext) -> None:
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._ring = MessageRing(config.ring_messages, config.ring_mib * 1024 * 1024)
        self._socket = self._zmq.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, config.high_water_mark)
        # A subscriber whose machine vanished is given up instead of filling its queue for ever.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._catch_up = None
        key, address = "results", config.results
        try:
            self._socket.bind(address)
            self.results_address = _endpoint(self._socket)
            self.catch_up_address = ""
            if config.catch_up:
                key, address = "catch_up", config.catch_up
                self._catch_up, self.catch_up_address = bind_catch_up(
                    self._zmq, address, self._ring, Path(config.results_dir), context.daemon_name
                )
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            self._zmq.term()
            raise ConfigError(f"{key}: {address}: {_advice(error)}") from None
        if self._catch_up is not None:
            self._catch_up.start()
        if not self.results_address.startswith(LOOPBACK):
            log.warning("results are published on %s: everybody who reaches it can read them", config.results)

    def handle(self, events: list[SinkEvent]) -> None:
        """Publish messages, in order."""
        for event in events:
            if isinstance(event, Published):
                # First into the ring: who sees the gap that this one leaves can ask at once.
                self._ring.append(Sent.of(event.message, event.stream, event.payload))
                self._socket.send_multipart([topic(event.message, event.stream), event.payload])

    def idle(self) -> None:
        """Nothing: the catch-up has its own thread."""

    def close(self) -> None:
        """Hand out what is queued (for a second at most) and release the addresses."""
        if self._catch_up is not None:
            self._catch_up.close()
        self._socket.close(linger=LINGER_MS)
        self._zmq.term()


def check(config: Config, where: str = "") -> None:
    """Check the numbers; `where` leads the error.

    Raises
    ------
    ConfigError
        If one is out of range.
    """
    for name in ("high_water_mark", "ring_messages", "ring_mib"):
        if getattr(config, name) < 1:
            at = f"{where}.{name}" if where else name
            raise ConfigError(f"{at}: expected 1 or more, got {getattr(config, name)}")


def open_sink(config: Config, context: SinkContext) -> Publisher:
    """Bind the sockets and return the sink.

    Raises
    ------
    ConfigError
        If an address cannot be bound, or a number is out of range.
    """
    check(config)
    return Publisher(config, context)


def _endpoint(socket: zmq.Socket[bytes]) -> str:
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    return bound.rstrip(b"\0").decode()


def _advice(error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return "the port is in use: stop the program that has it, or choose another port"
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
        return "this machine has no such network interface"
    return f"expected an address such as tcp://127.0.0.1:31100 ({error.strerror})"
