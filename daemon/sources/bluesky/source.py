"""Bluesky documents from its 0MQ proxy: the socket.

The proxy publishes, and does not know who listens: what is sent while nobody is connected is lost, and
so is what a reader does not fetch in time. Losses show as gaps in the numbers of events.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from daemon.sources.base import Bad, Event, Idle
from daemon.sources.bluesky.curve import load_keys
from daemon.sources.bluesky.documents import Documents, Rules
from daemon.sources.bluesky.framing import decode_message
from daemon.sources.bluesky.paths import Places
from daemon.sources.bluesky.scan import um_per
from daemon.sources.zmq_reader import attach, is_address
from grainwatch.config import ConfigError, Table
from pipelines.frame import BadFrame

log = logging.getLogger(__name__)

OWN_SCAN: Final = "that of each plan"

_WAIT_MS: Final = 100
#: Documents that are read before the next look for frames in files, and the other way round.
_DOCUMENTS: Final = 256
_FRAMES: Final = 8
#: A proxy that is away for longer is a problem that `status` shows, seconds.
_PATIENCE_S: Final = 3.0
#: How often to ask a silent proxy whether it is still there, milliseconds.
_HEARTBEAT_MS: Final = 5000


class Config(Table, frozen=True, kw_only=True):
    """``[streams.NAME.source]`` of type "bluesky".

    Attributes
    ----------
    address : str
        "tcp://host:port" where bluesky's proxy publishes (its out port is 5578).
    prefix : str
        Only documents of publishers with this prefix; "" for all.
    image_key : str
        The data key of the images; "" for the only one of the stream that is an image.
    stream : str
        The event stream with the images.
    position_unit : str
        Unit of motors whose descriptor names none ("mm", "um"); "" leaves such positions out, and the
        map counts points.
    position_wait_s : float
        How long a frame in a file waits for the event that says where it was taken.
    asset_wait_s : float
        How long to wait for a file, or for an image in it, until its frame fails.
    path_map : table
        Where files lie here: from the beginning of a path as documents give it to a folder of this
        machine, `{ "C:/data" = "/mnt/data" }`.
    asset_roots : list of str
        Only files below these folders are read; none: all that documents name.
    open_runs : int
        Runs that go on at once; a start beyond that ends the one that was silent for longest.
    curve_secret_key : str
        File with one's own key pair (NAME.key_secret), for an encrypted proxy.
    curve_server_key : str
        File with the proxy's public key (NAME.key).
    high_water_mark : int
        Messages that may wait in the socket; the proxy drops the others.
    max_message_bytes : int
        A message that is larger is failed without being decoded.
    allow_pickle_from_network_which_runs_any_code : bool
        Read pickled documents too. Whoever reaches the proxy's port can then try to run code here; msgpack
        or JSON is the remedy.
    """

    address: str
    prefix: str = ""
    image_key: str = ""
    stream: str = "primary"
    position_unit: str = ""
    position_wait_s: float = 5.0
    asset_wait_s: float = 30.0
    path_map: dict[str, str] | None = None
    asset_roots: tuple[str, ...] = ()
    open_runs: int = 2
    curve_secret_key: str = ""
    curve_server_key: str = ""
    high_water_mark: int = 1000
    max_message_bytes: int = 64 * 1024 * 1024
    allow_pickle_from_network_which_runs_any_code: bool = False

    def __post_init__(self) -> None:
        if not is_address(self.address) or "*" in self.address:
            raise ValueError(f"address: expected tcp://host:port or ipc://path, got {self.address!r}")
        if " " in self.prefix or not self.prefix.isascii():
            raise ValueError(f"prefix: expected letters without spaces, got {self.prefix!r}")
        if self.position_unit and um_per(self.position_unit) is None:
            raise ValueError(f"position_unit: expected a length such as 'mm', got {self.position_unit!r}")
        for key in ("position_wait_s", "asset_wait_s"):
            if not 0 <= getattr(self, key) < 86400:
                raise ValueError(f"{key}: expected 0 or more seconds, got {getattr(self, key)}")
        if not 1 <= self.open_runs <= 4:
            raise ValueError(f"open_runs: expected 1 to 4, got {self.open_runs}")
        for key in ("high_water_mark", "max_message_bytes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected 1 or more, got {getattr(self, key)}")


def check(config: Config, where: str) -> None:
    """Check the files that the table names.

    Raises
    ------
    ConfigError
        If a key file cannot be used.
    """
    load_keys(config.curve_secret_key, config.curve_server_key, where)


def open_source(config: Config, stream: str) -> BlueskySource:
    """Open the socket; the proxy need not be there yet.

    Raises
    ------
    ConfigError
        If a key file cannot be used, or the address.
    """
    return BlueskySource(config, stream)


class BlueskySource:
    """Implements `daemon.sources.base.Source`."""

    def __init__(self, config: Config, stream: str) -> None:
        self._config = config
        self._name = stream
        self._closed = False
        self._complained = False
        self._connected = False
        self._changed_at = time.monotonic()
        self.seen = 0
        self.refused = 0
        self._open_runs = self._waiting = 0  # as the other threads may see them
        self._documents = Documents(
            Rules(
                stream=config.stream,
                image_key=config.image_key,
                position_unit=config.position_unit,
                open_runs=config.open_runs,
                position_wait_s=config.position_wait_s,
                asset_wait_s=config.asset_wait_s,
                places=Places(
                    config.path_map or {}, tuple(Path(root).absolute() for root in config.asset_roots)
                ),
            ),
            stream,
        )
        where = f"streams.{stream}.source"
        keys = load_keys(config.curve_secret_key, config.curve_server_key, where)
        if config.allow_pickle_from_network_which_runs_any_code:
            log.warning(
                "%s: pickled documents are read: whoever reaches %s can try to run code in this process",
                stream,
                config.address,
            )
        self._context = zmq.Context(io_threads=1)
        try:
            self._socket = self._open(keys, where)
        except ConfigError:
            self._context.destroy(linger=0)
            raise

    @property
    def problem(self) -> str:
        """What keeps documents away, "" when nothing does."""
        if self._connected or time.monotonic() - self._changed_at < _PATIENCE_S:
            return ""
        curve = " (or it refuses our key)" if self._config.curve_secret_key else ""
        return f"no proxy answers at {self._config.address}{curve}"

    def events(self) -> Iterator[Event]:
        """Yield what documents bring until the source is closed."""
        wait_ms = _WAIT_MS
        while not self._closed:
            for message in self._receive(wait_ms):
                yield from self._take(message)
            due = self._documents.due(time.monotonic(), _FRAMES)
            self._open_runs, self._waiting = self._documents.open_runs, self._documents.waiting
            yield from due or (Idle(),)
            wait_ms = 0 if due else _WAIT_MS

    def describe(self) -> str:
        """Say what it listens to, and how many documents it saw."""
        state = "connected to" if self._connected else "waiting for"
        return (
            f"Bluesky documents, {state} {self._config.address}: {self.seen} documents seen,"
            f" {self.refused} refused, {self._open_runs} runs open"
            + (f", {self._waiting} wait for files" if self._waiting else "")
        )

    def close(self) -> None:
        """Close the socket."""
        self._closed = True
        self._socket.disable_monitor()
        self._context.destroy(linger=0)

    def _open(self, keys: tuple[bytes, bytes, bytes] | None, where: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.SUB)
        socket.set_hwm(self._config.high_water_mark)
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        # Beyond this the transport cuts the line: a last resort for memory.
        socket.setsockopt(zmq.MAXMSGSIZE, max(4 * self._config.max_message_bytes, 1 << 30))
        if keys is not None:
            socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = keys
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        attach(socket, self._config.address, False, f"{where}.address")
        return socket

    def _receive(self, wait_ms: int) -> Iterator[zmq.Frame | int]:
        """Yield the messages that are there, after a wait for the first one.

        A message of several parts is none of bluesky's: it is given as the number of its parts.
        """
        ready = dict(self._poller.poll(wait_ms))
        if self._monitor in ready:
            self._note_connection()
        if self._socket not in ready:
            return
        for _ in range(_DOCUMENTS):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            yield parts[0] if len(parts) == 1 else len(parts)

    def _note_connection(self) -> None:
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._changed_at = time.monotonic()
            if self._connected:
                log.info("%s: connected to the proxy at %s", self._name, self._config.address)
            else:
                log.warning(
                    "%s: the proxy at %s went away; what is published until it is back is lost",
                    self._name,
                    self._config.address,
                )

    def _take(self, message: zmq.Frame | int) -> list[Event]:
        try:
            if isinstance(message, int):
                raise BadFrame(f"message of {message} parts, bluesky's have one")
            size, limit = message.buffer.nbytes, self._config.max_message_bytes
            if size > limit:
                raise BadFrame(f"message of {size} bytes, the limit is {limit}")
            document = decode_message(
                message.buffer,
                prefix=self._config.prefix.encode(),
                allow_pickle=self._config.allow_pickle_from_network_which_runs_any_code,
            )
        except BadFrame as error:
            self.refused += 1
            return [Bad(str(error))]
        if document is None:
            return []
        self.seen += 1
        try:
            return self._documents.take(document, time.monotonic())
        except Exception as error:
            # Whatever a sender thinks of costs this document, not the stream, and one traceback, not a flood.
            if not self._complained:
                log.exception("a document cannot be used")
            self._complained = True
            return [Bad(f"a document cannot be used: {type(error).__name__}: {error}")]
