"""One worker process as the front sees it: started, told, killed, buried."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

from daemon.flow.ring import Ring
from daemon.flow.transport import Setup, pack

#: One core a worker: the frames are the parallel work.
_POOLS = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "NUMBA")
SINGLE_THREADED = {f"{pool}_NUM_THREADS": "1" for pool in _POOLS}


class Child:
    """A process with two connections: one for tasks and results, one that only ever closes.

    A fresh interpreter, not a fork: nothing of the front's threads, sockets and locks gets in.
    The connection reports end of file at the instant the process dies, however it dies.
    """

    def __init__(self, setup: Setup, ring: Ring) -> None:
        ours, theirs = socket.socketpair()
        lifeline_theirs, self._lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                # -P: a folder "daemon" in the working directory must not shadow the package.
                [sys.executable, "-P", "-m", "daemon.flow.worker"]
                + [str(fd) for fd in (theirs.fileno(), lifeline_theirs, ring.fd)],
                pass_fds=[theirs.fileno(), lifeline_theirs, ring.fd],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **SINGLE_THREADED},
            )
        except OSError:
            ours.close()
            os.close(self._lifeline)
            raise
        finally:
            theirs.close()
            os.close(lifeline_theirs)
        self.connection = Connection(ours.detach())
        with suppress(OSError):  # it died at once, and the end of file on the connection will say so
            self.connection.send_bytes(pack(setup))

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def kill(self) -> None:
        """Kill it; the connection then reports end of file."""
        self.process.kill()

    def bury(self, timeout: float = 5.0) -> str:
        """Wait for its end, by force after `timeout`; return how it died, in words."""
        self.connection.close()
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        os.close(self._lifeline)
        if code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit status {code}"
