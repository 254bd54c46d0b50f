"""The registry's SQLite file: opened when it is needed, shared by the daemon and by commands.

Tables: `models` (one row a version of a model), `serving` (what became active, one upon the other, null
for none; a rollback takes the topmost away), `history` (one row a change of state), `comparisons` (what
a model in the shadow found beside the live one).
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

#: Of the tables; a file that is newer is left alone.
VERSION: Final = 1
#: Somebody else writes for so long at most, seconds.
PATIENCE_S: Final = 15.0

_SCHEMA: Final = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, version TEXT NOT NULL, kind TEXT NOT NULL,
    sha256 TEXT NOT NULL, state TEXT NOT NULL, share REAL NOT NULL, added REAL NOT NULL,
    added_by TEXT NOT NULL, note TEXT NOT NULL, UNIQUE (name, version));
CREATE UNIQUE INDEX one_active ON models (name) WHERE state = 'active';
CREATE UNIQUE INDEX one_shadow ON models (name) WHERE state = 'shadow';
CREATE TABLE history (
    id INTEGER PRIMARY KEY, model INTEGER NOT NULL REFERENCES models (id), time REAL NOT NULL,
    who TEXT NOT NULL, from_state TEXT NOT NULL, to_state TEXT NOT NULL, why TEXT NOT NULL,
    share REAL NOT NULL);
CREATE TABLE serving (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, model INTEGER REFERENCES models (id));
CREATE TABLE comparisons (
    id INTEGER PRIMARY KEY, model INTEGER NOT NULL REFERENCES models (id), time REAL NOT NULL,
    stream TEXT NOT NULL, series_uid TEXT NOT NULL, frame INTEGER NOT NULL, channel TEXT NOT NULL,
    live_sha256 TEXT NOT NULL, agree INTEGER NOT NULL, figures TEXT NOT NULL, live_ms REAL NOT NULL,
    shadow_ms REAL NOT NULL, error TEXT NOT NULL, result BLOB NOT NULL);
CREATE INDEX comparisons_of ON comparisons (model, id);
"""


class RegistryError(ValueError):
    """What the registry cannot do, and why."""


class RegistryFile:
    """One connection to the file, safe between threads.

    Parameters
    ----------
    path : Path
        It and its folder come into being with the first thing that is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._log = path.with_name(f"{path.name}-wal")
        self._db: sqlite3.Connection | None = None

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """Give the file for reading one state of it; None where there is no registry yet.

        Raises
        ------
        RegistryError
            If the file cannot be read or is none of this version.
        """
        with self._lock, self._told():
            db = self._db or self._open_for_reading()
            if db is None:
                yield None
                return
            try:
                db.execute("BEGIN")
                yield db
            finally:
                # What was only read is left in the same way, however it went.
                _rollback(db)
                if db is not self._db:
                    db.close()

    @contextmanager
    def writing(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Give the file for one transaction: all of it is done, or nothing.

        `durable` says that it must outlive a power cut: it is on the disk at the end.

        Raises
        ------
        RegistryError
            If the file cannot be written or is none of this version.
        """
        with self._lock, self._told():
            if self._db is None:
                self._db = self._open_for_writing()
            db = self._db
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            finally:
                _rollback(db)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise RegistryError(f"the model registry {self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise RegistryError(
                f"the model registry {self.path} is damaged ({error}): move {self.path.name}* away and add"
                f" the models again; their bundles lie in {self.path.parent / 'bundles'}"
            ) from error

    def _open_for_reading(self) -> sqlite3.Connection | None:
        """Open the file and keep it open, unless it may only be read; None where it is not filled."""
        if not self.path.exists():
            return None
        db = self._connect("rw")
        try:
            version, keep = _version(db), True
        except sqlite3.OperationalError as error:
            db.close()
            # One who may only read. Without a log beside it nobody has the file open, and SQLite
            # need not make one; but such a reader sees no change.
            if "locked" in str(error) or self._log.exists():
                raise
            db = self._connect("ro&immutable=1")
            version, keep = _version(db), False
        self._check(db, version)
        if not version:
            # Another process is about to fill it.
            db.close()
            return None
        if keep:
            self._db = db
        return db

    def _open_for_writing(self) -> sqlite3.Connection:
        try:
            new = not self.path.exists()
            make_folder(self.path.parent)
            db = self._connect("rwc")
        except OSError as error:
            raise RegistryError(
                f"the model registry {self.path} cannot be made: {error.strerror or error}"
            ) from error
        try:
            self._check(db, _version(db))
            _in_wal_mode(db)
            if new:
                give_to_owner_of(self.path.parent, self.path)
            db.execute("BEGIN IMMEDIATE")
            try:
                if not _version(db):
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {VERSION}")
                db.execute("COMMIT")
            finally:
                _rollback(db)
        except (sqlite3.Error, RegistryError):
            db.close()
            raise
        return db

    def _connect(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=PATIENCE_S,
            check_same_thread=False,
            isolation_level=None,
        )

    def _check(self, db: sqlite3.Connection, version: int) -> None:
        """Refuse a file that is of another version or another program's; nothing was written to it."""
        if version > VERSION:
            db.close()
            raise RegistryError(
                f"the model registry {self.path} is of version {version}, this program writes {VERSION}:"
                " use the newer grainwatch that made it"
            )
        if not version and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.close()
            raise RegistryError(f"{self.path} is no model registry: move it away")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _rollback(db: sqlite3.Connection) -> None:
    if db.in_transaction:
        # After a full disk SQLite has done it by itself.
        with suppress(sqlite3.OperationalError):
            db.execute("ROLLBACK")


def _in_wal_mode(db: sqlite3.Connection) -> None:
    """Have readers and the writer not wait for each other.

    SQLite does not wait by itself where two processes make the file at once.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; where root makes them, they belong to whom the one above does."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    give_to_owner_of(folder.parent, folder)


def give_to_owner_of(folder: Path, *paths: Path) -> None:
    """Give what root made to the owner of a folder: a daemon that is another user has to write it."""
    if os.name == "posix" and os.geteuid() == 0:
        owner = folder.stat()
        for path in paths:
            # Not every root may do so.
            with suppress(PermissionError):
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
