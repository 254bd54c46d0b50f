"""Results files: their layout, and how to read them, also while they are being written.

One HDF5 file holds what one series of one stream gave (a new part begins after a crash). It is a
set of long tables of equal-length columns in NeXus form::

    /entry                 NXentry, @schema = LAYOUT
        start_time, end_time (blank until the series is closed)
        series/            who published what, number of frames in each state
        crystals/          NXdata, one row a crystal
        frames/            NXdata, one row a result: the frame index
        messages/          the payloads exactly as published (`data`, a heap of bytes) and their index
        micrographs/       NXdata, one row a micrograph: what is one number an image
        map/points, grains one row for each point of a map delta, one for each change of a grain
        drift/             NXdata, one row a report of the drift watch
        changes/           NXdata, one row a report of the drift alarm of micrographs
        names/             the texts behind the codes in the other tables
        provenance/        program, configuration, hashes

The files are written in HDF5's single-writer-multiple-reader mode: every reader here opens them
with ``swmr=True`` and sees what was flushed, even when the writer was killed. Columns of one table
may then differ in length by the rows of one flush; the shortest counts. A payload whose checksum
does not match was not completely flushed: it is skipped and counted.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from grainwatch.messages import AnyMessage, LaueResult, decode
from pipelines.files import reason
from pipelines.results_layout import (
    CHANGES,
    CRYSTALS,
    DRIFT,
    FLAG_BITS,
    FRAMES,
    GRAINS,
    LAYOUT,
    MESSAGES,
    MICROGRAPHS,
    POINTS,
    STATES,
    Column,
)

PATTERN = "*.h5"

Table: TypeAlias = dict[str, npt.NDArray[Any]]

BLOCK_BYTES = 4 * 1024 * 1024


class ResultsFileError(ValueError):
    """A file that cannot be read as results; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class StoredPayload:
    """A payload as it was published, with what its index says of it. `frame` is -1 but for a result."""

    seq: int
    schema: str
    frame: int
    payload: bytes


class PayloadIndex:
    """The index of a file's payloads in memory, so that a reader who comes back reads only what is new.

    `columns` are those of ``messages``, each (n,).
    """

    def __init__(self) -> None:
        self.columns: Table = {name: np.zeros(0, column.dtype) for name, column in MESSAGES.items()}

    def __len__(self) -> int:
        return len(self.columns["seq"])

    def extend(self, group: Any, length: int) -> None:
        """Read the rows up to `length` that are not here yet."""
        known = len(self)
        if length > known:
            for name, values in self.columns.items():
                self.columns[name] = np.concatenate([values, group[name][known:length]])


