"""Frames from files: every format that fabio reads, PNG, JPEG and BMP, .gz and .bz2 of them, HDF5 stacks.

All that reads images from files reads them through this module: sources, simulators, commands.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import itertools
import logging
import os
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import fabio
import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt

from grainwatch.push_files import natural_key
from pipelines.frame import BadFrame
from pipelines.micrograph.tiff_tags import is_tiff, read_tags
from pipelines.pictures import picture_kind, read_pictures

#: Compression filters that HDF5 stacks of detectors need; importing the package registers them.
HDF5_FILTERS: Final[str] = hdf5plugin.PLUGIN_PATH

_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
_PACKED: Final[Mapping[str, Callable[..., Any]]] = {".gz": gzip.open, ".bz2": bz2.open}
_NUMBERED: Final = re.compile(r"data_\d+")
_SECOND_READER: Final = re.compile(r"with PIL: (.+)")
_UNIDENTIFIED: Final = re.compile(r"^(Fabio could not|cannot) identify ")
_UNREAD: Final = re.compile(r" \(\d+ bytes not processed\)")
_TIME_KEYS: Final = (
    "time_of_day",
    "acquire_timestamp",
    "Date_Time",
    "DateTime",
    "date",
    "Date",
    "time",
    "Time",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileImage:
    """One image of a file.

    Attributes
    ----------
    label : str
        Names the file, and the image where there are several.
    pixels : ndarray
        (rows, columns); of a colour image (rows, columns, 3).
    metadata : mapping
        What goes with the frame, plain values: the file, and its time where the header gives one.
    index : int
        Which image of the file it is, from 0.
    of_stack : bool
        Whether the file holds several images, or has room for several.
    header : mapping
        All that the header says, as the reader gives it; of HDF5 files, the `keys` asked for.
    """

    label: str
    pixels: npt.NDArray[Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    index: int = 0
    of_stack: bool = False
    header: Mapping[str, Any] = field(default_factory=dict)


def expand(patterns: Iterable[str | Path]) -> list[str]:
    """Return the files that names, folders and patterns stand for.

    Parameters
    ----------
    patterns : iterable of str or Path
        A file, a folder (all files in it), a pattern with ``*``, ``?`` or ``[]``, or a dataset as
        ``file.h5::/entry/data/data``. What a folder or a pattern gives is in natural order
        (img_2 before img_10); otherwise the given order stays.

    Raises
    ------
    BadFrame
        If a folder or pattern gives no file. Files that do not exist fail when they are read.
    """
    names: list[str] = []
    for pattern in map(str, patterns):
        file, colons, dataset = pattern.partition("::")
        path = Path(file)
        if path.is_dir():
            found = [str(p) for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
        elif not path.exists() and glob.has_magic(file):
            found = glob.glob(file)
        else:
            names.append(pattern)
            continue
        if not found:
            raise BadFrame(f"{pattern}: no file there")
        names += [f"{name}{colons}{dataset}" for name in sorted(found, key=natural_key)]
    return names


def read_images(path: str | Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield (label, pixels [row, column]) of each image of a file; see `open_images`."""
    for image in open_images(path):
        yield image.label, image.pixels


