"""The folder that the demo leaves: one demo at a time, and nothing in it but what a demo wrote."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from grainwatch.config import ConfigError

CONFIG: Final = "grainwatch.toml"
GEOMETRY: Final = "scan.det"
MAP: Final = "map.png"
RESULTS: Final = "results"
#: The first line of a configuration that the demo wrote.
HEADING: Final = "# The configuration of grainwatch demo."

_LOCK: Final = ".demo-lock"
_RESULT: Final = re.compile(r"(germanium|nanowire|scan|sem)-[\w.-]+\.h5")


@contextmanager
def demo_folder(keep: Path) -> Iterator[None]:
    """Make the folder, empty it of an earlier demo, and hold it.

    Raises
    ------
    ConfigError
        If it cannot be made, another demo runs in it, or it holds what no demo wrote; nothing has
        been removed then.
    """
    lock = keep / _LOCK
    try:
        keep.mkdir(parents=True, exist_ok=True)
        foreign = _foreign(keep)
        if foreign is not None:
            raise ConfigError(
                f"demo: --keep {keep} holds {foreign}, which no demo wrote: choose an empty or a new folder"
            )
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"demo: --keep {keep}: cannot be made or written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"demo: another demo runs in {keep}: wait for its end, or choose another folder with --keep"
            ) from error
        for path in _results(keep):
            path.unlink()
        for name in (MAP, GEOMETRY, CONFIG):
            (keep / name).unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def _results(keep: Path) -> list[Path]:
    return sorted((keep / RESULTS).iterdir()) if (keep / RESULTS).is_dir() else []


def _foreign(keep: Path) -> Path | None:
    """Return something in the folder that is not a demo's."""
    for path in sorted(keep.iterdir()):
        own = {CONFIG, GEOMETRY, MAP, _LOCK}
        if not (path.name in own and path.is_file()) and not (path.name == RESULTS and path.is_dir()):
            return path
    for path in _results(keep):
        if not (_RESULT.fullmatch(path.name) and path.is_file()):
            return path
    config = keep / CONFIG
    rest = [path for path in keep.iterdir() if path.name not in {_LOCK, RESULTS}] + _results(keep)
    if not rest:
        return None
    # Files of these names may be somebody's: the configuration tells. It is written first and
    # removed last, so that a demo that was killed never leaves the others without it.
    if not config.is_file():
        return rest[0]
    with config.open(encoding="utf-8", errors="replace") as text:
        return None if text.readline().rstrip() == HEADING else config
