"""What SEM files say of themselves: real TIFF files and sidecars in the forms of six vendors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from pipelines.frame import BadFrame
from pipelines.micrograph import vendors
from pipelines.micrograph.acquisition import (
    METADATA_CONFLICT,
    METADATA_DAMAGED,
    NOT_AS_NAMED,
    OTHER_SIZE,
    PIXEL_SIZE_CONFLICT,
    PIXEL_SIZE_UNKNOWN,
    PIXELS_NOT_SQUARE,
    SIDECAR_UNREADABLE,
    read_acquisition,
)

ROWS, COLUMNS, BAR = 96, 128, 8
PIXELS = np.arange((ROWS + BAR) * COLUMNS, dtype=np.uint8).reshape(ROWS + BAR, COLUMNS)

FEI = f"""[User]\r
Date=11/21/2026\r
[System]\r
SystemType=Helios NanoLab 650\r
[Beam]\r
HV=5000\r
[EBeam]\r
WD=0.004123\r
[Scan]\r
PixelWidth=1.2e-008\r
PixelHeight=1.2e-008\r
HorFieldsize={COLUMNS * 1.2e-8:g}\r
[Stage]\r
StageX=0.001\r
WorkingDistance=0.004123\r
[Image]\r
ResolutionX={COLUMNS}\r
ResolutionY={ROWS}\r
[Detectors]\r
Name=TLD\r
[PrivateFei]\r
DatabarHeight={BAR}\r
"""
ZEISS = f"""0\r
0\r
AP_IMAGE_PIXEL_SIZE\r
Image Pixel Size = 35.94 nm\r
AP_PIXEL_SIZE\r
Pixel Size = 71.88 nm\r
AP_WIDTH\r
Width = {COLUMNS * 0.03594:.4f} \u00b5m\r
AP_ACTUALKV\r
EHT = 15.00 kV\r
AP_WD\r
WD = 4.1 mm\r
DP_DETECTOR_TYPE\r
Detector = InLens\r
SV_SERIAL_NUMBER\r
Serial No. = Merlin-61-50\r
"""
TESCAN = f"""[MAIN]
AccFrames=1
Device=MIRA3 LMH
ImageStripSize={BAR}
Magnification=5000
PixelSizeX=5.4e-08
PixelSizeY=5.4e-08
[SEM]
Detector=0
Detector0=BSE
HV=20000.0
WD=0.0152
"""
HITACHI = f"""[SemImageFile]\r
InstructName=SU5000\r
PixelSize=99.21875\r
DataSize={COLUMNS}x{ROWS}\r
SignalName=SE(L)\r
AcceleratingVoltage=15000 Volt\r
WorkingDistance=5000 um\r
Magnification=1000\r
"""
JEOL = f"""$CM_FORMAT 1.0
$CM_INSTRUMENT JSM-7800F
$CM_ACCEL_VOLT 15.00
$CM_SIGNAL SEI
$CM_MAG 1000
$CM_FULL_SIZE {COLUMNS} {ROWS}
$$SM_WD 10.1
$$SM_MICRON_BAR 100
$$SM_MICRON_MARKER 10um
"""
TAGS = {"fei": 34682, "sfeg": 34680, "zeiss": 34118, "tescan": 50431}

Write = Callable[..., Path]


def _with_tifffile(path: Path, order: str, big: bool, tags: dict[int, bytes], **more: object) -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile is absent")
    extra = [(code, "B" if code == 50431 else "s", len(text), text, True) for code, text in tags.items()]
    tifffile.imwrite(path, PIXELS, byteorder=order, bigtiff=big, extratags=extra, metadata=None, **more)


def _with_pillow(path: Path, order: str, big: bool, tags: dict[int, bytes], **more: object) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II" if order == "<" else b"MM")
    for code, text in tags.items():
        info.tagtype[code] = 1 if code == 50431 else 2
        info[code] = text
    # Pillow takes the byte order of the file from that of the pixels.
    pixels = PIXELS if order == "<" else PIXELS.astype(">u2")
    Image.fromarray(pixels).save(path, tiffinfo=info, big_tiff=big, **more)


@pytest.fixture(params=["tifffile", "pillow"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    """Two independent programs that write TIFF files."""

    def with_tags(tags: dict[int, bytes], order: str = "<", big: bool = False, **more: object) -> Path:
        path = tmp_path / "img.tif"
        {"tifffile": _with_tifffile, "pillow": _with_pillow}[request.param](path, order, big, tags, **more)
        assert path.read_bytes()[:4] == {"<": (b"II*\0", b"II+\0"), ">": (b"MM\0*", b"MM\0+")}[order][big]
        return path

    return with_tags


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("code", [34680, 34682])
def test_thermo(write: Write, order: str, big: bool, code: int) -> None:
    found = read_acquisition(write({code: FEI.encode()}, order, big))
    assert found.pixel_size_um == pytest.approx(0.012)
    assert (found.vendor, found.instrument, found.detector) == ("Thermo/FEI", "Helios NanoLab 650", "TLD")
    assert found.voltage_kV == pytest.approx(5.0)
    assert found.working_distance_mm == pytest.approx(4.123)
    assert found.data_bar_px == BAR
    assert found.flags == ()
    assert found.source == f"tag {code} (Thermo/FEI)"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("micro", [b"\xb5m", "\u00b5m".encode(), b"\xef\xbf\xbdm", b"?m", b"um"])
def test_zeiss_and_what_becomes_of_a_micro_sign(write: Write, order: str, micro: bytes) -> None:
    text = ZEISS.replace("71.88 nm", "0.07188 um").encode("latin-1").replace(b"\xb5m", micro)
    found = read_acquisition(write({34118: text}, order))
    assert found.pixel_size_um == pytest.approx(0.03594)
    assert (found.vendor, found.detector, found.instrument) == ("Zeiss", "InLens", "Merlin-61-50")
    assert (found.voltage_kV, found.working_distance_mm) == (15.0, pytest.approx(4.1))
    assert found.data_bar_px is None  # it is drawn into the picture, and nobody says where
    assert found.flags == ()


@pytest.mark.parametrize("order", ["<", ">"])
def test_tescan_tag_behind_binary_fields(write: Write, order: str) -> None:
    body = TESCAN.replace("[MAIN]\n", "").replace("[SEM]\n", "").encode()
    found = read_acquisition(write({50431: bytes(range(1, 90)) + body}, order))
    assert found.pixel_size_um == pytest.approx(0.054)
    assert (found.vendor, found.instrument, found.detector) == ("Tescan", "MIRA3 LMH", "BSE")
    assert (found.voltage_kV, found.working_distance_mm) == (20.0, pytest.approx(15.2))
    assert found.data_bar_px == BAR
    assert found.flags == ()


@pytest.mark.parametrize("name", ["img-tif.hdr", "img.hdr", "img-tif.HDR"])
def test_tescan_sidecar(write: Write, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(TESCAN)
    found = read_acquisition(write({}))
    assert (found.pixel_size_um, found.data_bar_px) == (pytest.approx(0.054), BAR)
    assert found.source == name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "latin-1"])
def test_hitachi_sidecar_in_any_encoding(write: Write, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "img.txt").write_bytes(HITACHI.encode(encoding))
    found = read_acquisition(write({}))
    assert found.pixel_size_um == pytest.approx(0.09921875)
    assert (found.vendor, found.instrument, found.detector) == ("Hitachi", "SU5000", "SE(L)")
    assert (found.voltage_kV, found.working_distance_mm, found.data_bar_px) == (15.0, 5.0, BAR)
    assert found.flags == ()


@pytest.mark.parametrize(("marker", "expected"), [("10um", 0.1), ("500nm", 5e-3), ("1mm", 10.0)])
def test_jeol_sidecar(write: Write, tmp_path: Path, marker: str, expected: float) -> None:
    (tmp_path / "img.txt").write_text(JEOL.replace("10um", marker))
    found = read_acquisition(write({}))
    assert found.pixel_size_um == pytest.approx(expected)
    assert (found.vendor, found.instrument, found.detector) == ("JEOL", "JSM-7800F", "SEI")
    assert (found.voltage_kV, found.working_distance_mm, found.data_bar_px) == (15.0, 10.1, BAR)


def test_a_jpeg_has_sidecars_too(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "img.jpg")
    (tmp_path / "img.txt").write_text(JEOL)
    found = read_acquisition(tmp_path / "img.jpg", PIXELS.shape)
    assert (found.pixel_size_um, found.data_bar_px) == (pytest.approx(0.1), BAR)


@pytest.mark.parametrize("unit", ["micron", "um", "\\u00B5m", "\u00b5m"])
def test_imagej_where_the_unit_says_so(tmp_path: Path, unit: str) -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile is absent")
    path = tmp_path / "img.tif"
    description = f"ImageJ=1.53t\nunit={unit}\nmin=0\nmax=255\n".encode()
    tifffile.imwrite(path, PIXELS, description=description, metadata=None, resolution=(25.0, 25.0))
    assert read_acquisition(path).pixel_size_um == pytest.approx(0.04)
    tifffile.imwrite(
        path, PIXELS, description=b"ImageJ=1.53t\nunit=inch\n", metadata=None, resolution=(25.0, 25.0)
    )
    assert read_acquisition(path).pixel_size_um is None


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [(300.0, "INCH", None), (118.0, "CENTIMETER", None), (1e5, "CENTIMETER", 0.1), (50.0, "NONE", None)],
)
def test_printing_resolutions_are_no_pixel_sizes(
    tmp_path: Path, resolution: float, unit: str, expected: float | None
) -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile is absent")
    path = tmp_path / "img.tif"
    tifffile.imwrite(path, PIXELS, resolution=(resolution, resolution), resolutionunit=unit, metadata=None)
    found = read_acquisition(path)
    assert found.pixel_size_um == (None if expected is None else pytest.approx(expected))
    assert (PIXEL_SIZE_UNKNOWN in found.flags) == (expected is None)


def test_nothing_known_is_flagged_and_says_where_it_looked(write: Write) -> None:
    found = read_acquisition(write({}))
    assert found.pixel_size_um is None
    assert found.flags == (PIXEL_SIZE_UNKNOWN,)
    assert "img.txt" in found.remarks[0]
    assert "img-tif.hdr" in found.remarks[0]


def test_places_that_contradict_each_other(write: Write, tmp_path: Path) -> None:
    (tmp_path / "img.txt").write_text(HITACHI.replace("99.21875", "13").replace("15000 Volt", "5000 Volt"))
    found = read_acquisition(write({34682: FEI.encode()}))
    assert found.pixel_size_um == pytest.approx(0.012)
    assert set(found.flags) == {PIXEL_SIZE_CONFLICT, METADATA_CONFLICT}
    assert "tag 34682 (Thermo/FEI) says 0.012, " in found.remarks[0]
    assert "img.txt says 0.013" in found.remarks[0]


def test_a_width_that_contradicts_the_pixel_size(write: Write) -> None:
    text = ZEISS.replace("35.94 nm", "30 nm").encode("latin-1")
    assert PIXEL_SIZE_CONFLICT in read_acquisition(write({34118: text})).flags


def test_pixels_that_are_not_square(write: Write) -> None:
    text = FEI.replace("PixelHeight=1.2e-008", "PixelHeight=1.5e-008").encode()
    assert read_acquisition(write({34682: text})).flags == (PIXELS_NOT_SQUARE,)


def test_metadata_of_an_image_that_was_resized_since(write: Write) -> None:
    text = FEI.replace(f"ResolutionX={COLUMNS}", "ResolutionX=1024").encode()
    found = read_acquisition(write({34682: text}))
    assert found.pixel_size_um is None
    assert set(found.flags) == {OTHER_SIZE, PIXEL_SIZE_UNKNOWN}
    assert "1024 x 96 pixels, this one has 128 x 104" in found.remarks[0]


def test_a_data_bar_that_was_cut_off_since(write: Write) -> None:
    text = FEI.replace(f"ResolutionY={ROWS}", f"ResolutionY={ROWS + BAR}").encode()
    assert read_acquisition(write({34682: text})).data_bar_px == 0


@pytest.mark.parametrize("value", ["", "abc", "nan", "-1e-8", "0", "1e99", "1e-30", "12 parsec"])
def test_wrong_pixel_sizes_are_unknown_and_named(write: Write, value: str) -> None:
    text = FEI.replace("PixelWidth=1.2e-008", f"PixelWidth={value}").encode()
    found = read_acquisition(write({34682: text}))
    assert found.pixel_size_um is None
    assert PIXEL_SIZE_UNKNOWN in found.flags
    assert (METADATA_DAMAGED in found.flags) == (value != "")
    assert found.voltage_kV == 5.0


@pytest.mark.parametrize(
    "content", [b"", b"lunch at noon\n", b"[SemImageFile]\nPixelSize=\n", b"$CM_MAG 1000\n", b"\xff\xfe\x00"]
)
def test_broken_sidecars_are_named(write: Write, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "img.txt").write_bytes(content)
    found = read_acquisition(write({}))
    assert SIDECAR_UNREADABLE in found.flags
    assert PIXEL_SIZE_UNKNOWN in found.flags
    assert any("img.txt" in remark for remark in found.remarks)


def test_notes_beside_an_image_that_speaks_for_itself_are_no_fault(write: Write, tmp_path: Path) -> None:
    (tmp_path / "img.txt").write_text("lunch at noon")
    assert read_acquisition(write({34682: FEI.encode()})).flags == ()


def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    with pytest.raises(BadFrame, match=r"gone\.tif: cannot be read: no such file"):
        read_acquisition(tmp_path / "gone.tif")
    # A PNG file named .tiff has no tags.
    Image.fromarray(PIXELS).save(tmp_path / "img.png")
    (tmp_path / "img.png").rename(tmp_path / "img.tiff")
    found = read_acquisition(tmp_path / "img.tiff")
    assert found.flags == (PIXEL_SIZE_UNKNOWN, NOT_AS_NAMED)
    assert found.remarks == (f"{tmp_path}/img.tiff: is no TIFF file, whatever its name says",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("damaged") / "img.tif"
    _with_pillow(path, "<", False, {34682: FEI.encode(), 34118: ZEISS.encode("latin-1")})
    return path, path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_flagged(whole: tuple[Path, bytes], data: st.DataObject) -> None:
    path, good = whole
    damaged = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for _ in range(data.draw(st.integers(0, 8))):
        # Directories lie at the end in files of this writer, headers at the start: both are hit often.
        place = data.draw(st.integers(0, min(7, len(damaged))) | st.integers(0, len(damaged)))
        damaged[place : place + 1] = data.draw(st.binary(max_size=3))
    path.with_name("bad.tif").write_bytes(damaged)
    try:
        found = read_acquisition(path.with_name("bad.tif"))
    except BadFrame:
        return
    assert (found.pixel_size_um is None) == (PIXEL_SIZE_UNKNOWN in found.flags)


FORMATS = {
    vendors.fei: FEI.encode(),
    vendors.zeiss: ZEISS.encode("latin-1"),
    vendors.tescan: TESCAN.encode(),
    vendors.hitachi: HITACHI.encode("utf-16"),
    vendors.jeol: JEOL.encode(),
}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_texts_give_sound_values_or_none(data: st.DataObject) -> None:
    read = data.draw(st.sampled_from(list(FORMATS)))
    text = bytearray(FORMATS[read])
    for _ in range(data.draw(st.integers(0, 12))):
        place = data.draw(st.integers(0, len(text)))
        text[place : place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=4))
    found = read(bytes(text), "here")
    for value in (found.pixel_um, found.pixel_height_um):
        assert value is None or 1e-6 <= value <= 1e3
    for value in (found.voltage_kV, found.working_distance_mm, found.width_um):
        assert value is None or 0.0 < value < np.inf
    for size in (found.size or (1, 1), (1, 1 if found.data_bar_px is None else found.data_bar_px + 1)):
        assert min(size) >= 1
    assert all(problem.startswith("here: ") for problem in found.problems)
