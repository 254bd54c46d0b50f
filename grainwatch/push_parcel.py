"""An image on its way to a daemon: what is said of it, and how its bytes are got."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grainwatch.push_wire import (
    BadHead,
    ImageHead,
    Outcome,
    array_fingerprint,
    file_fingerprint,
    metadata_error,
    pack,
    read_from_sender,
)


class FileChangedError(OSError):
    """A file changed while it was read, or since it was looked at."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of an image: "taken", "held" (it was there already), "failed" or "refused"."""

    number: int
    name: str
    outcome: Outcome
    reason: str = ""
    nbytes: int = 0


@dataclass(slots=True)
class Parcel:
    """An image to be sent. `load` returns its bytes; None when they were given up."""

    head: ImageHead
    load: Callable[[], bytes] | None
    nbytes: int
    outcome: Outcome = "taken"
    reason: str = ""

    def error(self, max_bytes: int) -> str:
        """Say why it cannot be sent, as far as that can be known without a daemon, "" if it can."""
        head = self.head
        reason = metadata_error(head.metadata, head.sidecars)
        if reason:
            return reason
        try:
            read_from_sender(pack(head))
        except BadHead as error:
            return str(error)
        if self.nbytes > max_bytes:
            return f"of {self.nbytes} bytes, the daemon takes up to {max_bytes}"
        return ""


def file_parcel(
    file: Path,
    number: int,
    name: str,
    position_um: tuple[float, ...] | None,
    metadata: Mapping[str, Any] | None,
    sidecars: Mapping[str, str] | None,
) -> Parcel:
    """Make a parcel of a file as it is now; it is read when it is sent.

    Raises
    ------
    OSError
        If it is not there.
    """
    found = file.stat()
    head = ImageHead(
        id=0,
        number=number,
        name=name,
        fingerprint=file_fingerprint(name, found.st_size, found.st_mtime_ns),
        sha256=bytes(32),
        form="file",
        modified=found.st_mtime,
        position_um=_plain(position_um),
        metadata=dict(metadata or {}),
        sidecars=dict(sidecars or {}),
    )
    return Parcel(head, lambda: read_unchanged(file, found), found.st_size)


def image_array(pixels: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return pixels (rows, columns) as they travel: C order, little-endian.

    Raises
    ------
    ValueError
        If that is no image.
    """
    array = np.asarray(pixels)
    if array.ndim != 2 or array.dtype.kind not in "uif" or not array.size:
        raise ValueError(f"pixels: expected rows and columns of numbers, got {array.shape} {array.dtype}")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def array_parcel(
    array: npt.NDArray[Any],
    number: int,
    name: str,
    acquired: float,
    position_um: tuple[float, ...] | None,
    metadata: Mapping[str, Any] | None,
) -> Parcel:
    """Make a parcel of what `image_array` returned; the pixels are copied."""
    data = array.tobytes()
    dtype, shape = array.dtype.str, (int(array.shape[0]), int(array.shape[1]))
    digest = hashlib.sha256(data).digest()
    head = ImageHead(
        id=0,
        number=number,
        name=name or f"array {number}",
        # Two equal pictures are two images if their numbers differ.
        fingerprint=array_fingerprint(digest, f"{number} {dtype}", shape),
        sha256=digest,
        form="array",
        dtype=dtype,
        shape=shape,
        acquired=acquired,
        position_um=_plain(position_um),
        metadata=dict(metadata or {}),
    )
    return Parcel(head, lambda: data, len(data))


def read_unchanged(file: Path, found: os.stat_result) -> bytes:
    """Read a file that is as it was when it was looked at.

    Raises
    ------
    FileChangedError
        If it changed since, or while it was read.
    """
    with file.open("rb") as opened:
        data = opened.read()
        after = os.fstat(opened.fileno())
    if len(data) != found.st_size or after.st_mtime_ns != found.st_mtime_ns:
        raise FileChangedError(f"{file} changes while it is read")
    return data


def _plain(position_um: tuple[float, ...] | None) -> tuple[float, ...] | None:
    return None if position_um is None else tuple(float(v) for v in position_um)
