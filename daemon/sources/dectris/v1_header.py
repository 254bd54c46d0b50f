"""The header of a series in DECTRIS Stream V1: configuration, tables, appendix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy.typing as npt

from daemon.sources.fields import MAX_IMAGES, MAX_METADATA_BYTES, need, shown, whole
from daemon.sources.json_parts import Part, appendix, json_object, plain
from pipelines.frame import BadFrame
from pipelines.images import EncodedImage

HEADER: Final = "dheader-1.0"
DETAILS: Final = ("none", "basic", "all")

PIXEL_TYPES: Final[Mapping[str, str]] = {
    "uint8": "u1",
    "uint16": "u2",
    "uint32": "u4",
    "int8": "i1",
    "int16": "i2",
    "int32": "i4",
    "float32": "f4",
}
#: The tables of a header with all details, and what they are called among the metadata.
TABLES: Final[Mapping[str, str]] = {
    "dflatfield-1.0": "flatfield",
    "dpixelmask-1.0": "pixel_mask",
    "dcountrate_table-1.0": "countrate_table",
}


@dataclass(frozen=True, slots=True)
class Date:
    """When a series began, in UTC seconds."""

    series: str
    began: float


class Header:
    """What a header says: filled by `read`, which notes complaints instead of raising."""

    def __init__(self, series: str, max_image_bytes: int) -> None:
        self.n_frames: int | None = None
        self.date: Date | None = None
        self.metadata: dict[str, Any] = {}
        self.complaints: list[str] = []
        self._series = series
        self._max_bytes = max_image_bytes
        self._config: dict[str, Any] = {}

    def read(self, first: Mapping[str, Any], parts: Sequence[Part]) -> None:
        """Read all parts of a header, the first one being known."""
        rest = list(parts[1:])
        detail = first.get("header_detail")
        if detail not in DETAILS:
            self._complain(f"header_detail: expected one of {', '.join(DETAILS)}, got {shown(detail)}")
        if detail in ("basic", "all"):
            if not rest:
                self._complain(f"header_detail is {detail!r}, but there is no configuration")
                return
            self._read_config(rest.pop(0))
        if detail == "all":
            rest = self._read_tables(rest)
        if rest:
            self._read_appendix(rest.pop(0))
        if rest:
            self._complain(f"{len(parts)} parts, {len(rest)} more than its detail {shown(detail)} has")

    def _complain(self, reason: str) -> None:
        self.complaints.append(reason)

    def _read_config(self, part: Part) -> None:
        try:
            self._config = json_object(part, "configuration")
        except BadFrame as error:
            self._complain(f"left out: {error}")
            return
        unusable = []
        for key, value in self._config.items():
            try:
                self.metadata[plain(key)] = plain(value)
            except BadFrame as error:
                unusable.append(f"{shown(key)}: {error}")
        if unusable:
            more = f", and {len(unusable) - 1} more" if len(unusable) > 1 else ""
            self._complain(f"configuration: left out: {unusable[0]}{more}")
        self._count_frames()
        self._find_date()

    def _count_frames(self) -> None:
        config, each = self._config, []
        try:
            each = [whole(config, key, "configuration") for key in ("nimages", "ntrigger") if key in config]
        except BadFrame as error:
            self._complain(f"{error}; the number of images is taken as unknown")
            return
        if "nimages" not in config:
            return
        n_frames = math.prod(each)
        if n_frames > MAX_IMAGES:
            self._complain(f"configuration: {n_frames} images make no sense, taken as unknown")
        else:
            self.n_frames = n_frames

    def _find_date(self) -> None:
        given = self._config.get("data_collection_date")
        if not given:
            return
        try:
            date = datetime.fromisoformat(given)
            if date.tzinfo is None:
                date = date.replace(tzinfo=UTC)
            self.date = Date(self._series, date.timestamp())
        except (TypeError, ValueError, OverflowError):
            self._complain(f"configuration: data_collection_date: expected a date, got {shown(given)}")

    def _read_tables(self, rest: list[Part]) -> list[Part]:
        """Read the pairs of description and blob; return what is behind them."""
        seen = set()
        while len(rest) >= 2:
            try:
                said = json_object(rest[0], "table")
            except BadFrame:
                break
            kind = said.get("htype")
            if not isinstance(kind, str) or kind not in TABLES:
                break
            blob = rest[1]
            rest = rest[2:]
            seen.add(kind)
            try:
                self.metadata[TABLES[kind]] = self._table(kind, said, blob)
            except BadFrame as error:
                self._complain(f"{TABLES[kind]} left out: {error}")
        missing = [name for kind, name in TABLES.items() if kind not in seen]
        if missing:
            self._complain(f"header_detail is 'all', but there is no {', no '.join(missing)}")
        return rest

    def _table(self, kind: str, said: Mapping[str, Any], blob: Part) -> Any:
        """Return a pixel mask as an array, a small table as lists of numbers, else what it is."""
        data = memoryview(blob).cast("B")
        # Tables are not encoded and the format says no byte order for them: it is the detector's own.
        image = EncodedImage(
            data, array_shape(said, kind), "<" + pixel_type(said, kind), max_bytes=self._max_bytes
        )
        if TABLES[kind] == "pixel_mask":
            self._compare_with_images(image.shape)
            return {"": image.array()}
        if data.nbytes <= MAX_METADATA_BYTES:
            return _numbers(image.array())
        return f"array of {image.dtype.name}, {image.shape[0]} x {image.shape[1]}"

    def _compare_with_images(self, shape: tuple[int, ...]) -> None:
        rows, columns = (self._config.get(f"{k}_pixels_in_detector") for k in "yx")
        if (rows is not None and rows != shape[0]) or (columns is not None and columns != shape[1]):
            raise BadFrame(f"shape {shape}, the images have ({shown(rows)}, {shown(columns)})")

    def _read_appendix(self, part: Part) -> None:
        try:
            said = appendix(part)
        except BadFrame as error:
            self._complain(f"appendix left out: {error}")
        else:
            if said:
                self.metadata["user_data"] = said


def array_shape(said: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Return rows and columns of what says [x, y]."""
    given = need(said, "shape", where)
    if (
        not isinstance(given, list)
        or len(given) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and abs(n) < 1 << 32 for n in given)
    ):
        raise BadFrame(f"{where}: shape: expected [x, y] in pixels, got {shown(given)}")
    return given[1], given[0]


def pixel_type(said: Mapping[str, Any], where: str) -> str:
    """Return the numpy type of pixels, without a byte order."""
    given = need(said, "type", where)
    if not isinstance(given, str) or given not in PIXEL_TYPES:
        raise BadFrame(f"{where}: type {shown(given)} is not one of {', '.join(PIXEL_TYPES)}")
    return PIXEL_TYPES[given]


def _numbers(table: npt.NDArray[Any]) -> list[list[Any]]:
    """Return a table as lists of numbers, nothing in place of what is no number."""
    return [[x if math.isfinite(x) else None for x in row] for row in table.tolist()]
