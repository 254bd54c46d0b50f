"""How a micrograph was taken, as its file and the files beside it say."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pipelines.files import reason
from pipelines.frame import BadFrame
from pipelines.micrograph import tiff_tags, vendors
from pipelines.micrograph.vendors import Statement

PIXEL_SIZE_UNKNOWN: Final = "pixel_size_unknown"
"""Nothing says it: lengths are in pixels."""
PIXEL_SIZE_CONFLICT: Final = "pixel_size_conflict"
"""Two places say pixel sizes that differ by more than 1 %; the first one is used."""
PIXELS_NOT_SQUARE: Final = "pixels_not_square"
"""Width and height of a pixel differ by more than 1 %."""
OTHER_SIZE: Final = "metadata_of_other_size"
"""The metadata are of an image of another size (this one was resized, or cropped): pixel size unknown."""
METADATA_CONFLICT: Final = "metadata_conflict"
"""Two places say different voltages or working distances; the first one is used."""
METADATA_DAMAGED: Final = "metadata_damaged"
"""Something is there that cannot be read."""
SIDECAR_UNREADABLE: Final = "sidecar_unreadable"
"""A file beside the image could not be read, or is none of a microscope."""
NOT_AS_NAMED: Final = "not_as_named"
"""The name says TIFF, the file is of another format: what a microscope had written into it is lost."""
WHITE_IS_ZERO: Final = "white_is_zero"
"""The TIFF file says that its white is 0; the pixels are taken as they are: dark may mean bright."""

FLAGS: Final = frozenset(
    {
        PIXEL_SIZE_UNKNOWN,
        PIXEL_SIZE_CONFLICT,
        PIXELS_NOT_SQUARE,
        OTHER_SIZE,
        METADATA_CONFLICT,
        METADATA_DAMAGED,
        SIDECAR_UNREADABLE,
        NOT_AS_NAMED,
        WHITE_IS_ZERO,
    }
)
"""All of them."""

_TOLERANCE: Final = 0.01
_SILENCE: Final = ": says nothing of how it was taken"
_SIDECAR_BYTES: Final = 1 << 20
_TIFF_SUFFIXES: Final = (".tif", ".tiff")
_PHOTOMETRIC: Final = 262
_FEI: Final = (34680, 34682)
_ZEISS: Final = 34118
_TESCAN: Final = 50431
_CODES: Final = frozenset(
    {
        tiff_tags.IMAGE_WIDTH,
        tiff_tags.IMAGE_LENGTH,
        tiff_tags.IMAGE_DESCRIPTION,
        tiff_tags.X_RESOLUTION,
        tiff_tags.RESOLUTION_UNIT,
        _PHOTOMETRIC,
        *_FEI,
        _ZEISS,
        _TESCAN,
    }
)
#: Resolution units that are a length; an inch is that of a printer or a screen. 4 and 5 are extensions.
_RESOLUTION_UM: Final = {3: 1e4, 4: 1e3, 5: 1.0}
#: Coarser "resolutions" are those of screens (72 a inch is 353 um), written in cm.
_COARSEST_UM: Final = 20.0


@dataclass(frozen=True, slots=True)
class Acquisition:
    """How a micrograph was taken.

    Attributes
    ----------
    pixel_size_um : float or None
        Width of a pixel; None where it is unknown.
    detector, vendor, instrument : str
        "" where they are unknown.
    voltage_kV, working_distance_mm : float or None
    data_bar_px : int or None
        Rows of the data bar at the bottom; 0 for none, None where nobody says.
    source : str
        Where the pixel size comes from.
    flags : tuple of str
        The constants of this module.
    remarks : tuple of str
        What the flags mean here, in words: which place says what.
    """

    pixel_size_um: float | None = None
    detector: str = ""
    voltage_kV: float | None = None
    working_distance_mm: float | None = None
    data_bar_px: int | None = None
    vendor: str = ""
    instrument: str = ""
    source: str = ""
    flags: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


UNKNOWN: Final = Acquisition(flags=(PIXEL_SIZE_UNKNOWN,))
"""Of an image that comes without any metadata."""


@dataclass(frozen=True, slots=True)
class FileStatements:
    """What a file and the files beside it say of how an image was taken.

    Attributes
    ----------
    statements : tuple of Statement
        Those that can be trusted most come first.
    guesses : tuple of Statement
        What programs other than a microscope's own write: to be trusted least of all.
    flags, remarks : tuple of str
        As in `Acquisition`.
    """

    statements: tuple[Statement, ...] = ()
    guesses: tuple[Statement, ...] = ()
    flags: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything is said."""
        return bool(self.statements or self.guesses or self.flags)

    def acquisition(self, shape: Sequence[int] | None, more: Sequence[Statement] = ()) -> Acquisition:
        """Make one of it, for an image of these rows and columns; `more` stands between facts and guesses."""
        size = None if shape is None else (shape[0], shape[1])
        found = combine([*self.statements, *more, *self.guesses], size)
        flags = dict.fromkeys((*found.flags, *self.flags))
        return replace(found, flags=tuple(flags), remarks=(*self.remarks, *found.remarks))


