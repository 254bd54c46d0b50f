"""What a subscriber reads: addresses, heads of messages, catch-up replies, losses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from grainwatch.config import ConfigError
from grainwatch.messages import (
    MESSAGES,
    AnyMessage,
    ArrayData,
    FrameResult,
    LaueResult,
    MicrographResult,
    Times,
    decode,
)

#: What decoding raises for bytes that are not what they should be.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError)
#: The array types that messages use, and their sizes.
ITEM_BYTES = {f"<{kind}{size}": size for kind in "fiu" for size in (2, 4, 8)} | {"|u1": 1, "|i1": 1}


class StreamError(RuntimeError):
    """What was asked for cannot be had from this daemon."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Messages `first` to `last` (both included) that were published and did not arrive here."""

    first: int
    last: int
    reason: str

    def __len__(self) -> int:
        return self.last - self.first + 1


class Head(msgspec.Struct, frozen=True):
    """What messages of later versions share with those known here."""

    seq: int
    times: Times = Times()


class Reply(msgspec.Struct, frozen=True):
    """The first part of a catch-up reply."""

    status: str
    id: int | str | None = None
    error: str = ""
    to_seq: int = 0
    last_seq: int = 0
    more: bool = False
    seqs: tuple[int, ...] = ()
    unavailable: tuple[tuple[int, int], ...] = ()


def catch_up_address(address: str) -> str:
    """Return the address one port above, or "" where there are no ports.

    >>> catch_up_address("tcp://beamline:31100")
    'tcp://beamline:31101'
    """
    found = re.fullmatch(r"(tcp://.+:)(\d{1,5})", address)
    return f"{found.group(1)}{int(found.group(2)) + 1}" if found else ""


def parsed_since(since: int | str | None) -> int | str | None:
    """Return a sequence number, a series_uid or None.

    Raises
    ------
    ConfigError
        If it is none of these.
    """
    if since == "start":
        return 0
    if isinstance(since, int) and not isinstance(since, bool) and since >= 0:
        return since
    if since is None or (isinstance(since, str) and since):
        return since
    raise ConfigError(f'since: expected a sequence number, a series_uid or "start", got {since!r}')


def message_types(schemas: str | Iterable[str] | None) -> tuple[type[AnyMessage], ...]:
    """Return the message types that schema names stand for; without names, those of frames.

    Raises
    ------
    ConfigError
        If a name is not known.
    """
    if schemas is None:
        return tuple(kind for kind in MESSAGES if issubclass(kind, FrameResult))
    if schemas == "all":
        return MESSAGES
    types: list[type[AnyMessage]] = []
    for wanted in [schemas] if isinstance(schemas, str) else schemas:
        found = [kind for kind in MESSAGES if wanted in (kind.SCHEMA, kind.SCHEMA.partition("/")[0])]
        if not found:
            known = ", ".join(kind.SCHEMA for kind in MESSAGES)
            raise ConfigError(f"schemas: {wanted!r} is not known here; known: {known}")
        types += found
    return tuple(types)


def decoded(payload: bytes) -> tuple[AnyMessage | None, Head | None]:
    """Decode a payload, or at least its head.

    Returns
    -------
    message
        None if it is not a message of a form known here, or an array in it contradicts itself.
    head
        None if not even its number can be read.
    """
    try:
        message = decode(payload)
        head = Head(message.seq, message.times)
        return (message if _arrays_hold(message) else None), head
    except UNREADABLE:
        pass
    try:
        return None, msgspec.msgpack.decode(payload, type=Head)
    except UNREADABLE:
        return None, None


def _arrays_hold(message: AnyMessage) -> bool:
    """Whether each array has as many bytes as its type and shape say (so that `numpy()` will work)."""
    return all(_holds(array) for array in _arrays(message))


def _arrays(message: AnyMessage) -> Iterator[ArrayData]:
    if isinstance(message, LaueResult):
        yield message.peaks
        for crystal in message.crystals:
            yield from (crystal.UB, crystal.B0)
            yield from (crystal.strain_crystal, crystal.strain_sample, crystal.strain_sigma)
            yield from (crystal.spot_indices, crystal.hkl)
    elif isinstance(message, MicrographResult):
        if message.patches is not None:
            yield message.patches.numbers
        for print_ in message.fingerprints:
            yield from (print_.vector, print_.spread)
            yield from (array for array in (print_.codes, print_.whitened) if array is not None)


def _holds(array: ArrayData) -> bool:
    size = ITEM_BYTES.get(array.dtype)
    return (
        size is not None
        and min(array.shape, default=0) >= 0
        and math.prod(array.shape) * size == len(array.data)
    )


def stream_of(topic: bytes) -> str:
    """Return the stream's name in a topic."""
    return topic.partition(b":")[2].decode("utf-8", "replace")


def common(skipped: Iterable[tuple[int, int]], given: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges that are in both (each ordered and apart)."""
    return [(max(a, c), min(b, d)) for a, b in skipped for c, d in given if max(a, c) <= min(b, d)]
