"""Files to be pushed: which, whether they are finished, and what their names say."""

from __future__ import annotations

import codecs
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grainwatch.config import ConfigError
from grainwatch.push_wire import MAX_NUMBER, PACKED, SIDECARS, SUFFIXES, file_fingerprint

#: Micrometres.
UNITS_UM: Final = {"nm": 1e-3, "um": 1.0, "mm": 1e3}
#: A listing that took long is followed by a pause of so many times its length, within bounds.
_PAUSE: Final = 3.0
_POLL_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 5.0
#: An empty file is given more time: its writer has opened it and not begun.
_EMPTY_S: Final = 10.0
#: Of a text that is read, and of all texts beside an image that are sent, in UTF-8.
_MAX_TEXT_BYTES: Final = 256 * 1024
_MAX_SIDECARS_BYTES: Final = 16 * 1024
_AXES: Final = ("x", "y", "z")
_IMAGES: Final = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
_TEMPORARY: Final = (".tmp", ".temp", ".part", ".partial", ".crdownload", ".lock", ".swp", "~")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file as it was when it was looked at. `name` is what it is called, with / between folders."""

    path: Path
    name: str
    size: int
    modified_ns: int

    @property
    def fingerprint(self) -> bytes:
        """What tells it from other files, and from itself when it was another one."""
        return file_fingerprint(self.name, self.size, self.modified_ns)

    def unchanged(self) -> bool:
        """Return whether it still is as it was; raises OSError if it cannot be told."""
        found = self.path.stat()
        return (found.st_size, found.st_mtime_ns) == (self.size, self.modified_ns)


@dataclass(slots=True)
class _Seen:
    mark: tuple[object, ...]
    since: float


class Watcher:
    """Looks at a folder, or at files, again and again.

    A file is finished when size and time of modification, its own and those of the texts beside it,
    have not changed for a while. Times are only compared with earlier times of the same file: the
    clock of a share is not that of this computer.

    Parameters
    ----------
    paths : sequence of Path
        One folder, or files.
    pattern : str
        Which files of the folder ("*.tif", "**/*.tif"); "" takes those whose names end as those of
        images do.
    settle_s : float
    sidecars : bool
        Whether texts of the same name belong to an image.
    clock : callable
        Returns seconds.

    Raises
    ------
    ConfigError
        If there is no such folder or file.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        pattern: str,
        settle_s: float,
        sidecars: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        absent = [path for path in paths if not path.exists()]
        if absent:
            raise ConfigError(f"{absent[0]}: no such file or folder")
        folders = [path for path in paths if path.is_dir()]
        if len({path.absolute().anchor for path in paths}) > 1:
            raise ConfigError(f"{paths[-1]}: expected files of one drive")
        if folders and len(paths) > 1:
            raise ConfigError(f"{folders[0]}: expected one folder, or files, got both or several")
        self.folder = folders[0] if folders else None
        self.done: set[str] = set()
        self.listed: list[str] = []
        self.growing = 0
        self._files = list(paths)
        self._pattern = pattern
        self._settle_s = settle_s
        self._sidecars = sidecars
        self._seen: dict[str, _Seen] = {}
        self._beside: dict[Path, dict[str, str]] = {}
        self._clock = clock
        self._next = -math.inf

    @property
    def series(self) -> str:
        """A name for the series: that of the folder."""
        folder = self.folder or self._files[0].absolute().parent
        return re.sub(r"[\x00-\x1f\x7f]", "_", folder.resolve().name)[:100] or "push"

    def look(self) -> list[Candidate]:
        """Return the finished files that are not in `done`, in natural order.

        Returns nothing when it is not yet time to look again. Sets `listed` to the names of all files
        that there are and `growing` to how many are not finished.

        Raises
        ------
        OSError
            If the folder cannot be listed at present.
        """
        began = self._clock()
        if began < self._next:
            return []
        self._beside = {}
        files = dict(self._list())
        self.listed = sorted(files, key=natural_key)
        finished = []
        self.growing = 0
        for name in self.listed:
            if name in self.done:
                continue
            candidate = self._stand_still(name, files[name])
            if candidate is not None:
                finished.append(candidate)
            else:
                self.growing += 1
        self._seen = {name: seen for name, seen in self._seen.items() if name in files}
        now = self._clock()
        self._next = now + min(max(_POLL_S, _PAUSE * (now - began)), _LONGEST_PAUSE_S)
        return finished

    def finished(self, name: str) -> None:
        """Look no more at a file."""
        self.done.add(name)
        self._seen.pop(name, None)

    def again(self, name: str) -> None:
        """Wait anew until a file stands still."""
        self._seen.pop(name, None)
        self.growing += 1

    def _stand_still(self, name: str, path: Path) -> Candidate | None:
        try:
            found = path.stat()
            texts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.sidecars_of(path)]
        except OSError:
            self._seen.pop(name, None)  # it is just being renamed, or is gone
            return None
        mark = (found.st_size, found.st_mtime_ns, *texts)
        seen = self._seen.get(name)
        now = self._clock()
        if seen is None or seen.mark != mark:
            seen = self._seen[name] = _Seen(mark, now)
        settle_s = self._settle_s if found.st_size else max(self._settle_s, _EMPTY_S)
        if now - seen.since < settle_s:
            return None
        return Candidate(path, name, found.st_size, found.st_mtime_ns)

    def sidecars_of(self, path: Path) -> list[Path]:
        """Return the texts beside an image: of its name, with or without its own ending."""
        if not self._sidecars:
            return []
        # One listing of a folder instead of six questions an image, which a share answers slowly.
        if path.parent not in self._beside:
            self._beside[path.parent] = {name.lower(): name for name in os.listdir(path.parent)}
        beside = self._beside[path.parent]
        stems = dict.fromkeys([path.name.lower(), stem_of(path.name).lower()])
        found = (beside.get(stem + suffix) for stem in stems for suffix in SIDECARS)
        return [path.with_name(name) for name in found if name is not None]

    def read_sidecars(self, path: Path) -> dict[str, str]:
        """Return the texts beside an image by name, cut off where they are longer than can be sent.

        Raises
        ------
        OSError
            If one cannot be read.
        """
        texts = {}
        left = _MAX_SIDECARS_BYTES
        for text in self.sidecars_of(path):
            with text.open("rb") as opened:
                sent = decoded_text(opened.read(_MAX_TEXT_BYTES)).encode()[:left]
            texts[text.name] = sent.decode("utf-8", "ignore")
            left -= len(sent)
        return texts

    def _list(self) -> Iterator[tuple[str, Path]]:
        if self.folder is None:
            common = Path(os.path.commonpath([str(file.absolute().parent) for file in self._files]))
            for file in self._files:
                yield file.absolute().relative_to(common).as_posix(), file
        elif self._pattern:
            for path in self.folder.glob(self._pattern):
                if not is_temporary(path.name) and path.is_file():
                    yield path.relative_to(self.folder).as_posix(), path
        else:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if not is_temporary(entry.name) and is_image(entry.name) and entry.is_file():
                        yield entry.name, self.folder / entry.name


