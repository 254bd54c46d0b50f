"""What microscope vendors write beside their pictures, read into one form.

One function a format; each takes text and returns a `Statement`. Texts are damaged in practice: cut off,
translated, re-encoded (a micro sign becomes anything). A value that cannot be read is named in `problems`
and left out; nothing here raises.

The formats have no public specification. Keys and units are those that several independent readers
agree on: tifffile, rosettasciio and pynxtools-em for Thermo/FEI, Zeiss, Tescan and Hitachi, published
sidecar files for JEOL, and ImageJ's own TIFF decoder.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_PREFIX_UM: Final = {"": 1e6, "m": 1e3, "c": 1e4, "n": 1e-3, "p": 1e-6, "k": 1e9}
_MICRO: Final = frozenset(
    {"u", "\u00b5", "\u03bc", "\u00c2\u00b5", "\u00ce\u00bc", "\ufffd", "\ufffd\ufffd", "?"}
)
_NUMBER: Final = re.compile(r"[-+]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][-+]?\d+)?")
_WORD: Final = re.compile(r"(?:AP|DP|SV)_[A-Z0-9_]+")
_UNITS_UM: Final = {
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometers": 1.0,
    "nanometer": 1e-3,
    "meter": 1e6,
}

#: Sizes of a pixel outside are no micrographs', um.
PIXEL_RANGE_UM: Final = (1e-6, 1e3)


@dataclass(slots=True)
class Statement:
    """What one place says of a picture; filled by the functions of this module.

    Attributes
    ----------
    source : str
        The place, for an operator: "tag 34682 (Thermo/FEI)".
    vendor, instrument, detector : str
        "" where it does not say.
    pixel_um, pixel_height_um : float or None
    width_um : float or None
        Of the whole picture.
    voltage_kV, working_distance_mm : float or None
    size : (int, int) or None
        Rows and columns of the picture without its data bar.
    whole_size : (int, int) or None
        The same with the data bar.
    data_bar_px : int or None
        Rows of the data bar, where it is said in so many words.
    problems : list of str
        What could not be read.
    """

    source: str
    vendor: str = ""
    instrument: str = ""
    detector: str = ""
    pixel_um: float | None = None
    pixel_height_um: float | None = None
    width_um: float | None = None
    voltage_kV: float | None = None
    working_distance_mm: float | None = None
    size: tuple[int, int] | None = None
    whole_size: tuple[int, int] | None = None
    data_bar_px: int | None = None
    problems: list[str] = field(default_factory=list)

    def number(self, text: str | None, what: str, scale: float = 1.0) -> float | None:
        """Return a number greater than 0, scaled; None, and a problem, for anything else."""
        if text is None or not text.strip():
            return None
        found = _NUMBER.match(text.strip())
        value = float(found.group().replace(",", ".")) * scale if found else math.nan
        if not math.isfinite(value) or value <= 0.0:
            self.problems.append(f"{self.source}: {what} is {_short(text)}, expected a number greater than 0")
            return None
        return value

    def count(self, text: str | None, what: str) -> int | None:
        """Return a count from 0 to 1e6; None, and a problem, for anything else."""
        if text is None or not text.strip():
            return None
        if re.fullmatch(r"\d{1,6}(?:\.0*)?", text.strip()):
            return int(float(text))
        self.problems.append(f"{self.source}: {what} is {_short(text)}, expected a count")
        return None

    def length_um(self, text: str | None, what: str, default_unit: str) -> float | None:
        """Return a length in um from a number and its unit."""
        value = self.number(text, what)
        if text is None or value is None:
            return None
        unit = _NUMBER.sub("", text.strip(), count=1).strip() or default_unit
        factor = unit_um(unit)
        if factor is None:
            self.problems.append(f"{self.source}: {what} is {_short(text)}, in an unknown unit")
            return None
        return value * factor

    def pixel(self, value: float | None, what: str) -> float | None:
        """Return the size of a pixel; None, and a problem, where no microscope has such pixels."""
        if value is None or PIXEL_RANGE_UM[0] <= value <= PIXEL_RANGE_UM[1]:
            return value
        self.problems.append(f"{self.source}: {what} of {value:g} um is no size of a micrograph's pixel")
        return None


def unit_um(unit: str) -> float | None:
    """Return a unit of length in um; None for what is none.

    >>> unit_um("nm"), unit_um("pixel")
    (0.001, None)
    """
    text = unit.strip().replace("\\u00B5", "\u00b5").replace("\\u00b5", "\u00b5")
    if text.lower() in _UNITS_UM:
        return _UNITS_UM[text.lower()]
    if not text.endswith("m"):
        return None
    prefix = text[:-1]
    return 1.0 if prefix in _MICRO else _PREFIX_UM.get(prefix)


def decoded(data: bytes) -> str:
    """Return text of unknown encoding: UTF-16 by its mark or its zeros, else UTF-8, else Latin-1."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    if data[1:2] == b"\0":
        return data.decode("utf-16-le", errors="replace")
    text = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def ini(text: str) -> dict[str, dict[str, str]]:
    """Return sections and their keys; keys ahead of any section are in "". Of two equal keys the first."""
    sections: dict[str, dict[str, str]] = {"": {}}
    current = sections[""]
    for line in text.replace("\0", "").splitlines():
        stripped = line.strip()
        if stripped.startswith("[") and stripped.endswith("]"):
            current = sections.setdefault(stripped[1:-1], {})
        elif "=" in stripped:
            key, _, value = stripped.partition("=")
            current.setdefault(key.strip(), value.strip())
    return sections


