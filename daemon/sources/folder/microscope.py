"""Files as microscopes write them: TIFF with a vendor's tags, or with a text beside it, and a data bar.

For the simulator of `folder`. What is written is what `pipelines.micrograph.vendors` reads; that reader is
tested against files of other programs.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, TiffImagePlugin

Vendor: TypeAlias = Literal["thermo", "zeiss", "tescan", "hitachi", "jeol"]
VENDORS: Final[tuple[Vendor, ...]] = get_args(Vendor)

_BACKGROUND, _INK = 10, 245
_ASCII, _BYTE = 2, 1
_SCALE_SHARE: Final = 4  # of the width at most, for the line of the scale


def checked_vendor(name: str) -> Vendor:
    """Return the name of a vendor.

    Raises
    ------
    ValueError
        If it is none.
    """
    for vendor in VENDORS:
        if vendor == name:
            return vendor
    raise ValueError(f"--vendor: expected one of {', '.join(VENDORS)}, got {name!r}")


@dataclass(frozen=True, slots=True)
class Microscope:
    """Who writes the files, and how the images were taken.

    `data_bar` is its share of the picture's height; 0 for none.
    """

    vendor: Vendor = "thermo"
    pixel_size_um: float = 0.25
    voltage_kV: float = 15.0
    working_distance_mm: float = 10.1
    detector: str = "SIM-SE"
    data_bar: float = 0.07

    def __post_init__(self) -> None:
        if not 1e-6 <= self.pixel_size_um <= 1e3:
            raise ValueError(f"--pixel-size-um: expected 1e-6 to 1000, got {self.pixel_size_um}")

    def files(self, name: str, picture: npt.NDArray[np.uint8]) -> list[tuple[str, bytes]]:
        """Return the names and contents of what is written for a picture, in the order of writing.

        Parameters
        ----------
        name : str
            Of the image: "scan_0001.tif".
        picture : (rows, columns) uint8
        """
        rows, columns = picture.shape
        bar = data_bar(self, columns, round(self.data_bar * rows))
        tag, kind, text = _TEXTS[self.vendor](self, (rows, columns), len(bar))
        info = TiffImagePlugin.ImageFileDirectory_v2()
        if tag:
            info.tagtype[tag] = kind
            info[tag] = text
        written = io.BytesIO()
        Image.fromarray(np.vstack([picture, bar])).save(written, format="TIFF", tiffinfo=info)
        image = [(name, written.getvalue())]
        return image if tag else [*image, (f"{PurePath(name).stem}.txt", text)]


def data_bar(microscope: Microscope, columns: int, rows: int) -> npt.NDArray[np.uint8]:
    """Draw a data bar: voltage, working distance, detector, and a scale of a round length."""
    image = Image.new("L", (columns, max(rows, 1)), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    longest_um = columns * microscope.pixel_size_um / _SCALE_SHARE
    power = 10.0 ** np.floor(np.log10(longest_um))
    # A little more, because the logarithm of what lies just below a power of ten is rounded up to it.
    length_um = float(max(n for n in (1, 2, 5) if n * power <= 1.001 * longest_um) * power)
    length_px = round(length_um / microscope.pixel_size_um)
    font = ImageFont.load_default(max(8, min(rows // 2, columns // 40)))
    said = f"{microscope.voltage_kV:g} kV  WD {microscope.working_distance_mm:g} mm  {microscope.detector}"
    draw.text((6, rows // 6), f"SIMULATED  {said}", fill=_INK, font=font)
    right = columns - 8
    draw.text((right - length_px, rows // 8), f"{length_um:g} um", fill=_INK, font=font)
    draw.line([right - length_px, rows - 4, right, rows - 4], fill=_INK, width=3)
    return np.asarray(image)[:rows]


def _thermo(of: Microscope, shape: tuple[int, int], bar: int) -> tuple[int, int, bytes]:
    rows, columns = shape
    size_m = of.pixel_size_um * 1e-6
    sections = {
        "System": {"SystemType": "grainwatch simulator"},
        "Beam": {"HV": f"{of.voltage_kV * 1e3:g}"},
        "Scan": {
            "PixelWidth": f"{size_m:.9g}",
            "PixelHeight": f"{size_m:.9g}",
            "HorFieldsize": f"{columns * size_m:.9g}",
        },
        "Stage": {"WorkingDistance": f"{of.working_distance_mm * 1e-3:g}"},
        "Image": {"ResolutionX": f"{columns}", "ResolutionY": f"{rows}"},
        "Detectors": {"Name": of.detector},
        "PrivateFei": {"DatabarHeight": f"{bar}"},
    }
    return 34682, _ASCII, _ini(sections)


def _zeiss(of: Microscope, shape: tuple[int, int], bar: int) -> tuple[int, int, bytes]:
    values = {
        "AP_IMAGE_PIXEL_SIZE": f"Image Pixel Size = {of.pixel_size_um * 1e3:.6g} nm",
        "AP_WIDTH": f"Width = {of.pixel_size_um * shape[1]:.6g} \u00b5m",
        "AP_ACTUALKV": f"EHT = {of.voltage_kV:g} kV",
        "AP_WD": f"WD = {of.working_distance_mm:g} mm",
        "DP_DETECTOR_TYPE": f"Detector = {of.detector}",
        "SV_SERIAL_NUMBER": "Serial No. = grainwatch simulator",
    }
    return (
        34118,
        _ASCII,
        "\r\n".join(["0", *(f"{k}\r\n{v}" for k, v in values.items()), ""]).encode("latin-1"),
    )


def _tescan(of: Microscope, shape: tuple[int, int], bar: int) -> tuple[int, int, bytes]:
    size_m = f"{of.pixel_size_um * 1e-6:.9g}"
    sections = {
        "MAIN": {
            "AccFrames": "1",
            "Device": "grainwatch simulator",
            "ImageStripSize": f"{bar}",
            "PixelSizeX": size_m,
            "PixelSizeY": size_m,
        },
        "SEM": {
            "Detector0": of.detector,
            "HV": f"{of.voltage_kV * 1e3:g}",
            "WD": f"{of.working_distance_mm * 1e-3:g}",
        },
    }
    return 50431, _BYTE, _ini(sections)


def _hitachi(of: Microscope, shape: tuple[int, int], bar: int) -> tuple[int, int, bytes]:
    rows, columns = shape
    keys = {
        "InstructName": "grainwatch simulator",
        "PixelSize": f"{of.pixel_size_um * 1e3:.6g}",
        "DataSize": f"{columns}x{rows}",
        "SignalName": of.detector,
        "AcceleratingVoltage": f"{of.voltage_kV * 1e3:g} Volt",
        "WorkingDistance": f"{of.working_distance_mm * 1e3:g} um",
    }
    return 0, 0, _ini({"SemImageFile": keys})


def _jeol(of: Microscope, shape: tuple[int, int], bar: int) -> tuple[int, int, bytes]:
    rows, columns = shape
    lines = [
        "$CM_FORMAT 1.0",
        "$CM_INSTRUMENT grainwatch simulator",
        f"$CM_ACCEL_VOLT {of.voltage_kV:.2f}",
        f"$CM_SIGNAL {of.detector}",
        f"$CM_FULL_SIZE {columns} {rows}",
        f"$$SM_WD {of.working_distance_mm:g}",
        "$$SM_MICRON_BAR 100",
        f"$$SM_MICRON_MARKER {100 * of.pixel_size_um:.6g}um",
        "",
    ]
    return 0, 0, "\r\n".join(lines).encode()


def _ini(sections: dict[str, dict[str, Any]]) -> bytes:
    blocks = (
        "".join([f"[{name}]\r\n", *(f"{k}={v}\r\n" for k, v in keys.items())])
        for name, keys in sections.items()
    )
    return "".join(blocks).encode()


_TEXTS: Final[dict[Vendor, Callable[[Microscope, tuple[int, int], int], tuple[int, int, bytes]]]] = {
    "thermo": _thermo,
    "zeiss": _zeiss,
    "tescan": _tescan,
    "hitachi": _hitachi,
    "jeol": _jeol,
}
"""Each gives the code and the type of a tag (0 for a text beside the image) and what stands in it."""
