"""What a model in the shadow found on a frame, beside the model that served it."""

from __future__ import annotations

import math
import sqlite3
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np

_COLUMNS: Final = (
    "time, stream, series_uid, frame, channel, live_sha256, agree, figures, live_ms, shadow_ms, error, result"
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One frame that both models computed.

    Attributes
    ----------
    time : float
        UTC seconds.
    stream, series_uid, channel : str
    frame : int
        Whose results they are: the live one is in the results file.
    live_sha256 : str
        Of the model that served the frame.
    agree : bool
        False also where the shadow failed.
    figures : dict of str to float
        In what the two differ, as their pipeline counts it.
    live_ms, shadow_ms : float
        What the frame took them.
    error : str
        Why the shadow has no result, "" where it has.
    result : bytes
        That of the shadow, msgpack.
    """

    time: float
    stream: str
    series_uid: str
    frame: int
    channel: str
    live_sha256: str
    agree: bool
    figures: dict[str, float] = field(default_factory=dict)
    live_ms: float = 0.0
    shadow_ms: float = 0.0
    error: str = ""
    result: bytes = b""


def put(db: sqlite3.Connection, model: int, row: Comparison, kept: int) -> None:
    """Write a comparison and forget all but the newest `kept` of its model."""
    db.execute(
        f"INSERT INTO comparisons (model, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            model,
            row.time,
            row.stream,
            row.series_uid,
            row.frame,
            row.channel,
            row.live_sha256,
            bool(row.agree),
            # Figures are often numbers of NumPy.
            msgspec.json.encode(row.figures, enc_hook=float).decode(),
            row.live_ms,
            row.shadow_ms,
            row.error,
            zlib.compress(row.result),
        ),
    )
    db.execute(
        "DELETE FROM comparisons WHERE model = ? AND id <="
        " (SELECT id FROM comparisons WHERE model = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
        (model, model, kept),
    )


def read(db: sqlite3.Connection, model: int, limit: int = -1) -> list[Comparison]:
    """Return comparisons of a model, the latest first."""
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM comparisons WHERE model = ? ORDER BY id DESC LIMIT ?", (model, limit)
    )
    return [
        Comparison(
            *(at, stream, uid, frame, channel, live),
            agree=bool(agree),
            figures=_figures(figures),
            live_ms=live_ms,
            shadow_ms=shadow_ms,
            error=error,
            result=zlib.decompress(result),
        )
        for at, stream, uid, frame, channel, live, agree, figures, live_ms, shadow_ms, error, result in rows
    ]


def summarise(db: sqlite3.Connection, model: int) -> dict[str, Any]:
    """Sum up what is kept of a model against the live one of the latest comparison.

    Returns
    -------
    dict
        `n`; `agree` (share of them); `errors`; `figures` (the median of each); `live_ms` and
        `shadow_ms` (`median`, `p95`, of the frames that both have done); `live_sha256`; `first` and
        `last` (UTC seconds); `others`, comparisons with other live models, which do not count.
        Of a model without any: n = 0 alone.
    """
    latest = db.execute(
        "SELECT live_sha256 FROM comparisons WHERE model = ? ORDER BY id DESC LIMIT 1", (model,)
    ).fetchone()
    if latest is None:
        return {"n": 0}
    rows = db.execute(
        "SELECT time, agree, figures, live_ms, shadow_ms, error FROM comparisons"
        " WHERE model = ? AND live_sha256 = ? ORDER BY id",
        (model, latest[0]),
    ).fetchall()
    (total,) = db.execute("SELECT count(*) FROM comparisons WHERE model = ?", (model,)).fetchone()
    done = [row for row in rows if not row[5]]
    figures: dict[str, list[float]] = {}
    for row in done:
        for name, value in _figures(row[2]).items():
            if math.isfinite(value):
                figures.setdefault(name, []).append(value)
    return {
        "n": len(rows),
        "agree": sum(row[1] for row in rows) / len(rows),
        "errors": len(rows) - len(done),
        "figures": {name: float(np.median(values)) for name, values in figures.items()},
        "live_ms": _spread([row[3] for row in done]),
        "shadow_ms": _spread([row[4] for row in done]),
        "live_sha256": latest[0],
        "first": rows[0][0],
        "last": rows[-1][0],
        "others": total - len(rows),
    }


def _figures(text: str) -> dict[str, float]:
    # JSON has no number that is none.
    stored = msgspec.json.decode(text, type=dict[str, float | None])
    return {name: math.nan if value is None else value for name, value in stored.items()}


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    median, p95 = np.percentile(values, (50, 95))
    return {"median": float(median), "p95": float(p95)}
