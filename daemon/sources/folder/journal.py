"""What a folder source has handed over, in a file: so that a restart takes nothing twice.

Written ahead: what is about to be handed over is in the journal first. What the daemon did not receive
then, or lost in a crash, the ledger knows; the journal says in which file it lies.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from daemon.flow.ranges import Ranges
from daemon.sources.folder.pattern import Mark
from grainwatch.config import ConfigError

log = logging.getLogger(__name__)

_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS series (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, name TEXT NOT NULL, folder BLOB NOT NULL,
    first INTEGER NOT NULL, ended INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS series_of ON series (key);
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, inode TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns TEXT NOT NULL,
    given INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (
    series INTEGER NOT NULL, path BLOB NOT NULL, image INTEGER NOT NULL, frame INTEGER NOT NULL,
    PRIMARY KEY (series, path, image)) WITHOUT ROWID;
"""


@dataclass(slots=True, eq=False)
class FolderSeries:
    """A series of files.

    `key` is what its files have in common, `name` what the daemon is told; `first` its first frame
    number. `frames` are the numbers that were handed over. `started`: the daemon was told of it.
    `over`: it is of an earlier run, and another one came after it.
    """

    row: int
    key: str
    name: str
    folder: str
    first: int
    frames: Ranges = field(default_factory=Ranges)
    started: bool = False
    over: bool = False


Earlier: TypeAlias = tuple[FolderSeries, int]
"""As which frame of which series an image was handed over in an earlier run."""


class Journal:
    """One file for one stream. Used by one thread; a tenth of a millisecond an image."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault = ""
        self._unwritten = 0
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
            version = self._meta("version", _VERSION)
            self._set_meta("version", version)
        except sqlite3.Error as error:
            raise ConfigError(f"daemon.state_dir: the journal {path} cannot be used: {error}") from error
        if version != _VERSION:
            raise ConfigError(
                f"daemon.state_dir: the journal {path} is of version {version},"
                f" this program writes {_VERSION}"
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def has_begun(self, pattern: str) -> bool:
        """Return whether files of this pattern were looked at before."""
        return self._meta(f"begun {pattern}", 0) != 0

    def set_begun(self, pattern: str) -> None:
        """Note that files of this pattern were looked at."""
        with self._transaction():
            self._set_meta(f"begun {pattern}", 1)

    # Files.

    def files(self) -> Iterator[tuple[str, Mark]]:
        """Yield all files that were taken."""
        rows = self._db.execute("SELECT path, inode, size, mtime_ns, given FROM files")
        for path, inode, size, mtime_ns, given in rows:
            yield os.fsdecode(path), Mark(int(inode), size, int(mtime_ns), given)

    def note(self, files: Iterable[tuple[str, Mark]]) -> None:
        """Note what files were like, and how many images of each were handed over."""
        with self._transaction():
            self._write(files)

    def take(self, path: str, mark: Mark, series: FolderSeries | None, image: int, frame: int) -> None:
        """Note an image that is about to be handed over, as a frame of a series unless that is None."""
        with self._transaction():
            self._write([(path, mark)])
            if series is not None:
                self._db.execute(
                    "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)",
                    (series.row, os.fsencode(path), image, frame),
                )

    def _write(self, files: Iterable[tuple[str, Mark]]) -> None:
        # As text: inodes and times of some shares are too large for SQLite's whole numbers.
        self._db.executemany(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
            [(os.fsencode(p), str(m.inode), m.size, str(m.mtime_ns), m.given) for p, m in files],
        )

    # Series.

    def begin(self, key: str, folder: str, first: int) -> FolderSeries:
        """Write a new series; its name is its key, with a count if there was one of that key before."""
        self._unwritten -= 1
        row, name = self._unwritten, f"{key} ({time.time_ns()})"  # what it is if it cannot be written
        with self._transaction():
            (before,) = self._db.execute("SELECT count(*) FROM series WHERE key = ?", (key,)).fetchone()
            new = f"{key} ({before + 1})" if before else key
            added = self._db.execute(
                "INSERT INTO series (key, name, folder, first) VALUES (?, ?, ?, ?)",
                (key, new, os.fsencode(folder), first),
            )
            row, name = int(added.lastrowid or row), new
        return FolderSeries(row, key, name, folder, first)

    def end(self, series: FolderSeries) -> None:
        """Note that the daemon knows of a series' end: its images need not be known one by one any more."""
        with self._transaction():
            self._db.execute("UPDATE series SET ended = 1 WHERE id = ?", (series.row,))
            self._db.execute("DELETE FROM images WHERE series = ?", (series.row,))

    def open_series(self) -> list[FolderSeries]:
        """Return the series whose end the daemon may not know of, oldest first."""
        rows = self._db.execute("SELECT id, key, name, folder, first FROM series WHERE NOT ended ORDER BY id")
        return [FolderSeries(row, key, name, os.fsdecode(f), first) for row, key, name, f, first in rows]

    def images(self, series: FolderSeries) -> list[tuple[str, int, int]]:
        """Return (path, image, frame) of all that was handed over of an open series."""
        rows = self._db.execute("SELECT path, image, frame FROM images WHERE series = ?", (series.row,))
        return [(os.fsdecode(path), int(image), int(frame)) for path, image, frame in rows]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Write all or nothing. A disk that is full costs the memory of a restart, not the results."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if not self.fault:
                log.error("the journal %s cannot be written: %s; going on without it", self.path, error)
            self.fault = f"the journal {self.path} cannot be written: {error}"
        else:
            self.fault = ""

    def _meta(self, key: str, default: int) -> int:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return default if row is None else int(row[0])

    def _set_meta(self, key: str, value: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