def read_acquisition(path: str | Path, shape: tuple[int, int] | None = None) -> Acquisition:
    """Read what a file says of how its image was taken, and the files beside it.

    In order of trust: Thermo/FEI, Zeiss and Tescan tags of a TIFF file; NAME-tif.hdr or NAME.hdr
    (Tescan); NAME.txt (Hitachi, JEOL), with the image's suffix before .txt too; ImageJ's description;
    resolution tags in a unit of length that is no inch.

    Parameters
    ----------
    path : str or Path
        The image file; of one that is no TIFF file only the sidecars are read.
    shape : (int, int), optional
        Rows and columns of the image as it was read; of a TIFF file its tags say it.

    Raises
    ------
    BadFrame
        If the file cannot be read or is a truncated TIFF file. What is wrong with metadata is flagged.
    """
    file = Path(path)
    said, tagged = _read(file)
    found = said.acquisition(shape or tagged)
    return found if said else replace(found, remarks=(*found.remarks, silence(path)))


def read_statements(path: str | Path) -> FileStatements:
    """Read what `read_acquisition` reads, and leave it as it is said.

    Raises
    ------
    BadFrame
        As `read_acquisition`.
    """
    return _read(Path(path))[0]


def is_silence(remark: str) -> bool:
    """Return whether a remark is that of `silence`."""
    return _SILENCE in remark


def differ(one_um: float, other_um: float) -> bool:
    """Return whether two sizes of a pixel are not the same."""
    return vendors.conflicts(one_um, other_um, _TOLERANCE)


def silence(path: str | Path) -> str:
    """Return the remark upon a file that says nothing."""
    file = Path(path)
    return (
        f"{file}{_SILENCE}, and neither {file.stem}.txt (Hitachi, JEOL) nor"
        f" {file.stem}-{file.suffix[1:] or 'tif'}.hdr (Tescan) lies beside it"
    )


def _read(file: Path) -> tuple[FileStatements, tuple[int, int] | None]:
    """Return what is said, and rows and columns by the tags of a TIFF file."""
    remarks: list[str] = []
    flags: list[str] = []
    shape = None
    try:
        tags = tiff_tags.read_tags(file, _CODES) if tiff_tags.is_tiff(file) else None
    except OSError as error:
        raise BadFrame(reason(error)) from error
    statements: list[Statement] = []
    guesses: list[Statement] = []
    if tags is not None:
        remarks += [f"{file}: tag {code} points outside the file" for code in tags.damaged]
        rows, columns = tags.integer(tiff_tags.IMAGE_LENGTH), tags.integer(tiff_tags.IMAGE_WIDTH)
        shape = (rows, columns) if rows and columns else None
        statements += _of_tags(tags)
        guesses += _of_resolution(tags)
        flags += [METADATA_DAMAGED] if tags.damaged else []
        flags += [WHITE_IS_ZERO] if tags.integer(_PHOTOMETRIC) == 0 else []
    elif file.suffix.lower() in _TIFF_SUFFIXES:
        flags.append(NOT_AS_NAMED)
        remarks.append(f"{file}: is no TIFF file, whatever its name says")
    beside, unreadable = _sidecars(file, told=any(said.pixel_um is not None for said in statements))
    flags += [SIDECAR_UNREADABLE] if unreadable else []
    found = FileStatements((*statements, *beside), tuple(guesses), tuple(flags), (*remarks, *unreadable))
    return found, shape


def combine(statements: Sequence[Statement], shape: tuple[int, int] | None) -> Acquisition:
    """Make one of what several places say; the first place is trusted most.

    Parameters
    ----------
    statements : sequence of Statement
    shape : (int, int), optional
        Rows and columns of the image, data bar included; None where it is unknown.
    """
    flags: list[str] = []
    remarks = [problem for statement in statements for problem in statement.problems]
    if remarks:
        flags.append(METADATA_DAMAGED)
    pixels: dict[str, float] = {}
    data_bar: int | None = None
    for said in statements:
        fits, bar, text = _against(said, shape)
        if not fits:
            flags.append(OTHER_SIZE)
            remarks.append(text)
            continue
        if data_bar is None:
            data_bar = bar
        if said.pixel_um is not None:
            pixels[said.source] = said.pixel_um
            if said.width_um is not None and shape is not None:
                pixels[f"{said.source} by its width"] = said.width_um / shape[1]
            height = said.pixel_height_um
            if height is not None and vendors.conflicts(said.pixel_um, height, _TOLERANCE):
                flags.append(PIXELS_NOT_SQUARE)
                remarks.append(f"{said.source}: a pixel is {said.pixel_um:g} um wide and {height:g} um high")
    source, size = next(iter(pixels.items()), ("", None))
    if size is None:
        flags.append(PIXEL_SIZE_UNKNOWN)
    elif any(vendors.conflicts(size, other, _TOLERANCE) for other in pixels.values()):
        flags.append(PIXEL_SIZE_CONFLICT)
        remarks.append(f"pixel size in um: {vendors.by_source(pixels)}")
    voltages = {s.source: s.voltage_kV for s in statements if s.voltage_kV is not None}
    distances = {s.source: s.working_distance_mm for s in statements if s.working_distance_mm is not None}
    for name, values in (("voltage in kV", voltages), ("working distance in mm", distances)):
        first = next(iter(values.values()), 0.0)
        if any(vendors.conflicts(first, value, _TOLERANCE) for value in values.values()):
            flags.append(METADATA_CONFLICT)
            remarks.append(f"{name}: {vendors.by_source(values)}")
    return Acquisition(
        pixel_size_um=size,
        detector=next((s.detector for s in statements if s.detector), ""),
        voltage_kV=next(iter(voltages.values()), None),
        working_distance_mm=next(iter(distances.values()), None),
        data_bar_px=data_bar,
        vendor=next((s.vendor for s in statements if s.vendor), ""),
        instrument=next((s.instrument for s in statements if s.instrument), ""),
        source=source,
        flags=tuple(dict.fromkeys(flags)),
        remarks=tuple(remarks),
    )


