"""The series of a folder source: begun, gone on with after a restart, ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from daemon.sources.base import Event, SeriesEnd, SeriesStart, Standing
from daemon.sources.folder.journal import Earlier, FolderSeries, Journal
from daemon.sources.folder.names import printable


class SeriesBook:
    """One series is under way at a time; after a restart some of an earlier run may be left.

    Parameters
    ----------
    journal : Journal
    standing : callable
        Says how a series stands in the accounts; see `daemon.sources.base.SourceContext`.
    n_frames : int or None
        Frames of each series.
    """

    def __init__(
        self, journal: Journal, standing: Callable[[str], Standing | None], n_frames: int | None
    ) -> None:
        self._journal = journal
        self._standing = standing
        self._n_frames = n_frames
        self._left: list[FolderSeries] = []
        self._ending: list[FolderSeries] = []
        self.current: FolderSeries | None = None
        self.touched = time.monotonic()

    def find(self, key: str) -> FolderSeries | None:
        """Return the series of a key if it is under way or was left by an earlier run."""
        known = [self.current, *self._left]
        return next((s for s in known if s is not None and s.key == key), None)

    def is_known(self, series: FolderSeries) -> bool:
        """Return whether images of a series may still come."""
        return series is self.current or series in self._left

    def enter(self, series: FolderSeries) -> Iterator[Event]:
        """Go on with a series that `find` returned."""
        if series is not self.current:
            yield from self.leave()
            self._left.remove(series)
            yield from self._set_current(series)

    def start(self, key: str, folder: str, first: int) -> Iterator[Event]:
        """Begin a series."""
        yield from self.leave_all()
        series = self._journal.begin(key, folder, first)
        yield from self._set_current(series)

    def leave(self) -> Iterator[Event]:
        """End the series that is under way."""
        series, self.current = self.current, None
        if series is not None:
            self._ending.append(series)
            yield SeriesEnd(series.name)

    def leave_if_full(self) -> Iterator[Event]:
        """End the series that is under way if it has all its frames."""
        if self.current is not None and self._is_full(self.current):
            yield from self.leave()

    def leave_all(self) -> Iterator[Event]:
        """End the series that is under way and those that were left."""
        yield from self.leave()
        while self._left:
            self.current = self._left.pop(0)
            yield from self.leave()

    def leave_behind(self, busy: bool) -> Iterator[Event]:
        """End a series of an earlier run that was not the last one, when its files are read.

        `busy` says whether there are files of the current series to read.
        """
        if self.current is not None and self.current.over and not busy:
            yield from self.leave()
            if self._left:
                yield from self._set_current(self._left.pop(0))

    def note_ended(self) -> None:
        """Write down which series ended in the accounts too: until then a crash may lose frames of them."""
        for series in list(self._ending):
            standing = self._standing(series.name)
            if standing is not None and not standing.open:
                self._journal.end(series)
                self._ending.remove(series)

    def resume(self) -> dict[str, dict[int, Earlier | None]]:
        """Find what was under way in an earlier run; `take_up` goes on with it.

        Returns
        -------
        dict
            The images that were handed over, by file and number in the file; None for those that the
            daemon has, the others have to be read again.
        """
        images: dict[str, dict[int, Earlier | None]] = {}
        for series in self._journal.open_series():
            standing, given = self._standing(series.name), self._journal.images(series)
            if not (given if standing is None else standing.open):
                self._journal.end(series)
                continue
            series.started = standing is not None
            for path, image, frame in given:
                series.frames.add(frame)
                held = standing is not None and frame in standing.held
                images.setdefault(path, {})[image] = None if held else (series, frame)
            self._left.append(series)
        for series in self._left:
            series.over = series is not self._left[-1] or self._is_full(series)
        return images

    def take_up(self) -> Iterator[Event]:
        """Go on with the first series that was left."""
        if self._left:
            yield from self._set_current(self._left.pop(0))

    def _is_full(self, series: FolderSeries) -> bool:
        return self._n_frames is not None and len(series.frames) >= self._n_frames

    def _set_current(self, series: FolderSeries) -> Iterator[Event]:
        self.current, self.touched = series, time.monotonic()
        if not series.started:
            series.started = True
            what = {"folder": printable(series.folder), "files": series.key}
            yield SeriesStart(series.name, self._n_frames, series.first, metadata=what)
