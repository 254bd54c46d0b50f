"""What all messages have: keys, times, where a result comes from, arrays as bytes."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Self

import msgspec
import numpy as np
import numpy.typing as npt


class ArrayData(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array as raw little-endian bytes.

    Attributes
    ----------
    dtype : str
        numpy type string, little-endian or single byte ("<f8", "<i4", "|u1").
    shape : tuple of int
    data : bytes
        C order, ``prod(shape) * itemsize`` bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: npt.ArrayLike, dtype: str = "<f8") -> Self:
        """Pack an array, converted to `dtype` and C order."""
        a = np.ascontiguousarray(np.asarray(array), dtype=np.dtype(dtype))
        return cls(dtype=dtype, shape=a.shape, data=a.tobytes())

    def numpy(self) -> npt.NDArray[Any]:
        """Return the array (read-only, a view of the bytes).

        Raises
        ------
        ValueError
            If dtype and shape do not describe `data`.
        """
        dtype = np.dtype(self.dtype)
        if dtype.hasobject or dtype.byteorder == ">" or (dtype.byteorder == "=" and sys.byteorder == "big"):
            raise ValueError(f"array dtype {self.dtype!r} is not little-endian numbers")
        expected = int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize
        if expected != len(self.data):
            raise ValueError(
                f"array of {self.dtype} and shape {self.shape} needs {expected} bytes, has {len(self.data)}"
            )
        return np.frombuffer(self.data, dtype=dtype).reshape(self.shape)


class FrameKey(msgspec.Struct, frozen=True, order=True):
    """What names a frame for ever.

    `series_uid` is made by the daemon at each start of a series, because detectors reuse
    their numbers. `frame` counts from the detector's first number.
    """

    source: str
    series_uid: str
    frame: int
    channel: str = ""


class ModelInfo(msgspec.Struct, frozen=True):
    """Which model, or which classical method, made a result."""

    name: str
    version: str
    sha256: str = ""


class Provenance(msgspec.Struct, frozen=True):
    """Made from what: the model, and hashes of the calibration and of the configuration."""

    model: ModelInfo
    calibration_hash: str = ""
    config_hash: str = ""


class Times(msgspec.Struct, frozen=True):
    """The four times of a frame, UTC seconds; 0 where the instrument gave none."""

    acquired: float = 0.0
    received: float = 0.0
    processed: float = 0.0
    published: float = 0.0


class Message(msgspec.Struct, frozen=True, tag_field="schema", kw_only=True):
    """Common head of all messages.

    `seq` is monotone per publisher, across restarts; `again` marks a repeat of a key that may
    have been published before a crash. Front fields are filled in by the daemon's publisher.
    """

    SCHEMA: ClassVar[str]

    publisher: str = ""
    seq: int = 0
    times: Times = Times()
    again: bool = False
    flags: tuple[str, ...] = ()


class FrameResult(Message, frozen=True, kw_only=True):
    """What the results of all pipelines have: one for each frame that ended as done.

    `position` is the scan position: (ix, iy[, iz]) in `grid_index` and/or coordinates in um.
    """

    key: FrameKey
    provenance: Provenance
    grid_index: tuple[int, ...] | None = None
    position_um: tuple[float, ...] | None = None
    compute_ms: float = 0.0
