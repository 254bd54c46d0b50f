"""Files that came over a network are decoded in a process of their own.

A file is somebody else's bytes, and readers of image formats are written for files of one's own. In
the child memory and time are bounded, and what crashes there costs one frame.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec

from daemon.sources.base import Idle
from daemon.sources.push.decoder import READY, Reply, Request
from pipelines.frame import BadFrame
from pipelines.images import EncodedImage

_SLICE_S: Final = 0.1
_MEMORY_SLACK: Final = 512 << 20
#: The process loads what it needs in a second, but the machine may be busy.
_START_S: Final = 120.0


class FileReader:
    """The process, as the source sees it. It is started at once and again whenever it died.

    Parameters
    ----------
    formats : tuple of str
        Which formats are taken, of those in `grainwatch.push_wire.SUFFIXES`.
    max_file_bytes, max_image_bytes : int
    timeout_s : float
        A file that takes longer is given up.
    """

    def __init__(
        self, formats: tuple[str, ...], max_file_bytes: int, max_image_bytes: int, timeout_s: float
    ) -> None:
        self._formats = formats
        self._max_image_bytes = max_image_bytes
        self._memory = 2 * max_file_bytes + 4 * max_image_bytes + _MEMORY_SLACK
        self._timeout_s = timeout_s
        self._folder = ""
        self._ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._start()

    def read(self, name: str, data: memoryview) -> Generator[Idle, None, tuple[EncodedImage, dict[str, Any]]]:
        """Decode a file: yields `Idle` while it waits and returns the image and what its header says.

        Raises
        ------
        BadFrame
            If it is of no format that is taken, damaged, too large, or not one image.
        """
        try:
            return (yield from self._ask(name, data))
        except (OSError, EOFError, msgspec.MsgspecError) as error:
            died = self._bury()
            self._start()
            raise BadFrame(f"{name}: the reader of files died of it ({died})") from error

    def close(self) -> None:
        """End the process."""
        self._bury()

    def _ask(self, name: str, data: memoryview) -> Generator[Idle, None, tuple[EncodedImage, dict[str, Any]]]:
        if self._process is not None and self._process.poll() is not None:
            self._bury()  # it died between two files: of none of them
            self._start()
        connection = self._connection
        assert connection is not None
        if not self._ready:
            yield from self._wait(connection, name, _START_S)
            self._ready = connection.recv_bytes() == READY
        connection.send_bytes(msgspec.msgpack.encode(Request(name, self._formats, self._max_image_bytes)))
        connection.send_bytes(data)
        yield from self._wait(connection, name, self._timeout_s)
        reply = msgspec.msgpack.decode(connection.recv_bytes(), type=Reply)
        if reply.reason:
            raise BadFrame(reply.reason)
        pixels = memoryview(connection.recv_bytes())
        image = EncodedImage(pixels, reply.shape, reply.dtype, max_bytes=self._max_image_bytes)
        return image, reply.metadata

    def _wait(self, connection: Connection, name: str, timeout_s: float) -> Iterator[Idle]:
        deadline = time.monotonic() + timeout_s
        while not connection.poll(_SLICE_S):
            if time.monotonic() > deadline:
                self._bury()
                self._start()
                raise BadFrame(f"{name}: could not be read in {timeout_s:g} s")
            yield Idle()

    def _start(self) -> None:
        self._ready = False
        self._folder = tempfile.mkdtemp(prefix="grainwatch-push-")
        longest_s = 2 * math.ceil(self._timeout_s)
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "daemon.sources.push.decoder"]
                + [str(argument) for argument in (theirs.fileno(), self._folder, self._memory, longest_s)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the daemon alone
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())

    def _bury(self) -> str:
        if self._connection is not None:
            self._connection.close()
        if self._process is None:
            return ""
        try:
            # Whoever closes it first: one that still computes does not see that nobody listens.
            code = self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)
        return f"signal {-code}" if code < 0 else f"exit status {code}"
