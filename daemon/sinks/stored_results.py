"""Payloads out of all results files of a folder, by sequence number or by series.

Files are opened for each look-up and closed again: a reader that kept one open would stop others
from opening a finished file without SWMR. What is worth keeping, the index, is kept in memory.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.sinks.message_ring import Sent
from pipelines.results_files import PayloadIndex, ResultsFile, ResultsFileError, results_files

log = logging.getLogger("grainwatch.sinks.zmq")

#: Rows of indices kept in memory beside that of the file being read, of all files together; 46 bytes each.
INDEX_ROWS = 2_000_000


@dataclass(slots=True)
class _Known:
    """What is remembered of a file; `stamp` tells whether it has changed since.

    `index` is empty when it was forgotten to bound the memory: the file is read again then.
    """

    stamp: tuple[int, int]
    publisher: str = ""
    series_uid: str = ""
    seqs: tuple[int, int] | None = None
    first_published: float = 0.0
    index: PayloadIndex = field(default_factory=PayloadIndex)


class StoredResults:
    """The results files that one daemon wrote into a folder.

    Parameters
    ----------
    folder : Path
        May be absent.
    publisher : str
        Name of the daemon: other daemons' files in the same folder are left alone.
    """

    def __init__(self, folder: Path, publisher: str) -> None:
        self._folder = folder
        self._publisher = publisher
        self._known: dict[Path, _Known] = {}
        self._complained: set[Path] = set()

    def by_seq(self, first: int, last: int) -> Iterator[Sent]:
        """Iterate over messages numbered `first` to `last` (both included), in order, each once."""
        paths = [
            path
            for path, known in self._epoch()
            if known.seqs is not None and known.seqs[0] <= last and known.seqs[1] >= first
        ]
        return self._merged(paths, seqs=(first, last))

    def by_series(
        self, series_uid: str, frames: tuple[int | None, int | None] | None, after_seq: int
    ) -> Iterator[Sent]:
        """Iterate over the messages of a series after a sequence number, in order, each once."""
        self._refresh(series_uid)
        paths = [path for path, known in self._known.items() if known.series_uid == series_uid]
        return self._merged(paths, frames=frames, after_seq=after_seq)

    def last_seq(self) -> int | None:
        """Return the largest stored sequence number."""
        return max((known.seqs[1] for _, known in self._epoch() if known.seqs is not None), default=None)

    def _epoch(self) -> list[tuple[Path, _Known]]:
        """Return the files of the present numbering, newest first.

        Numbers begin anew when a daemon has lost its state; then a file that was begun later
        holds smaller numbers than one before it, and that one belongs to the past.
        """
        self._refresh()
        mine = [
            (path, known)
            for path, known in self._known.items()
            if known.publisher == self._publisher and known.seqs is not None
        ]
        mine.sort(key=lambda item: item[1].first_published, reverse=True)
        epoch: list[tuple[Path, _Known]] = []
        oldest: int | None = None
        for path, known in mine:
            assert known.seqs is not None
            if oldest is not None and known.seqs[0] > oldest:
                break
            oldest = known.seqs[0]
            epoch.append((path, known))
        return epoch

    def _refresh(self, series_uid: str | None = None) -> None:
        paths = results_files(self._folder) if series_uid is None else results_files(self._folder, series_uid)
        for path in paths:
            try:
                stat = path.stat()
            except OSError:
                continue
            stamp = (stat.st_mtime_ns, stat.st_size)
            known = self._known.setdefault(path, _Known((0, 0)))
            if known.stamp == stamp:
                continue
            try:
                with ResultsFile(path, known.index) as file:
                    index = file.index()
                    self._use(path)
                    known.publisher, known.series_uid = file.publisher, file.series_uid
            except (ResultsFileError, OSError, KeyError, RuntimeError) as error:
                self._skip(path, error)
                continue
            known.stamp = stamp
            if len(index["seq"]):
                known.seqs = (int(index["seq"].min()), int(index["seq"].max()))
                known.first_published = float(index["published"][0])
        if series_uid is None:
            for gone in set(self._known) - set(paths):
                del self._known[gone]

    def _use(self, path: Path) -> None:
        """Note that the index of a file is used; let go of those used longest ago when they are many."""
        self._known[path] = self._known.pop(path)
        rows = 0
        for known in reversed(self._known.values()):
            rows += len(known.index)
            if rows > INDEX_ROWS and known is not self._known[path]:
                rows -= len(known.index)
                known.index = PayloadIndex()

    def _merged(self, paths: list[Path], **which: Any) -> Iterator[Sent]:
        """Merge files by number; each is open only while its turn lasts, for there may be thousands."""
        waiting = deque(sorted(paths, key=self._first_seq))
        streams: list[tuple[int, int, Sent, Iterator[Sent]]] = []
        order = itertools.count()

        def push(stream: Iterator[Sent]) -> None:
            sent = next(stream, None)
            if sent is not None:
                heapq.heappush(streams, (sent.seq, next(order), sent, stream))

        last = -1
        while waiting or streams:
            while waiting and (not streams or self._first_seq(waiting[0]) <= streams[0][0]):
                push(self._payloads(waiting.popleft(), which))
            if not streams:
                return
            _, _, sent, stream = heapq.heappop(streams)
            if sent.seq != last:
                last = sent.seq
                yield sent
            push(stream)

    def _first_seq(self, path: Path) -> int:
        seqs = self._known[path].seqs
        return seqs[0] if seqs is not None else 0

    def _payloads(self, path: Path, which: dict[str, Any]) -> Iterator[Sent]:
        self._use(path)
        try:
            with ResultsFile(path, self._known[path].index) as file:
                for stored in file.payloads(**which):
                    topic = f"{stored.schema}:{file.stream}".encode()
                    yield Sent(stored.seq, topic, file.series_uid, stored.frame, stored.payload)
        except (ResultsFileError, OSError, KeyError, RuntimeError) as error:
            self._skip(path, error)

    def _skip(self, path: Path, error: Exception) -> None:
        if path not in self._complained:
            self._complained.add(path)
            log.warning("results file skipped: %s", str(error).splitlines()[0] if str(error) else repr(error))