def fei(data: bytes, source: str) -> Statement:
    """Thermo/FEI, tags 34680 and 34682: INI; lengths in m, voltage in V."""
    found = Statement(source, vendor="Thermo/FEI")
    sections = ini(decoded(data))

    def value(*places: tuple[str, str]) -> str | None:
        return next((v for section, key in places if (v := sections.get(section, {}).get(key))), None)

    found.instrument = value(("System", "SystemType"), ("System", "Dnumber")) or ""
    found.detector = value(("Detectors", "Name"), ("Detectors", "Mode")) or ""
    for name, key in (("pixel_um", "PixelWidth"), ("pixel_height_um", "PixelHeight")):
        size = found.number(value(("Scan", key), ("EScan", key), ("IScan", key)), key, 1e6)
        setattr(found, name, found.pixel(size, key))
    found.width_um = found.number(
        value(("Scan", "HorFieldsize"), ("EScan", "HorFieldsize"), ("EBeam", "HFW")), "HorFieldsize", 1e6
    )
    found.voltage_kV = found.number(value(("Beam", "HV"), ("EBeam", "HV"), ("IBeam", "HV")), "HV", 1e-3)
    found.working_distance_mm = found.number(
        value(("Stage", "WorkingDistance"), ("EBeam", "WD")), "WorkingDistance", 1e3
    )
    rows = found.count(value(("Image", "ResolutionY")), "ResolutionY")
    columns = found.count(value(("Image", "ResolutionX")), "ResolutionX")
    found.size = (rows, columns) if rows and columns else None
    found.data_bar_px = found.count(value(("PrivateFei", "DatabarHeight")), "DatabarHeight")
    return found


def zeiss(data: bytes, source: str) -> Statement:
    """Zeiss SmartSEM, tag 34118: a line with the name, then one with "label = value unit"."""
    found = Statement(source, vendor="Zeiss")
    values: dict[str, str] = {}
    lines = decoded(data).replace("\0", "").splitlines()
    for name, line in itertools.pairwise(lines):
        if _WORD.fullmatch(name.strip()) and "=" in line:
            values.setdefault(name.strip(), line.partition("=")[2].strip())
    found.instrument = values.get("SV_SERIAL_NUMBER", "")
    found.detector = values.get("DP_DETECTOR_TYPE") or values.get("DP_DETECTOR_CHANNEL", "")
    # AP_PIXEL_SIZE is that of the screen in later versions, which store finer images.
    name = "AP_IMAGE_PIXEL_SIZE" if values.get("AP_IMAGE_PIXEL_SIZE") else "AP_PIXEL_SIZE"
    found.pixel_um = found.pixel(found.length_um(values.get(name), name, "m"), name)
    found.width_um = found.length_um(values.get("AP_WIDTH"), "AP_WIDTH", "m")
    kilovolts = values.get("AP_ACTUALKV") or values.get("AP_MANUALKV")
    volts = kilovolts is not None and re.search(r"(?<![kK])V\s*$", kilovolts) is not None
    found.voltage_kV = found.number(kilovolts, "AP_ACTUALKV", 1e-3 if volts else 1.0)
    distance = found.length_um(values.get("AP_WD"), "AP_WD", "mm")
    found.working_distance_mm = None if distance is None else distance / 1e3
    return found


