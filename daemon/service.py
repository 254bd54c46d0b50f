"""What the daemon tells a service manager: sd_notify(3) messages, once a second and at each change.

A message is a datagram of lines KEY=VALUE to the unix socket that $NOTIFY_SOCKET names. Nothing is
said where that is absent; the parts are watched and what hangs is logged all the same.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, MutableMapping
from typing import Final, Protocol

from daemon.watchdog import Part, Watchdog

log = logging.getLogger(__name__)

#: How often the parts are looked at and the state is told, at least, seconds.
TICK_S: Final = 1.0
#: What may hang for how long, in all, when no service manager says it, seconds.
WATCHDOG_S: Final = 30.0
#: For how long a start or stop is extended at a time, seconds.
EXTENSION_S: Final = 15.0
#: A service manager that does not take a message within this is not waited for, seconds.
SEND_S: Final = 1.0
MAX_STATUS: Final = 500


class Notifier:
    """Sends messages to a service manager.

    Parameters
    ----------
    address : str
        Of the unix datagram socket: a path, or "@" and the name of an abstract one; "" for none.
    """

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if address and not address.startswith(("/", "@")):
            log.error("NOTIFY_SOCKET=%s is neither a path nor an abstract socket: nothing is told", address)
            self._address = ""
        self._complained = False

    @property
    def enabled(self) -> bool:
        """Whether anybody listens."""
        return bool(self._address)

    def send(self, **fields: object) -> None:
        """Send one message; one that cannot be sent is said once and costs nothing else."""
        if not self._address:
            return
        message = "".join(f"{key}={value}\n" for key, value in fields.items()).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_S)
                sender.sendto(message, self._address)
        except OSError as error:
            if not self._complained:
                log.error("the service manager cannot be told (NOTIFY_SOCKET): %s", error)
            self._complained = True


class Watched(Protocol):
    """The daemon, as far as a service manager wants to know."""

    def parts(self) -> Iterable[Part]:
        """Return what could hang, without taking a lock."""
        ...

    def status_line(self) -> str:
        """Say how it does, in one line."""
        ...


class Service:
    """The daemon's line to its service manager, from the first moment to the last.

    A ping of the watchdog means that nothing hangs: it is sent after a look at all parts, and not
    when one of them stands still. A part may do so for half the watchdog's time, so that the
    manager acts after one and a half of it at the latest.
    """

    def __init__(self, notifier: Notifier, watchdog_s: float | None) -> None:
        self._notifier = notifier
        self._pings = watchdog_s is not None
        span = WATCHDOG_S if watchdog_s is None else watchdog_s
        self._watchdog = Watchdog(span / 2)
        self._tick_s = min(TICK_S, span / 4)
        self._phase = "starting"
        self._reloads = False
        self._until = 0.0
        self._doing = "starting"
        self._told = ""
        self._daemon: Watched | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()  # the order of messages
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)
        self.hung: dict[str, float] = {}

    @classmethod
    def of_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Service:
        """Make it from $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID, and take these away.

        What is started from here must not speak for the daemon.
        """
        address = environment.pop("NOTIFY_SOCKET", "")
        asked = environment.pop("WATCHDOG_USEC", "")
        whom = environment.pop("WATCHDOG_PID", "")
        watchdog_s = None
        if asked and whom in ("", str(os.getpid())):
            if asked.isascii() and asked.isdigit() and int(asked):
                watchdog_s = 1e-6 * int(asked)
            else:
                log.error("WATCHDOG_USEC=%s is no number of microseconds: the watchdog is not served", asked)
        return cls(Notifier(address), watchdog_s)

    def begin(self, at_most_s: float) -> None:
        """The start begins; the manager waits for it for at most `at_most_s` seconds."""
        self._until = time.monotonic() + at_most_s
        self._thread.start()

    def doing(self, what: str) -> None:
        """Say what the start is at."""
        self._doing = f"starting: {what}"

    def ready(self, daemon: Watched) -> None:
        """The daemon is warm and its sockets are bound, or is through with a reload."""
        with self._lock:
            if self._phase == "stopping":  # it broke the reload off
                return
            self._daemon = daemon
            self._phase = "running"
            self._reloads = False
            self._notifier.send(READY=1, STATUS=self._line())

    def reloading(self) -> None:
        """A reload begins; `ready` ends it. The manager waits for it as for a start."""
        with self._lock:
            self._reloads = True
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            self._notifier.send(RELOADING=1, MONOTONIC_USEC=now, STATUS=f"reloading; {self._line()}")

    def stopping(self, at_most_s: float) -> None:
        """The daemon stops, within `at_most_s` seconds."""
        with self._lock:
            self._phase = "stopping"
            self._until = time.monotonic() + at_most_s
            self._notifier.send(STOPPING=1, STATUS="draining")

    def failed(self, why: str) -> None:
        """Leave a word about why the daemon does not start."""
        with self._lock:
            self._notifier.send(STATUS=_one_line(why))

    def end(self) -> None:
        """Say no more."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(2 * SEND_S)

    def _run(self) -> None:
        while not self._over.wait(self._tick_s):
            if self._phase == "running":
                self._watch()
                if self._reloads:
                    self._notifier.send(EXTEND_TIMEOUT_USEC=round(1e6 * EXTENSION_S))
            elif time.monotonic() < self._until:
                self._notifier.send(EXTEND_TIMEOUT_USEC=round(1e6 * EXTENSION_S))
                if self._phase == "stopping" and self._pings:
                    self._notifier.send(WATCHDOG=1)
            self._tell()

    def _watch(self) -> None:
        assert self._daemon is not None
        hung = self._watchdog.hung(self._daemon.parts(), time.monotonic())
        for name in hung.keys() - self.hung.keys():
            ends = ": the watchdog is not served" if self._pings else ""
            log.critical("%s hangs, nothing moved there for %.1f s%s", name, hung[name], ends)
        for name in self.hung.keys() - hung.keys():
            log.warning("%s moves again", name)
        self.hung = hung
        if self._pings and not hung:
            self._notifier.send(WATCHDOG=1)

    def _tell(self) -> None:
        with self._lock:
            line = "draining" if self._phase == "stopping" else self._line()
            if line != self._told:
                self._notifier.send(STATUS=line)
            self._told = line

    def _line(self) -> str:
        if self._phase == "starting" or self._daemon is None:
            return self._doing
        return _one_line(self._daemon.status_line())


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_STATUS]
