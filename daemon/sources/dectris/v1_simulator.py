"""A DECTRIS detector without the detector: Stream V1 messages on a PUSH socket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from daemon.sources import simulator
from daemon.sources.dectris.v1_codec import END, IMAGE, IMAGE_DATA, TIMES
from daemon.sources.dectris.v1_header import DETAILS, HEADER, PIXEL_TYPES
from pipelines.images import encode_image

#: What a user calls the compression, and the format: encoding (with the bits of a pixel) and our name.
ENCODINGS: Final = {
    "bslz4": ("bs{bits}-lz4<", "bslz4"),
    "lz4": ("lz4<", "lz4-block"),
    "none": ("<", "none"),
}


@dataclass(frozen=True)
class Exposure:
    """The parts of an image message that are the same whenever it is sent."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    description: bytes
    blob: bytes
    md5: str


@dataclass(frozen=True)
class Options(simulator.Options[Exposure]):
    """How the simulated detector behaves, besides what all of them have in common.

    Attributes
    ----------
    algorithm : str
        "bslz4", "lz4", or "none" for bytes without compression.
    header_detail : str
        "none"; "basic" sends the configuration; "all" also flat field, pixel mask, count rate table.
    header_appendix, image_appendix : str
        Text that every header or image brings as one part more; "" for none.
    """

    address: str = "tcp://127.0.0.1:9999"
    algorithm: str = "bslz4"
    header_detail: str = "basic"
    header_appendix: str = ""
    image_appendix: str = ""

    def own_checks(self) -> list[tuple[bool, str]]:
        """Return what must hold of algorithm and header detail."""
        return [
            (self.algorithm in ENCODINGS, f"algorithm: expected one of {', '.join(ENCODINGS)}"),
            (self.header_detail in DETAILS, f"header detail: expected one of {', '.join(DETAILS)}"),
        ]

    def expose(self, image: npt.NDArray[Any]) -> Exposure:
        """As `encode_exposure`."""
        return encode_exposure(image, self.algorithm)

    def coder(self, series_id: int) -> SeriesCoder:
        """Return what codes the messages of a series that begins now."""
        return SeriesCoder(
            series_id,
            datetime.now(UTC),
            self.header_detail,
            self.header_appendix,
            self.image_appendix,
            self.metadata,
        )


def encode_exposure(image: npt.NDArray[Any], algorithm: str) -> Exposure:
    """Compress and code the pixels of one exposure.

    Parameters
    ----------
    image : ndarray, (rows, columns)
    algorithm : str
        A key of `ENCODINGS`.

    Raises
    ------
    ValueError
        If the format has no pixels of that type.
    """
    kind = image.dtype.newbyteorder("=").name
    if kind not in PIXEL_TYPES:
        raise ValueError(f"Stream V1 has no pixels of type {image.dtype}")
    pixels = np.ascontiguousarray(image, dtype=f"<{PIXEL_TYPES[kind]}")
    encoding, packing = ENCODINGS[algorithm]
    blob = encode_image(pixels, packing)
    rows, columns = pixels.shape
    description = {
        "htype": IMAGE_DATA,
        "shape": [columns, rows],
        "type": kind,
        "encoding": encoding.format(bits=8 * pixels.dtype.itemsize),
        "size": len(blob),
    }
    digest = hashlib.md5(blob, usedforsecurity=False).hexdigest()
    return Exposure((rows, columns), pixels.dtype, _json(description), blob, digest)


@dataclass(frozen=True)
class SeriesCoder:
    """Codes the messages of one series. Implements `simulator.Coder`."""

    series_id: int
    started: datetime
    header_detail: str = "basic"
    header_appendix: str = ""
    image_appendix: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def start(self, first: Exposure, n_images: int) -> list[bytes]:
        """Return the header with what its detail asks for."""
        parts = [_json({"htype": HEADER, "series": self.series_id, "header_detail": self.header_detail})]
        rows, columns = first.shape
        if self.header_detail != "none":
            config = {
                "nimages": n_images,
                "ntrigger": 1,
                "bit_depth_image": 8 * first.dtype.itemsize,
                "x_pixels_in_detector": columns,
                "y_pixels_in_detector": rows,
                "data_collection_date": self.started.isoformat(),
                "description": "grainwatch simulator",
                **self.metadata,
            }
            parts.append(_json(config))
        if self.header_detail == "all":
            parts += _table("dflatfield-1.0", np.ones((rows, columns), np.float32))
            parts += _table("dpixelmask-1.0", np.zeros((rows, columns), np.uint32))
            # No correction: as many counts as were measured.
            parts += _table("dcountrate_table-1.0", np.tile(np.arange(10, dtype=np.float32), (2, 1)).T)
        return [*parts, self.header_appendix.encode()] if self.header_appendix else parts

    def image(
        self, number: int, exposure: Exposure, period_s: float, position_um: Sequence[float] | None = None
    ) -> list[bytes]:
        """Return an image message: only what differs is coded anew."""
        times = {
            "htype": TIMES,
            "start_time": round(1e9 * number * period_s),
            "stop_time": round(1e9 * (number + 1) * period_s),
            "real_time": round(1e9 * period_s),
        }
        which = {"htype": IMAGE, "series": self.series_id, "frame": number, "hash": exposure.md5}
        parts = [_json(which), exposure.description, exposure.blob, _json(times)]
        appendix = self.image_appendix.encode()
        if position_um is not None:
            note = {"appendix": self.image_appendix} if self.image_appendix else {}
            appendix = _json({"position_um": [float(x) for x in position_um], **note})
        return [*parts, appendix] if appendix else parts

    def end(self) -> list[bytes]:
        """Return the end of the series."""
        return [_json({"htype": END, "series": self.series_id})]


def _table(kind: str, table: npt.NDArray[Any]) -> list[bytes]:
    rows, columns = table.shape
    said = {"htype": kind, "shape": [columns, rows], "type": table.dtype.name}
    return [_json(said), table.astype(table.dtype.newbyteorder("<")).tobytes()]


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()
