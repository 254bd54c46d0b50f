"""Which series, number, position and time an image of a file has, by the rules of a configuration."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from daemon.sources.folder.journal import FolderSeries
from daemon.sources.folder.names import (
    LARGEST_NUMBER,
    Names,
    header_number,
    header_position,
    header_time,
    printable,
)
from pipelines.files import FileImage

if TYPE_CHECKING:
    from daemon.sources.folder.source import Config


class Rules:
    """What a configuration says of names and headers.

    Parameters
    ----------
    config : daemon.sources.folder.Config
    root : str
        The folder that the pattern begins with.
    """

    def __init__(self, config: Config, root: str) -> None:
        self._config = config
        self._root = root
        self._names = Names(config.number_pattern, config.position_pattern)
        self._per_file = max(1, config.images_per_file)

    @property
    def header_keys(self) -> tuple[str, ...]:
        """The entries of headers that are looked at."""
        config = self._config
        return tuple(k for k in (config.number_key, *config.position_keys, config.time_key) if k)

    def key_of_name(self, folder: str, name: str) -> str:
        """Return what a file has in common with the others of its series, as far as its name says."""
        by = self._config.series
        if by == "all":
            return printable(self._root)
        key = os.path.join(folder, name) if by == "file" else self._names.series(name, by, folder)
        return printable(key)

    def is_alone(self, image: FileImage) -> bool:
        """Return whether a file is a series of its own: a stack whose size nobody told."""
        return image.of_stack and self._config.numbers == "name" and not self._config.images_per_file

    def number(
        self, path: str, image: int, series: FolderSeries | None, alone: bool, found: FileImage | None
    ) -> tuple[int, str]:
        """Return the frame number of an image, or -1 and why it has none.

        Parameters
        ----------
        path : str
        image : int
            Which image of the file it is.
        series : FolderSeries or None
            The series that it belongs to, if that has begun.
        alone : bool
            Whether the file is a series of its own.
        found : FileImage or None
            The image; None for one that could not be read.
        """
        config = self._config
        if config.numbers == "count":
            highest = series.frames.highest if series is not None else None
            return (config.first_number or 0) if highest is None else highest + 1, ""
        if config.numbers == "header":
            number = header_number(found.header, config.number_key) if found is not None else None
            why = f"its header has no whole number under {config.number_key!r}: see number_key"
        elif alone or config.series == "file":
            return (config.first_number or 0) + image, ""
        else:
            number = self._names.number(os.path.basename(path))
            why = 'its name has no number: set number_pattern, or numbers = "count"'
            if image >= self._per_file:
                return -1, f"{path}: images_per_file is {self._per_file}, and this is image {image + 1}"
            number = None if number is None else number * self._per_file + image
        if number is None:
            return -1, f"{path}: {why}"
        if not 0 <= number <= LARGEST_NUMBER:
            return -1, f'{path}: {number} is no frame number: set number_pattern, or numbers = "count"'
        return number, ""

    def first(self, frame: int, alone: bool, names: Iterable[str]) -> int:
        """Return the first number of a series that begins with `frame`.

        `names` are those of its files that lie there and were not read yet: the first to be complete is
        not always the one with the lowest number.
        """
        config = self._config
        if config.first_number is not None:
            return config.first_number
        if config.numbers == "header":
            return frame
        if alone or config.numbers == "count" or config.series == "file":
            return 0
        numbers = [n for n in map(self._names.number, names) if n is not None]
        return min([frame, *(n * self._per_file for n in numbers)])

    def position_um(self, name: str, image: FileImage) -> tuple[float, ...] | None:
        """Return where an image was taken, from its name or else from its header."""
        found = self._names.position(name) or header_position(image.header, self._config.position_keys)
        return tuple(p * self._config.position_unit_um for p in found) if found else None

    def acquired(self, image: FileImage) -> float:
        """Return when an image was taken in UTC seconds, 0 if nothing says it."""
        return header_time(image.header, self._config.time_key) if self._config.time_key else 0.0
