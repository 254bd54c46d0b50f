"""The file of a long run of many parts: what is finished stays finished, whatever happens.

It is JSON, and replaced as a whole after each part, so that a run which was killed goes on with
the part that it was at.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from offline_training.errors import StudyError


class Study:
    """Finished parts by name, and what determines them.

    Parameters
    ----------
    path : Path
        Made when it is absent, folder included.
    kind : str
        What the study is of, "laue-curve".
    settings : dict
        Whatever decides over the results; a file with other ones is refused.
    summary : callable
        Of the parts; stands in the file beside them.

    Raises
    ------
    StudyError
        If `path` holds something else or another run.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        settings: dict[str, Any],
        summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
    ) -> None:
        self.path = path
        self._summary = summary
        # As the file will have them: JSON knows no tuples.
        self._head = {"study": kind, "settings": msgspec.json.decode(msgspec.json.encode(settings))}
        self.parts: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.parts = self._read()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, part: dict[str, Any]) -> None:
        """Keep a finished part."""
        self.parts[name] = msgspec.to_builtins(part)
        content = self._head | self.summary() | {"parts": self.parts}
        text = msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
        unfinished = self.path.with_name(self.path.name + ".part")
        with unfinished.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)

    def summary(self) -> dict[str, Any]:
        """Return what the parts come to."""
        return self._summary(list(self.parts.values()))

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            stored = msgspec.json.decode(self.path.read_bytes())
            kind, settings, parts = stored["study"], stored["settings"], dict(stored["parts"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, OSError) as error:
            raise StudyError(
                f"{self.path} is no file of this command ({error}): choose another --out"
            ) from error
        if kind != self._head["study"]:
            raise StudyError(f"{self.path} is of a {kind}: choose another --out")
        asked: dict[str, Any] = self._head["settings"]
        if settings != asked:
            names = sorted(k for k in asked.keys() | settings.keys() if asked.get(k) != settings.get(k))
            raise StudyError(
                f"{self.path} is of another run ({', '.join(names)} differ): choose another --out, or remove"
                " it to start anew"
            )
        return parts
