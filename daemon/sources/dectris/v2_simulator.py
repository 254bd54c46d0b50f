"""A DECTRIS detector without the detector: Stream V2 messages on a PUSH socket."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import cbor2
import numpy as np
import numpy.typing as npt
from cbor2 import CBORTag

from daemon.sources import simulator
from daemon.sources.dectris.v2_codec import ALGORITHMS, COMPRESSED, ROW_MAJOR, typed_array_tag
from pipelines.images import encode_image

#: Time base of the detector's clock, in ticks a second.
CLOCK_HZ: Final = 50_000_000


@dataclass(frozen=True)
class Exposure:
    """The part of an image message that is the same whenever it is sent, coded."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    data: bytes


@dataclass(frozen=True)
class Options(simulator.Options[Exposure]):
    """How the simulated detector behaves, besides what all of them have in common.

    Attributes
    ----------
    algorithm : str
        "bslz4", "lz4", or "none" for bytes without compression.
    channels : tuple of str
        Thresholds; each but the first carries a fraction of the first one's counts.
    """

    address: str = "tcp://127.0.0.1:31001"
    algorithm: str = "bslz4"
    channels: tuple[str, ...] = ("threshold_1",)

    def own_checks(self) -> list[tuple[bool, str]]:
        """Return what must hold of algorithm and channels."""
        return [
            (self.algorithm in ALGORITHMS, f"algorithm: expected one of {', '.join(ALGORITHMS)}"),
            (len(set(self.channels)) == len(self.channels) > 0, "channels: expected different names"),
        ]

    def expose(self, image: npt.NDArray[Any]) -> Exposure:
        """As `encode_exposure`."""
        return encode_exposure(image, self.channels, self.algorithm)

    def coder(self, series_id: int) -> SeriesCoder:
        """Return what codes the messages of a series that begins now."""
        return SeriesCoder(series_id, uuid.uuid4().hex, datetime.now(UTC), self.channels, self.metadata)


def encode_exposure(image: npt.NDArray[Any], channels: Sequence[str], algorithm: str) -> Exposure:
    """Compress and code the pixels of one exposure.

    Parameters
    ----------
    image : ndarray, (rows, columns)
        Channel number k (from 0) carries image // (k + 1).

    Raises
    ------
    ValueError
        If the format has no pixels of that type.
    """
    tag = typed_array_tag(image.dtype)
    data = {}
    for k, channel in enumerate(channels):
        pixels = image if k == 0 else (image // (k + 1)).astype(image.dtype)
        blob: Any = encode_image(pixels, algorithm)
        if algorithm != "none":
            elements = image.dtype.itemsize if algorithm == "bslz4" else 0
            blob = CBORTag(COMPRESSED, [algorithm, elements, blob])
        data[channel] = CBORTag(ROW_MAJOR, [list(image.shape), CBORTag(tag, blob)])
    rows, columns = image.shape
    return Exposure((rows, columns), image.dtype, cbor2.dumps("data") + cbor2.dumps(data))


@dataclass(frozen=True)
class SeriesCoder:
    """Codes the messages of one series: one part each. Implements `simulator.Coder`."""

    series_id: int
    unique_id: str
    started: datetime
    channels: tuple[str, ...] = ("threshold_1",)
    metadata: dict[str, Any] = field(default_factory=dict)

    def start(self, first: Exposure, n_images: int) -> list[bytes]:
        """Return the start message."""
        rows, columns = first.shape
        message = {
            "type": "start",
            **self._identity(),
            "arm_date": self.started,
            "channels": list(self.channels),
            "number_of_images": n_images,
            "image_dtype": first.dtype.name,
            "image_size_x": columns,
            "image_size_y": rows,
            "detector_description": "grainwatch simulator",
            **self.metadata,
        }
        return [cbor2.dumps(message)]

    def image(
        self, number: int, exposure: Exposure, period_s: float, position_um: Sequence[float] | None = None
    ) -> list[bytes]:
        """Return an image message: only its head is coded anew."""
        head: dict[str, Any] = {
            "type": "image",
            **self._identity(),
            "image_id": number,
            "series_date": self.started,
            "start_time": [round(number * period_s * CLOCK_HZ), CLOCK_HZ],
            "stop_time": [round((number + 1) * period_s * CLOCK_HZ), CLOCK_HZ],
            "real_time": [round(period_s * CLOCK_HZ), CLOCK_HZ],
        }
        if position_um is not None:
            head["user_data"] = {"position_um": [float(x) for x in position_um]}
        coded = bytearray(cbor2.dumps(head))
        coded[0] += 1  # a map of up to 23 pairs has their number in its first byte; data is one more
        return [bytes(coded) + exposure.data]

    def end(self) -> list[bytes]:
        """Return the end message."""
        return [cbor2.dumps({"type": "end", **self._identity()})]

    def _identity(self) -> dict[str, Any]:
        return {"series_id": self.series_id, "series_unique_id": self.unique_id}