class ResultsFile:
    """A results file opened for reading, finished or not.

    Parameters
    ----------
    path : Path
    index : PayloadIndex, optional
        What an earlier reader of the same file left.

    Attributes
    ----------
    stream, series_uid, publisher : str
    started : float
        UTC seconds.
    damaged : int
        Payloads skipped so far because their checksum did not match.

    Raises
    ------
    ResultsFileError
        If the file is absent, is not HDF5, or has another layout.
    """

    def __init__(self, path: Path | str, index: PayloadIndex | None = None) -> None:
        self.path = Path(path)
        self._index = PayloadIndex() if index is None else index
        try:
            self.path.open("rb").close()
            self._file = h5py.File(self.path, "r", libver="latest", swmr=True)
        except OSError as error:
            raise ResultsFileError(_unreadable(self.path, error)) from error
        try:
            entry = self._file.get("entry")
            layout = None if entry is None else entry.attrs.get("schema")
            if layout != LAYOUT:
                raise ResultsFileError(
                    f"{self.path}: expected results in the layout {LAYOUT!r} in /entry, found {layout!r}"
                )
            series = entry["series"]
            self.stream: str = series["stream"].asstr()[()]
            self.series_uid: str = series["series_uid"].asstr()[()]
            self.publisher: str = series["publisher"].asstr()[()]
            self.started = float(series["started"][()])
        except KeyError as error:
            self._file.close()
            raise ResultsFileError(f"{self.path}: incomplete: {error}") from error
        except ResultsFileError:
            self._file.close()
            raise
        self._entry = entry
        self.damaged = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    @property
    def finished(self) -> bool:
        """Whether the series was closed in order (not while it runs, not after a crash)."""
        return bool(self._column("series", "ended", 1)[0] > 0)

    @property
    def config_text(self) -> str:
        """The configuration file that the daemon ran with; empty when it is not in the file."""
        text = self._entry.get("provenance/config")
        return "" if text is None else str(text.asstr()[()])

    def counts(self) -> dict[str, int]:
        """Return how many frames ended in each state; empty unless `finished`."""
        if not self.finished:
            return {}
        return {state: int(self._column("series", state, 1)[0]) for state in STATES}

    def names(self, what: str) -> list[str]:
        """Return the texts behind codes: `what` is one of "material", "channel", "flag", ..."""
        dataset = self._entry["names"][what]
        dataset.refresh()
        return [text.decode("utf-8", "replace") for text in dataset[()]]

    def crystals(self) -> Table:
        """Return the columns of the crystal table: n rows, one a crystal, in order of publication.

        Codes are resolved: `material` and `channel` are text, `flags` tuples of text.
        """
        return self._table("crystals", CRYSTALS)

    def frames(self) -> Table:
        """Return the columns of the frame index: n rows, one a result."""
        return self._table("frames", FRAMES)

    def map_points(self) -> Table:
        """Return the points of all map deltas in order.

        Of the rows of one `grid_index` those with the largest `seq` count; `rank` -1 says that
        the point was measured and holds no crystal.
        """
        return self._table("map/points", POINTS)

    def map_grains(self) -> Table:
        """Return all changes of grains in order: the last row of a `grain_id` counts.

        A row whose `merged_into` is not -1 says that from this `seq` on the points of the grain
        belong to that other one.
        """
        return self._table("map/grains", GRAINS)

    def drift(self) -> Table:
        """Return the reports of the drift watch in order."""
        return self._later_table("drift", DRIFT)

    def micrographs(self) -> Table:
        """Return the columns of the micrographs: n rows, one a result; NaN where something is not known.

        `condition` is the most probable one, `probability` its own; "" where none was asked for.
        """
        return self._later_table("micrographs", MICROGRAPHS)

    def changes(self) -> Table:
        """Return the reports of the drift alarm of micrographs in order."""
        return self._later_table("changes", CHANGES)

    def index(self) -> Table:
        """Return the index of all payloads stored so far: the columns of ``messages``, each (n,)."""
        group = self._entry["messages"]
        self._index.extend(group, self._length(group, MESSAGES))
        return self._index.columns

    def payloads(
        self,
        *,
        frames: tuple[int | None, int | None] | None = None,
        seqs: tuple[int | None, int | None] | None = None,
        after_seq: int | None = None,
        schemas: tuple[str, ...] | None = None,
    ) -> Iterator[StoredPayload]:
        """Iterate over stored payloads, ordered by sequence number.

        Parameters
        ----------
        frames, seqs : (first, last), both included, None for open
            Which frame numbers, which sequence numbers. A map's payload has no frame number:
            it comes only when `frames` is None.
        after_seq : int, optional
            Only larger sequence numbers (where to go on).
        schemas : tuple of str, optional
            Only these schema names.
        """
        index = self.index()
        seq, frame, schema = index["seq"], index["frame"], index["schema"]
        offset, size, crc32 = index["offset"], index["size"], index["crc32"]
        wanted = np.ones(len(seq), dtype=bool)
        if frames is not None:
            wanted &= _within(frame, frames) & (frame >= 0)
        if seqs is not None:
            wanted &= _within(seq, seqs)
        if after_seq is not None:
            wanted &= _within(seq, (after_seq + 1, None))
        known = self.names("schema")
        if schemas is not None:
            wanted &= np.isin(schema, [code for code, name in enumerate(known) if name in schemas])
        rows = np.flatnonzero(wanted)
        rows = rows[np.argsort(seq[rows], kind="stable")]
        heap = self._entry["messages"]["data"]
        heap.refresh()
        for block in _blocks(rows, offset, size):
            first = int(offset[block].min())
            raw = heap[first : int((offset[block] + size[block]).max())].tobytes()
            for row in block:
                start = int(offset[row]) - first
                payload = raw[start : start + int(size[row])]
                if zlib.crc32(payload) != int(crc32[row]) or int(schema[row]) >= len(known):
                    self.damaged += 1
                    continue
                yield StoredPayload(int(seq[row]), known[int(schema[row])], int(frame[row]), payload)

    def messages(self, **which: Any) -> Iterator[AnyMessage]:
        """Iterate over decoded messages; the arguments are those of `payloads`."""
        for stored in self.payloads(**which):
            yield decode(stored.payload)

    def results(self, first: int | None = None, last: int | None = None) -> Iterator[LaueResult]:
        """Iterate over the results of frames `first` to `last` (both included)."""
        for message in self.messages(frames=(first, last), schemas=(LaueResult.SCHEMA,)):
            if isinstance(message, LaueResult):
                yield message

    def _later_table(self, name: str, columns: dict[str, Column]) -> Table:
        """Return a table that files of older versions do not have: no rows then."""
        if name in self._entry:
            return self._table(name, columns)
        return {n: np.zeros((0, *c.shape), "<U1" if c.names else c.dtype) for n, c in columns.items()}

    def _table(self, name: str, columns: dict[str, Column]) -> Table:
        n = self._length(self._entry[name], columns)
        table = {column: self._column(name, column, n) for column in columns}
        for column, spec in columns.items():
            if spec.names == "flag":
                table[column] = _flag_texts(table[column], self.names("flag"))
            elif spec.names:
                known = np.array([*self.names(spec.names), "?"])
                table[column] = known[np.minimum(table[column], len(known) - 1)]
        return table

    def _length(self, group: Any, columns: dict[str, Column]) -> int:
        for column in columns:
            group[column].refresh()
        return min(int(group[column].shape[0]) for column in columns)

    def _column(self, table: str, column: str, n: int) -> npt.NDArray[Any]:
        dataset = self._entry[table][column]
        if table == "series":
            dataset.refresh()
        values: npt.NDArray[Any] = dataset[:n]
        return values


