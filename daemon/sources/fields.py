"""Fields of a detector's messages, checked: numbers, names, metadata, positions.

Whatever comes from a network is of any type and size. These functions return what can be used or
raise `BadFrame` with the name of the message, the key, and what was expected.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, Final, TypeGuard

from cbor2 import CBORTag

from pipelines.frame import BadFrame

#: A detector that announces more images than it could take in a year has announced no number.
MAX_IMAGES: Final = 10**12
#: Arrays of metadata up to this size are kept as lists of numbers; larger ones are only described.
MAX_METADATA_BYTES: Final = 32 * 1024
#: Whole numbers of metadata and messages fit into 64 bits with a sign.
LARGEST: Final = (1 << 63) - 1


def need(fields: Mapping[str, Any], key: str, where: str) -> Any:
    """Return the value of a key that must be there; `where` names the message."""
    if key not in fields:
        raise BadFrame(f"{where}: key {key!r} is missing")
    return fields[key]


def whole(fields: Mapping[str, Any], key: str, where: str) -> int:
    """Return a whole number of at least 0 and less than 2⁶³."""
    value = need(fields, key, where)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
        raise BadFrame(f"{where}: {key}: expected a whole number, got {shown(value)}")
    return value


def text(fields: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text that may serve as a name."""
    value = need(fields, key, where)
    if not is_name(value):
        raise BadFrame(f"{where}: {key}: expected text, got {shown(value)}")
    return value


def is_name(value: Any) -> TypeGuard[str]:
    """Names go into logs, files and topics: no control characters, no end to speak of."""
    return isinstance(value, str) and len(value) <= 256 and value.isprintable()


def position_um(user_data: Any) -> tuple[float, ...] | None:
    """Return the scan position in um that the user data of an image carry, None where they carry none."""
    if not isinstance(user_data, dict) or "position_um" not in user_data:
        return None
    given = user_data["position_um"]
    if (
        not isinstance(given, list)
        or not 1 <= len(given) <= 3
        or not all(isinstance(x, int | float) and math.isfinite(x) for x in given)
    ):
        raise BadFrame(f"image: user_data: position_um: expected 1 to 3 numbers, got {shown(given)}")
    return tuple(float(x) for x in given)


def shown(value: Any) -> str:
    """Return a value as a few characters for a message to an operator."""
    if isinstance(value, CBORTag):
        return f"CBOR tag {value.tag}"
    if isinstance(value, memoryview):
        return f"{value.nbytes} bytes"
    return reprlib.repr(value)
