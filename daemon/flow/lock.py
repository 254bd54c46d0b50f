"""One daemon a state folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from grainwatch.config import ConfigError


class StateLock:
    """Holds `folder`/lock, with the process id in it; the kernel lets go when the process ends.

    Raises
    ------
    ConfigError
        If another daemon holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise ConfigError(f"daemon.state_dir: {path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise ConfigError(
                f"daemon.state_dir: another daemon (process {holder}) works in {folder}:"
                " stop it, or give this one a folder of its own"
            ) from error
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let go."""
        os.close(self._fd)


def make_folder(path: Path, key: str) -> None:
    """Make a folder if need be.

    Raises
    ------
    ConfigError
        If that fails or it cannot be written; names `key`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: the folder {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: the folder {path} cannot be written")
