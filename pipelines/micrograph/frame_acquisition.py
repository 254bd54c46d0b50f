"""How the micrograph of a frame was taken: what its file, its stream and the configuration say of it.

A pipeline sees frames, no files. What reads the file of a frame puts what the file says into the frame's
metadata (`file_metadata`, key "acquisition"); `acquisition_of` makes an `Acquisition` of that and the rest.
In order of trust:

1. the microscope's own tags in the file and its own text beside it, or the text that came with a pushed
   image (metadata "sidecars");
2. metadata of the stream, under the names in `KEYS` or what the configuration calls them: of the frame
   itself, its NDAttributes (areaDetector), its user data (DECTRIS, Bluesky);
3. what other programs write into files: ImageJ's scale, resolution tags;
4. the configuration, for what nobody says.

Where two of the first three say different pixel sizes, that is flagged. A pixel size that cannot be one is
flagged and never used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from grainwatch.config import Table
from pipelines.frame import BadFrame, Frame
from pipelines.micrograph.acquisition import (
    FLAGS,
    METADATA_DAMAGED,
    PIXEL_SIZE_UNKNOWN,
    Acquisition,
    FileStatements,
    read_statements,
    sidecar_statement,
    silence,
)
from pipelines.micrograph.vendors import PIXEL_RANGE_UM, Statement

ACQUISITION: Final = "acquisition"
"""The key of a frame's metadata that holds what its file says."""
KEYS: Final = (
    "pixel_size_um",
    "detector",
    "voltage_kV",
    "working_distance_mm",
    "data_bar_px",
    "vendor",
    "instrument",
)
"""Names that metadata of a stream may use, and that the configuration may translate."""

CONFIGURED: Final = "the configuration"
"""`Acquisition.source` of a pixel size that neither file nor stream says."""

_TEXTS: Final = frozenset({"detector", "vendor", "instrument"})
_FIELDS: Final = {name: "pixel_um" if name == "pixel_size_um" else name for name in KEYS}
_LONGEST: Final = 256
_LONGEST_REMARK: Final = 1000
_MOST_REMARKS: Final = 20
_MOST_ROWS: Final = 1_000_000
_LARGEST: Final = 1e100
#: Where sources keep what an instrument says of a frame.
_PLACES: Final = ("ndattr", "user_data")


class AcquisitionTable(Table, frozen=True, kw_only=True):
    """How micrographs are taken, where neither file nor stream says it, and what a stream calls it.

    Attributes
    ----------
    pixel_size_um : float, optional
        Width of a pixel.
    detector : str
        Its name.
    voltage_kV : float, optional
        Of the beam.
    working_distance_mm : float, optional
        From the lens to the sample.
    data_bar_px : int, optional
        Rows of the data bar at the bottom; 0 for none. Without it the bar is looked for.
    keys : mapping
        What the stream's metadata (NDAttributes for example) call `pixel_size_um`, `detector`,
        `voltage_kV`, `working_distance_mm`, `data_bar_px`, `vendor`, `instrument`, if not so.
    factors : mapping
        By what those numbers are to be multiplied: `{ pixel_size_um = 0.001 }` for nm.
    """

    pixel_size_um: float | None = None
    detector: str = ""
    voltage_kV: float | None = None
    working_distance_mm: float | None = None
    data_bar_px: int | None = None
    keys: dict[str, str] = msgspec.field(default_factory=dict)
    factors: dict[str, float] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        low, high = PIXEL_RANGE_UM
        if self.pixel_size_um is not None and not low <= self.pixel_size_um <= high:
            raise ValueError(f"pixel_size_um: expected {low:g} to {high:g}, got {self.pixel_size_um}")
        for key in ("voltage_kV", "working_distance_mm"):
            value = getattr(self, key)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{key}: expected a number greater than 0, got {value}")
        if self.data_bar_px is not None and not 0 <= self.data_bar_px <= _MOST_ROWS:
            raise ValueError(f"data_bar_px: expected 0 to {_MOST_ROWS}, got {self.data_bar_px}")
        for table in ("keys", "factors"):
            unknown = [name for name in getattr(self, table) if name not in KEYS]
            if unknown:
                raise ValueError(f"{table}: {unknown[0]!r} is not one of {', '.join(KEYS)}")
        for name, factor in self.factors.items():
            if name in _TEXTS or not 0.0 < factor < math.inf:
                raise ValueError(f"factors.{name}: expected a number greater than 0, and only of numbers")


_NOT_CONFIGURED: Final = AcquisitionTable()


def file_metadata(path: str | Path) -> dict[str, Any]:
    """Return what a file and those beside it say, as an entry of a frame's metadata; empty for nothing.

    Raises
    ------
    BadFrame
        If a file cannot be read. What is wrong with metadata is flagged.
    """
    try:
        said = read_statements(path)
    except BadFrame as error:
        if isinstance(error.__cause__, OSError):
            raise
        # Its pixels were read all the same.
        said = FileStatements(flags=(METADATA_DAMAGED,), remarks=(str(error),))
    return {ACQUISITION: _fit_to_travel(asdict(said))} if said else {}