def open_images(
    path: str | Path,
    *,
    first: int = 0,
    keys: Sequence[str] = (),
    growing: bool = False,
    colour: bool = False,
) -> Iterator[FileImage]:
    """Yield the images of a file, in native byte order.

    Parameters
    ----------
    path : str or Path
        An image file, packed or not; an HDF5 file, whose default signal (NeXus), ``/entry/data/data``,
        numbered ``/entry/data/data_000001`` ... or first image stack is taken; or
        ``file.h5::/path/of/dataset``.
    first : int
        Begin with this image, counted from 0.
    keys : sequence of str
        Datasets of HDF5 files that belong into the images' `header`: single values, or one an image.
    growing : bool
        An HDF5 file may still be written, in SWMR mode too: an image that there is room for but that
        was not written ends what is yielded. The file is not locked, so that its writer can open it
        again at any time.
    colour : bool
        Colour images are yielded too; otherwise they are refused.

    Raises
    ------
    BadFrame
        If the file is absent, truncated, of no known format or holds no images; the message names it.
        Images ahead of the fault are yielded first.
    """
    name = str(path)
    file, _, dataset = name.partition("::")
    try:
        has_stacks = is_hdf5(file)
    except OSError as error:
        raise BadFrame(f"{file}: cannot be read: {error.strerror}") from error
    if has_stacks:
        yield from _hdf5_images(file, dataset, first, keys, growing)
    elif dataset:
        raise BadFrame(f"{name}: is not an HDF5 file, so it has no dataset {dataset}")
    else:
        yield from _plain_images(file, first, colour)


def is_hdf5(path: str | Path) -> bool:
    """Return whether a file begins as an HDF5 file does.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as opened:
        return opened.read(len(_SIGNATURE)) == _SIGNATURE


def hdf5_writer(path: str | Path) -> Literal["", "alone", "swmr"]:
    """Say who has an HDF5 file open for writing, as the file itself says it.

    Returns
    -------
    str
        "swmr": a writer that allows readers; "alone": one that does not; "": nobody, or the file is
        not HDF5, or of the older form (superblock 0 to 2) that does not say. A writer that died left
        the mark behind.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    # HDF5 File Format Specification 3.0, II.A: byte 8 is the version of the superblock; byte 11 of
    # version 3 has the consistency flags: bit 0 open for writing, bit 2 for SWMR writing.
    with open(path, "rb") as opened:
        head = opened.read(12)
    if len(head) < 12 or not head.startswith(_SIGNATURE) or head[8] != 3 or not head[11] & 1:
        return ""
    return "swmr" if head[11] & 4 else "alone"


def _plain_images(file: str, first: int, colour: bool) -> Iterator[FileImage]:
    with tempfile.TemporaryDirectory(prefix="grainwatch-") as folder:
        path = _unpacked(file, Path(folder))
        try:
            kind, size = picture_kind(path), os.stat(path).st_size
        except OSError as error:
            raise BadFrame(f"{file}: cannot be read: {error.strerror}") from error
        if not size:
            raise BadFrame(f"{file}: cannot be read as an image: the file is empty")
        if kind:
            yield from _pictures(path, kind, file, first, colour)
            return
        image = _fabio_open(path, file)
        count = int(image.nframes)
        for number in range(first, count):
            frame = image if number == 0 else _fabio_frame(image, number, file)
            label = file if count == 1 else f"{file}#{number}"
            pixels, header = _pixels(frame.data, label), frame.header
            yield FileImage(label, pixels, _metadata(header, file), number, count > 1, header)


def _pictures(path: str, kind: str, file: str, first: int, colour: bool) -> Iterator[FileImage]:
    images = read_pictures(path, kind, first)
    for number in itertools.count(first):
        with _reader_complaints(file):
            found = next(images, None)
        if found is None:
            return
        pixels, count = found
        label = file if count == 1 else f"{file}#{number}"
        if pixels.ndim == 3 and not colour:
            raise BadFrame(f"{label}: is a colour image, expected a grey one")
        yield FileImage(label, _pixels(pixels, label, 3), {"file": file}, number, count > 1)


def _unpacked(file: str, folder: Path) -> str:
    """Return the path of a plain copy of a packed file, `file` itself if it is plain.

    fabio guesses formats from names, so the copy keeps the name; it could unpack by itself, but
    prints to standard output when it does.
    """
    opener = _PACKED.get(Path(file).suffix.lower())
    if opener is None:
        return file
    copy = folder / Path(file).stem
    try:
        with opener(file, "rb") as packed, copy.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise BadFrame(f"{file}: cannot be unpacked, it is truncated or damaged: {error}") from error
    return str(copy)


