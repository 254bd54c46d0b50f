"""A watched folder: image files on a local disk or a network share, while they are written.

Any microscope and any detector can write files. What a folder cannot say by messages (that a file is
complete, that a series is over) is found by looking again and again, which works on every share.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Final, Literal

from daemon.sources.base import Event, Idle, SourceContext
from daemon.sources.folder.journal import Journal
from daemon.sources.folder.names import LARGEST_NUMBER, Names
from daemon.sources.folder.pattern import FilePattern
from daemon.sources.folder.reader import FolderReader
from grainwatch.config import Table

log = logging.getLogger(__name__)

#: Temporary names of editors, browsers and copying programs, and what lies beside images.
IGNORED: Final = (
    ".*",
    "~*",
    "*~",
    "*.tmp",
    "*.temp",
    "*.part",
    "*.partial",
    "*.filepart",
    "*.crdownload",
    "*.swp",
    "*.lock",
    "*.log",
    "*.txt",
    "*.csv",
    "*.json",
    "*.xml",
    "*.yaml",
    "*.hdr",
    "*.db",
    "*.ini",
)

_IDLE_S: Final = 0.1
#: How long a stop waits for a share, in seconds.
_CLOSE_S: Final = 2.0
#: Frames that are read ahead of the daemon.
_AHEAD: Final = 2


class Config(Table, frozen=True, kw_only=True):
    r"""``[streams.NAME.source]`` of type "folder".

    Attributes
    ----------
    path : str
        A folder, for the files in it; one file that grows; or a pattern with `*`, `?`, `[]`, and `**` for
        all folders below: "/data/**/*.tif".
    poll_s : float
        Seconds between two looks; after a look that took long, ten times as long.
    settle_s : float
        A file is read when its size and time have stood still for so long; longer where times are of whole
        seconds only. 0 for writers that write under another name and rename.
    patience_s : float
        A file that cannot be read is tried again until it has not changed for so long; then its frame
        fails. Files of another series wait for it meanwhile.
    ignore : list of str
        Names of files and folders to pass over, with `*` and `?`, in capitals or not.
    existing : bool
        Take what lies there when the folder is watched for the first time.
    once : bool
        End when all files that lie there are read; with `end_file`, not before that lies there.
    dataset : str
        Where the images are in HDF5 files, if not where they are looked for.
    numbers : str
        Where frame numbers come from: "name" of the file, its "header", or "count" in order of arrival.
    number_pattern : str
        Regular expression for the number in a name: its group `n`, else its first group. "" takes the
        last digits in front of the suffix.
    number_key : str
        Entry of the header, or dataset of an HDF5 file, that is the number.
    first_number : int, optional
        Number of the first frame of a series. Without it: the lowest number that lies there when the
        series begins, or 0 for images that are counted.
    images_per_file : int
        Images in each file of a series of stacks: frame = number in the name * images_per_file + image.
        With 0 a stack is a series of its own, its images counted from `first_number`.
    position_pattern : str
        Regular expression for a position in a name, with groups `x`, `y`, `z`: "x(?P<x>[-\d.]+)".
    position_keys : list of str
        Entries of the header, or datasets, that are the position: for x, y and z.
    position_unit_um : float
        How many um one unit of such a position is.
    time_key : str
        Entry of the header, or dataset, that is the time of the image; UTC where it names no zone.
    series : str
        Which files make a series: "name" (same folder, same name but for number and position), "folder",
        "file" (each file one), or "all".
    frames_per_series : int
        So many frames end a series; 0 for an unknown number.
    series_idle_s : float
        So many seconds without a new file end a series; 0 for never.
    end_file : str
        Name, with `*` and `?`, of a file whose appearance ends the series in its folder.
    repeats : str
        A file whose number came before: "drop" drops its frame, "series" begins a new series.
    mixed : bool
        Images of a series may differ in size and type, as micrographs do; otherwise those fail that are
        not like the first.
    acquisition : bool
        Read what microscopes write into a file and beside it: pixel size, detector, voltage, data bar.
    sidecar : str
        A file beside each image, "{stem}.txt" for example, that has to lie there before the image is read;
        after `patience_s` it is read without. `{stem}` stands for the image's name without its suffix,
        `{name}` for its name.
    """

    path: str
    poll_s: float = 0.5
    settle_s: float = 0.5
    patience_s: float = 30.0
    ignore: tuple[str, ...] = IGNORED
    existing: bool = True
    once: bool = False
    dataset: str = ""
    numbers: Literal["name", "header", "count"] = "name"
    number_pattern: str = ""
    number_key: str = ""
    first_number: int | None = None
    images_per_file: int = 0
    position_pattern: str = ""
    position_keys: tuple[str, ...] = ()
    position_unit_um: float = 1.0
    time_key: str = ""
    series: Literal["name", "folder", "file", "all"] = "name"
    frames_per_series: int = 0
    series_idle_s: float = 0.0
    end_file: str = ""
    repeats: Literal["drop", "series"] = "drop"
    mixed: bool = False
    acquisition: bool = True
    sidecar: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: expected a folder or a pattern")
        for key in ("settle_s", "patience_s", "series_idle_s", "images_per_file", "frames_per_series"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key}: expected 0 or more, got {getattr(self, key)}")
        if self.first_number is not None and not 0 <= self.first_number <= LARGEST_NUMBER:
            raise ValueError(f"first_number: expected 0 to {LARGEST_NUMBER}, got {self.first_number}")
        if not self.poll_s > 0:
            raise ValueError(f"poll_s: expected more than 0, got {self.poll_s}")
        if not self.position_unit_um > 0:
            raise ValueError(f"position_unit_um: expected more than 0, got {self.position_unit_um}")
        if len(self.position_keys) > 3:
            raise ValueError(
                f"position_keys: expected up to 3, for x, y and z, got {len(self.position_keys)}"
            )
        if (self.numbers == "header") != bool(self.number_key):
            raise ValueError('number_key: goes with numbers = "header", and numbers = "header" with it')
        if self.numbers == "count" and self.series == "name":
            raise ValueError('series: with numbers = "count" expected "folder", "file" or "all", got "name"')
        if self.sidecar and (os.sep in self.sidecar or not re.search(r"\{(stem|name)\}", self.sidecar)):
            raise ValueError(
                f"sidecar: expected the name of a file with {{stem}} or {{name}} in it, got {self.sidecar!r}"
            )
        Names(self.number_pattern, self.position_pattern)


def remarks(config: Config) -> list[str]:
    """Return what is no fault, because a folder may come later, and may not be meant."""
    root = Path(FilePattern(config.path).root)
    return [] if root.exists() else [f"remark: {root} does not exist yet: it is waited for"]


def open_source(config: Config, stream: str, context: SourceContext) -> FolderSource:
    """Open the journal; the folder itself may still be away.

    Raises
    ------
    ConfigError
        If the journal of the stream cannot be used.
    """
    return FolderSource(config, Journal(context.state_dir / f"folder-{stream}.sqlite"), context)


class FolderSource:
    """Implements `daemon.sources.base.Source`.

    Files are read in a thread of their own, so that a share that does not answer stops neither the
    daemon nor its stop.
    """

    def __init__(self, config: Config, journal: Journal, context: SourceContext) -> None:
        self._config = config
        self._journal = journal
        self._reader = FolderReader(config, context, journal)
        self._read: Queue[Event | Exception] = Queue(_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"read {config.path}", daemon=True)

    def events(self) -> Iterator[Event]:
        """Yield what is found until the source is closed; `Idle` only, after `Exhausted`."""
        self._thread.start()
        while not self._closed.is_set():
            try:
                event = self._read.get(timeout=_IDLE_S)
            except Empty:
                yield Idle()
                continue
            if isinstance(event, Exception):
                raise event
            yield event

    @property
    def problem(self) -> str:
        """What keeps it from reading at present, "" if nothing."""
        return self._reader.problem

    def describe(self) -> str:
        """Say what it reads."""
        waiting = f", {self._reader.waiting} files waiting" if self._reader.waiting else ""
        return f"folder {Path(self._config.path).absolute()}, {self._reader.taken} images taken{waiting}"

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.error("%s: still waits for the share: left behind", self.describe())
            return
        self._reader.book.note_ended()
        self._journal.close()

    def _work(self) -> None:
        try:
            self._read_on()
        except Exception as error:
            log.exception("%s: reading broke down", self._config.path)
            self._put(error)

    def _read_on(self) -> None:
        for item in self._reader.events():
            if isinstance(item, float):
                self._closed.wait(item)
            else:
                self._put(item)
            if self._closed.is_set():
                return

    def _put(self, item: Event | Exception) -> None:
        while not self._closed.is_set():
            try:
                self._read.put(item, timeout=_IDLE_S)
                return
            except Full:
                continue