class Naming:
    """What names say: numbers and positions.

    Parameters
    ----------
    number : str
        "" for the last digits in front of the ending, "order" to count, or a regular expression whose
        group `n`, else first group, else whole match is the number.
    position : str
        Regular expression with the groups `x`, `y`, `z`, or some of them; "" for none.
    unit : str
        Of the positions: "nm", "um" or "mm".

    Raises
    ------
    ConfigError
        If an expression or the unit cannot be used.
    """

    def __init__(self, number: str = "", position: str = "", unit: str = "um") -> None:
        if unit not in UNITS_UM:
            raise ConfigError(f"--position-unit: expected one of {', '.join(UNITS_UM)}, got {unit!r}")
        self.by_order = number == "order"
        self._chosen = bool(number)
        self._number = _compiled(number, "--number") if number and not self.by_order else None
        self._position = _compiled(position, "--position") if position else None
        if self._position is not None and not set(_AXES) & set(self._position.groupindex):
            raise ConfigError(f"--position: expected groups (?P<x>...), (?P<y>...), got {position!r}")
        self._scale_um = UNITS_UM[unit]

    def number(self, name: str) -> int | None:
        """Return the number in a name, None if there is none.

        >>> Naming().number("scan7/frame_0042.tif.gz")
        42
        """
        name = name.rpartition("/")[2]
        if self._number is not None:
            match = self._number.search(name)
            if match is None:
                return None
            group: str | int = "n" if "n" in match.re.groupindex else min(1, match.re.groups)
            digits = match[group] or ""
        else:
            stem = stem_of(name)
            position = self._position.search(stem) if self._position else None
            if position is not None:  # the digits of a coordinate are no number
                stem = f"{stem[: position.start()]}-{stem[position.end() :]}"
            runs = re.findall("[0-9]+", stem)
            digits = runs[-1] if runs else ""
        number = int(digits) if re.fullmatch("[0-9]{1,16}", digits) else None
        return number if number is not None and number <= MAX_NUMBER else None

    def position_um(self, name: str) -> tuple[float, ...] | None:
        """Return the position in a name, None if there is none.

        >>> Naming("", r"x(?P<x>-?[0-9.]+)_y(?P<y>-?[0-9.]+)", "mm").position_um("a_x-0.5_y2_0001.tif")
        (-500.0, 2000.0)
        """
        match = self._position.search(name.rpartition("/")[2]) if self._position else None
        if match is None:
            return None
        try:
            values = [float(match[axis]) for axis in _AXES if match.re.groupindex.get(axis)]
        except (TypeError, ValueError):
            return None
        return tuple(self._scale_um * value for value in values)

    def settle(self, names: Iterable[str]) -> None:
        """Decide, with the first names, whether names have numbers or are counted.

        Raises
        ------
        ConfigError
            If some have and others have not, or two have the same.
        """
        if self.by_order:
            return
        numbered: dict[int, str] = {}
        without = []
        for name in names:
            number = self.number(name)
            if number is None:
                without.append(name)
            elif number in numbered:
                raise ConfigError(
                    f"{numbered[number]} and {name} both have the number {number}:"
                    " --number PATTERN says where it stands, --number order counts"
                )
            else:
                numbered[number] = name
        if without and (numbered or self._chosen):
            raise ConfigError(
                f"{without[0]}: no number in its name: --number PATTERN says where it stands,"
                " --number order counts"
            )
        self.by_order = bool(without)


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key that takes runs of digits as numbers, and parts names that differ in leading zeros.

    >>> sorted(["img_10", "img_2", "img_02"], key=natural_key)
    ['img_02', 'img_2', 'img_10']
    """
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]
    # Without the name a2 and a02 would be equal, and stay in the order in which the file system lists them.
    return parts, name


def stem_of(name: str) -> str:
    """Return a name without the ending that says what kind of file it is.

    >>> stem_of("a.b_0001.tif.gz"), stem_of("image.0001")
    ('a.b_0001', 'image.0001')
    """
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in PACKED:
        stem, suffix = os.path.splitext(stem)
    # A detector that numbers its files image.0001 has no ending.
    return stem + suffix if suffix[1:].isdecimal() else stem


def decoded_text(raw: bytes) -> str:
    r"""Return the text of a file whose encoding nobody says: UTF-16 with its mark, UTF-8, else Latin-1.

    >>> decoded_text(b"20 \xb5m"), decoded_text("20 µm".encode())
    ('20 µm', '20 µm')
    """
    if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return raw.decode("utf-16", "replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def is_image(name: str) -> bool:
    """Return whether a name ends as that of an image that daemons take."""
    lower = name.lower()
    for packed in PACKED:
        lower = lower.removesuffix(packed)
    return lower.endswith(_IMAGES)


def is_temporary(name: str) -> bool:
    """Return whether a name is that of a file that is hidden, or will get another name when it is done."""
    return name.startswith((".", "~$")) or name.lower().endswith(_TEMPORARY)


def _compiled(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{option}: is no regular expression: {error}, got {pattern!r}") from None
