"""Broken messages for the areaDetector decoder, and for what puts its arrays into series."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from daemon.sources.areadetector.codec import Decoder
from daemon.sources.areadetector.series import SeriesBook
from daemon.sources.base import Bad, SeriesEnd, SeriesStart
from tests.wire import golden_areadetector as g
from tests.wire.fuzz import MAX_IMAGE_BYTES, NUMBERS, Case, Outcome, Parts, check_events, damage, damage_blob

_DECODERS = [
    Decoder(MAX_IMAGE_BYTES, MAX_IMAGE_BYTES),
    Decoder(MAX_IMAGE_BYTES, MAX_IMAGE_BYTES, "xy", ("SamX", "SamY"), 1000.0),
]

_VALUES: list[Any] = [
    *NUMBERS, -1, -(1 << 70), 10**400, 1.5, 1e300, float("nan"), float("inf"), True, None,
    "", "bslz4", "lz4", "lz4hdf5", "jpeg", "uint8", "uint64", "float16", "little", "big", "array-1.0",
    "\ud800", "x" * 5000, ["array-1.0"], ["chunk-1.0"], [["array-1.0"]],
    [], {}, [0, 0], [1, 1], [5, 3], [3, 5], [1, 3, 5], [3, 5, 3], [-5, -3], [1 << 31, 1 << 31], [10**300, 1],
    {"SamX": 1, "SamY": 2}, {"SamX": None}, {"a": {"b": [None]}}, {"ColorMode": 2},
    17, 18, 16, 19, 80, 10**7,
]  # fmt: skip
_ODD = [
    b"{",
    b"[",
    b'"',
    b"\\",
    b"\\u",
    b"\xff",
    b"\0",
    b"1e999",
    b"nan",
    b"-inf",
    b"9" * 5000,
    b'{"a":' * 50,
]


class _Books:
    """A book for each decoder, as two sources have; begun anew where too many series began."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._made = 0
        self.books = [self.make(), self.make()]

    def make(self) -> SeriesBook:
        self._made += 1
        note = Path(self._folder.name) / f"{self._made}.json"
        return SeriesBook(note, lambda _: None, n_frames=50 if self._made % 2 else 0)


_BOOKS = _Books()


def broken(parts: Parts, others: list[Parts], rng: random.Random) -> Parts:
    """Damage parts: their number and order, their bytes, their values."""
    changed = list(parts)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(changed)) if changed else 0
        kind = rng.random()
        if kind < 0.06 or not changed:  # another number of parts
            changed[at : at + rng.randrange(2)] = rng.choice(others)[: rng.randrange(3)]
        elif kind < 0.1:
            changed.insert(at, rng.choice((b"", b"{}", b"x" * 3000, *changed)))
        elif kind < 0.12:
            rng.shuffle(changed)
        elif kind < 0.6 and (described := _described(changed[0])) is not None:
            changed[0] = _said_otherwise(described, rng)
        elif kind < 0.8 and len(changed) > 1:
            changed[1] = damage_blob(changed[1], rng)
        else:
            pieces = [part for other in others for part in other]
            changed[at] = damage(changed[at], rng, pieces, lambda: rng.choice(_ODD))
    return changed


def _described(part: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(part)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _said_otherwise(fields: dict[str, Any], rng: random.Random) -> bytes:
    """Change a value, leave a key out, add one."""
    keys = list(fields)
    inner = fields.get("ndattr")
    if isinstance(inner, dict) and rng.random() < 0.2:
        inner[rng.choice(["SamX", "SamY", "ColorMode", "x"])] = rng.choice(_VALUES)
    elif keys and rng.random() < 0.2:
        del fields[rng.choice(keys)]
    else:
        fields[rng.choice([*keys, "frame", "frame", "endianness"])] = rng.choice(_VALUES)
    return json.dumps(fields).encode()


def check(parts: Parts, outcome: Outcome) -> None:
    """Decode one message, put it into a series, and look at what comes out."""
    for number, decoder in enumerate(_DECODERS):
        book = _BOOKS.books[number]
        events = book.take(decoder.decode(parts))
        assert events, "no event"
        opened = [e.detector_series for e in events if isinstance(e, SeriesStart)]
        ended = [e.detector_series for e in events if isinstance(e, SeriesEnd)]
        assert len(opened) <= 1, "two series began"
        assert len(ended) <= 2, "three series ended"
        for event in events:
            json.dumps(dict(getattr(event, "metadata", {})), allow_nan=False).encode()
            if isinstance(event, Bad) and "series began within a minute" in event.reason:
                _BOOKS.books[number] = _BOOKS.make()
        check_events(events, outcome)


CASE = Case("areaDetector ZMQ", g.corpus, broken, check)
