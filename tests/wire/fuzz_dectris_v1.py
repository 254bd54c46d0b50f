"""Broken messages for the Stream V1 decoder."""

from __future__ import annotations

import json
import random
from typing import Any

from daemon.sources.dectris.v1_codec import Decoder
from tests.wire import golden_v1 as g
from tests.wire.fuzz import MAX_IMAGE_BYTES, NUMBERS, Case, Outcome, Parts, check_events, damage, damage_blob

# One for the whole run, as in a source: what one message leaves behind meets the next one.
_DECODER = Decoder(MAX_IMAGE_BYTES)

_VALUES: list[Any] = [
    *NUMBERS, -1, -(1 << 70), 10**400, 1.5, 1e300, float("nan"), float("inf"), True, None,
    "", "<", "lz4<", "bs8-lz4<", "bs32-lz4>", "uint8", "uint32", "float32", "none", "all",
    "\ud800", "x" * 5000,
    [], {}, [0, 0], [1, 1], [5, 3], [3, 5], [-5, -3], [1 << 31, 1 << 31], [10**300, 10**300], [[[[5, 3]]]],
    {"a": {"b": [None]}}, "dheader-1.0", "dimage-1.0", "dimage_d-1.0", "dconfig-1.0", "dseries_end-1.0",
]  # fmt: skip
_ODD = [b"{", b"[", b'"', b"\\", b"\\u", b"\xff", b"\0", b"1e999", b"-", b"NaN", b"9" * 5000, b'{"a":' * 50]


def broken(parts: Parts, others: list[Parts], rng: random.Random) -> Parts:
    """Damage parts: their number and order, their bytes, their values."""
    changed = list(parts)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(changed)) if changed else 0
        kind = rng.random()
        if kind < 0.1 or not changed:  # another number of parts
            changed[at : at + rng.randrange(2)] = rng.choice(others)[: rng.randrange(4)]
        elif kind < 0.15:
            changed.insert(at, rng.choice((b"", b"{}", b"x" * 3000, *changed)))
        elif kind < 0.2:
            rng.shuffle(changed)
        elif kind < 0.6 and (described := _described(changed[at])) is not None:
            changed[at] = _said_otherwise(described, rng)
        elif kind < 0.8 and len(changed) > 2:  # pixels and tables
            blobs = [k for k, part in enumerate(changed) if _described(part) is None] or [at]
            at = rng.choice(blobs)
            changed[at] = damage_blob(changed[at], rng)
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
    if keys and rng.random() < 0.3:
        del fields[rng.choice(keys)]
    else:
        fields[rng.choice([*keys, "size", "nimages", "position_um"])] = rng.choice(_VALUES)
    return json.dumps(fields).encode()


def check(parts: Parts, outcome: Outcome) -> None:
    """Decode one message and look at what comes out."""
    events = _DECODER.decode(parts)
    assert events, "no event"
    for event in events:
        # What metadata say goes into files and to other processes.
        json.dumps(dict(getattr(event, "metadata", {})), allow_nan=False, default=str).encode()
    check_events(events, outcome)


CASE = Case("DECTRIS Stream V1", g.corpus, broken, check)
