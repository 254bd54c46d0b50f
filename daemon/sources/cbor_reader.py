"""CBOR maps from a network, read with bounds on memory and time.

The decoding is cbor2's. Around it: lengths are checked against what is there, the number and the
depth of data items against a budget, tags against the ones that the caller's format knows. The
map is read key by key, so that one that breaks off half-way still gives its first fields.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from cbor2 import CBORDecoder, CBORError, CBORTag

from pipelines.frame import BadFrame

#: More data items than any detector sends; a message of millions of tiny ones is an attack or a fault.
MAX_ITEMS: Final = 200_000
MAX_DEPTH: Final = 32

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


_SEMANTICS: Final = {tag: _left_alone(tag) for tag in _LEFT_ALONE}


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
        What could be read.
    problem : str or None
        What stopped the reading, or is wrong with the last field. Nothing is raised.
    """
    view = memoryview(message).cast("B")
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


def shown(value: Any) -> str:
    """Return a value as a few characters for a message to an operator."""
    if isinstance(value, CBORTag):
        return f"CBOR tag {value.tag}"
    return reprlib.repr(value)


def _chain(error: BaseException) -> str:
    """Return what the CBOR library says, with the reason under it."""
    reasons = [str(error) or type(error).__name__]
    if error.__cause__ is not None:
        reasons.append(str(error.__cause__))
    return ": ".join(reasons)
