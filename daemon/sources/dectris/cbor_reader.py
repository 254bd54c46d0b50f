"""CBOR maps from a network, read with bounds on memory and time.

The decoding is cbor2's. Around it: lengths are checked against what is there, the number and the
depth of data items against a budget, tags against the ones that the caller's format knows.

A sound message of ordinary size is read without copying what is large in it: a walk from item to
item finds the long byte strings, a short tag stands for each while the rest is decoded, and they
come back as views of the message. What the walk or the decoder does not like is read again key by
key, so that a map that breaks off half-way still gives its first fields, and the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from io import BytesIO
from typing import Any, Final

from cbor2 import CBORDecoder, CBORError, CBORTag

from daemon.sources.fields import shown
from pipelines.frame import BadFrame

#: More data items than any detector sends; a message of millions of tiny ones is an attack or a fault.
MAX_ITEMS: Final = 200_000
MAX_DEPTH: Final = 32

#: Byte strings of this size and more are not copied.
LONG_BYTES: Final = 2048

# What an image message has, many times over; a message of more items is read the slow way.
_MOST_STEPS: Final = 2000
# "Always invalid" for senders (IANA registry of CBOR tags), so that it is free for use in here.
_STAND_IN: Final = 0xFFFF

# Tags that the CBOR library would act on by itself: big numbers, fractions, expressions, shared and
# cyclic references and so on. None belongs to the format; they stay tags here and are refused as such.
_LEFT_ALONE: Final = (
    *range(2, 6),
    25,
    28,
    29,
    30,
    35,
    36,
    37,
    52,
    54,
    100,
    256,
    258,
    260,
    261,
    1004,
    43000,
    55799,
)


def _left_alone(tag: int) -> Callable[[Any, bool], CBORTag]:
    return lambda value, _immutable: CBORTag(tag, value)


def _refuse(_value: Any, _immutable: bool) -> CBORTag:
    raise _NotAsUsual


_SEMANTICS: Final = {tag: _left_alone(tag) for tag in _LEFT_ALONE}
_REFUSED: Final = dict.fromkeys(_LEFT_ALONE, _refuse)


class _NotAsUsual(ValueError):
    """Something that the quick way leaves to the slow one."""


class _Reader:
    """A message as the file that the CBOR decoder reads from: counts reads, never looks ahead.

    Each data item takes at least one read, so the count bounds the objects that are made.
    """

    def __init__(self, message: memoryview) -> None:
        self._message = message
        self._reads = 0
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def left(self) -> int:
        return self._message.nbytes - self.at

    def peek(self) -> int:
        """Return the next byte, -1 at the end."""
        return self._message[self.at] if self.left() else -1

    def read(self, size: int) -> bytes:
        self._reads += 1
        if self._reads > MAX_ITEMS + self.at // 4096:  # long strings are read piece by piece
            raise BadFrame(f"message has more than {MAX_ITEMS} data items")
        piece = bytes(self._message[self.at : self.at + size])
        self.at += len(piece)
        return piece


def read_map(message: memoryview | bytes, known_tags: Collection[int]) -> tuple[dict[str, Any], str | None]:
    """Read a message that is one map with text keys.

    Parameters
    ----------
    message : bytes-like
    known_tags : collection of int
        Tags that may stand in it, as `cbor2.CBORTag`; besides, tags 0 and 1 become `datetime`.

    Returns
    -------
    fields : dict
        What could be read. Long byte strings are read-only views of `message`.
    problem : str or None
        What stopped the reading, or is wrong with the last field. Nothing is raised.
    """
    view = memoryview(message).cast("B").toreadonly()
    quickly = _read_quickly(view, known_tags)
    if quickly is not None:
        return quickly, None
    fields: dict[str, Any] = {}
    reader = _Reader(view)
    if not 0xA0 <= reader.peek() <= 0xBF:
        return fields, f"message of {view.nbytes} bytes is not a CBOR map"
    try:
        pairs = _map_length(reader)
        decoder = CBORDecoder(
            reader,  # type: ignore[arg-type]  # it needs read() alone
            semantic_decoders=_SEMANTICS,
            max_depth=MAX_DEPTH,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
        while pairs is None or len(fields) < pairs:
            if pairs is None and reader.peek() == 0xFF:
                reader.read(1)
                break
            key = decoder.decode()
            if not isinstance(key, str):
                return fields, f"message has a key that is not text: {shown(key)}"
            if key in fields:
                return fields, f"message has the key {shown(key)} twice"
            fields[key] = decoder.decode()
            _check_tags(fields[key], known_tags)
    except BadFrame as error:
        return fields, str(error)
    except (CBORError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        return fields, f"message of {view.nbytes} bytes is broken at byte {reader.at}: {_chain(error)}"
    if reader.left():
        return fields, f"message of {view.nbytes} bytes has {reader.left()} bytes after its end"
    return fields, None


def _read_quickly(message: memoryview, known_tags: Collection[int]) -> dict[str, Any] | None:
    """Return the map, None when anything about the message is not as usual.

    What is wrong then, and with which field, is found out the slow way.
    """
    cut = _without_long_bytes(message)
    if cut is None:
        return None
    short, blobs = cut
    taken = iter(enumerate(blobs))

    def take(number: Any, _immutable: bool) -> memoryview:
        # A sender's own tag of that number would come at the wrong place or once too often.
        expected, blob = next(taken, (-1, None))
        if number != expected or blob is None:
            raise _NotAsUsual
        return blob

    def known(tag: CBORTag, _immutable: bool) -> CBORTag:
        if tag.tag not in known_tags:
            raise _NotAsUsual
        return tag

    stream = BytesIO(short)
    decoder = CBORDecoder(
        stream,
        tag_hook=known,
        semantic_decoders={**_REFUSED, _STAND_IN: take},
        max_depth=MAX_DEPTH,
        allow_duplicate_keys=False,
        strict_hashable_types=True,
    )
    try:
        fields = decoder.decode()
    except (CBORError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        return None
    if stream.tell() != len(short) or next(taken, None) is not None or not isinstance(fields, dict):
        return None
    return fields if set(map(type, fields)) == {str} else None


def _without_long_bytes(message: memoryview) -> tuple[bytes, list[memoryview]] | None:
    """Return a sound message with a tag and a number in place of each long byte string, and these.

    None when the message is no map, has too many items, or does not end with an item. Heads of CBOR
    (RFC 8949 §3) follow one another whatever the nesting, so no nesting is kept track of here.
    """
    at, end = 0, message.nbytes
    if not end or not 0xA0 <= message[0] <= 0xBF:
        return None
    kept: list[bytes | memoryview] = []
    blobs: list[memoryview] = []
    begin = 0
    for _ in range(_MOST_STEPS):
        if at >= end:
            break
        head = message[at]
        step = _STEPS[head]
        if step > 0:
            at += step
            continue
        width = -step
        if not width or at + 1 + width > end:
            return None
        length = int.from_bytes(message[at + 1 : at + 1 + width], "big")
        start = at + 1 + width
        if head < 0x60 and length >= LONG_BYTES:
            kept += [message[begin:at], bytes((0xD9, 0xFF, 0xFF, 0x1A)) + len(blobs).to_bytes(4, "big")]
            blobs.append(message[start : start + length])
            begin = start + length
        at = start + length
    if at != end:
        return None
    return b"".join([*kept, message[begin:]]), blobs


def _steps() -> tuple[int, ...]:
    """Return by first byte how far the next head is; -n: a string whose length takes n bytes; 0: unusual."""
    steps = []
    for head in range(256):
        major, info = head >> 5, head & 0x1F
        width = {24: 1, 25: 2, 26: 4, 27: 8}.get(info, 0)
        if major in (2, 3):
            steps.append(1 + info if info < 24 else -width)
        elif info < 28 or (info == 31 and major in (4, 5, 7)):
            steps.append(1 + width)
        else:
            steps.append(0)
    return tuple(steps)


_STEPS: Final = _steps()


def _map_length(reader: _Reader) -> int | None:
    """Read the head of a map: the number of pairs, None when a break ends it."""
    info = reader.read(1)[0] & 0x1F
    if info < 24:
        return info
    if info == 31:
        return None
    width = {24: 1, 25: 2, 26: 4, 27: 8}.get(info)
    head = reader.read(width or 0)
    if width is None or len(head) < width:
        raise BadFrame("message breaks off in its first bytes")
    return int.from_bytes(head, "big")


def _check_tags(value: Any, known: Collection[int]) -> None:
    """Refuse tags that the format does not have, wherever they stand."""
    if isinstance(value, CBORTag):
        if value.tag not in known:
            raise BadFrame(f"CBOR tag {value.tag} is unknown")
        _check_tags(value.value, known)
    elif isinstance(value, Mapping):
        for item in value.values():
            _check_tags(item, known)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_tags(item, known)


def _chain(error: BaseException) -> str:
    """Return what the CBOR library says, with the reason under it."""
    reasons = [str(error) or type(error).__name__]
    if error.__cause__ is not None:
        reasons.append(str(error.__cause__))
    return ": ".join(reasons)
