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
from daemon.sinks.results_tables import Names, Rows
from grainwatch import __version__
from grainwatch.messages import (
    ChangeReport,
    Crystal,
    DriftReport,
    FrameResult,
    LaueResult,
    MapUpdate,
    MicrographResult,
)
from pipelines.results_layout import (
    CHANGES,
    CRYSTALS,
    DRIFT,
    FRAMES,
    GRAINS,
    LAYOUT,
    MESSAGES,
    MICROGRAPHS,
    NAMES,
    POINTS,
    STATES,
)

HEAP_CHUNK_BYTES = 256 * 1024
TIME_BYTES = 32
UNFINISHED_SUFFIX = ".creating"


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

        self._crystals = Rows(_nxdata(entry, "crystals", "match_rate", "frame"), CRYSTALS)
        self._frames = Rows(_nxdata(entry, "frames", "n_crystals", "frame"), FRAMES)
        messages = _group(entry, "messages", "NXcollection")
        self._data = messages.create_dataset(
            "data", shape=(0,), maxshape=(None,), chunks=(HEAP_CHUNK_BYTES,), dtype="u1"
        )
        messages.attrs["encoding"] = "msgpack"
        self._index = Rows(messages, MESSAGES)
        grid = self._map = _group(entry, "map", "NXcollection")
        grid.create_dataset("shape", data=np.zeros((1, 3), "<i4"), chunks=(1, 3), maxshape=(1, 3))
        grid.create_dataset("step_um", data=np.full((1, 3), np.nan), chunks=(1, 3), maxshape=(1, 3))
        grid["step_um"].attrs["units"] = "um"
        self._map_known = False
        self._points = Rows(_nxdata(grid, "points", "grain_id", "frame"), POINTS)
        self._grains = Rows(_nxdata(grid, "grains", "size_points", "grain_id"), GRAINS)
        self._drift = Rows(_nxdata(entry, "drift", "change", "frame"), DRIFT)
        self._micrographs = Rows(_nxdata(entry, "micrographs", "fraction", "frame"), MICROGRAPHS)
        self._changes = Rows(_nxdata(entry, "changes", "statistic", "frame"), CHANGES)
        # Rows that the frame index points to come before it.
        self._tables = (
            self._crystals,
            self._micrographs,
            self._points,
            self._grains,
            self._drift,
            self._changes,
            self._frames,
        )
        names = _group(entry, "names", "NXcollection")
        self._names = {name: Names(names, name) for name in NAMES}

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
        if isinstance(message, FrameResult):
            frame, channel = message.key.frame, message.key.channel
            self._frame_row(message, offset, len(payload))
        if isinstance(message, LaueResult):
            for rank, crystal in enumerate(message.crystals):
                self._crystal(message, rank, crystal)
        elif isinstance(message, MicrographResult):
            self._micrograph(message)
        elif isinstance(message, MapUpdate):
            self._map_rows(message)
        elif isinstance(message, DriftReport):
            self._drift_row(message)
        elif isinstance(message, ChangeReport):
            self._change_row(message)
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

    def _frame_row(self, message: FrameResult, offset: int, size: int) -> None:
        names = self._names
        laue = message if isinstance(message, LaueResult) else None
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
            n_peaks=laue.n_peaks if laue else 0,
            n_crystals=len(laue.crystals) if laue else 0,
            first_crystal=self._crystals.count,
            offset=offset,
            size=size,
            grid_index=_padded(message.grid_index, -1),
            position_um=_padded(message.position_um, np.nan),
            compute_ms=message.compute_ms,
            model=names["model"].code(f"{model.name} {model.version} {model.sha256}".strip()),
            calibration=names["calibration"].code(message.provenance.calibration_hash),
        )

    def _micrograph(self, message: MicrographResult) -> None:
        # What is not known is NaN; which model and where it lies the frame index says.
        statistics, found = message.statistics, message.morphology
        posterior, novelty = message.posterior, message.novelty
        best = int(np.argmax(posterior.probability)) if posterior else 0
        of_statistics = ("mean", "std", "entropy_bits", "sharpness", "dark_share", "bright_share")
        of_phases = ("fraction", "fraction_spread", "free_path_px", "free_path_spread_px")
        of_lengths = ("free_path_um", "free_path_spread_um")
        of_distances = ("latent_distance", "image_distance")
        of_novelty = ("typicality", *of_distances, "code_divergence_bits", "bits_per_code")
        self._micrographs.add(
            frame=message.key.frame,
            channel=self._names["channel"].code(message.key.channel),
            seq=message.seq,
            flags=self._names["flag"].bits(message.flags),
            pixel_size_um=_known(message, "pixel_size_um"),
            condition=self._names["condition"].code(posterior.candidates[best] if posterior else ""),
            probability=posterior.probability[best] if posterior else np.nan,
            condition_mean=_known(posterior, "mean"),
            condition_sigma=_known(posterior, "sigma"),
            none_of_these=bool(posterior and posterior.none_of_these),
            novel=bool(novelty and novelty.novel),
            **{name: _known(statistics, name) for name in of_statistics},
            **{name: _known(found, name) for name in (*of_phases, *of_lengths)},
            **{name: _known(novelty, name) for name in of_novelty},
        )

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

    def _change_row(self, message: ChangeReport) -> None:
        self._changes.add(
            frame=message.frame,
            seq=message.seq,
            images=message.images,
            channel=self._names["channel"].code(message.channel),
            state=self._names["state"].code(message.state),
            foremost=self._names["component"].code(message.foremost),
            statistic=message.statistic,
            limit=message.limit,
            alarm_frame=message.alarm_frame,
        )

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


def _known(part: Any, name: str) -> float:
    """Return a number of a part of a message, NaN where there is no part, or no number."""
    value = None if part is None else getattr(part, name)
    return float("nan") if value is None else float(value)


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
