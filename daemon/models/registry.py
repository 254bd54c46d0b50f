"""The registry of models: bundles by name and version, the state of each, and who brought it there.

It lies in ``models/`` of the daemon's state folder: ``registry.sqlite``, and copies of the bundles. The
daemon and the ``grainwatch models`` command use it at the same time.
"""

from __future__ import annotations

import getpass
import os
import socket
import sqlite3
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from daemon.models import comparisons
from daemon.models.bundle_store import BundleStore, discard, renumbered
from daemon.models.comparisons import Comparison
from daemon.models.registry_file import RegistryError, RegistryFile
from grainwatch.config import did_you_mean
from pipelines.engines.bundle import Bundle, BundleError, load_bundle

__all__ = ["STATES", "Comparison", "Event", "Model", "Registry", "RegistryError", "operator"]

FOLDER: Final = "models"
DATABASE: Final = "registry.sqlite"
STATES: Final = ("candidate", "shadow", "active", "retired")

#: From each state to those that it can change to. An active model ends only for another one, or for
#: none: never by becoming something else, which would leave a stream without a model unsaid.
_TRANSITIONS: Final = {
    "candidate": ("shadow", "active", "retired"),
    "shadow": ("shadow", "candidate", "active", "retired"),
    "active": ("retired",),
    "retired": ("candidate", "shadow", "active"),
}

_COLUMNS: Final = "name, version, kind, sha256, state, added, added_by, note, share"


@dataclass(frozen=True, slots=True)
class Model:
    """A version of a model as the registry has it.

    Attributes
    ----------
    name, version, kind : str
        As its bundle says.
    sha256 : str
        Of the bundle's manifest.
    state : str
        One of `STATES`.
    folder : Path
        The registry's own copy of the bundle.
    added : float
        UTC seconds.
    added_by, note : str
        Who brought it, and what was said of it.
    share : float
        Part of the frames that it computes in the shadow; 0 in any other state.
    """

    name: str
    version: str
    kind: str
    sha256: str
    state: str
    folder: Path
    added: float
    added_by: str
    note: str
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """A change of state. `from_state` is "" where the model was added; `share` is that of a shadow."""

    time: float
    who: str
    name: str
    version: str
    from_state: str
    to_state: str
    why: str
    share: float = 0.0


