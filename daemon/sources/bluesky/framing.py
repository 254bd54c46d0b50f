"""Messages of bluesky's 0MQ proxy: bytes to a named document, without sockets.

A message is three words, ``prefix name payload``, divided by single spaces; the prefix may be empty.
The payload is a map in msgpack (NumPy arrays in msgpack-numpy's form), in JSON, or a pickle, which is
refused. Which one stands in its first bytes.

msgpack-numpy's own decoder unpickles arrays of objects, so arrays are put together here: numbers and
texts only, and only where the size of the data is that of type and shape.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgpack
import numpy as np

from daemon.sources.bluesky import pickles
from daemon.sources.fields import shown
from pipelines.frame import BadFrame

#: Documents that are read; the others of event-model are known by name.
NAMES: Final = frozenset(
    {
        "start",
        "descriptor",
        "event",
        "event_page",
        "resource",
        "datum",
        "datum_page",
        "stream_resource",
        "stream_datum",
        "stop",
    }
)
_BULK: Final = frozenset({"bulk_events", "bulk_datum"})

#: Prefix and name are no longer than this together.
_MOST_HEAD_BYTES: Final = 512
#: JSON takes many times its size in memory: an image is better sent as msgpack.
MAX_JSON_BYTES: Final = 32 << 20
#: Lists and maps in one document, and items of one of them.
MAX_CONTAINERS: Final = 200_000
MAX_ITEMS: Final = 5_000_000

_TYPE: Final = re.compile(r"[<>|=]?([biufc][0-9]{1,2}|[SU][0-9]{1,6}|\?)")
_REFUSED_PICKLE: Final = (
    "pickled document refused, because a pickle runs any code that its sender puts in: publish with"
    " Publisher(ADDRESS, serializer=msgpack_numpy.dumps) (or, where only your own machines reach the proxy,"
    " set allow_pickle_from_network_which_runs_any_code = true)"
)


@dataclass(frozen=True, slots=True)
class Document:
    """A document of event-model, its values plain: numbers, texts, lists, maps, NumPy arrays."""

    name: str
    body: Mapping[str, Any]


def decode_message(
    message: memoryview | bytes, *, prefix: bytes = b"", allow_pickle: bool = False
) -> Document | None:
    """Read one message.

    Parameters
    ----------
    message : bytes-like
    prefix : bytes
        Only messages of publishers with this prefix are read; empty: all.
    allow_pickle : bool
        Read pickled documents too. See `daemon.sources.bluesky.pickles`.

    Returns
    -------
    Document or None
        None for a message with another prefix.

    Raises
    ------
    BadFrame
        If it is no document; nothing else is raised.
    """
    view = memoryview(message).cast("B")
    words = bytes(view[:_MOST_HEAD_BYTES]).split(b" ", 2)
    if len(words) < 3:
        raise BadFrame(f"message of {view.nbytes} bytes is not 'prefix name document'")
    if prefix and words[0] != prefix:
        return None
    name = words[1].decode("ascii", "replace")
    if name not in NAMES:
        known = (
            "is no longer sent by bluesky, and not read" if name in _BULK else "is not known to event-model"
        )
        raise BadFrame(f"document {shown(name)} {known}")
    payload = view[len(words[0]) + len(words[1]) + 2 :]
    try:
        body = _body(payload, allow_pickle)
    except BadFrame as error:
        raise BadFrame(f"{name}: {error}") from error
    if not all(isinstance(key, str) for key in body):
        raise BadFrame(f"{name}: keys are expected to be texts")
    return Document(name, body)


def _body(payload: memoryview, allow_pickle: bool) -> Mapping[Any, Any]:
    if not payload.nbytes:
        raise BadFrame("the document is empty")
    if pickles.is_pickle(payload):
        if not allow_pickle:
            raise BadFrame(_REFUSED_PICKLE)
        try:
            return pickles.load(payload)
        except ValueError as error:
            raise BadFrame(str(error)) from error
    if payload[0] in b" \t\r\n{":
        return _json(payload)
    if 0x80 <= payload[0] <= 0x8F or payload[0] in (0xDE, 0xDF):
        return _msgpack(payload)
    raise BadFrame("is neither a msgpack map nor a JSON object")


def _json(payload: memoryview) -> Mapping[Any, Any]:
    if payload.nbytes > MAX_JSON_BYTES:
        raise BadFrame(f"{payload.nbytes} bytes of JSON, the limit is {MAX_JSON_BYTES}: publish with msgpack")
    try:
        found = json.loads(str(payload, "utf-8"))
    except RecursionError as error:
        raise BadFrame("JSON is nested too deeply") from error
    except ValueError as error:
        raise BadFrame(f"JSON cannot be read: {_line(error)}") from error
    if not isinstance(found, dict):
        raise BadFrame("JSON is no object")
    return found


def _msgpack(payload: memoryview) -> Mapping[Any, Any]:
    hooks = _Hooks()
    try:
        found = msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=False,
            object_hook=hooks.map,
            list_hook=hooks.list,
            ext_hook=hooks.extension,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_CONTAINERS,
        )
    except BadFrame:
        raise
    except RecursionError as error:
        raise BadFrame("msgpack is nested too deeply") from error
    except (ValueError, TypeError, OverflowError, MemoryError, msgpack.exceptions.UnpackException) as error:
        raise BadFrame(f"msgpack cannot be read: {_line(error)}") from error
    if not isinstance(found, dict):
        raise BadFrame("msgpack is no map")
    return found


class _Hooks:
    """What msgpack calls for each map, list and extension of one document; counts them."""

    def __init__(self) -> None:
        self._containers = 0
        self._items = 0

    def map(self, found: dict[Any, Any]) -> Any:
        self._count(len(found))
        for key in (b"nd", "nd"):
            if key in found:
                return _array(found)
        return str(found.get(b"data"))[:64] if b"complex" in found else found

    def list(self, found: list[Any]) -> list[Any]:
        self._count(len(found))
        return found

    def extension(self, code: int, data: bytes) -> None:
        """Leave out what is no document's: an extension says nothing about its meaning."""

    def _count(self, items: int) -> None:
        self._containers += 1
        self._items += items
        if self._containers > MAX_CONTAINERS or self._items > MAX_ITEMS:
            raise BadFrame("the document has more parts than any document needs")