def _fabio_open(path: str, file: str) -> Any:
    with _reader_complaints(file, path):
        image = fabio.open(path)
        if getattr(image, "incomplete_file", False):
            raise BadFrame("the file ends before its pixels do")
        if image.data is None:
            raise BadFrame("the file holds no pixels")
    return image


def _fabio_frame(image: Any, number: int, file: str) -> Any:
    with _reader_complaints(f"{file}#{number}"):
        frame = image.get_frame(number)
        if getattr(frame, "incomplete_data", False):
            raise BadFrame("the file ends before its pixels do")
    return frame


@contextmanager
def _reader_complaints(label: str, path: str = "") -> Iterator[None]:
    """Turn whatever a reader raises, logs and warns into one `BadFrame`, or log lines of our own.

    `path` is the plain file that is read, where it is known.
    """
    collected = _Collector()
    logger = logging.getLogger("fabio")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(collected)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    except Exception as error:
        # Readers of thirty formats raise what they like on a damaged file.
        why = _why([str(error), *collected.messages], path)
        raise BadFrame(f"{label}: cannot be read as an image: {why}") from error
    finally:
        logger.removeHandler(collected)
        logger.propagate = propagate
    for message in [*collected.messages, *(str(w.message) for w in warned)]:
        _log.warning("%s: %s", label, message)


def _why(said: list[str], path: str) -> str:
    """Return what is wrong with a file in one clause, of all that its reader says."""
    if path and is_tiff(path):
        try:
            read_tags(path, ())
        except BadFrame:
            return "the file ends before its first page is described"
        # fabio tries two libraries for TIFF files and complains of both; the second one says what is wrong.
        said = [found[1] for text in said if (found := _SECOND_READER.search(text))] or said
    if any(_UNIDENTIFIED.search(text) for text in said):
        return "its format is not known"
    return "; ".join(_UNREAD.sub("", text) for text in said if text)


