"""A program that writes images into a folder, as detectors and microscopes do: the simulator of `folder`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import fabio.tifimage
import h5py
import numpy as np
import numpy.typing as npt

from daemon.flow.scan import grid_index
from daemon.sources.folder.microscope import Microscope
from grainwatch.config import ScanTable

Writer: TypeAlias = Literal["slow", "rename", "swmr"]
WRITERS: Final[tuple[Writer, ...]] = get_args(Writer)

#: In so many pieces a slow writer writes a file.
_PIECES: Final = 4


def checked_writer(name: str) -> Writer:
    """Return the name of a kind of writer.

    Raises
    ------
    ValueError
        If it is none.
    """
    for writer in WRITERS:
        if writer == name:
            return writer
    raise ValueError(f"--writer: expected one of {', '.join(WRITERS)}, got {name!r}")


@dataclass(frozen=True, slots=True)
class Options:
    """How it writes.

    `writer` is "slow" (TIFF files in pieces, under their own names), "rename" (TIFF files that appear
    complete) or "swmr" (one HDF5 file that grows: /frames, and with a scan /x and /y). With a `scan` that
    has steps, positions stand in the names: scan_0042_x10.5_y-3.tif. `end_file` is written at the end. A
    `microscope` writes its metadata and a data bar with each image, which has to be 8-bit then.
    """

    folder: Path
    name: str = "scan"
    writer: Writer = "slow"
    rate_hz: float = 20.0
    scan: ScanTable | None = None
    end_file: str = ""
    microscope: Microscope | None = None

    def __post_init__(self) -> None:
        if self.rate_hz < 0:
            raise ValueError(f"rate: expected 0 (no limit) or more, got {self.rate_hz}")
        if self.microscope is not None and self.writer == "swmr":
            raise ValueError("writer: microscopes write single files, expected slow or rename")
        for key, name in (("name", self.name), ("end_file", self.end_file)):
            if Path(name).name != name:
                raise ValueError(f"{key}: expected the name of a file without a folder, got {name!r}")


@dataclass(frozen=True, slots=True)
class Report:
    """What was written."""

    frames: int
    seconds: float
    complete: bool

    def __str__(self) -> str:
        return f"{self.frames} frames written in {self.seconds:.1f} s"


def write(images: Iterable[npt.NDArray[Any]], options: Options, stop: Callable[[], bool]) -> Report:
    """Write images until they or `stop` end it.

    Raises
    ------
    OSError
        If the folder cannot be written to.
    ValueError
        If an image is none that a microscope writes.
    """
    options.folder.mkdir(parents=True, exist_ok=True)
    began = due = time.monotonic()
    written, complete = 0, True
    with _writing(options) as put:
        for image in images:
            while not stop() and (left := due - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))
            if stop():
                complete = False
                break
            put(written, image)
            written += 1
            due = max(due + 1 / options.rate_hz, time.monotonic()) if options.rate_hz else 0.0
    if options.end_file and complete:
        (options.folder / options.end_file).touch()
    return Report(written, time.monotonic() - began, complete)


@contextmanager
def _writing(options: Options) -> Iterator[Callable[[int, npt.NDArray[Any]], None]]:
    if options.writer == "swmr":
        with closing(_Stack(options)) as stack:
            yield stack.put
    else:
        yield lambda number, image: _write_image(options, number, image)


def _write_image(options: Options, number: int, image: npt.NDArray[Any]) -> None:
    position = _position_um(options, number)
    where = "".join(f"_{axis}{value:g}" for axis, value in zip("xyz", position, strict=False))
    name = f"{options.name}_{number:04d}{where}.tif"
    microscope = options.microscope
    if microscope is None:
        files = [(name, _tiff(options.folder / f".{name}.tmp", image))]
    elif image.dtype == np.uint8 and image.ndim == 2:
        files = microscope.files(name, image)
    else:
        raise ValueError(
            f"--vendor: expected 8-bit grey images, got {image.dtype} of {image.ndim} dimensions"
        )
    for written, content in files:
        _put(options, options.folder / written, content)


def _tiff(hidden: Path, image: npt.NDArray[Any]) -> bytes:
    fabio.tifimage.TifImage(data=image).write(str(hidden))
    content = hidden.read_bytes()
    hidden.unlink()
    return content


def _put(options: Options, path: Path, content: bytes) -> None:
    if options.writer == "rename":
        hidden = path.with_name(f".{path.name}.tmp")
        hidden.write_bytes(content)
        hidden.rename(path)
        return
    size = -(-len(content) // _PIECES)
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(content), size):
            file.write(content[at : at + size])
            if options.rate_hz:
                time.sleep(0.5 / _PIECES / options.rate_hz)


def _position_um(options: Options, number: int) -> tuple[float, ...]:
    scan = options.scan
    index = grid_index(scan, number) if scan is not None and scan.step_um else None
    if scan is None or index is None:
        return ()
    origin = scan.origin_um or (0.0,) * len(index)
    return tuple(o + i * s for o, i, s in zip(origin, index, scan.step_um, strict=True))


class _Stack:
    """An HDF5 file in SWMR mode."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._file = h5py.File(options.folder / f"{options.name}.h5", "w", libver="latest")
        axes = "xyz"[: len(_position_um(options, 0))]
        self._axes = [self._file.create_dataset(a, (0,), "f8", maxshape=(None,)) for a in axes]
        self._frames: h5py.Dataset | None = None

    def put(self, number: int, image: npt.NDArray[Any]) -> None:
        if self._frames is None:
            shape = image.shape
            self._frames = self._file.create_dataset(
                "frames", (0, *shape), image.dtype, maxshape=(None, *shape), chunks=(1, *shape)
            )
            self._file.swmr_mode = True
        position = _position_um(self._options, number)
        for dataset, value in zip(self._axes, position, strict=False):
            dataset.resize(number + 1, axis=0)
            dataset[number] = value
            dataset.flush()
        self._frames.resize(number + 1, axis=0)
        self._frames[number] = image
        self._frames.flush()

    def close(self) -> None:
        self._file.close()
