"""Which files of a folder are new, stand still, changed, went away: by looking, again and again.

Times of files are only ever compared with earlier times of the same file, because the clock of a share
is not the clock of this machine and may count in steps of two seconds.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from daemon.flow.log_limit import LogLimit
from daemon.sources.folder.journal import Earlier
from daemon.sources.folder.pattern import FilePattern, Listing, Mark
from pipelines.files import hdf5_writer, is_hdf5

log = logging.getLogger(__name__)

#: So many of the files taken last are looked at again each time, in case that they grew or were replaced.
RECENT: Final = 256
#: A poll that took long is followed by a pause of so many times its length.
PAUSE: Final = 10.0
#: How long a file must stand still whose time is of whole seconds: those of FAT and of SMB shares may come
#: in steps of two.
COARSE_S: Final = 2.1
_SECOND_NS: Final = 1_000_000_000
_HDF5_SUFFIXES: Final = (".h5", ".hdf5", ".hdf", ".he5", ".nxs", ".nx", ".nx5", ".nexus", ".cxi")
_DIGITS: Final = re.compile("[0-9]+")

#: What a share says that is away, or a disk that is being taken out: no fault of the file.
_AWAY: Final = frozenset(
    {
        errno.ESTALE,
        errno.EIO,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENODEV,
        errno.ENXIO,
        errno.ESHUTDOWN,
    }
)


@dataclass(slots=True, eq=False)
class WatchedFile:
    """A file that is not finished.

    Attributes
    ----------
    path, folder, name : str
    key : str
        The series that its name says.
    order : str
        Sorts files by name, with the numbers in them as numbers.
    inode, size, mtime_ns : int
        What it was like at the last look.
    changed : float
        When it last changed for us (monotonic).
    settled : bool
        Whether it has stood still for long enough.
    given : int
        How many of its images need not be read (again).
    noted : Mark or None
        What it was like when that was last written down.
    earlier : dict
        What its images were in an earlier run; None for those that the daemon has.
    alone : bool
        Whether it turned out to be a series of its own.
    tries, try_at : int, float
        Attempts to read it as it is, and when the next one is due (monotonic).
    sidecar : tuple or None
        Size and time of the file beside it that is waited for, and since when they are these (monotonic).
    why : str
        Why it could not be read, "" if that was not tried or went well.
    look : int
        The last look that found it.
    """

    path: str
    folder: str
    name: str
    key: str
    order: str
    inode: int
    size: int
    mtime_ns: int
    changed: float
    settled: bool = False
    given: int = 0
    noted: Mark | None = None
    earlier: dict[int, Earlier | None] = field(default_factory=dict)
    alone: bool = False
    tries: int = 0
    try_at: float = 0.0
    sidecar: tuple[int, int, float] | None = None
    why: str = ""
    look: int = 0

    def mark(self) -> Mark:
        """Return what it is like."""
        return Mark(self.inode, self.size, self.mtime_ns, self.given)


class FolderWatch:
    """The files of a pattern.

    Parameters
    ----------
    pattern : FilePattern
    key : callable
        Says from folder and name which series a file belongs to.
    poll_s, settle_s : float
        Time between two looks; time that a file must stand still.
    """

    def __init__(
        self, pattern: FilePattern, key: Callable[[str, str], str], poll_s: float, settle_s: float
    ) -> None:
        self._pattern = pattern
        self._key = key
        self._poll_s = poll_s
        self._settle_s = settle_s
        self._done: dict[str, dict[str, Mark]] = {}
        self._recent: dict[str, None] = {}
        self._inodes: dict[int, str] = {}
        self._expected: dict[str, tuple[Mark, dict[int, Earlier | None]]] = {}
        self._said: set[str] = set()
        self._complaints = LogLimit(log, pattern.root)
        self._looks = 0
        self._next_look = 0.0
        self._device = 0
        self.pending: dict[str, WatchedFile] = {}
        self.renamed: list[tuple[str, Mark]] = []
        self.ends: list[tuple[str, str, Mark]] = []
        self.went_away = 0
        self.away = ""
        self.failed: dict[str, str] = {}

    # Looking.

    @property
    def due(self) -> float:
        """When the next look is due (monotonic)."""
        return self._next_look

    def look(self) -> bool:
        """Look at the folders; return whether they could be read.

        Their state is in `pending`, `ends` (new files that say that a series is over: folder, path,
        mark), `renamed` (files that were taken under another name: path, mark), `away` (why nothing can
        be read at present, "" if it can) and `failed` (folders, links).
        """
        began = time.monotonic()
        try:
            listing = self._list()
        except OSError as error:
            self._say_away(f"{self._pattern.root} cannot be read: {(error.strerror or str(error)).lower()}")
            self._next_look = time.monotonic() + self._poll_s
            return False
        now = time.monotonic()
        if self.away:
            log.warning("%s can be read again", self._pattern.root)
            self.away = ""
            for file in self.pending.values():  # what happened meanwhile, nobody saw
                file.changed, file.settled = now, False
        self._looks += 1
        self.renamed = []
        self._take_in(listing, now)
        self._look_again(now)
        self._next_look = time.monotonic() + max(self._poll_s, PAUSE * (time.monotonic() - began))
        return True

    def ready(self) -> list[WatchedFile]:
        """Return the files that stand still and may be read now."""
        now = time.monotonic()
        return [file for file in self.pending.values() if file.settled and file.try_at <= now]

    def is_unchanged(self, file: WatchedFile) -> bool:
        """Look at a file; if it changed it has to stand still anew. One that went away did not change.

        Raises
        ------
        OSError
            If the share is away.
        """
        try:
            found = os.stat(file.path)
        except OSError as error:
            if is_away(error):
                raise
            return True
        if (found.st_size, found.st_mtime_ns) == (file.size, file.mtime_ns):
            return True
        self._changed(file, found, time.monotonic())
        return False

    def say_away(self, error: Exception) -> None:
        """Take note that the share went away in the middle of reading."""
        self._say_away(f"{self._pattern.root} does not answer: {error}")

    # What was done with files.

    @property
    def knows_files(self) -> bool:
        """Whether any file was ever taken."""
        return any(self._done.values())

    def finish(self, file: WatchedFile) -> None:
        """Take note that a file has been taken as it is."""
        self.pending.pop(file.path, None)
        self.set_finished(file.path, file.mark())
        self._recent.pop(file.path, None)
        self._recent[file.path] = None
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        self._inodes[file.inode] = file.path
        if len(self._inodes) > RECENT:
            del self._inodes[next(iter(self._inodes))]

    def set_finished(self, path: str, mark: Mark) -> None:
        """Take note of a file that was taken, now or in an earlier run."""
        folder, name = os.path.split(path)
        self._done.setdefault(folder, {})[name] = mark

    def pass_over(self, files: Sequence[tuple[str, Mark]]) -> None:
        """Take note of files that need not be read."""
        for path, mark in files:
            self.pending.pop(path, None)
            self.set_finished(path, mark)
        passed = {path for path, _ in files}
        self.ends = [end for end in self.ends if end[1] not in passed]

    def expect(self, path: str, mark: Mark, earlier: dict[int, Earlier | None]) -> None:
        """Have a file of an earlier run read again, if it still is what it was."""
        self._expected[path] = (mark, earlier)

    def forget(self, file: WatchedFile) -> None:
        """Drop a file that went away; if it comes again it is new."""
        self.pending.pop(file.path, None)
        self.went_away += 1
        self._complaints.warning("%s went away before it was read", file.path)

    # Inside.

    def _list(self) -> Listing:
        # The first look is at every file: what was taken earlier may have been written anew since.
        listing = self._pattern.listing(self._done if self._looks else {})
        device = os.stat(self._pattern.root).st_dev
        if self._device and device != self._device and not listing.entries:
            # What is left of a share that was unmounted: the empty folder below it.
            raise OSError(errno.ENOTCONN, "it is empty and on another disk: is the share mounted?")
        self._device = device
        return listing

    def _say_away(self, why: str) -> None:
        if not self.away:
            log.warning("%s; trying on", why)
        self.away = why

    def _take_in(self, listing: Listing, now: float) -> None:
        self.failed = {
            folder: f"{folder} cannot be read: {(error.strerror or str(error)).lower()}"
            for folder, error in listing.failed.items()
        }
        self.ends = []
        for what in [*self.failed.values(), *(f"{f} is a folder: not read" for f in listing.folders)]:
            if what not in self._said:
                self._said.add(what)
                self._complaints.warning("%s", what)
        for folder, entry in listing.files:
            self._look_at(folder, entry, now)
        for folder, entry in listing.ends:
            self._look_at_end(folder, entry)
        for file in [f for f in self.pending.values() if f.look != self._looks]:
            if not any(file.path == f or file.path.startswith(f + os.sep) for f in self.failed):
                self.forget(file)

    def _look_at(self, folder: str, entry: os.DirEntry[str], now: float) -> None:
        file, inode = self.pending.get(entry.path), entry.inode()
        if file is not None:
            file.look = self._looks
            if file.settled and file.inode == inode:
                return  # looked at again when it is read
        try:
            found = entry.stat()
        except OSError as error:
            # Gone since it was listed, or an answer that a share owes us: it is tried again.
            log.debug("%s: %s", entry.path, error)
            return
        mark = self._done.get(folder, {}).get(entry.name)
        if file is not None:
            same = (found.st_size, found.st_mtime_ns, inode) == (file.size, file.mtime_ns, file.inode)
            if not same:
                file.inode = inode
                self._changed(file, found, now)
            self._settle(file, now)
        elif mark is None:
            self._look_at_new(folder, entry, inode, found, now)
        elif (found.st_size, found.st_mtime_ns) == (mark.size, mark.mtime_ns):
            # A share may number its files anew.
            self._done[folder][entry.name] = mark._replace(inode=inode)
        else:
            self._begin_again(entry.path, mark, inode, found, now)

    def _look_at_new(
        self, folder: str, entry: os.DirEntry[str], inode: int, found: os.stat_result, now: float
    ) -> None:
        if self._is_renamed(inode, found):
            log.info("%s was taken already as %s", entry.path, self._inodes[inode])
            mark = Mark(inode, found.st_size, found.st_mtime_ns, 0)
            self.set_finished(entry.path, mark)
            self.renamed.append((entry.path, mark))
            return
        file = self._begin(entry.path, inode, found, now)
        expected, earlier = self._expected.pop(entry.path, (None, {}))
        if expected is not None and _goes_on(file, expected):
            file.earlier, file.given = earlier, min(earlier)
        self._settle(file, now)

    def _is_renamed(self, inode: int, found: os.stat_result) -> bool:
        """Return whether it is a file that was taken under another name, which it has no more."""
        old = self._inodes.get(inode)
        if old is None or found.st_mtime_ns % _SECOND_NS == 0:
            return False  # coarse times could also be those of another file with a number used again
        folder, name = os.path.split(old)
        mark = self._done.get(folder, {}).get(name)
        if mark is None:
            return False  # it is being read anew, after it had got another inode
        same = (mark.inode, mark.size, mark.mtime_ns) == (inode, found.st_size, found.st_mtime_ns)
        return same and not os.path.lexists(old)

    def _look_at_end(self, folder: str, entry: os.DirEntry[str]) -> None:
        try:
            found = entry.stat()
        except OSError as error:
            log.debug("%s: %s", entry.path, error)
            return
        new = Mark(entry.inode(), found.st_size, found.st_mtime_ns, 0)
        mark = self._done.get(folder, {}).get(entry.name)
        if mark is not None and mark[1:3] == new[1:3]:
            self._done[folder][entry.name] = new
        else:
            self.ends.append((folder, entry.path, new))

    def _look_again(self, now: float) -> None:
        """Look at the files that were taken last: a stack grows, a name is used again."""
        for path in list(self._recent):
            folder, name = os.path.split(path)
            mark = self._done[folder][name]
            try:
                found = os.stat(path)
                if (found.st_size, found.st_mtime_ns) != (mark.size, mark.mtime_ns):
                    self._begin_again(path, mark, os.lstat(path).st_ino, found, now)
            except OSError as error:
                log.debug("%s: %s", path, error)

    def _begin(self, path: str, inode: int, found: os.stat_result, now: float) -> WatchedFile:
        folder, name = os.path.split(path)
        key = self._key(folder, name)
        file = WatchedFile(
            path, folder, name, key, _order(name), inode, found.st_size, found.st_mtime_ns, now
        )
        file.look = self._looks
        self.pending[path] = file
        return file

    def _begin_again(self, path: str, mark: Mark, inode: int, found: os.stat_result, now: float) -> None:
        """Have a file that was taken read again: on from where it was if it grew, else from its start."""
        file = self._begin(path, inode, found, now)
        if _goes_on(file, mark):
            file.given = mark.given
        self._done[file.folder].pop(file.name)
        self._recent.pop(path, None)
        self._inodes.pop(mark.inode, None)
        self._settle(file, now)

    def _changed(self, file: WatchedFile, found: os.stat_result, now: float) -> None:
        if found.st_size < file.size:
            file.given, file.earlier = 0, {}
        file.size, file.mtime_ns = found.st_size, found.st_mtime_ns
        file.changed, file.settled = now, False
        file.tries, file.try_at, file.why = 0, 0.0, ""

    def _settle(self, file: WatchedFile, now: float) -> None:
        needed = self._settle_s
        if needed and file.mtime_ns % _SECOND_NS == 0:
            needed = max(needed, COARSE_S)
        file.settled = now - file.changed >= needed or _may_be_read_while_it_grows(file.path)


def _may_be_read_while_it_grows(path: str) -> bool:
    """Return whether it is an HDF5 file in SWMR mode: it may never stand still, and need not."""
    try:
        return path.lower().endswith(_HDF5_SUFFIXES) and hdf5_writer(path) == "swmr"
    except OSError as error:
        log.debug("%s: %s", path, error)
        return False


def _goes_on(file: WatchedFile, mark: Mark) -> bool:
    """Return whether a file that was taken is the same one, perhaps longer, and was not written anew."""
    if (file.size, file.mtime_ns) == (mark.size, mark.mtime_ns):
        return True
    if file.inode != mark.inode or file.size < mark.size:
        return False
    # A stack has a new time, and often no other size, when its writer closes it.
    return file.size > mark.size or is_hdf5(file.path)


def _order(name: str) -> str:
    # Text compares many times faster than the pairs of `grainwatch.push_files.natural_key`.
    return _DIGITS.sub(lambda number: number[0].zfill(20), name)


def is_away(error: BaseException) -> bool:
    """Return whether an error, or what caused it, says that a share or disk is away."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _AWAY:
            return True
        cause = cause.__cause__ or cause.__context__
    return False
