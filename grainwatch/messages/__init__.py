"""What the daemon publishes: msgspec structs with a schema name and a version.

On the wire a message is ZMQ multipart ``[topic, payload]``: the topic is
``<schema>:<stream>`` (so that a subscriber can filter by prefix), the payload is
msgpack. Arrays travel as raw little-endian bytes with dtype and shape, never as pickles.
The JSON Schema of each message is generated from this module into ``grainwatch/schemas``.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from grainwatch.messages.common import ArrayData, FrameKey, FrameResult, Message, ModelInfo, Provenance, Times
from grainwatch.messages.health import EdgeHealth, Health, StreamHealth
from grainwatch.messages.laue import (
    Crystal,
    DriftObservation,
    DriftReport,
    Grain,
    LaueResult,
    MapPoint,
    MapUpdate,
)
from grainwatch.messages.micrograph import (
    ChangeReport,
    Fingerprint,
    ImageStatistics,
    MicrographResult,
    Neighbour,
    Novelty,
    PatchGrid,
    PhaseMorphology,
    ProcessPosterior,
)

__all__ = [
    "MESSAGES",
    "AnyMessage",
    "AnyResult",
    "ArrayData",
    "ChangeReport",
    "Crystal",
    "DriftObservation",
    "DriftReport",
    "EdgeHealth",
    "Fingerprint",
    "FrameKey",
    "FrameResult",
    "Grain",
    "Health",
    "ImageStatistics",
    "LaueResult",
    "MapPoint",
    "MapUpdate",
    "Message",
    "MicrographResult",
    "ModelInfo",
    "Neighbour",
    "Novelty",
    "PatchGrid",
    "PhaseMorphology",
    "ProcessPosterior",
    "Provenance",
    "SeriesMessage",
    "StreamHealth",
    "Times",
    "decode",
    "encode",
    "series_uid_of",
    "to_builtins",
    "topic",
]

AnyResult: TypeAlias = LaueResult | MicrographResult
"""About one frame."""

AnyMessage: TypeAlias = LaueResult | MicrographResult | MapUpdate | DriftReport | ChangeReport | Health
SeriesMessage: TypeAlias = MapUpdate | DriftReport | ChangeReport
"""About a series of frames, not about one."""

MESSAGES: tuple[type[AnyMessage], ...] = (
    LaueResult,
    MicrographResult,
    MapUpdate,
    DriftReport,
    ChangeReport,
    Health,
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Return the msgpack payload of a message."""
    return _encoder.encode(message)


def decode(payload: bytes | memoryview) -> AnyMessage:
    """Read a payload.

    Raises
    ------
    msgspec.ValidationError, msgspec.DecodeError
        If it is not a message of a known schema.
    """
    return _decoder.decode(payload)


def series_uid_of(message: AnyMessage) -> str:
    """Return the series that a message belongs to, "" for none (the daemon's health)."""
    if isinstance(message, FrameResult):
        return message.key.series_uid
    return message.series_uid if isinstance(message, SeriesMessage) else ""


def topic(message: AnyMessage, stream: str) -> bytes:
    """Return the first part of the multipart: schema and stream name."""
    return f"{type(message).SCHEMA}:{stream}".encode()


def to_builtins(obj: Any) -> Any:
    """Return plain lists, dicts and numbers, arrays as nested lists (for JSON lines).

    >>> to_builtins(ArrayData.of([[1.0, 2.0]]))
    [[1.0, 2.0]]
    """
    if isinstance(obj, ArrayData):
        return obj.numpy().tolist()
    if isinstance(obj, msgspec.Struct):
        fields = {f: to_builtins(getattr(obj, f)) for f in obj.__struct_fields__}
        schema = getattr(type(obj), "SCHEMA", None)
        return {"schema": schema, **fields} if schema else fields
    if isinstance(obj, tuple | list):
        return [to_builtins(x) for x in obj]
    return obj