class _Collector(logging.Handler):
    """Keeps the text of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._thread = logging.makeLogRecord({}).thread  # others may read files at the same time

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.messages.append(record.getMessage())


def _hdf5_images(
    file: str, dataset: str, first: int, keys: Sequence[str], growing: bool
) -> Iterator[FileImage]:
    try:
        swmr = growing and hdf5_writer(file) == "swmr"
        handle = h5py.File(file, "r", swmr=swmr, locking=False if growing else None)
    except OSError as error:
        raise BadFrame(f"{file}: is a damaged HDF5 file: {error}") from error
    with handle:
        try:
            stacks = _stacks(handle, dataset, file)
            images = [(s, i) for s in stacks for i in range(s.shape[0] if s.ndim == 3 else 1)]
        except (OSError, RuntimeError, KeyError, TypeError) as error:
            raise BadFrame(f"{file}: is a damaged HDF5 file: {error}") from error
        for number, (stack, index) in itertools.islice(enumerate(images), first, None):
            label = f"{file}::{stack.name}#{index}"
            try:
                if growing and not _is_written(stack, index):
                    return
                data = stack[index] if stack.ndim == 3 else stack[()]
                header = {key: _hdf5_value(_get(handle, key), number) for key in keys}
            except (OSError, ValueError, TypeError, RuntimeError) as error:
                raise BadFrame(f"{label}: cannot be read: {error}") from error
            metadata = {"file": file, "file_frame": number}
            yield FileImage(label, _pixels(data, label), metadata, number, stack.ndim == 3, header)


def _is_written(stack: h5py.Dataset, index: int) -> bool:
    """Return whether the file holds pixels of an image: HDF5 reads what was never written as zeros."""
    if stack.is_virtual or stack.external:
        return True
    if stack.chunks is None:
        return bool(stack.id.get_storage_size() > 0)
    sizes = zip(stack.shape[-2:], stack.chunks[-2:], strict=True)
    rows, columns = (range(0, length, chunk) for length, chunk in sizes)
    return all(
        stack.id.get_chunk_info_by_coord((index, y, x)[-stack.ndim :]).byte_offset is not None
        for y in rows
        for x in columns
    )


def _hdf5_value(item: Any, number: int) -> Any:
    """Return what a dataset says of an image: its one value, or one of its row; None if it says nothing."""
    if not isinstance(item, h5py.Dataset) or item.ndim > 1 or item.size == 0:
        return None
    if item.size > 1 and number >= item.size:
        return None
    value = item[()] if item.ndim == 0 else item[number if item.size > 1 else 0]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value


def _stacks(handle: h5py.File, dataset: str, file: str) -> list[h5py.Dataset]:
    """Find the datasets with the images."""
    if dataset:
        found = _get(handle, dataset)
        if found is None:
            raise BadFrame(f"{file}: has no dataset {dataset}")
        if not _is_images(found):
            raise BadFrame(f"{file}: {dataset} is not a stack of images (2 or 3 dimensions of numbers)")
        return [found]
    for candidate in (_nexus_signal(handle), _get(handle, "/entry/data/data")):
        if _is_images(candidate):
            return [candidate]
    group = _get(handle, "/entry/data")
    if isinstance(group, h5py.Group):
        numbered = [_get(group, name) for name in sorted(group, key=natural_key) if _NUMBERED.fullmatch(name)]
        missing = [item for item in numbered if item is None]
        if missing:
            raise BadFrame(f"{file}: links to {len(missing)} data files that cannot be opened")
        if numbered and all(_is_images(item) for item in numbered):
            return numbered
    found = _first_stack(handle)
    if found is None:
        raise BadFrame(f"{file}: holds no dataset with images")
    return [found]


def _first_stack(handle: h5py.File) -> h5py.Dataset | None:
    flat: list[h5py.Dataset] = []

    def visit(_name: str, item: Any) -> h5py.Dataset | None:
        if _is_images(item):
            if item.ndim == 3:
                return item
            flat.append(item)
        return None

    return handle.visititems(visit) or (flat[0] if flat else None)


def _nexus_signal(handle: h5py.File) -> Any:
    """Follow the `default` attributes to the NXdata group and return its signal."""
    group: Any = handle
    for _ in range(8):
        name = _text(group.attrs.get("default"))
        if not name:
            break
        group = _get(group, name)
        if not isinstance(group, h5py.Group):
            return None
    signal = _text(group.attrs.get("signal"))
    return _get(group, signal) if signal else None


def _get(group: h5py.Group, name: str) -> Any:
    """Return an item, None if it is absent or its link leads nowhere."""
    try:
        return group.get(name)
    except (KeyError, OSError, RuntimeError):
        return None


def _is_images(item: Any) -> bool:
    return (
        isinstance(item, h5py.Dataset) and item.ndim in (2, 3) and item.dtype.kind in "uif" and item.size > 0
    )


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else ""


def _pixels(data: Any, label: str, most_dimensions: int = 2) -> npt.NDArray[Any]:
    pixels = np.asarray(data)
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8)
    if not 2 <= pixels.ndim <= most_dimensions or not pixels.size or pixels.dtype.kind not in "uif":
        raise BadFrame(f"{label}: is not a grey image: {pixels.ndim} dimensions of {pixels.dtype}")
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))


def _metadata(header: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return file name and the time that the header gives, as its text: files name no time zone."""
    metadata: dict[str, Any] = {"file": file}
    for key in _TIME_KEYS:
        value = str(header.get(key, "")).strip()
        if any(c.isdigit() for c in value):
            metadata["file_time"] = value
            break
    return metadata


def reason(error: Exception) -> str:
    """Return what an error says to a user: the file first, and no error numbers."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    absent = isinstance(error, FileNotFoundError)
    return f"{error.filename}: cannot be read: {'no such file' if absent else error.strerror.lower()}"
