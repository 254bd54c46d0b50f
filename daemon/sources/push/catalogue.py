"""Which image stands behind a number: what was pushed, by the name of its series.

The ledger knows numbers only. With the catalogue a sender that comes back, or another one, learns
which of its files need not be sent again, and two files of the same number are told apart. A row
says nothing of whether the image was received: that is the ledger's to say, which may lack the last
tenth of a second after a crash.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from grainwatch.config import ConfigError

_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS series (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, first INTEGER NOT NULL, used REAL NOT NULL);
CREATE INDEX IF NOT EXISTS series_of ON series (name);
CREATE TABLE IF NOT EXISTS images (
    series TEXT NOT NULL, number INTEGER NOT NULL, fingerprint BLOB NOT NULL, name TEXT NOT NULL,
    PRIMARY KEY (series, number)) WITHOUT ROWID;
"""
_DAY_S: Final = 86400.0


class Catalogue:
    """The file, for one thread at a time.

    Parameters
    ----------
    path : Path
    keep_days : float
        Series that were not used for so long are forgotten at the opening.

    Raises
    ------
    ConfigError
        If it cannot be used.
    """

    def __init__(self, path: Path, keep_days: float) -> None:
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            # What a power cut may cost is sent again, and found in the ledger.
            self._db.execute("PRAGMA synchronous = OFF")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise ConfigError(f"{path} is of version {version}, this program writes {_VERSION}")
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {_VERSION}")
            self._forget(time.time() - keep_days * _DAY_S)
        except sqlite3.Error as error:
            raise ConfigError(f"the catalogue {path} cannot be used: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def series_of(self, name: str, limit: int) -> list[str]:
        """Return the ids of the series of a name, latest first."""
        rows = self._db.execute(
            "SELECT id FROM series WHERE name = ? ORDER BY rowid DESC LIMIT ?", (name, limit)
        )
        return [str(series) for (series,) in rows]

    def first(self, series: str) -> int:
        """Return the number that a series starts from, 0 for one that is not known."""
        row = self._db.execute("SELECT first FROM series WHERE id = ?", (series,)).fetchone()
        return int(row[0]) if row else 0

    def add_series(self, series: str, name: str, first: int) -> None:
        """Note a series, or that it goes on."""
        self._db.execute(
            "INSERT INTO series VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET used = excluded.used",
            (series, name, first, time.time()),
        )

    def add(self, series: str, number: int, fingerprint: bytes, name: str) -> None:
        """Note an image."""
        self._db.execute(
            "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", (series, number, fingerprint, name)
        )

    def find(self, series: str, number: int) -> tuple[bytes, str] | None:
        """Return fingerprint and name of the image that a number stands for."""
        row = self._db.execute(
            "SELECT fingerprint, name FROM images WHERE series = ? AND number = ?", (series, number)
        ).fetchone()
        return (bytes(row[0]), str(row[1])) if row else None

    def images(self, series: str) -> Iterator[tuple[int, bytes]]:
        """Yield number and fingerprint of the images of a series, in order."""
        rows = self._db.execute(
            "SELECT number, fingerprint FROM images WHERE series = ? ORDER BY number", (series,)
        )
        for number, fingerprint in rows:
            yield int(number), bytes(fingerprint)

    def _forget(self, before: float) -> None:
        self._db.execute(
            "DELETE FROM images WHERE series IN (SELECT id FROM series WHERE used < ?)", (before,)
        )
        self._db.execute("DELETE FROM series WHERE used < ?", (before,))
