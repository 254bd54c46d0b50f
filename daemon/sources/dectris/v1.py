"""DECTRIS Stream V1: messages of several parts, JSON and binary."""

from __future__ import annotations

from functools import partial

from daemon.sources.base import Bad, Event
from daemon.sources.dectris.v1_codec import Decoder, refused
from daemon.sources.zmq_reader import ReaderTable, ZmqSource


class Config(ReaderTable, frozen=True, kw_only=True):
    """``[streams.NAME.source]`` of type "dectris-v1".

    Attributes
    ----------
    address : str
        "tcp://host:port" of the detector (its port is 9999) or of a re-publisher. "ipc://path" is
        for senders that stay: when one leaves, libzmq drops what the reader has not taken yet.
    bind : bool
        Listen on `address` instead of connecting to it, for senders that connect.
    role : str
        "primary" takes every message from the detector, "tap" listens to a re-publisher.
    republish : str
        Where a primary publishes each message again, all parts as they came, for taps ("" for nowhere).
    high_water_mark : int
        Messages that may wait in the socket; a primary's detector keeps the others, a tap loses them.
    max_message_bytes : int
        A message whose parts together are larger, compressed as they came, is failed without being
        decoded. A header with all details has 8 bytes a pixel.
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
    return ZmqSource("DECTRIS Stream V1", config, stream, partial(_decode, config, decoder))


def _decode(config: Config, decoder: Decoder, parts: list[memoryview]) -> list[Event]:
    nbytes, limit = sum(part.nbytes for part in parts), config.max_message_bytes
    if nbytes > limit:
        return [refused(parts, f"message of {nbytes} bytes, the limit is {limit}")]
    if len(parts) == 1 and nbytes and 0xA0 <= parts[0][0] <= 0xBF:
        # The head of a CBOR map, which no text begins with.
        return [
            Bad("this is CBOR, not Stream V1: the detector's format 'cbor' is read by type \"dectris-v2\"")
        ]
    return decoder.decode(parts)
