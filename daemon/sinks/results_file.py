"""Sink "hdf5": results files, one for each series of each stream, readable while they grow.

A file is called ``<stream>-<UTC start>-<first 8 of series_uid>.h5``; after a crash, or after an
error of the disk, the series goes on in ``...-part2.h5``, because a file that was left open is
never opened for writing again. See `pipelines.results_files` for the layout and the reader.
"""

from __future__ import annotations

import errno
import functools
import logging
import re
import shutil
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from daemon.folders import try_folder
from daemon.sinks.base import Published, SeriesClosed, SeriesOpened, SinkContext, SinkEvent
from daemon.sinks.results_writer import ResultsWriter
from grainwatch.config import ConfigError, EdgeTable, Table
from grainwatch.messages import series_uid_of
from pipelines.results_files import results_files

log = logging.getLogger("grainwatch.sinks.hdf5")

WRITE_ERRORS = (OSError, RuntimeError, KeyError)  # what h5py raises when the disk refuses
BACKLOG_MESSAGES = 10_000
LONGEST_RETRY_S = 300.0
FLUSH_BYTES = 4 * 1024 * 1024


class Config(Table, frozen=True, kw_only=True):
    """``[sinks.hdf5]``.

    Attributes
    ----------
    folder : str
        Where the files go; made when absent.
    flush_s : float
        A reader sees a result at most so many seconds after it was published; up to 1.
    retry_s : float
        After an error of the disk it is tried again so many seconds later, then ever more rarely.
    reserve_mib : int
        Free space below which the disk counts as full: writing stops before it really is, and
        goes on in the same file when there is room again.
    edge : EdgeTable
        The default waits rather than lose results when the disk is slow.
    """

    folder: str = "results"
    flush_s: float = 0.5
    retry_s: float = 10.0
    reserve_mib: int = 64
    edge: EdgeTable = EdgeTable(policy="block", depth=1024)


class ResultsFileSink:
    """Writes what is published into results files.

    Attributes
    ----------
    write_errors : int
        How often the disk refused.
    lost_messages : int
        Messages that are in no file because it refused for too long.
    fault : str
        Why results cannot be written at present, "" when they can; afterwards, how many are lost.
    """

    def __init__(self, config: Config, context: SinkContext) -> None:
        self._folder = Path(config.folder).absolute()
        self._flush_s = config.flush_s
        self._retry_s = config.retry_s
        self._reserve_bytes = config.reserve_mib * 1024 * 1024
        self._context = context
        self._series: dict[str, _Series] = {}
        self._flushed = time.monotonic()
        self.write_errors = 0
        self.lost_messages = 0
        self.fault = ""

    def handle(self, events: list[SinkEvent]) -> None:
        """Take events; they are in the file within `flush_s`."""
        for event in events:
            if isinstance(event, SeriesOpened):
                self._open(event)
            elif isinstance(event, SeriesClosed):
                self._close(event)
            else:
                self._add(event)
        self.idle()

    def idle(self) -> None:
        """Flush what is due; try again what failed."""
        now = time.monotonic()
        due = now - self._flushed >= self._flush_s
        if due:
            self._flushed = now
        for series in self._series.values():
            if now < series.retry_at:
                self._bound(series)
            elif series.writer is None:
                self._start_part(series)
            elif due or series.writer.pending_bytes >= FLUSH_BYTES:
                self._attempt(series, series.writer.write)

    def close(self) -> None:
        """Flush and close all files; their series stay unfinished."""
        for series in self._series.values():
            self._finish(series, None)
        self._series.clear()

    def reconfigured(self, context: SinkContext) -> None:
        """Write another configuration into the files that are begun from now on."""
        self._context = context

    def path(self, series_uid: str) -> Path | None:
        """Return the file that is being written for a series, if there is one."""
        series = self._series.get(series_uid)
        return series.writer.path if series and series.writer else None

    def _open(self, event: SeriesOpened) -> None:
        if event.series_uid in self._series:
            return
        series = self._series[event.series_uid] = _Series(event, self._retry_s)
        self._start_part(series)

    def _add(self, event: Published) -> None:
        uid = series_uid_of(event.message)
        if not uid:
            return  # the daemon's health belongs to no series
        if uid not in self._series:
            # The series was opened before a restart.
            self._open(SeriesOpened(event.stream, uid, time.time(), detector_series=""))
        series = self._series[uid]
        if series.writer is not None:
            series.writer.add(event)
        else:
            series.backlog.append(event)

    def _close(self, event: SeriesClosed) -> None:
        series = self._series.pop(event.series_uid, None)
        if series is not None:
            self._finish(series, event)

    def _finish(self, series: _Series, event: SeriesClosed | None) -> None:
        ended, counts = (event.ended, event.counts) if event else (None, None)
        # Twice, because what a failing close still held gets one more file.
        for _ in range(2):
            if series.writer is None:
                self._start_part(series)
            writer = series.writer
            if writer is None or self._attempt(series, functools.partial(writer.close, ended, counts)):
                break
        series.lost += len(series.backlog)
        self.lost_messages += len(series.backlog)
        if series.writer is not None and series.writer.pending:
            series.lost += len(series.writer.pending)
            self.lost_messages += len(series.writer.pending)
            series.writer.strand()
        if series.lost:
            log.error("%d results of series %s are in no file", series.lost, series.opened.series_uid)
        if series.complained:
            series.complained = False
            self._all_well()

    def _start_part(self, series: _Series) -> None:
        """Begin the next file of a series, with what could not be written before."""
        if not self._attempt(series, lambda: self._create(series)):
            return
        writer = series.writer
        assert writer is not None
        while series.backlog:
            writer.add(series.backlog.popleft())
        self._attempt(series, writer.write)

    def _create(self, series: _Series) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        series.writer = ResultsWriter(_new_path(self._folder, series.opened), series.opened, self._context)

    def _attempt(self, series: _Series, action: Callable[[], None]) -> bool:
        """Do something that writes; False, and said once, when the disk refuses."""
        try:
            _need_room(self._folder, self._reserve_bytes)
        except OSError as error:
            self._failed(series, error)
            return False
        try:
            action()
        except WRITE_ERRORS as error:
            self._failed(series, error)
            self._drop_writer(series)
            return False
        writer = series.writer
        if writer is not None and writer.holds_results:  # an empty file proves nothing
            if series.complained:
                log.warning(
                    "results of series %s are written again, to %s", series.opened.series_uid, writer.path
                )
                series.complained = False
                self._all_well()
            series.retry_s = self._retry_s
        return True

    def _failed(self, series: _Series, error: Exception) -> None:
        self.write_errors += 1
        series.retry_at = time.monotonic() + series.retry_s
        series.retry_s = min(2 * series.retry_s, LONGEST_RETRY_S)
        self.fault = (
            f"results of series {series.opened.series_uid} cannot be written to the folder {self._folder}:"
            f" {_first_line(error)}; they wait"
        )
        if not series.complained:
            series.complained = True
            log.error("%s", self.fault)

    def _all_well(self) -> None:
        if not any(series.complained for series in self._series.values()):
            lost = self.lost_messages
            self.fault = f"{lost} results are in no file, because it could not be written" if lost else ""

    def _drop_writer(self, series: _Series) -> None:
        """Let go of a file that cannot be written; what it held in memory goes to the next part."""
        writer, series.writer = series.writer, None
        if writer is None:
            return
        series.backlog.extendleft(reversed(writer.pending))
        writer.strand()
        if not writer.holds_results:
            # Else every attempt on a broken disk would leave an empty part behind.
            writer.path.unlink(missing_ok=True)

    def _bound(self, series: _Series) -> None:
        """Keep no more than BACKLOG_MESSAGES for a disk that refuses; the oldest go."""
        waiting = series.backlog if series.writer is None else series.writer.pending
        while len(waiting) > BACKLOG_MESSAGES:
            waiting.popleft()
            self.lost_messages += 1
            series.lost += 1