class Registry:
    """The registry below a state folder. Safe between threads and processes.

    Reading never makes a file. Every method raises `RegistryError` where the file cannot be used.
    """

    def __init__(self, state_dir: Path) -> None:
        folder = state_dir / FOLDER
        self._file = RegistryFile(folder / DATABASE)
        self._store = BundleStore(folder / "bundles")

    @property
    def path(self) -> Path:
        """The registry's file; it may not exist yet."""
        return self._file.path

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # What there is.

    def models(self, name: str = "") -> list[Model]:
        """Return all versions of a model, the oldest first; of all models where no name is given."""
        with self._file.reading() as db:
            return [] if db is None else self._models(db, name)

    def find(self, name: str, version: str = "", among: Collection[str] = STATES) -> Model:
        """Return one model whose state is `among` these.

        Without a version: the only one there is, else the only candidate or shadow.

        Raises
        ------
        RegistryError
            If there is none, or more than one could be meant; says what there is.
        """
        with self._file.reading() as db:
            every = [] if db is None else self._models(db)
        of_name = [m for m in every if m.name == name]
        if not of_name:
            names = sorted({m.name for m in every})
            meant = did_you_mean(name, names) or (": there are " + ", ".join(names) if names else "")
            raise RegistryError(f"no model {name!r} in the registry{meant}; `grainwatch models add` adds one")
        there = "; there are " + ", ".join(f"{m.version} ({m.state})" for m in of_name)
        if version:
            found = [m for m in of_name if m.version == version]
            if not found:
                raise RegistryError(f"model {name} has no version {version!r}{there}")
        else:
            found = [m for m in of_name if m.state in among]
            if len(found) > 1:
                found = [m for m in found if m.state in ("candidate", "shadow")] or found
        fit = [m for m in found if m.state in among]
        if len(fit) == 1:
            return fit[0]
        if fit:
            raise RegistryError(f"model {name}: say which version{there}")
        states = " or ".join(among)
        which = f"version {version} is {found[0].state}, not" if version else "no version is"
        raise RegistryError(f"model {name}: {which} {states}{there}")

    def active(self, name: str) -> Model | None:
        """Return the model that serves under a name."""
        return next((m for m in self.models(name) if m.state == "active"), None)

    def previous(self, name: str) -> Model | None:
        """Return the model that `rollback` would bring back; None where there was none before.

        `set_state` does not go back: what it makes active has what is active now before it.
        """
        with self._file.reading() as db:
            return None if db is None else self._previous(db, name)

    def history(self, name: str = "") -> list[Event]:
        """Return the changes of state of a model, or of all, the oldest first."""
        with self._file.reading() as db:
            if db is None:
                return []
            rows = db.execute(
                "SELECT time, who, name, version, from_state, to_state, why, history.share FROM history"
                " JOIN models ON models.id = model WHERE ? IN ('', name) ORDER BY history.id",
                (name,),
            )
            return [Event(*row) for row in rows]

    # Changes.

    def add(self, folder: Path, by: str, note: str = "", version: str = "") -> Model:
        """Verify a bundle and take a copy of it as a candidate.

        The same bundle again is no error: the model there is is returned, its copy mended if need be.
        With a `version` the copy gets this one in place of its own, and so another sha256.

        Raises
        ------
        RegistryError
            If it is no intact bundle, another one has its name and version, or the disk does not take it.
        """
        try:
            bundle = load_bundle(folder)
        except BundleError as error:
            raise RegistryError(str(error)) from error
        if version in ("", bundle.description.version):
            return self._add(bundle, by, note)
        with renumbered(bundle, version) as other:
            before = f"version {bundle.description.version} ({bundle.sha256[:8]}) renumbered"
            return self._add(other, by, f"{note}; {before}" if note else before)

    def _add(self, bundle: Bundle, by: str, note: str) -> Model:
        there = self._there(bundle)
        if there is not None:
            try:
                self.verify(there)
            except RegistryError:
                self._store.settle(self._store.copy(bundle), there.folder)
            return there
        unfinished = self._store.copy(bundle)
        described = bundle.description
        place = self._store.place(described.name, described.version, bundle.sha256)
        settled = False
        try:
            with self._file.writing() as db:
                if self._same(db, bundle) is None:
                    self._store.settle(unfinished, place)
                    settled = True
                    self._insert(db, bundle, by, note)
        except BaseException:
            # Nothing lies about that the registry does not know.
            if settled:
                discard(place)
            raise
        finally:
            discard(unfinished)
        return self.find(described.name, described.version)

    def set_state(self, model: Model, state: str, by: str, why: str = "", share: float = 0.0) -> Model:
        """Change the state of a model; return it as it is then.

        A model that becomes active retires the one that was, at the same moment; one that goes into the
        shadow makes the one there a candidate. An active one that retires leaves none: its name then
        means what it does without the registry.

        Raises
        ------
        RegistryError
            If it cannot change so from the state that it has now, whatever `model` says.
        """
        if state not in STATES:
            raise RegistryError(f"no state {state!r}; expected one of {', '.join(STATES)}")
        if state == "shadow" and not 0.0 < share <= 1.0:
            raise RegistryError(f"the share of a shadow: expected more than 0 and at most 1, got {share:g}")
        share = share if state == "shadow" else 0.0
        with self._file.writing() as db:
            row, now = self._row(db, model)
            if state not in _TRANSITIONS[now]:
                raise RegistryError(_refusal(model, now, state))
            if state == "active":
                self._relieve(db, model, "active", "retired", by, f"version {model.version} became active")
            elif state == "shadow":
                instead = f"version {model.version} went into the shadow"
                self._relieve(db, model, "shadow", "candidate", by, instead)
            if "active" in (state, now):
                db.execute(
                    "INSERT INTO serving (name, model) VALUES (?, ?)",
                    (model.name, row if state == "active" else None),
                )
            self._change(db, row, now, state, by, why, share)
        return self.find(model.name, model.version)

    def rollback(self, name: str, by: str, why: str = "") -> Model | None:
        """Bring back what was active before and retire what is; return it, None where none was.

        Again, it goes back by one more.

        Raises
        ------
        RegistryError
            If no model of this name was ever active, or all were rolled back.
        """
        with self._file.writing() as db:
            top = db.execute("SELECT max(id) FROM serving WHERE name = ?", (name,)).fetchone()[0]
            if top is None:
                raise RegistryError(f"model {name}: there is nothing to roll back, no version was activated")
            before = self._previous(db, name)
            db.execute("DELETE FROM serving WHERE id = ?", (top,))
            for active in self._models(db, name):
                if active.state == "active":
                    self._change(db, self._row(db, active)[0], "active", "retired", by, why, 0.0)
            if before is not None:
                row, now = self._row(db, before)
                self._change(db, row, now, "active", by, why, 0.0)
        return None if before is None else self.find(name, before.version)

    def verify(self, model: Model) -> Bundle:
        """Check every file of a model against its manifest, and the manifest against the registry.

        Raises
        ------
        RegistryError
            If something is missing or altered: names the file.
        """
        try:
            bundle = load_bundle(model.folder)
        except BundleError as error:
            raise RegistryError(f"{error} (`grainwatch models add` with the same bundle mends it)") from error
        if bundle.sha256 != model.sha256:
            raise RegistryError(
                f"{model.folder}: is not the bundle that was added as {model.name} {model.version}: its"
                f" manifest has sha256 {bundle.sha256[:12]}, the registry says {model.sha256[:12]}"
            )
        return bundle

    # What a model in the shadow found.

    def compare_put(self, model: Model, row: Comparison, kept: int) -> None:
        """Keep a comparison, and of all comparisons of the model the newest `kept`."""
        with self._file.writing(durable=False) as db:
            comparisons.put(db, self._row(db, model)[0], row, kept)

    def comparisons(self, model: Model, limit: int = -1) -> list[Comparison]:
        """Return at most `limit` comparisons of a model, the latest first."""
        with self._file.reading() as db:
            return [] if db is None else comparisons.read(db, self._row(db, model)[0], limit)

    def comparison_summary(self, model: Model) -> dict[str, Any]:
        """Sum up the comparisons of a model, as `daemon.models.comparisons.summarise` says."""
        with self._file.reading() as db:
            return {"n": 0} if db is None else comparisons.summarise(db, self._row(db, model)[0])

    # Inside a transaction.

    def _models(self, db: sqlite3.Connection, name: str = "") -> list[Model]:
        rows = db.execute(
            f"SELECT {_COLUMNS} FROM models WHERE ? IN ('', name) ORDER BY name, added, id", (name,)
        )
        return [self._model(row) for row in rows]

    def _model(self, row: tuple[Any, ...]) -> Model:
        name, version, kind, sha256, state, *rest = row
        return Model(name, version, kind, sha256, state, self._store.place(name, version, sha256), *rest)

    def _row(self, db: sqlite3.Connection, model: Model) -> tuple[int, str]:
        """Return where a model stands in the file, and its state."""
        row = db.execute(
            "SELECT id, state FROM models WHERE name = ? AND version = ? AND sha256 = ?",
            (model.name, model.version, model.sha256),
        ).fetchone()
        if row is None:
            raise RegistryError(f"model {model.name} {model.version} is not in the registry {self.path}")
        return int(row[0]), str(row[1])

    def _previous(self, db: sqlite3.Connection, name: str) -> Model | None:
        row = db.execute(
            f"SELECT {_COLUMNS} FROM models WHERE id ="
            " (SELECT model FROM serving WHERE name = ? ORDER BY id DESC LIMIT 1 OFFSET 1)",
            (name,),
        ).fetchone()
        return None if row is None else self._model(row)

    def _there(self, bundle: Bundle) -> Model | None:
        with self._file.reading() as db:
            return None if db is None else self._same(db, bundle)

    def _same(self, db: sqlite3.Connection, bundle: Bundle) -> Model | None:
        described = bundle.description
        found = [m for m in self._models(db, described.name) if m.version == described.version]
        if found and found[0].sha256 != bundle.sha256:
            raise RegistryError(
                f"{bundle.folder}: the registry has another model {described.name} {described.version}"
                f" (sha256 {found[0].sha256[:12]}, this one {bundle.sha256[:12]}): give it another version"
            )
        return found[0] if found else None

    def _insert(self, db: sqlite3.Connection, bundle: Bundle, by: str, note: str) -> None:
        described, now = bundle.description, time.time()
        model = (
            described.name,
            described.version,
            described.kind,
            bundle.sha256,
            STATES[0],
            now,
            by,
            note,
            0.0,
        )
        cursor = db.execute(f"INSERT INTO models ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", model)
        self._note(db, int(cursor.lastrowid or 0), "", STATES[0], by, note, 0.0)

    def _relieve(self, db: sqlite3.Connection, model: Model, state: str, to: str, by: str, why: str) -> None:
        """Have the other version that is in a state, of which there is one a name, leave it."""
        for other in self._models(db, model.name):
            if other.state == state and other.version != model.version:
                self._change(db, self._row(db, other)[0], state, to, by, why, 0.0)

    def _change(
        self, db: sqlite3.Connection, row: int, now: str, state: str, by: str, why: str, share: float
    ) -> None:
        db.execute("UPDATE models SET state = ?, share = ? WHERE id = ?", (state, share, row))
        self._note(db, row, now, state, by, why, share)

    def _note(
        self, db: sqlite3.Connection, row: int, now: str, state: str, by: str, why: str, share: float
    ) -> None:
        db.execute(
            "INSERT INTO history (model, time, who, from_state, to_state, why, share)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row, time.time(), by, now, state, why, share),
        )


def operator() -> str:
    """Return who works at the terminal, USER@HOST, for the history."""
    try:
        user = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        # A container may have users that have no name.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _refusal(model: Model, now: str, state: str) -> str:
    what = f"model {model.name} {model.version}"
    if now == state:
        return f"{what} is {state} already"
    if now == "active":
        return f"{what} is active and cannot become a {state}: activate another version, or roll back"
    return f"{what} is {now} and cannot become {state}; it can become {', '.join(_TRANSITIONS[now])}"
