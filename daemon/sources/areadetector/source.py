"""EPICS areaDetector by its ZeroMQ plug-in (ADZMQ, NDPluginZMQ): arrays of one camera as frames."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

from daemon.sources.areadetector.codec import Decoder
from daemon.sources.areadetector.header import ShapeOrder
from daemon.sources.areadetector.series import SeriesBook
from daemon.sources.base import Event, Idle, SourceContext
from daemon.sources.zmq_reader import ReaderTable, Role, ZmqSource


class Config(ReaderTable, frozen=True, kw_only=True):
    """``[streams.NAME.source]`` of type "areadetector".

    Attributes
    ----------
    address : str
        "tcp://host:port" where the plug-in publishes (the address in its NDZMQConfigure line), or of a
        re-publisher.
    bind : bool
        Listen on `address` instead of connecting to it, for plug-ins that connect: those of type PUSH do,
        unless their line says BIND.
    role : str
        "tap" listens to a plug-in of type PUB, beside others; "primary" takes the arrays of one of type
        PUSH, each of which reaches one reader only.
    republish : str
        Where a primary publishes each message again, all parts as they came, for taps ("" for nowhere).
    high_water_mark : int
        Messages that may wait in the socket; what comes beyond stays with the plug-in, which drops arrays
        when its own buffer is full. Dropped arrays are counted as missing.
    max_message_bytes : int
        A message whose parts together are larger, as they came, is failed without being decoded.
    max_image_bytes : int
        An image that says it takes more uncompressed is failed before any memory is set aside for it.
    shape_order : str
        What comes first in the header's shape: "xy" (columns, rows), "yx" (rows, columns), or "auto" for
        what the plug-in's version sends: x first up to 1.3, whose `htype` is a list, y first since 1.4.
    series_idle_s : float
        So many seconds without an array end a series; 0 for never. Longer than the longest exposure.
    frames_per_series : int
        So many numbers make a series; 0 for an unknown number.
    position_keys : list of str
        NDAttributes that are the position: for x, y and z. An array without them is failed.
    position_unit_um : float
        How many um one unit of such a position is.
    time_epoch : str
        Where the driver's time stamps count from: "epics" (1990), "unix" (1970), or "none" to leave them.
    """

    role: Role = "tap"
    shape_order: ShapeOrder = "auto"
    series_idle_s: float = 60.0
    frames_per_series: int = 0
    position_keys: tuple[str, ...] = ()
    position_unit_um: float = 1.0
    time_epoch: Literal["epics", "unix", "none"] = "epics"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("series_idle_s", "frames_per_series"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key}: expected 0 or more, got {getattr(self, key)}")
        if not self.position_unit_um > 0:
            raise ValueError(f"position_unit_um: expected more than 0, got {self.position_unit_um}")
        if len(self.position_keys) > 3:
            raise ValueError(
                f"position_keys: expected up to 3, for x, y and z, got {len(self.position_keys)}"
            )


def open_source(config: Config, stream: str, context: SourceContext) -> AreaDetectorSource:
    """Open the sockets, so that an address in use is known at once.

    Raises
    ------
    ConfigError
        If an address cannot be bound or connected to.
    """
    return AreaDetectorSource(config, stream, context)


class AreaDetectorSource:
    """Implements `daemon.sources.base.Source`."""

    def __init__(self, config: Config, stream: str, context: SourceContext) -> None:
        self._decoder = Decoder(
            config.max_message_bytes,
            config.max_image_bytes,
            config.shape_order,
            config.position_keys,
            config.position_unit_um,
        )
        self._book = SeriesBook(
            context.state_dir / f"areadetector-{stream}.json",
            context.standing,
            config.series_idle_s,
            config.frames_per_series,
            config.time_epoch,
        )
        self._reader = ZmqSource("areaDetector ZMQ", config, stream, self._decode)

    @property
    def address(self) -> str:
        """Where it listens in fact: the port that was taken when the address ended in ``:*``."""
        return self._reader.address

    @property
    def republished_at(self) -> str:
        """Where it publishes again in fact, "" for nowhere."""
        return self._reader.republished_at

    def events(self) -> Iterator[Event]:
        """Yield what arrives until the source is closed."""
        yield from self._book.resume()
        waiting_since = time.monotonic()
        for event in self._reader.events():
            if isinstance(event, Idle):
                yield from self._book.silent(time.monotonic() - waiting_since)
                yield event
            else:
                yield event
                # While the daemon does not ask, the plug-in may send what nobody sees yet.
                waiting_since = time.monotonic()
            del event  # the memory of a message is free while the next one is waited for

    def describe(self) -> str:
        """Say what it listens to, how and where."""
        return self._reader.describe()

    def close(self) -> None:
        """Close the sockets."""
        self._reader.close()

    def _decode(self, parts: list[memoryview]) -> list[Event]:
        return self._book.take(self._decoder.decode(parts))
