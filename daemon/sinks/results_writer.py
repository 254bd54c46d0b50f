"""Writes one results file: the tables of `pipelines.results_files`, row by row, readable at once.

Everything that a file will ever hold is created before it enters HDF5's SWMR mode; from then on
rows are only appended, and numbers and texts of fixed length overwritten in place, which is all
that SWMR allows. Texts are therefore codes into the tables under ``names``.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from daemon.sinks.base import Published, SeriesOpened, SinkContext
from grainwatch import __version__
from grainwatch.messages import Crystal, DriftReport, LaueResult, MapUpdate
from pipelines.results_files import (
    CRYSTALS,
    DRIFT,
    FLAG_BITS,
    FRAMES,
    GRAINS,
    LAYOUT,
    MESSAGES,
    NAMES,
    POINTS,
    STATES,
    Column,
)

CHUNK_BYTES = 16 * 1024  # small enough to rewrite at each flush, large enough to read back fast
HEAP_CHUNK_BYTES = 256 * 1024
NAME_BYTES = 192
TIME_BYTES = 32
UNFINISHED_SUFFIX = ".creating"


class _Rows:
    """Rows of one table, gathered in memory and appended together."""

    def __init__(self, group: Any, columns: Mapping[str, Column]) -> None:
        self._columns = columns
        self._pending: dict[str, list[Any]] = {name: [] for name in columns}
        self._datasets = {}
        for name, column in columns.items():
            row_bytes = np.dtype(column.dtype).itemsize * int(np.prod(column.shape, dtype=int))
            dataset = group.create_dataset(
                name,
                shape=(0, *column.shape),
                maxshape=(None, *column.shape),
                chunks=(max(64, CHUNK_BYTES // row_bytes), *column.shape),
                dtype=column.dtype,
            )
            if column.units:
                dataset.attrs["units"] = column.units
            if column.names:
                dataset.attrs["codes_of"] = f"/entry/names/{column.names}"
            self._datasets[name] = dataset
        self.count = 0  # rows appended and pending together

    def datasets(self) -> list[Any]:
        return list(self._datasets.values())

    def add(self, **values: Any) -> None:
        for name, pending in self._pending.items():
            pending.append(values[name])
        self.count += 1

    def write(self) -> None:
        pending = next(iter(self._pending.values()))
        if not pending:
            return
        start = self.count - len(pending)
        for name, column in self._columns.items():
            rows = np.asarray(self._pending[name], dtype=column.dtype).reshape(-1, *column.shape)
            dataset = self._datasets[name]
            dataset.resize(self.count, axis=0)
            dataset[start:] = rows
            dataset.flush()
        for values in self._pending.values():
            values.clear()


class _Names:
    """The texts behind the codes of a column."""

    def __init__(self, group: Any, name: str) -> None:
        self._dataset = group.create_dataset(
            name, shape=(0,), maxshape=(None,), chunks=(64,), dtype=h5py.string_dtype("utf-8", NAME_BYTES)
        )
        self._codes: dict[str, int] = {}
        self._written = 0

    def datasets(self) -> list[Any]:
        return [self._dataset]

    def code(self, text: str) -> int:
        return self._codes.setdefault(text, len(self._codes))

    def bits(self, texts: tuple[str, ...]) -> int:
        """One bit a text; the last bit stands for all texts beyond the first 63."""
        value = 0
        for text in texts:
            if text in self._codes or len(self._codes) < FLAG_BITS - 1:
                value |= 1 << self.code(text)
            else:
                value |= 1 << self._codes.setdefault("other", FLAG_BITS - 1)
        return value

    def write(self) -> None:
        if len(self._codes) == self._written:
            return
        new = [text.encode()[:NAME_BYTES] for text in list(self._codes)[self._written :]]
        self._dataset.resize(len(self._codes), axis=0)
        self._dataset[self._written :] = np.array(new, dtype=self._dataset.dtype)
        self._dataset.flush()
        self._written = len(self._codes)


class ResultsWriter:
    """One results file being written.

    The file appears under its final name when it can be read; until then its name ends in
    ``.creating``.

    Parameters
    ----------
    path : Path
        Must not exist: a file is never opened for writing twice.
    opened : SeriesOpened
    context : SinkContext

    Raises
    ------
    OSError
        If the file cannot be created or (in `write`, `close`) written.
    """

    def __init__(self, path: Path, opened: SeriesOpened, context: SinkContext) -> None:
        self.path = path
        self.opened = opened
        creating = path.with_name(path.name + UNFINISHED_SUFFIX)
        self._file = h5py.File(creating, "w", libver="latest")
        self._objects: list[Any] = [self._file]
        try:
            self._layout(opened, context)
            self._file.swmr_mode = True
            self._file.flush()
            os.rename(creating, path)
        except BaseException:
            self.strand()
            creating.unlink(missing_ok=True)
            raise
        self._heap_size = 0
        self._heap: list[bytes] = []
        self.pending: deque[Published] = deque()
        self.pending_bytes = 0
        self.holds_results = False

    def add(self, event: Published) -> None:
        """Take a message; it is in the file after the next `write`."""
        self.pending.append(event)
        self.pending_bytes += len(event.payload)

    def write(self) -> None:
        """Append what is pending and flush it, payloads first and their index last.

        After an error `pending` still holds all that may not be in the file.
        """
        if not self.pending:
            return
        for event in self.pending:
            self._rows_of(event)
        for names in self._names.values():
            names.write()
        data = np.frombuffer(b"".join(self._heap), dtype=np.uint8)
        self._data.resize(self._heap_size, axis=0)
        self._data[self._heap_size - data.size :] = data
        self._data.flush()
        self._heap.clear()
        for rows in (*self._tables, self._index):
            rows.write()
        self.pending.clear()
        self.pending_bytes = 0
        self.holds_results = True

    def close(self, ended: float | None = None, counts: Mapping[str, int] | None = None) -> None:
        """Write the rest and close; with `ended` (UTC seconds) the series is marked finished."""
        self.write()
        if ended is not None:
            for state in STATES:
                self._series[state][0] = int((counts or {}).get(state, 0))
            self._entry["end_time"][()] = np.bytes_(_iso(ended))
            self._series["ended"][0] = ended
        self._file.flush()
        self._file.close()

    def strand(self) -> None:
        """Leave the file as it is, after an error: nothing of it is touched any more.

        HDF5 crashes the process when it closes a file that it could not write, or what belongs to
        it; the handles are therefore left to the end of the process.
        """
        for item in self._objects:
            item.id.locked = True  # h5py closes no handle that is locked

    def _layout(self, opened: SeriesOpened, context: SinkContext) -> None:
        root = self._file
        root.attrs.update({"NX_class": "NXroot", "default": "entry", "creator": f"grainwatch {__version__}"})
        entry = root.create_group("entry")
        entry.attrs.update({"NX_class": "NXentry", "default": "crystals", "schema": LAYOUT})
        self._entry = entry
        _text(entry, "title", f"{opened.stream} {opened.detector_series}".strip())
        _text(entry, "start_time", _iso(opened.started))
        _text(entry, "end_time", "", TIME_BYTES)

        series = self._series = _group(entry, "series", "NXcollection")
        for name, text in (
            ("stream", opened.stream),
            ("series_uid", opened.series_uid),
            ("detector_series", opened.detector_series),
            ("publisher", context.daemon_name),
            ("metadata", json.dumps(opened.metadata, default=str)),
        ):
            _text(series, name, text)
        series.create_dataset("started", data=float(opened.started))
        series.create_dataset("n_frames", data=-1 if opened.n_frames is None else int(opened.n_frames))
        series.create_dataset("scan_shape", data=np.array(opened.scan_shape or (), dtype="<i4"))
        series.create_dataset("ended", data=np.zeros(1), chunks=(1,), maxshape=(1,))
        for state in STATES:
            series.create_dataset(state, data=np.zeros(1, "<i8"), chunks=(1,), maxshape=(1,))

        self._crystals = _Rows(_nxdata(entry, "crystals", "match_rate", "frame"), CRYSTALS)
        self._frames = _Rows(_nxdata(entry, "frames", "n_crystals", "frame"), FRAMES)
        messages = _group(entry, "messages", "NXcollection")
        self._data = messages.create_dataset(
            "data", shape=(0,), maxshape=(None,), chunks=(HEAP_CHUNK_BYTES,), dtype="u1"
        )
        messages.attrs["encoding"] = "msgpack"
        self._index = _Rows(messages, MESSAGES)
        grid = self._map = _group(entry, "map", "NXcollection")
        grid.create_dataset("shape", data=np.zeros((1, 3), "<i4"), chunks=(1, 3), maxshape=(1, 3))
        grid.create_dataset("step_um", data=np.full((1, 3), np.nan), chunks=(1, 3), maxshape=(1, 3))
        grid["step_um"].attrs["units"] = "um"
        self._map_known = False
        self._points = _Rows(_nxdata(grid, "points", "grain_id", "frame"), POINTS)
        self._grains = _Rows(_nxdata(grid, "grains", "size_points", "grain_id"), GRAINS)
        self._drift = _Rows(_nxdata(entry, "drift", "change", "frame"), DRIFT)
        self._tables = (self._crystals, self._points, self._grains, self._drift, self._frames)
        names = _group(entry, "names", "NXcollection")
        self._names = {name: _Names(names, name) for name in NAMES}

        self._objects += [entry, series, self._data, grid]
        for rows in (*self._tables, self._index):
            self._objects += rows.datasets()
        for texts in self._names.values():
            self._objects += texts.datasets()

        provenance = _group(entry, "provenance", "NXprocess")
        for name, text in (
            ("program", "grainwatch"),
            ("version", __version__),
            ("date", _iso(opened.started)),
            ("config", context.config_text),
            ("config_hash", context.config_hash),
        ):
            _text(provenance, name, text)

    def _rows_of(self, event: Published) -> None:
        message, payload = event.message, event.payload
        offset = self._heap_size
        frame, channel = -1, ""
        if isinstance(message, LaueResult):
            frame, channel = message.key.frame, message.key.channel
            self._laue(message, offset, len(payload))
        elif isinstance(message, MapUpdate):
            self._map_rows(message)
        elif isinstance(message, DriftReport):
            self._drift_row(message)
        self._index.add(
            seq=message.seq,
            schema=self._names["schema"].code(type(message).SCHEMA),
            frame=frame,
            channel=self._names["channel"].code(channel),
            published=message.times.published,
            offset=offset,
            size=len(payload),
            crc32=zlib.crc32(payload),
        )
        self._heap.append(payload)
        self._heap_size += len(payload)

    def _laue(self, message: LaueResult, offset: int, size: int) -> None:
        names = self._names
        model = message.provenance.model
        self._frames.add(
            frame=message.key.frame,
            channel=names["channel"].code(message.key.channel),
            seq=message.seq,
            again=message.again,
            flags=names["flag"].bits(message.flags),
            acquired=message.times.acquired,
            received=message.times.received,
            processed=message.times.processed,
            published=message.times.published,
            n_peaks=message.n_peaks,
            n_crystals=len(message.crystals),
            first_crystal=self._crystals.count,
            offset=offset,
            size=size,
            grid_index=_padded(message.grid_index, -1),
            position_um=_padded(message.position_um, np.nan),
            compute_ms=message.compute_ms,
            model=names["model"].code(f"{model.name} {model.version} {model.sha256}".strip()),
            calibration=names["calibration"].code(message.provenance.calibration_hash),
        )
        for rank, crystal in enumerate(message.crystals):
            self._crystal(message, rank, crystal)

    def _crystal(self, message: LaueResult, rank: int, crystal: Crystal) -> None:
        self._crystals.add(
            frame=message.key.frame,
            channel=self._names["channel"].code(message.key.channel),
            seq=message.seq,
            rank=rank,
            material=self._names["material"].code(crystal.material),
            quaternion=crystal.quaternion,
            euler_deg=crystal.euler_deg,
            UB=crystal.UB.numpy(),
            B0=crystal.B0.numpy(),
            strain_crystal=crystal.strain_crystal.numpy(),
            strain_sample=crystal.strain_sample.numpy(),
            strain_sigma=crystal.strain_sigma.numpy(),
            orientation_sigma_deg=crystal.orientation_sigma_deg,
            spots_matched=crystal.spots_matched,
            spots_expected=crystal.spots_expected,
            match_rate=crystal.match_rate,
            chance_match_rate=crystal.chance_match_rate,
            false_probability=crystal.false_probability,
            residual_px=crystal.residual_px,
            depth_um=crystal.depth_um,
            grain_id=crystal.grain_id,
            flags=self._names["flag"].bits(crystal.flags),
        )

    def _drift_row(self, message: DriftReport) -> None:
        own = {name: getattr(message, name) for name in DRIFT if name != "channel"}
        self._drift.add(channel=self._names["channel"].code(message.channel), **own)

    def _map_rows(self, message: MapUpdate) -> None:
        if not self._map_known:
            self._map["shape"][0] = _padded(message.shape, 0)
            self._map["step_um"][0] = _padded(message.step_um, np.nan)
            self._map_known = True
        material = self._names["material"]
        nan = np.nan
        for absorbed, into in message.merged:
            self._grains.add(
                seq=message.seq,
                grain_id=absorbed,
                merged_into=into,
                material=material.code(""),
                size_points=0,
                mean_quaternion=(nan,) * 4,
                spread_deg=nan,
                centre=(nan,) * 3,
            )
        for grain in message.grains:
            self._grains.add(
                seq=message.seq,
                grain_id=grain.grain_id,
                merged_into=-1,
                material=material.code(grain.material),
                size_points=grain.size_points,
                mean_quaternion=grain.mean_quaternion,
                spread_deg=grain.spread_deg,
                centre=_padded(grain.centre, nan),
            )
        if message.kind != "delta":
            return  # a snapshot repeats what its deltas said: its payload is kept, its points are not
        for point in message.points:
            self._points.add(
                seq=message.seq,
                frame=point.frame,
                grid_index=_padded(point.grid_index, -1),
                rank=point.rank,
                material=material.code(point.material),
                quaternion=point.quaternion,
                grain_id=point.grain_id,
                match_rate=point.match_rate,
                false_probability=point.false_probability,
                residual_px=point.residual_px,
                strain_sample=point.strain_sample,
            )
        for grid_index in message.empty:
            self._points.add(
                seq=message.seq,
                frame=-1,
                grid_index=_padded(grid_index, -1),
                rank=-1,
                material=material.code(""),
                quaternion=(nan,) * 4,
                grain_id=-1,
                match_rate=nan,
                false_probability=nan,
                residual_px=nan,
                strain_sample=(nan,) * 6,
            )


def _group(parent: Any, name: str, nx_class: str) -> Any:
    group = parent.create_group(name)
    group.attrs["NX_class"] = nx_class
    return group


def _nxdata(parent: Any, name: str, signal: str, axis: str) -> Any:
    group = _group(parent, name, "NXdata")
    group.attrs.update({"signal": signal, "axes": [axis], f"{axis}_indices": 0})
    return group


def _text(group: Any, name: str, text: str, room: int = 1) -> None:
    raw = text.encode()
    group.create_dataset(name, data=raw, dtype=h5py.string_dtype("utf-8", max(len(raw), room)))


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _padded(values: tuple[float, ...] | None, filler: float) -> npt.NDArray[Any]:
    out = np.full(3, filler)
    given = values or ()
    out[: len(given)] = given[:3]
    return out
