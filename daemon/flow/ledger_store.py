"""The ledger's file: SQLite in WAL mode, one transaction for all that happened in a while.

Tables: `series` (one row a series; a uid "none-..." collects messages that belong to none), `accounts`
(the counters of a channel of a series), `ranges` (which frames were received, which are done, as
intervals), `exceptions` (every other end of a frame, with reason and time; neighbours with the
same end share a row), `meta`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemon.flow.ranges import Ranges
from daemon.sources.base import Standing
from grainwatch.config import ConfigError

#: The states that a frame can end in, apart from done.
STATES: Final = ("failed", "dropped", "lost", "missing")
COUNTERS: Final = ("received", "done", "failed", "dropped", "lost", "missing")
RECEIVED: Final = 0
DONE: Final = 1
VERSION: Final = 1
NO_SERIES: Final = "none-"

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS series (
    id INTEGER PRIMARY KEY, stream TEXT NOT NULL, uid TEXT NOT NULL, detector_series TEXT NOT NULL,
    first_frame INTEGER NOT NULL, n_frames INTEGER, started REAL NOT NULL, ended REAL,
    results_file TEXT, UNIQUE (stream, uid));
CREATE TABLE IF NOT EXISTS accounts (
    id INTEGER PRIMARY KEY, series INTEGER NOT NULL REFERENCES series (id), channel TEXT NOT NULL,
    received INTEGER NOT NULL DEFAULT 0, done INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, dropped INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0, missing INTEGER NOT NULL DEFAULT 0, UNIQUE (series, channel));
CREATE TABLE IF NOT EXISTS ranges (
    account INTEGER NOT NULL, kind INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    PRIMARY KEY (account, kind, first)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS exceptions (
    id INTEGER PRIMARY KEY, account INTEGER NOT NULL, state TEXT NOT NULL, first INTEGER, last INTEGER,
    beside INTEGER NOT NULL, reason TEXT NOT NULL, time REAL NOT NULL);
CREATE INDEX IF NOT EXISTS exceptions_of ON exceptions (account, first);
"""


@dataclass(frozen=True, slots=True)
class SeriesRow:
    """A series as the file knows it."""

    row: int
    stream: str
    uid: str
    detector_series: str
    first_frame: int
    n_frames: int | None
    started: float
    ended: float | None
    results_file: str | None


@dataclass(frozen=True, slots=True)
class AccountRow:
    """The counters of one channel of a series."""

    row: int
    series: int
    channel: str
    counts: dict[str, int]


@dataclass(slots=True)
class Exceptional:
    """Frames first .. last that ended in the same way. `first` None: a message without a number.

    `beside` marks arrivals that are not a frame's own end: repeats, frames of a closed series.
    """

    state: str
    first: int | None
    last: int | None
    beside: bool
    reason: str
    time: float


