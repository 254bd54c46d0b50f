"""JSON parts of a message from a network, read with bounds on size and depth."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from daemon.sources.fields import LARGEST, shown
from pipelines.frame import BadFrame

#: A part of JSON that is larger describes nothing that a detector could mean.
MAX_JSON_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 32

Part: TypeAlias = memoryview | bytes


def appendix(part: Part) -> Any:
    """Return what a user appended: JSON as what it says, other text as it is.

    Raises
    ------
    BadFrame
        If it cannot be metadata.
    """
    text = part_text(part, "appendix")
    try:
        return plain(_JSON.decode(text))
    except BadFrame as error:
        raise BadFrame(f"appendix: {error}") from error
    except (ValueError, RecursionError):
        return text


def json_object(part: Part, where: str, htype: str = "") -> dict[str, Any]:
    """Return the fields of a part that is a JSON object, of a kind if one is asked for.

    Raises
    ------
    BadFrame
        If it is none, naming `where`.
    """
    text = part_text(part, where)
    try:
        fields = _JSON.decode(text)
    except BadFrame as error:
        raise BadFrame(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        at_once = isinstance(error, json.JSONDecodeError)
        said = str(error) if at_once else "nested too deeply or a number too long"
        raise BadFrame(f"{where} of {len(text)} characters is not JSON: {said}") from error
    if not isinstance(fields, dict):
        raise BadFrame(f"{where} is not a JSON object: {shown(fields)}")
    if htype and fields.get("htype") != htype:
        raise BadFrame(f"expected a part {htype}, got htype {shown(fields.get('htype'))}")
    return fields


def part_text(part: Part, where: str) -> str:
    """Return a part as text.

    Raises
    ------
    BadFrame
        If it is too large or not UTF-8.
    """
    view = memoryview(part)
    if view.nbytes > MAX_JSON_BYTES:
        raise BadFrame(f"{where} of {view.nbytes} bytes, the limit is {MAX_JSON_BYTES}")
    try:
        return str(view, "utf-8")
    except UnicodeDecodeError as error:
        raise BadFrame(f"{where} of {view.nbytes} bytes is no text") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadFrame(f"has the key {shown(twice)} twice")
    return fields


# JSON has no NaN and no infinity; where a sender writes one, nothing is known.
_JSON: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=lambda _name: None)


def plain(value: Any, depth: int = 0) -> Any:
    """Return metadata that any writer can take: numbers of 64 bits, text in Unicode, lists and maps.

    Raises
    ------
    BadFrame
        If a number is larger, a text is none, or lists and maps are nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise BadFrame(f"nested more than {MAX_DEPTH} times")
    if isinstance(value, Mapping):
        return {plain(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise BadFrame("a number needs more than 64 bits")
    if isinstance(value, str) and not _is_unicode(value):
        raise BadFrame(f"text {shown(value)} is no Unicode")
    return value


def _is_unicode(value: str) -> bool:
    """Return whether a text can be written: JSON can spell halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