def tescan(data: bytes, source: str) -> Statement:
    """Tescan, tag 50431 or a .hdr file: "key=value" in sections or none; lengths in m, voltage in V."""
    found = Statement(source, vendor="Tescan")
    # The tag has binary fields ahead of the text.
    start = max(data.find(b"AccFrames"), 0)
    merged: dict[str, str] = {}
    for section in ini(decoded(data[start:])).values():
        merged = {**section, **merged}
    found.instrument = merged.get("Device", "")
    found.detector = merged.get("Detector0") or merged.get("Detector", "")
    found.pixel_um = found.pixel(found.number(merged.get("PixelSizeX"), "PixelSizeX", 1e6), "PixelSizeX")
    found.pixel_height_um = found.pixel(
        found.number(merged.get("PixelSizeY"), "PixelSizeY", 1e6), "PixelSizeY"
    )
    found.voltage_kV = found.number(merged.get("HV"), "HV", 1e-3)
    found.working_distance_mm = found.number(merged.get("WD"), "WD", 1e3)
    found.data_bar_px = found.count(merged.get("ImageStripSize"), "ImageStripSize")
    return found


def hitachi(data: bytes, source: str) -> Statement:
    """Hitachi, a .txt file: INI with [SemImageFile]; pixels in nm, working distance in um, voltage in V."""
    found = Statement(source, vendor="Hitachi")
    keys = ini(decoded(data)).get("SemImageFile", {})
    found.instrument = keys.get("InstructName", "")
    found.detector = keys.get("SignalName") or keys.get("Signal", "")
    found.pixel_um = found.pixel(found.length_um(keys.get("PixelSize"), "PixelSize", "nm"), "PixelSize")
    found.voltage_kV = found.number(keys.get("AcceleratingVoltage"), "AcceleratingVoltage", 1e-3)
    distance = found.length_um(keys.get("WorkingDistance"), "WorkingDistance", "um")
    found.working_distance_mm = None if distance is None else distance / 1e3
    found.size = _size(found, keys.get("DataSize"), "DataSize")
    return found


def jeol(data: bytes, source: str) -> Statement:
    """JEOL, a .txt file: "$KEY value"; a pixel is the micron marker over its length in pixels."""
    found = Statement(source, vendor="JEOL")
    keys: dict[str, str] = {}
    for line in decoded(data).replace("\0", "").splitlines():
        if line.startswith("$"):
            key, _, value = line.strip().partition(" ")
            keys.setdefault(key.lstrip("$"), value.strip())
    found.instrument = keys.get("CM_INSTRUMENT", "")
    found.detector = keys.get("CM_SIGNAL", "")
    marker = found.length_um(keys.get("SM_MICRON_MARKER"), "$$SM_MICRON_MARKER", "um")
    bar = found.number(keys.get("SM_MICRON_BAR"), "$$SM_MICRON_BAR")
    if marker is not None and bar is not None:
        found.pixel_um = found.pixel(marker / bar, "$$SM_MICRON_MARKER / $$SM_MICRON_BAR")
    found.voltage_kV = found.number(keys.get("CM_ACCEL_VOLT"), "$CM_ACCEL_VOLT")
    found.working_distance_mm = found.number(keys.get("SM_WD"), "$$SM_WD")
    found.size = _size(found, keys.get("CM_FULL_SIZE"), "$CM_FULL_SIZE")
    return found


def imagej(description: bytes, resolution: float | None, source: str) -> Statement:
    """ImageJ, tags 270 and 282: pixels to a unit, which the description names."""
    found = Statement(source)
    unit = ini(decoded(description))[""].get("unit", "")
    factor = unit_um(unit)
    if factor is not None and resolution is not None and resolution > 0.0:
        found.pixel_um = found.pixel(factor / resolution, "a pixel")
    return found


def is_hitachi(data: bytes) -> bool:
    """Return whether a sidecar is Hitachi's."""
    return "[SemImageFile]" in decoded(data)


def is_jeol(data: bytes) -> bool:
    """Return whether a sidecar is JEOL's."""
    return re.search(r"^\$+(?:CM|SM)_", decoded(data), re.MULTILINE) is not None


def conflicts(a: float, b: float, tolerance: float) -> bool:
    """Return whether two positive values differ by more than a share of the larger one."""
    return abs(a - b) > tolerance * max(a, b)


def by_source(statements: Mapping[str, float]) -> str:
    """Return "A says 0.01, B says 0.02"."""
    return ", ".join(f"{source} says {value:g}" for source, value in statements.items())


def _size(found: Statement, text: str | None, what: str) -> tuple[int, int] | None:
    # "1280x960" or "1280 960": columns first.
    if not text:
        return None
    sizes = re.fullmatch(r"\s*(\d{1,6})\s*[x,;\s]\s*(\d{1,6})\s*", text)
    if sizes is None or not (int(sizes[1]) and int(sizes[2])):
        found.problems.append(f"{found.source}: {what} is {_short(text)}, expected columns x rows")
        return None
    return int(sizes[2]), int(sizes[1])


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