def acquisition_of(frame: Frame, table: AcquisitionTable = _NOT_CONFIGURED) -> Acquisition:
    """Return how the image of a frame was taken; the head of this module says whom to believe.

    Nothing is raised, whatever the metadata hold.
    """
    metadata = frame.metadata
    said = _of_file(metadata)
    more = [*_of_sidecars(metadata), *_of_stream(metadata, table)]
    found = said.acquisition(frame.image.shape, more)
    if not said and not more and isinstance(file := metadata.get("file"), str):
        found = replace(found, remarks=(*found.remarks, silence(file)))
    # Names of files and of texts beside them are among the words.
    found = replace(found, remarks=tuple(_fit_to_travel(found.remarks)))
    return _completed(found, table, frame.image.shape[0])


def _completed(found: Acquisition, table: AcquisitionTable, rows: int) -> Acquisition:
    """Take from the configuration what nobody said."""
    changes: dict[str, Any] = {
        name: getattr(table, name)
        for name in ("voltage_kV", "working_distance_mm", "data_bar_px")
        if getattr(found, name) is None
    }
    if (bar := changes.get("data_bar_px")) is not None and bar >= rows:
        changes["data_bar_px"] = None
    changes["detector"] = found.detector or table.detector
    if found.pixel_size_um is None and table.pixel_size_um is not None:
        flags = tuple(flag for flag in found.flags if flag != PIXEL_SIZE_UNKNOWN)
        changes |= {"pixel_size_um": table.pixel_size_um, "source": CONFIGURED, "flags": flags}
    return replace(found, **changes)


def _fit_to_travel(value: Any) -> Any:
    """Return plain values whose texts are short, and can be stored and sent: names of files cannot always."""
    if isinstance(value, str):
        return value[:_LONGEST_REMARK].encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _fit_to_travel(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_fit_to_travel(inner) for inner in value[:_MOST_REMARKS]]
    return value


def _of_file(metadata: Mapping[str, Any]) -> FileStatements:
    """Put together what `file_metadata` took apart; a sender may have put anything in its place."""
    given = metadata.get(ACQUISITION)
    if given is None:
        return FileStatements()
    try:
        said = msgspec.convert(given, FileStatements)
    except (msgspec.ValidationError, TypeError) as error:
        return FileStatements(flags=(METADATA_DAMAGED,), remarks=(f"metadata {ACQUISITION}: {error}",))
    for statement in (*said.statements, *said.guesses):
        _check(statement)
    return replace(said, flags=tuple(flag for flag in said.flags if flag in FLAGS))


def _check(statement: Statement) -> None:
    """Drop numbers that no microscope says."""
    for each in fields(statement):
        value = getattr(statement, each.name)
        if isinstance(value, str) and not _is_text(value):
            setattr(statement, each.name, "")
        bad = isinstance(value, float) and not 0.0 < value < math.inf
        bad |= isinstance(value, int) and not 0 <= value <= _MOST_ROWS
        bad |= isinstance(value, tuple) and not all(0 < n <= _MOST_ROWS for n in value)
        if bad:
            statement.problems.append(f"{statement.source}: {each.name} cannot be {value}")
            setattr(statement, each.name, None)
    for name in ("pixel_um", "pixel_height_um"):
        setattr(statement, name, statement.pixel(getattr(statement, name), name))


def _of_sidecars(metadata: Mapping[str, Any]) -> Iterator[Statement]:
    """Yield what texts say that were sent along with a file."""
    texts = metadata.get("sidecars")
    if not isinstance(texts, Mapping):
        return
    for name, text in texts.items():
        if isinstance(name, str) and isinstance(text, str):
            said, _ = sidecar_statement(_fit_to_travel(name), text.encode(errors="replace"), told=True)
            if said is not None:
                yield said


def _of_stream(metadata: Mapping[str, Any], table: AcquisitionTable) -> Iterator[Statement]:
    """Yield what the metadata of each place say."""
    places = {"metadata": metadata} | {f"metadata {name}": metadata.get(name) for name in _PLACES}
    for source, place in places.items():
        if isinstance(place, Mapping):
            found = Statement(source)
            for name in KEYS:
                _take(found, name, place, table)
            if found != Statement(source):
                yield found


def _take(found: Statement, name: str, place: Mapping[str, Any], table: AcquisitionTable) -> None:
    key = table.keys.get(name, name)
    value = place.get(key)
    if value is None:
        return
    if name in _TEXTS:
        if isinstance(value, str) and _is_text(value):
            setattr(found, name, value)
        return
    if name == "data_bar_px":
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_ROWS
        good: Any = value if whole else None
        wanted = "a count"
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
        good = float(value) * table.factors.get(name, 1.0) if number else math.nan
        good = good if 0.0 < good < math.inf else None
        wanted = "a number greater than 0"
    if good is None:
        found.problems.append(f"{found.source}: {key} is {_short(value)}, expected {wanted}")
    elif name == "pixel_size_um":
        found.pixel_um = found.pixel(good, key)
    else:
        setattr(found, _FIELDS[name], good)


def _is_text(value: str) -> bool:
    return len(value) <= _LONGEST and value.isprintable()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
