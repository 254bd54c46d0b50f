"""Control of a running daemon: JSON lines over a unix socket, mode 0660.

A request is one line, ``{"command": "status"}``; the reply is one line, ``{"ok": true, ...}`` or
``{"ok": false, "error": "..."}``. docs/reference/control.md has every command.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from grainwatch.config import ConfigError

log = logging.getLogger(__name__)

SOCKET_NAME: Final = "control.sock"
MAX_LINE: Final = 64 * 1024
MAX_CLIENTS: Final = 16
#: A client that says nothing for so long is cut off, seconds.
SILENCE_S: Final = 60.0
#: Before the next client is tried when one could not be served, seconds.
PAUSE_S: Final = 0.5

Handler = Callable[[Mapping[str, Any]], dict[str, Any]]


class ControlServer:
    """Answers requests, each client in a thread of its own.

    Parameters
    ----------
    path : Path
        Of the socket.
    commands : mapping
        From the name of a command to what answers it. A handler raises ValueError for a request
        that makes no sense.

    Raises
    ------
    ConfigError
        If the socket cannot be made, or another daemon answers there.
    """

    def __init__(self, path: Path, commands: Mapping[str, Handler]) -> None:
        self.path = path
        self._commands = commands
        self._slots = threading.BoundedSemaphore(MAX_CLIENTS)
        self._closed = threading.Event()
        self._socket = _listen(path)
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)

    def start(self) -> None:
        """Start to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop and remove the socket."""
        self._closed.set()
        # Closing does not wake an accept in another thread; shutting down does.
        self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join(2.0)
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError as error:
                if self._closed.is_set():
                    return
                # Too many open files, or a client that left: the next one may have more luck.
                log.error("a control client cannot be served: %s", error)
                time.sleep(PAUSE_S)
                continue
            if not self._slots.acquire(blocking=False):
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), name="control-client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            client.settimeout(SILENCE_S)
            with client, client.makefile("rwb") as lines:
                while line := lines.readline(MAX_LINE + 1):
                    reply = self._answer(line)
                    lines.write(json.dumps(reply).encode() + b"\n")
                    lines.flush()
                    if len(line) > MAX_LINE:
                        return
        except OSError as error:
            log.debug("a control client left: %s", error)
        finally:
            self._slots.release()

    def _answer(self, line: bytes) -> dict[str, Any]:
        if len(line) > MAX_LINE:
            return _error(f"the line is longer than {MAX_LINE} bytes")
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            return _error(f"not a line of JSON: {error}")
        name = request.get("command") if isinstance(request, dict) else None
        if not isinstance(name, str) or name not in self._commands:
            known = ", ".join(sorted(self._commands))
            return _error(f'expected {{"command": NAME}} with one of: {known}; got {str(request)[:200]}')
        try:
            return {"ok": True, **self._commands[name](request)}
        except ValueError as error:
            return _error(str(error))
        except Exception as error:
            log.exception("the command %s failed", name)
            return _error(f"{type(error).__name__}: {error}")


def _error(message: str) -> dict[str, Any]:
    return {"ok": False, "error": message}


def _listen(path: Path) -> socket.socket:
    """Bind the socket; nobody can connect before its mode is set."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and _answers(path):
            raise ConfigError(f"daemon.runtime_dir: another daemon answers at {path}")
        path.unlink(missing_ok=True)
        server.bind(str(path))
        os.chmod(path, 0o660)
        server.listen(MAX_CLIENTS)
    except OSError as error:
        server.close()
        raise ConfigError(
            f"daemon.runtime_dir: the socket {path} cannot be made: {error.strerror or error}"
        ) from error
    except ConfigError:
        server.close()
        raise
    return server


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