class LedgerStore:
    """The file. Not safe between threads: the ledger holds a lock around it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
            known = self.meta("version", VERSION)
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('version', ?)", (VERSION,))
        except sqlite3.Error as error:
            raise ConfigError(f"daemon.state_dir: the ledger {path} cannot be used: {error}") from error
        if known != VERSION:
            raise ConfigError(
                f"daemon.state_dir: the ledger {path} is of version {known}, this program writes {VERSION}"
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def begin(self) -> None:
        """Begin a transaction."""
        self._db.execute("BEGIN IMMEDIATE")

    def begin_reading(self) -> None:
        """Begin to read one state of the file, whatever is written meanwhile."""
        self._db.execute("BEGIN")

    def commit(self) -> None:
        """Commit it."""
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        """Undo it, if one is open."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    # Single values.

    def meta(self, key: str, default: int) -> int:
        """Return a number by name."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return default if row is None else int(row[0])

    def set_meta(self, key: str, value: int) -> None:
        """Write a number by name."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def set_meta_durably(self, key: str, value: int) -> None:
        """Write a number so that it outlives a power cut: it is on the disk on return."""
        self._db.execute("PRAGMA synchronous = FULL")
        try:
            self.set_meta(key, value)
        finally:
            self._db.execute("PRAGMA synchronous = NORMAL")

    # Series and accounts.

    def add_series(
        self, stream: str, uid: str, detector_series: str, first: int, n_frames: int | None, started: float
    ) -> int:
        """Write a new series; return its row."""
        self._db.execute(
            "INSERT OR IGNORE INTO series (stream, uid, detector_series, first_frame, n_frames, started)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (stream, uid, detector_series, first, n_frames, started),
        )
        row = self._db.execute("SELECT id FROM series WHERE stream = ? AND uid = ?", (stream, uid))
        return int(row.fetchone()[0])

    def add_account(self, series: int, channel: str) -> int:
        """Write a new account with zero counters, or find the one there is; return its row."""
        self._db.execute("INSERT OR IGNORE INTO accounts (series, channel) VALUES (?, ?)", (series, channel))
        row = self._db.execute("SELECT id FROM accounts WHERE series = ? AND channel = ?", (series, channel))
        return int(row.fetchone()[0])

    def set_ended(self, series: int, ended: float) -> None:
        """Note when a series ended."""
        self._db.execute("UPDATE series SET ended = ? WHERE id = ?", (ended, series))

    def set_results_file(self, uid: str, path: str) -> None:
        """Note where the results of a series are."""
        self._db.execute("UPDATE series SET results_file = ? WHERE uid = ?", (path, uid))

    def results_file(self, uid: str) -> str | None:
        """Return where the results of a series are."""
        row = self._db.execute("SELECT results_file FROM series WHERE uid = ?", (uid,)).fetchone()
        return None if row is None else row[0]

    def series(self, only_open: bool = False, limit: int = -1) -> list[SeriesRow]:
        """Return series, latest first, without those that stand for no series."""
        where = "AND ended IS NULL" if only_open else ""
        rows = self._db.execute(
            "SELECT id, stream, uid, detector_series, first_frame, n_frames, started, ended, results_file"
            f" FROM series WHERE uid NOT LIKE '{NO_SERIES}%' {where} ORDER BY id DESC LIMIT ?",
            (limit,),
        )
        return [SeriesRow(*row) for row in rows]

    def all_series(self) -> list[SeriesRow]:
        """Return all series, also those that stand for none, in order."""
        rows = self._db.execute(
            "SELECT id, stream, uid, detector_series, first_frame, n_frames, started, ended, results_file"
            " FROM series ORDER BY id"
        )
        return [SeriesRow(*row) for row in rows]

    def standing(self, stream: str, detector_series: str) -> Standing | None:
        """Return how the latest series of that name stands, over all its channels."""
        row = self._db.execute(
            "SELECT id, ended IS NULL FROM series WHERE stream = ? AND detector_series = ?"
            " ORDER BY id DESC LIMIT 1",
            (stream, detector_series),
        ).fetchone()
        if row is None:
            return None
        held = Ranges()
        for account in self.accounts(row[0]):
            lost = Ranges()
            for e in self.exceptions(account.row):
                if e.state == "lost" and not e.beside and e.first is not None and e.last is not None:
                    lost.add_range(e.first, e.last)
            for first, last in self.ranges(account.row, RECEIVED).minus(lost):
                held.add_range(first, last)
        return Standing(open=bool(row[1]), held=held)

    def accounts(self, series: int) -> list[AccountRow]:
        """Return the accounts of a series."""
        rows = self._db.execute(
            f"SELECT id, series, channel, {', '.join(COUNTERS)} FROM accounts WHERE series = ? ORDER BY id",
            (series,),
        )
        return [AccountRow(r[0], r[1], r[2], dict(zip(COUNTERS, r[3:], strict=True))) for r in rows]

    def set_counts(self, account: int, counts: dict[str, int]) -> None:
        """Write the counters of an account."""
        assignments = ", ".join(f"{c} = ?" for c in COUNTERS)
        self._db.execute(
            f"UPDATE accounts SET {assignments} WHERE id = ?", (*(counts[c] for c in COUNTERS), account)
        )

    # Frames.

    def add_ranges(self, account: int, kind: int, numbers: Ranges) -> None:
        """Add frames to those received or done, merged with the intervals that they touch."""
        for a, b in numbers:
            touching = self._db.execute(
                "SELECT first, last FROM ranges WHERE account = ? AND kind = ?"
                " AND first <= ? AND last >= ? AND first >= ("
                " SELECT coalesce(max(first), ?) FROM ranges WHERE account = ? AND kind = ? AND first <= ?)",
                (account, kind, b + 1, a - 1, a, account, kind, a),
            ).fetchall()
            first = min([a, *(f for f, _ in touching)])
            last = max([b, *(t for _, t in touching)])
            if touching == [(first, last)]:
                continue
            self._db.executemany(
                "DELETE FROM ranges WHERE account = ? AND kind = ? AND first = ?",
                [(account, kind, f) for f, _ in touching if f != first],
            )
            self._db.execute(
                "INSERT OR REPLACE INTO ranges VALUES (?, ?, ?, ?)", (account, kind, first, last)
            )

    def ranges(self, account: int, kind: int) -> Ranges:
        """Return the frames received or done."""
        rows = self._db.execute(
            "SELECT first, last FROM ranges WHERE account = ? AND kind = ? ORDER BY first", (account, kind)
        )
        return Ranges((int(a), int(b)) for a, b in rows)

    def add_exceptions(self, account: int, rows: Iterable[Exceptional]) -> None:
        """Append exceptions."""
        self._db.executemany(
            "INSERT INTO exceptions (account, state, first, last, beside, reason, time)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(account, e.state, e.first, e.last, e.beside, e.reason, e.time) for e in rows],
        )

    def exceptions(self, account: int) -> list[Exceptional]:
        """Return the exceptions of an account, oldest first."""
        rows = self._db.execute(
            "SELECT state, first, last, beside, reason, time FROM exceptions WHERE account = ? ORDER BY id",
            (account,),
        )
        return [Exceptional(s, f, t, bool(b), r, at) for s, f, t, b, r, at in rows]

    def take_back(self, account: int, state: str, numbers: Ranges) -> None:
        """Remove frames from their own exceptions of a state: a lost frame came again after all."""
        for a, b in numbers:
            rows = self._db.execute(
                "SELECT id, first, last, reason, time FROM exceptions WHERE account = ? AND state = ?"
                " AND NOT beside AND first <= ? AND last >= ?",
                (account, state, b, a),
            ).fetchall()
            for row, first, last, reason, at in rows:
                self._db.execute("DELETE FROM exceptions WHERE id = ?", (row,))
                rest = Ranges([(first, last)]).minus(Ranges([(a, b)]))
                self.add_exceptions(account, [Exceptional(state, f, t, False, reason, at) for f, t in rest])

    def drop_missing(self, account: int) -> None:
        """Remove the missing frames of an account whose series goes on."""
        self._db.execute("DELETE FROM exceptions WHERE account = ? AND state = 'missing'", (account,))

    def forget(self, before: float, keep: Collection[int] = ()) -> int:
        """Delete the series that ended before `before` (UTC seconds), but for the rows in `keep`.

        Returns
        -------
        int
            How many.
        """
        ended = self._db.execute("SELECT id FROM series WHERE ended < ?", (before,)).fetchall()
        old = [row for (row,) in ended if row not in keep]
        for series in old:
            mine = "account IN (SELECT id FROM accounts WHERE series = ?)"
            self._db.execute(f"DELETE FROM ranges WHERE {mine}", (series,))
            self._db.execute(f"DELETE FROM exceptions WHERE {mine}", (series,))
            self._db.execute("DELETE FROM accounts WHERE series = ?", (series,))
            self._db.execute("DELETE FROM series WHERE id = ?", (series,))
        return len(old)


