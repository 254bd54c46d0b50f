"""Images of an HDF5 dataset that may still be written, compressed as they lie there.

A detector writes one chunk an image, and compresses it as it does on the wire. Such chunks are passed on
as they are, for the workers to decompress; any other layout is read here.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import h5py

from daemon.sources.bluesky.paths import Places, check_hdf5
from pipelines.files import FileImage, hdf5_writer, open_images
from pipelines.frame import BadFrame, Image, PlainImage
from pipelines.images import EncodedImage

#: Registered HDF5 filters (https://github.com/HDFGroup/hdf5_plugins) whose chunks are framed as on the wire.
_LZ4: Final = 32004
_BITSHUFFLE: Final = 32008
#: What the bitshuffle filter is told to compress with LZ4: its fifth value.
_WITH_LZ4: Final = 2


class NotYet(BadFrame):
    """What is to be read is not there, or not whole; it may come."""


class Hdf5Stack:
    """A dataset of images. The file stays open as long as images come out of it."""

    def __init__(self, places: Places, file: Path, dataset: str) -> None:
        self._places = places
        self._file = file
        self._dataset = dataset
        self._handle: h5py.File | None = None
        self._stack: Any = None
        self._algorithm = ""
        self._images: Iterator[FileImage] | None = None
        self._next = 0

    def image(self, number: int) -> Image:
        """Return an image, counted from 0.

        Raises
        ------
        NotYet
            If it is not there (yet).
        BadFrame
            If it may not be read.
        """
        try:
            if self._handle is None and self._images is None:
                self._open()
            found = self._chunk(number) if self._algorithm else self._read(number)
        except BadFrame:
            self.close()
            raise
        except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
            self.close()
            raise NotYet(f"{self._file}: {self._dataset} cannot be read: {first_line(error)}") from error
        if found is None:
            # What was written since is seen by opening the file again.
            self.close()
            raise NotYet(f"{self._file}: {self._dataset} has no image {number}")
        return found

    def close(self) -> None:
        """Let go of the file."""
        if self._images is not None:
            getattr(self._images, "close", lambda: None)()
        if self._handle is not None:
            self._handle.close()
        self._images, self._handle, self._stack, self._algorithm = None, None, None, ""

    def _open(self) -> None:
        need_file(self._file)
        check_hdf5(self._places, self._file, self._dataset)
        self._handle = h5py.File(self._file, "r", locking=False, swmr=hdf5_writer(self._file) == "swmr")
        self._stack = self._handle[self._dataset]
        self._algorithm = _chunked_as(self._stack)
        if not self._algorithm:
            self._handle.close()
            self._handle, self._stack = None, None

    def _chunk(self, number: int) -> Image | None:
        """Return an image as it lies in the file, None if it is not there."""
        stack = self._stack
        stack.refresh()
        if number >= stack.shape[0]:
            return None
        at = (number, 0, 0)
        if stack.id.get_chunk_info_by_coord(at).byte_offset is None:
            return None
        skipped, chunk = stack.id.read_direct_chunk(at)
        # A chunk that would not shrink may have been stored without the filter.
        algorithm = "none" if skipped else self._algorithm
        try:
            return EncodedImage(memoryview(chunk), stack.shape[1:], stack.dtype.str, algorithm)
        except BadFrame as error:
            raise NotYet(f"{self._file}: {self._dataset}: image {number}: {error}") from error

    def _read(self, number: int) -> Image | None:
        """Return an image of any other layout, None if it is not there."""
        if self._images is None or self._next != number:
            self.close()
            self._images = open_images(f"{self._file}::{self._dataset}", first=number, growing=True)
            self._next = number
        try:
            found = next(self._images, None)
        except BadFrame as error:
            raise NotYet(str(error)) from error
        self._next += 1
        return PlainImage(found.pixels) if found is not None else None


def need_file(path: Path) -> None:
    """See whether a file is there.

    Raises
    ------
    NotYet
        If it is not, or its share is not.
    BadFrame
        If it is no regular file: opening a pipe would wait for ever.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        said = "no such file" if absent else f"cannot be reached: {error.strerror}"
        raise NotYet(f"{path}: {said}") from error
    if not stat.S_ISREG(mode):
        raise BadFrame(f"{path}: is no regular file: not read")


def first_line(error: Exception) -> str:
    """Return what an error says, short enough for a message to an operator."""
    said = str(error).splitlines() or [type(error).__name__]
    return said[0][:200].encode("ascii", "backslashreplace").decode()


def _chunked_as(stack: Any) -> str:
    """Return how chunks are compressed of which each is one image; "" for any other layout."""
    if stack.ndim != 3 or stack.dtype.kind not in "uif" or stack.is_virtual or stack.external:
        return ""
    if stack.chunks != (1, *stack.shape[1:]):
        return ""
    filters = stack.id.get_create_plist()
    used = [filters.get_filter(i) for i in range(filters.get_nfilters())]
    if not used:
        return "none"
    if len(used) > 1:
        return ""
    number, _, values = used[0][:3]
    if number == _BITSHUFFLE and len(values) > 4 and values[4] == _WITH_LZ4:
        return "bslz4"
    return "lz4" if number == _LZ4 else ""
