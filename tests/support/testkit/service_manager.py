"""A service manager, as far as a daemon sees one: a socket that takes its messages."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Message:
    """One datagram: when it came, monotonic, and its fields."""

    at: float
    fields: dict[str, str]


class ServiceManager:
    """Listens at `address`, as $NOTIFY_SOCKET names it: a path, or "@" and the name of an abstract socket."""

    def __init__(self, folder: Path, *, abstract: bool = False) -> None:
        self.address = f"@grainwatch-test-{os.getpid()}-{time.monotonic_ns()}"
        if not abstract:
            self.address = str(folder / "notify.sock")
        self.messages: list[Message] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address.replace("@", "\0", 1) if abstract else self.address)
        self._socket.settimeout(0.2)
        self._over = False
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()
        self._socket.close()

    def environment(self, watchdog_s: float | None = None) -> dict[str, str]:
        """Return what it puts into the environment of a service."""
        given = {"NOTIFY_SOCKET": self.address}
        return given if watchdog_s is None else {**given, "WATCHDOG_USEC": str(round(1e6 * watchdog_s))}

    def having(self, key: str, value: str = "", since: float = 0.0) -> list[Message]:
        """Return the messages with a field that contains a text, of those that came after `since`."""
        came = [m for m in list(self.messages) if m.at > since and key in m.fields]
        return [m for m in came if value in m.fields[key]]

    def states(self) -> list[str]:
        """Return the names of the changes of state in order: READY, RELOADING, STOPPING."""
        names = ("READY", "RELOADING", "STOPPING")
        return [name for m in list(self.messages) for name in names if m.fields.get(name) == "1"]

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                if self._over:  # and all that came has been read
                    return
                continue
            lines = data.decode().splitlines()
            fields = dict(line.split("=", 1) for line in lines)
            assert len(fields) == len(lines), data
            self.messages.append(Message(time.monotonic(), fields))