def audit(path: Path) -> list[str]:
    """Check a ledger file against itself and return what does not balance.

    The counters are compared with what the intervals and the exceptions say, which are written
    separately: received = done + failed + dropped + lost + in flight for each stream, series and
    channel, where the frames in flight are those received that have no other state.

    Raises
    ------
    ConfigError
        If it is not a ledger.
    """
    if not path.exists():
        raise ConfigError(f"daemon.state_dir: there is no ledger {path}")
    store = LedgerStore(path)
    store.begin_reading()
    wrong: list[str] = []
    for series in store.all_series():
        for account in store.accounts(series.row):
            at = f"{series.stream} {series.uid} {account.channel!r}"
            wrong += [f"{at}: {w}" for w in _audit_account(store, account)]
    store.close()
    return wrong


def unsettled(store: LedgerStore, account: int) -> Ranges:
    """Return the frames that were received and have no end."""
    ended = store.ranges(account, DONE)
    for e in store.exceptions(account):
        if e.first is not None and e.last is not None and not e.beside and e.state != "missing":
            ended.add_range(e.first, e.last)
    return store.ranges(account, RECEIVED).minus(ended)


def _audit_account(store: LedgerStore, account: AccountRow) -> list[str]:
    received, done = store.ranges(account.row, RECEIVED), store.ranges(account.row, DONE)
    seen = dict.fromkeys(COUNTERS, 0)
    own = Ranges()
    beside, wrong = 0, []
    for e in store.exceptions(account.row):
        n = 1 if e.first is None or e.last is None else e.last - e.first + 1
        seen[e.state] += n
        if e.state == "missing":
            continue
        if e.beside or e.first is None or e.last is None:
            beside += n
            continue
        if len(own.within(e.first, e.last)) or len(done.within(e.first, e.last)):
            wrong.append(f"frames {e.first}..{e.last} have two ends, one of them {e.state}")
        own.add_range(e.first, e.last)
    seen["received"] = len(received) + beside
    seen["done"] = len(done)
    in_flight = len(received.minus(own).minus(done))
    if len(own.minus(received)) or len(done.minus(received)):
        wrong.append("frames ended that were never received")
    wrong += [
        f"{name}: counted {account.counts[name]}, the frames say {seen[name]}"
        for name in COUNTERS
        if seen[name] != account.counts[name]
    ]
    ends = sum(account.counts[s] for s in ("done", "failed", "dropped", "lost"))
    if account.counts["received"] != ends + in_flight:
        wrong.append(f"received {account.counts['received']} != {ends} ended + {in_flight} in flight")
    return wrong
