"""DECTRIS Stream V2: one CBOR message a ZeroMQ message."""

from __future__ import annotations

from functools import partial
from typing import Final

from daemon.sources.base import Arrival, Bad, Event
from daemon.sources.dectris.v2_codec import Decoder, decode_message
from daemon.sources.zmq_reader import ReaderTable, ZmqSource

_HEAD_BYTES: Final = 4096


class Config(ReaderTable, frozen=True, kw_only=True):
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


def open_source(config: Config, stream: str) -> ZmqSource:
    """Open the sockets, so that an address in use is known at once.

    Raises
    ------
    ConfigError
        If an address cannot be bound or connected to.
    """
    decoder = Decoder(config.max_image_bytes)
    return ZmqSource("DECTRIS Stream V2", config, stream, partial(_decode, config, decoder))


def _decode(config: Config, decoder: Decoder, parts: list[memoryview]) -> list[Event]:
    if len(parts) != 1:
        return [
            Bad(
                f"message of {len(parts)} parts, Stream V2 has one"
                " (is the detector's format 'cbor'? the other one is read by type \"dectris-v1\")"
            )
        ]
    message, limit = parts[0], config.max_message_bytes
    if message.nbytes > limit:
        # Which frame it was stands in its first bytes; the rest is not looked at.
        head = decode_message(message[:_HEAD_BYTES])[0]
        known = (head.detector_series, head.frame) if isinstance(head, Bad | Arrival) else (None, None)
        return [Bad(f"message of {message.nbytes} bytes, the limit is {limit}", *known)]
    return decoder.decode(message)
