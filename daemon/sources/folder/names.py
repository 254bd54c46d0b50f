"""What names and headers of image files say: series, number, position, time."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

#: Larger numbers are dates or serial numbers, not counters (and no float holds them).
LARGEST_NUMBER: Final = 1 << 53

_AXES: Final = ("x", "y", "z")
_PACKED: Final = (".gz", ".bz2")
#: What may say the kind of a file: .tif, .h5, .mar3450.
_SUFFIX: Final = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")
_DIGITS: Final = re.compile(r"[0-9]+")
_NUMBER_TEXT: Final = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
#: ESRF's headers list names beside values: `motor_mne` "x y", `motor_pos` "1.5 2".
_LISTS: Final = (("motor_mne", "motor_pos"), ("counter_mne", "counter_pos"))


def compiled(pattern: str, key: str, groups: Sequence[str] = ()) -> re.Pattern[str]:
    """Compile a pattern of the configuration.

    Raises
    ------
    ValueError
        If it is no regular expression, or has none of the named groups; the message begins with `key`.
    """
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: is no regular expression: {error}, got {pattern!r}") from error
    if groups and not set(groups) & set(found.groupindex):
        wanted = ", ".join(f"(?P<{g}>...)" for g in groups)
        raise ValueError(f"{key}: expected one of the groups {wanted}, got {pattern!r}")
    return found


class Names:
    """Reads file names.

    Parameters
    ----------
    number_pattern : str
        Regular expression whose group `n`, else first group, else whole match is the number; "" for the
        last run of digits in front of the suffix.
    position_pattern : str
        Regular expression with the groups `x`, `y`, `z`, or some of them; "" for none.
    """

    def __init__(self, number_pattern: str = "", position_pattern: str = "") -> None:
        self._number = compiled(number_pattern, "number_pattern") if number_pattern else None
        self._position = compiled(position_pattern, "position_pattern", _AXES) if position_pattern else None

    def number(self, name: str) -> int | None:
        """Return the number in a name (without its folder), None if there is none.

        >>> Names().number("scan7_0042.tif.gz")
        42
        """
        span = self._span(name)
        digits = name[slice(*span)] if span else ""
        return int(digits) if _DIGITS.fullmatch(digits) else None

    def position(self, name: str) -> tuple[float, ...] | None:
        """Return the coordinates in a name, in its own units; None if it has none."""
        match = self._position.search(name) if self._position else None
        if match is None:
            return None
        texts = [match[axis] for axis in _AXES if axis in match.re.groupindex]
        values = [value_of(text) for text in texts]
        return _position(values)

    def series(self, name: str, by: Literal["name", "folder"], folder: str) -> str:
        """Return what the files of one series have in common: the folder, and the text of their names.

        >>> Names().series("scan7_0042.tif", "name", "/data")
        '/data/scan7_#.tif'
        """
        if by == "folder":
            return folder
        text = name
        spans = [(span, "#") for span in [self._span(name)] if span]
        match = self._position.search(name) if self._position else None
        if match is not None and match.end() > match.start():
            spans.append((match.span(), "@"))
        for (start, end), sign in sorted(spans, reverse=True):
            text = text[:start] + sign + text[end:]
        return os.path.join(folder, text)

    def _span(self, name: str) -> tuple[int, int] | None:
        """Return where in a name the number stands."""
        if self._number is not None:
            match = self._number.search(name)
            if match is None:
                return None
            group = "n" if "n" in match.re.groupindex else min(1, match.re.groups)
            span = match.span(group)
            return span if span[0] >= 0 else None
        stem = name[: len(name) - _suffix_length(name)]
        position = self._position.search(stem) if self._position else None
        if position is not None:  # the digits of a coordinate are no number
            blank = "-" * (position.end() - position.start())
            stem = stem[: position.start()] + blank + stem[position.end() :]
        spans = [match.span() for match in _DIGITS.finditer(stem)]
        return spans[-1] if spans else None


def _suffix_length(name: str) -> int:
    """Return how many characters at the end of a name say what kind of file it is."""
    stem, suffix = os.path.splitext(name)
    length = 0
    if suffix.lower() in _PACKED:
        length = len(suffix)
        suffix = os.path.splitext(stem)[1]
    # A name that is numbered image.0001 or 2.5um_0001 has no suffix.
    return length + len(suffix) if _SUFFIX.fullmatch(suffix) else length


def sidecar_of(path: str, pattern: str) -> str:
    """Return the path of the file that a pattern names beside an image.

    >>> sidecar_of("/data/a_07.tif", "{stem}-tif.hdr")
    '/data/a_07-tif.hdr'
    """
    folder, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    return os.path.join(folder, pattern.replace("{stem}", stem).replace("{name}", name))


def printable(name: str) -> str:
    r"""Return a name that can be stored and sent: shares also have names in encodings of long ago.

    >>> printable("scan_\udcb5m.tif")
    'scan_\\udcb5m.tif'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def header_value(header: Mapping[str, Any], key: str) -> Any:
    """Return what a header says under a key; None if nothing.

    Besides the key itself it is looked for in the lists of names that EDF headers of the ESRF have, and
    at the beginning of lines of text ("# Exposure_time 0.1 s") as CBF and TIFF files carry them.
    """
    if key in header:
        return header[key]
    for names, values in _LISTS:
        listed = str(header.get(names, "")).split()
        if key in listed:
            given = str(header.get(values, "")).split()
            return given[listed.index(key)] if listed.index(key) < len(given) else None
    line = re.compile(rf"^[\s#;]*{re.escape(key)}\s*[\s:=]\s*(\S.*)$", re.MULTILINE)
    for text in header.values():
        match = line.search(text) if isinstance(text, str) else None
        if match is not None:
            return match[1].strip()
    return None


def value_of(given: Any) -> float | None:
    """Return a number, or the number that a text begins with ("1.5 mm"); None for what is neither."""
    if isinstance(given, bool) or given is None:
        return None
    if isinstance(given, str):
        match = _NUMBER_TEXT.match(given.strip())
        given = match[0] if match else "nan"
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def header_number(header: Mapping[str, Any], key: str) -> int | None:
    """Return the whole number under a key, None if there is none."""
    value = value_of(header_value(header, key))
    return int(value) if value is not None and value == int(value) else None


def header_position(header: Mapping[str, Any], keys: Sequence[str]) -> tuple[float, ...] | None:
    """Return the coordinates under keys, in the header's units; None unless all are there."""
    return _position([value_of(header_value(header, key)) for key in keys]) if keys else None


def header_time(header: Mapping[str, Any], key: str) -> float:
    """Return the time under a key in UTC seconds, 0 if it cannot be read.

    Seconds since 1970, or a date and time (ISO 8601; "2026:11:21 10:00:00" of TIFF). A time without a
    zone is taken as UTC, because files do not say where they were written.
    """
    given = header_value(header, key)
    text = str(given or "").strip()
    if _NUMBER_TEXT.fullmatch(text):
        return max(0.0, value_of(text) or 0.0)
    text = re.sub(r"^(\d{4}):(\d\d):(\d\d)\b", r"\1-\2-\3", text)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return 0.0
    try:
        return max(0.0, (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())
    except (OverflowError, ValueError, OSError):
        return 0.0


def _position(values: Sequence[float | None]) -> tuple[float, ...] | None:
    found = tuple(v for v in values if v is not None)
    return found if len(found) == len(values) else None