def _array(found: Mapping[Any, Any]) -> Any:
    """Return the array or number that msgpack-numpy took apart.

    Raises
    ------
    BadFrame
        If it holds objects or structures, or its data do not have the size of type and shape.
    """
    fields = {_text(key): value for key, value in found.items()}
    kind = _text(fields.get("kind", ""))
    if kind == "O":
        raise BadFrame("an array of Python objects is a pickle: refused")
    type_name = _text(fields.get("type"))
    if kind == "V" or not _TYPE.fullmatch(type_name):
        raise BadFrame(f"array of type {shown(fields.get('type'))}, expected numbers or texts")
    try:
        dtype = np.dtype(type_name)
    except TypeError as error:
        raise BadFrame(f"array of type {shown(type_name)} is unknown") from error
    data = fields.get("data")
    if not isinstance(data, bytes):
        raise BadFrame("array without data")
    is_array = fields["nd"] is True
    shape = fields.get("shape") if is_array else []
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise BadFrame(f"array of shape {shown(shape)}")
    if not dtype.itemsize or math.prod(shape) * dtype.itemsize != len(data):
        raise BadFrame(f"array of shape {shown(shape)} and type {type_name} has {len(data)} bytes of data")
    values = np.frombuffer(data, dtype).reshape(shape)
    return values if is_array else values.item()


def _text(value: Any) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


def _line(error: Exception) -> str:
    said = str(error).splitlines() or [type(error).__name__]
    return said[0][:200].encode("ascii", "backslashreplace").decode()