def _unreadable(path: Path, error: OSError) -> str:
    """Say why a file cannot be opened, without what only the HDF5 library's authors understand."""
    if error.filename is not None:
        return reason(error)
    if not h5py.is_hdf5(path):
        return f"{path}: cannot be opened as HDF5: it is no HDF5 file"
    # "Unable to synchronously open file (truncated file: ...)": the brackets hold the reason.
    inner = re.search(r"\((.*)\)", str(error))
    return f"{path}: cannot be opened as HDF5: {inner[1] if inner else error}"


def read_results(path: Path | str) -> Iterator[LaueResult]:
    """Iterate over all Laue results of a file.

    Raises
    ------
    ResultsFileError
        If the file is not a results file.
    """
    with ResultsFile(path) as file:
        yield from file.results()


def crystals_table(path: Path | str) -> Table:
    """Return all crystals of a file as columns (see `ResultsFile.crystals`).

    Raises
    ------
    ResultsFileError
        If the file is not a results file.
    """
    with ResultsFile(path) as file:
        return file.crystals()


def results_files(folder: Path | str, series_uid: str | None = None) -> list[Path]:
    """Return the results files of a folder by name (which begins with stream and start), parts in order.

    `series_uid` keeps those whose name carries its first eight characters.
    """
    paths = sorted(Path(folder).glob(PATTERN), key=_by_part)
    return [p for p in paths if series_uid is None or f"-{series_uid[:8]}" in p.stem]


def _by_part(path: Path) -> tuple[str, int]:
    base, _, number = path.stem.partition("-part")
    return (base, int(number)) if number.isdecimal() else (path.stem, 1)


def _within(values: npt.NDArray[Any], bounds: tuple[int | None, int | None]) -> npt.NDArray[np.bool_]:
    inside = np.ones(values.shape, dtype=bool)
    first, last = bounds
    kind = np.iinfo(values.dtype)
    # Bounds come from a network: clip, so that no number overflows the column's type.
    if first is not None:
        inside &= values >= values.dtype.type(min(max(first, kind.min), kind.max))
    if last is not None:
        inside &= values <= values.dtype.type(min(max(last, kind.min), kind.max))
        if last < kind.min:
            inside[:] = False
    return inside


def _blocks(
    rows: npt.NDArray[np.intp], offset: npt.NDArray[np.int64], size: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.intp]]:
    """Group rows so that one read of the heap serves many payloads and stays bounded."""
    start = 0
    while start < len(rows):
        begin = offset[rows[start]]
        # A window over payloads that lie behind the first one and within BLOCK_BYTES of it.
        ends = offset[rows[start:]] + size[rows[start:]]
        outside = (offset[rows[start:]] < begin) | (ends > begin + BLOCK_BYTES)
        count = int(np.argmax(outside)) if outside.any() else len(outside)
        stop = start + max(count, 1)
        yield rows[start:stop]
        start = stop


def _flag_texts(bits: npt.NDArray[np.uint64], known: list[str]) -> npt.NDArray[np.object_]:
    texts = {
        int(value): tuple(name for bit, name in enumerate(known[:FLAG_BITS]) if int(value) >> bit & 1)
        for value in np.unique(bits)
    }
    out = np.empty(bits.shape, dtype=object)
    for row, value in enumerate(bits):
        out[row] = texts[int(value)]
    return out