class _Series:
    """A series that is open: its file, and what waits while there is none."""

    def __init__(self, opened: SeriesOpened, retry_s: float) -> None:
        self.opened = opened
        self.retry_s = retry_s
        self.writer: ResultsWriter | None = None
        self.backlog: deque[Published] = deque()
        self.retry_at = 0.0
        self.complained = False
        self.lost = 0


def check(config: Config, where: str) -> None:
    """Check what `open_sink` does, and leave nothing behind; `where` leads the error.

    Raises
    ------
    ConfigError
        As `open_sink`.
    """
    _check_numbers(config, where)
    _try_folder(config, f"{where}.folder", keep=False)


def _check_numbers(config: Config, where: str = "") -> None:
    at = f"{where}." if where else ""
    if not 0.0 < config.flush_s <= 1.0:
        raise ConfigError(f"{at}flush_s: expected more than 0 and at most 1 second, got {config.flush_s}")
    if not config.retry_s > 0.0:
        raise ConfigError(f"{at}retry_s: expected more than 0, got {config.retry_s}")
    if config.reserve_mib < 1:
        raise ConfigError(f"{at}reserve_mib: expected 1 or more, got {config.reserve_mib}")


def open_sink(config: Config, context: SinkContext) -> ResultsFileSink:
    """Check the folder and return the sink.

    Raises
    ------
    ConfigError
        If the folder cannot be made or written to, or a number is out of range.
    """
    _check_numbers(config)
    _try_folder(config, "folder", keep=True)
    return ResultsFileSink(config, context)


def _try_folder(config: Config, key: str, *, keep: bool) -> None:
    folder = Path(config.folder).absolute()
    try:
        try_folder(folder, keep=keep)
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        _need_room(existing, config.reserve_mib * 1024 * 1024)
    except OSError as error:
        raise ConfigError(
            f"{key}: {folder} cannot be written to ({error.strerror}): "
            "choose a folder that this user may write to"
        ) from error


def _new_path(folder: Path, opened: SeriesOpened) -> Path:
    """Return the name of the next part: all parts of a series carry the name of the first."""
    uid = re.sub(r"[^0-9A-Za-z]", "", opened.series_uid)[:8]
    stream = re.sub(r"[^0-9A-Za-z_-]", "_", opened.stream)
    parts = [p for p in results_files(folder, uid) if p.name.startswith(f"{stream}-")]
    if parts:
        base = re.sub(r"-part\d+$", "", parts[0].stem)
        numbers = [int(m.group(1)) for p in parts if (m := re.search(r"-part(\d+)$", p.stem))]
        return folder / f"{base}-part{max(numbers, default=1) + 1}.h5"
    start = datetime.fromtimestamp(opened.started, UTC).strftime("%Y%m%dT%H%M%SZ")
    return folder / f"{stream}-{start}-{uid}.h5"


def _need_room(folder: Path, reserve_bytes: int) -> None:
    # Looked at before HDF5 finds out, because it does not survive a full disk with its file whole.
    free = shutil.disk_usage(folder).free
    if free < reserve_bytes:
        raise OSError(
            errno.ENOSPC, f"only {free >> 20} MiB are free, expected {reserve_bytes >> 20} at least"
        )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