def _against(said: Statement, shape: tuple[int, int] | None) -> tuple[bool, int | None, str]:
    """Return whether metadata are of an image of this size, and the rows of its data bar."""
    if shape is None:
        return True, said.data_bar_px, ""
    rows, columns = shape
    bar = said.data_bar_px
    if said.size is not None:
        own_rows, own_columns = said.size
        if own_columns != columns or own_rows > rows:
            text = (
                f"{said.source}: describes an image of {own_columns} x {own_rows} pixels, this one has"
                f" {columns} x {rows}: its pixel size does not hold"
            )
            return False, None, text
        # The rows beyond the picture are the bar; with none beyond, it was cut off already.
        bar = rows - own_rows if rows > own_rows or bar is not None else None
    if bar is not None and bar >= rows:
        return True, None, ""
    return True, bar, ""


def _of_tags(tags: tiff_tags.TiffTags) -> Iterator[Statement]:
    for code in _FEI:
        if data := tags.content(code):
            yield vendors.fei(data, f"tag {code} (Thermo/FEI)")
    if data := tags.content(_ZEISS):
        yield vendors.zeiss(data, f"tag {_ZEISS} (Zeiss)")
    if data := tags.content(_TESCAN):
        yield vendors.tescan(data, f"tag {_TESCAN} (Tescan)")


def _of_resolution(tags: tiff_tags.TiffTags) -> Iterator[Statement]:
    description = tags.content(tiff_tags.IMAGE_DESCRIPTION)
    resolution = tags.rational(tiff_tags.X_RESOLUTION)
    if description.startswith(b"ImageJ="):
        said = vendors.imagej(description, resolution, "ImageJ's scale")
        if said.pixel_um is not None or said.problems:
            yield said
        return
    unit = _RESOLUTION_UM.get(tags.integer(tiff_tags.RESOLUTION_UNIT) or 0)
    if unit is not None and resolution is not None and resolution > 0.0:
        size = unit / resolution
        if vendors.PIXEL_RANGE_UM[0] <= size <= _COARSEST_UM:
            yield Statement("resolution tags", pixel_um=size)


def _sidecars(file: Path, *, told: bool) -> tuple[list[Statement], list[str]]:
    """Return what the files beside an image say, and what is wrong with them.

    Of an image that told its pixel size itself, a text file beside it may be about anything.
    """
    suffix = file.suffix[1:]
    statements, unreadable = [], []
    usual = (f"{file.stem}-{suffix}.hdr", f"{file.stem}.hdr", f"{file.stem}.txt", f"{file.name}.txt")
    # Microscopes write from Windows, which sees no difference between .TXT and .txt.
    for name in (n for small in usual for n in (small, f"{small[:-4]}{small[-4:].upper()}")):
        sidecar = file.with_name(name)
        if sidecar == file or not _is_file(sidecar):
            continue
        try:
            with sidecar.open("rb") as opened:
                data = opened.read(_SIDECAR_BYTES)
        except OSError as error:
            unreadable.append(reason(error))
            continue
        said, problem = sidecar_statement(name, data, told=told)
        statements += [said] if said is not None else []
        unreadable += [f"{sidecar}: {problem}"] if problem else []
    return statements, unreadable


def sidecar_statement(name: str, data: bytes, *, told: bool = False) -> tuple[Statement | None, str]:
    """Return what a file beside an image says, None for nothing, and what is wrong with it ("" for nothing).

    `told`: the image told its pixel size itself, so that a text beside it may be about anything.
    """
    if name.lower().endswith(".hdr"):
        kind = vendors.tescan if b"PixelSize" in data or b"[MAIN]" in data else None
    elif vendors.is_hitachi(data):
        kind = vendors.hitachi
    else:
        kind = vendors.jeol if vendors.is_jeol(data) else None
    if kind is None:
        return None, "" if told else "is no file of a microscope (Tescan, Hitachi or JEOL)"
    said = kind(data, name)
    return said, "" if said.pixel_um is not None else "does not give the size of a pixel"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise BadFrame(reason(error)) from error
