"""Built plans beside the compiled kernels: made once, found again, trusted only when they are whole.

A plan's name says what it was made from: the ONNX, the flavour and its version, the architecture it
is for, the precision and the batch. The file holds a header and the sha256 of all that follows, and
comes into being by a rename, so that a crash or a second daemon leaves either nothing or all of it.
Whoever builds one holds a lock meanwhile: others wait for the plan instead of building it too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from pipelines.engines.flavours import EngineError
from pipelines.engines.plans import Batch
from pipelines.kernels import cache_dir

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger(__name__)

ANY_GPU = "any"
"""Architecture of a plan that its flavour finishes when it is loaded."""

_MAGIC = b"grainwatch plan 1\n"
_DIGEST_BYTES = 32
_LARGEST_BYTES = 1 << 33


@dataclass(frozen=True)
class PlanKey:
    """What a plan was made from."""

    onnx_sha256: str
    flavour: str
    version: str
    architecture: str
    precision: str
    batch: Batch

    @property
    def file_name(self) -> str:
        """Name of the file, the same for the same key."""
        digest = hashlib.sha256(msgspec.json.encode(asdict(self), order="sorted")).hexdigest()[:16]
        readable = re.sub(r"[^A-Za-z0-9._]+", "_", f"{self.flavour}-{self.version}-{self.architecture}")
        return f"{readable}-{self.precision}-{digest}.plan"


def engines_dir() -> Path:
    """Return the folder of plans; it may not exist yet."""
    return cache_dir() / "engines"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a plan; it ends with the process that holds it, however that ends.

    Raises
    ------
    EngineError
        If no lock can be made in that folder.
    """
    if sys.platform == "win32":  # a plan may be built twice there; the rename keeps it whole
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise EngineError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("%s: another process is at it; waiting", path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        for left in lock.parent.glob(f".{path.name}.[0-9]*"):  # by one that was killed while it wrote
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def write_plan(key: PlanKey, content: bytes, folder: Path | None = None) -> Path:
    """Store a plan; one that is there already is replaced.

    Raises
    ------
    EngineError
        If the disk does not take it. Nothing is left behind then.
    """
    folder = folder or engines_dir()
    path = folder / key.file_name
    beside = folder / f".{path.name}.{os.getpid()}"
    body = _MAGIC + msgspec.json.encode(asdict(key)) + b"\n" + content
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(hashlib.sha256(body).digest())
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(folder)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise EngineError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def read_plan(key: PlanKey, folder: Path | None = None) -> bytes | None:
    """Return a plan; None where none was stored.

    Raises
    ------
    EngineError
        If what is stored is damaged or another plan: it is to be built again.
    """
    path = (folder or engines_dir()) / key.file_name
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise EngineError(f"{path}: is larger than any plan; remove it and build the engine again")
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
    body = memoryview(stored)[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != stored[:_DIGEST_BYTES]:
        raise EngineError(f"{path}: is damaged (its sha256 differs): build the engine again")
    start = len(_MAGIC)
    end = stored.find(b"\n", _DIGEST_BYTES + start)
    if bytes(body[:start]) != _MAGIC or end < 0:
        raise EngineError(f"{path}: is no plan of grainwatch: build the engine again")
    if stored[_DIGEST_BYTES + start : end] != msgspec.json.encode(asdict(key)):
        raise EngineError(f"{path}: was made from something else than its name says: build the engine again")
    return stored[end + 1 :]


def sync_folder(folder: Path) -> None:
    """Have new names in a folder survive a power loss too, where a folder can be synchronised."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
