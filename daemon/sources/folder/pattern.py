"""Which files a folder or a pattern means, and a listing of them that stays cheap.

Listings are made with `os.scandir`: change notices (inotify) do not cross network shares.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Final, NamedTuple, TypeAlias

#: Stands for ``**``: any number of folders.
_ANY: Final = None
_Part: TypeAlias = re.Pattern[str] | None


class Mark(NamedTuple):
    """What a file was like when it was taken; `given` images of it were handed over."""

    inode: int
    size: int
    mtime_ns: int
    given: int


Marks: TypeAlias = Mapping[str, Mapping[str, Mark]]
"""Files that were taken: by folder, then by name."""


@dataclass(slots=True)
class Listing:
    """What a look at the folders found.

    `files` are those of the pattern that are not in the marks, or are there under another inode, as
    (folder, entry); `ends` those whose name says that a series is over. `failed` are folders and links
    that could not be read, with the error; `folders` such as have the name of a file.
    """

    files: list[tuple[str, os.DirEntry[str]]] = field(default_factory=list)
    ends: list[tuple[str, os.DirEntry[str]]] = field(default_factory=list)
    failed: dict[str, OSError] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    entries: int = 0


class FilePattern:
    """A folder (the files in it), one file, or a pattern.

    In a pattern ``*``, ``?`` and ``[]`` stand for parts of a name, and ``**`` for all folders below.

    Parameters
    ----------
    path : str
    ignore : iterable of str
        Names, with ``*`` and ``?``, of files and folders to pass over.
    end : str
        Name, with ``*`` and ``?``, of files that say that a series is over; "" for none.
    """

    def __init__(self, path: str, ignore: Iterable[str] = (), end: str = "") -> None:
        parts = os.path.abspath(path).split(os.sep)
        fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        self.root = os.sep.join(parts[:fixed]) or os.sep
        self._magic = fixed < len(parts)
        names = parts[fixed:] or ["*"]
        self._parts: list[_Part] = [_ANY if n == "**" else re.compile(translate(n)) for n in names]
        self._last = len(names) - 1
        # Programs of Windows write NAME.TXT as well as NAME.txt.
        self._ignored = re.compile("|".join(map(translate, ignore)) or r"(?!)", re.IGNORECASE)
        self._end = re.compile(translate(end)) if end else None

    def is_end(self, name: str) -> bool:
        """Whether a file of this name says that a series is over."""
        return self._end is not None and self._end.match(name) is not None

    def listing(self, marks: Marks) -> Listing:
        """Look into the folders.

        A name costs about a microsecond, and nothing more if it is in `marks`; a folder costs the
        share's answer.

        Raises
        ------
        OSError
            If the folder that the pattern begins with cannot be read.
        """
        if not self._magic and os.path.isfile(self.root):
            self.root, name = os.path.split(self.root)
            self._parts = [re.compile(re.escape(name))]
        found = Listing()
        waiting = [(self.root, self._closed({0}))]
        while waiting:
            folder, at = waiting.pop()
            try:
                waiting += self._look(folder, at, marks.get(folder, {}), found)
            except OSError as error:
                if folder == self.root:
                    raise
                # One that was removed since its parent was read is no failure.
                if not isinstance(error, FileNotFoundError):
                    found.failed[folder] = error
        return found

    def _look(
        self, folder: str, at: frozenset[int], marks: Mapping[str, Mark], listing: Listing
    ) -> list[tuple[str, frozenset[int]]]:
        """List one folder; return the folders below it that may hold more.

        `at` says which parts of the pattern may match names here.
        """
        below = []
        file_part = self._parts[self._last]
        files_here = self._last in at
        with os.scandir(folder) as entries:
            for entry in entries:
                listing.entries += 1
                name = entry.name
                mark = marks.get(name)
                if mark is not None and mark.inode == entry.inode():
                    continue
                if self.is_end(name):
                    listing.ends.append((folder, entry))
                    continue
                if self._ignored.match(name):
                    continue
                matches = files_here and (file_part is _ANY or file_part.fullmatch(name) is not None)
                deeper = self._below(name, at)
                try:
                    if matches and entry.is_file():
                        listing.files.append((folder, entry))
                    elif deeper and entry.is_dir(follow_symlinks=not self._recurses(deeper)):
                        below.append((entry.path, deeper))
                    elif matches and file_part is not _ANY and entry.is_dir():
                        listing.folders.append(entry.path)
                except OSError as error:
                    if not entry.is_symlink():
                        raise
                    listing.failed[entry.path] = error  # it leads in a circle, or where nobody may look
        return below

    def _below(self, name: str, at: frozenset[int]) -> frozenset[int]:
        """Return which parts may match names in a folder of this name."""
        found = set()
        for i in at:
            part = self._parts[i]
            if part is _ANY:
                found.add(i)
            elif i < self._last and part.fullmatch(name):
                found.add(i + 1)
        return self._closed(found)

    def _closed(self, at: set[int]) -> frozenset[int]:
        """Add what follows a ``**``, which may stand for no folder at all."""
        closed = set(at)
        for i in sorted(at):
            while i < self._last and self._parts[i] is _ANY:
                i += 1
                closed.add(i)
        return frozenset(closed)

    def _recurses(self, at: frozenset[int]) -> bool:
        # A link to a folder above would be followed for ever.
        return any(self._parts[i] is _ANY for i in at)
