"""How a frame's image was taken: whom is believed, what is flagged, and that rubbish harms nothing."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from grainwatch.messages import FrameKey
from pipelines.frame import BadFrame, Frame, PlainImage
from pipelines.micrograph.acquisition import (
    METADATA_DAMAGED,
    NOT_AS_NAMED,
    OTHER_SIZE,
    PIXEL_SIZE_CONFLICT,
    PIXEL_SIZE_UNKNOWN,
    SIDECAR_UNREADABLE,
    UNKNOWN,
    WHITE_IS_ZERO,
    read_acquisition,
)
from pipelines.micrograph.frame_acquisition import KEYS, AcquisitionTable, acquisition_of, file_metadata

ROWS, COLUMNS, BAR = 108, 128, 12
PIXELS = np.arange(ROWS * COLUMNS, dtype=np.uint8).reshape(ROWS, COLUMNS)
FEI = f"""[System]
SystemType=Helios
[Beam]
HV=5000
[Scan]
PixelWidth=1.2e-08
PixelHeight=1.2e-08
[Image]
ResolutionX={COLUMNS}
ResolutionY={ROWS - BAR}
[Detectors]
Name=TLD
"""
HITACHI = f"[SemImageFile]\r\nInstructName=SU5000\r\nPixelSize=99.2\r\nDataSize={COLUMNS}x{ROWS}\r\n"


def frame(metadata: dict[str, Any], shape: tuple[int, ...] = (ROWS, COLUMNS)) -> Frame:
    """A frame as a worker sees it: its metadata went through msgpack."""
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(metadata))
    return Frame(FrameKey("s", "f" * 32, 0), PlainImage(np.zeros(shape, np.uint8)), metadata=travelled)


def tiff(path: Path, fei: str = FEI, **more: object) -> Path:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info.tagtype[34682] = 2
    info[34682] = fei.encode()
    Image.fromarray(PIXELS).save(path, tiffinfo=info, **more)
    return path


def test_a_frame_says_what_its_file_says(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif")
    found = acquisition_of(frame(file_metadata(path)))
    assert found == read_acquisition(path)
    assert (found.pixel_size_um, found.data_bar_px, found.flags) == (pytest.approx(0.012), BAR, ())
    in_colour = acquisition_of(frame(file_metadata(path), (ROWS, COLUMNS, 3)))
    assert in_colour == found


def test_an_image_of_another_size_loses_its_pixel_size(tmp_path: Path) -> None:
    found = acquisition_of(frame(file_metadata(tiff(tmp_path / "a.tif")), (ROWS // 2, COLUMNS // 2)))
    assert found.pixel_size_um is None
    assert set(found.flags) == {OTHER_SIZE, PIXEL_SIZE_UNKNOWN}


def test_a_file_that_says_nothing_adds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plain.png"
    Image.fromarray(PIXELS).save(path)
    assert file_metadata(path) == {}
    assert acquisition_of(frame({})) == UNKNOWN
    found = acquisition_of(frame({"file": str(path)}))
    assert found.flags == (PIXEL_SIZE_UNKNOWN,)
    assert found.remarks == read_acquisition(path).remarks
    assert "neither plain.txt (Hitachi, JEOL) nor plain-png.hdr (Tescan) lies beside it" in found.remarks[0]


def test_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.tiff", format="PNG")
    assert NOT_AS_NAMED in acquisition_of(frame(file_metadata(tmp_path / "a.tiff"))).flags
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[262] = 0
    Image.fromarray(PIXELS).save(tmp_path / "white.tif", tiffinfo=info)
    assert WHITE_IS_ZERO in acquisition_of(frame(file_metadata(tmp_path / "white.tif"))).flags
    (tmp_path / "cut.tif").write_bytes(tiff(tmp_path / "b.tif").read_bytes()[:6])
    assert acquisition_of(frame(file_metadata(tmp_path / "cut.tif"))).flags == (
        PIXEL_SIZE_UNKNOWN,
        METADATA_DAMAGED,
    )
    with pytest.raises(BadFrame, match=r"gone\.tif: cannot be read"):
        file_metadata(tmp_path / "gone.tif")


def test_what_a_file_says_can_travel(tmp_path: Path) -> None:
    name = os.fsdecode(b"2\xb5m.tif")  # in an encoding of long ago
    path = tiff(tmp_path / name, FEI.replace("Helios", "H" * 100_000).replace("1.2e-08", "0"))
    said = msgspec.msgpack.encode(file_metadata(path))
    assert len(said) < 8000
    found = acquisition_of(frame(file_metadata(path)))
    assert found.instrument == ""
    assert set(found.flags) == {METADATA_DAMAGED, PIXEL_SIZE_UNKNOWN}
    (tmp_path / os.fsdecode(b"3\xb5m.txt")).write_text("a shopping list")
    Image.fromarray(PIXELS).save(tmp_path / os.fsdecode(b"3\xb5m.png"), format="PNG")
    found = acquisition_of(frame(file_metadata(tmp_path / os.fsdecode(b"3\xb5m.png"))))
    assert SIDECAR_UNREADABLE in found.flags
    assert "is no file of a microscope" in found.remarks[0]


def test_names_that_leave_no_room_for_a_sidecar(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".png")
    Image.fromarray(PIXELS).save(path)
    assert file_metadata(path) == {}


def test_the_stream_may_say_it() -> None:
    attributes = {"pixel_size_um": 0.25, "detector": "BSE", "voltage_kV": 20, "data_bar_px": 0}
    for metadata in (attributes, {"ndattr": attributes}, {"user_data": attributes}):
        found = acquisition_of(frame(metadata))
        assert (found.pixel_size_um, found.detector, found.voltage_kV, found.data_bar_px) == (
            0.25,
            "BSE",
            20,
            0,
        )
        assert found.flags == found.remarks == ()
        assert found.source.startswith("metadata")


def test_names_of_a_stream_are_translated() -> None:
    table = AcquisitionTable(
        keys={"pixel_size_um": "SEM:PixelWidth", "voltage_kV": "HV"},
        factors={"pixel_size_um": 1e-3, "voltage_kV": 1e-3},
    )
    found = acquisition_of(frame({"ndattr": {"SEM:PixelWidth": 12.0, "HV": 5000, "pixel_size_um": 7}}), table)
    assert (found.pixel_size_um, found.voltage_kV) == (pytest.approx(0.012), pytest.approx(5.0))
    assert found.flags == ()


@pytest.mark.parametrize(
    "wrong", [0, 0.0, -1.5, math.nan, math.inf, 1e9, 1e-12, "0.25", "12 nm", True, [1.0], {}]
)
def test_a_wrong_pixel_size_is_flagged_and_never_used(wrong: Any) -> None:
    found = acquisition_of(frame({"ndattr": {"pixel_size_um": wrong, "detector": "SE"}}))
    assert found.pixel_size_um is None
    assert set(found.flags) == {METADATA_DAMAGED, PIXEL_SIZE_UNKNOWN}
    assert any("pixel_size_um" in remark for remark in found.remarks)
    assert found.detector == "SE"
    filled = acquisition_of(frame({"pixel_size_um": wrong}), AcquisitionTable(pixel_size_um=0.5))
    assert (filled.pixel_size_um, filled.source, filled.flags) == (
        0.5,
        "the configuration",
        (METADATA_DAMAGED,),
    )


def test_whom_is_believed(tmp_path: Path) -> None:
    tags = file_metadata(tiff(tmp_path / "a.tif"))
    stream = {"ndattr": {"pixel_size_um": 0.5, "voltage_kV": 30.0}}
    table = AcquisitionTable(pixel_size_um=9.0, detector="ETD", working_distance_mm=4.0, data_bar_px=3)
    found = acquisition_of(frame({**tags, **stream}), table)
    assert found.pixel_size_um == pytest.approx(0.012)
    assert PIXEL_SIZE_CONFLICT in found.flags
    assert (found.detector, found.voltage_kV, found.data_bar_px) == ("TLD", 5.0, BAR)
    assert found.working_distance_mm == 4.0
    # A scale that some program wrote into the file is believed less than the stream.
    imagej = tmp_path / "scaled.tif"
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270], info[282] = "ImageJ=1.54\nunit=um\n", 4.0
    Image.fromarray(PIXELS).save(imagej, tiffinfo=info)
    guess = file_metadata(imagej)
    assert acquisition_of(frame(guess)).pixel_size_um == 0.25
    found = acquisition_of(frame({**guess, **stream}))
    assert (found.pixel_size_um, PIXEL_SIZE_CONFLICT in found.flags) == (0.5, True)
    found = acquisition_of(frame(guess), table)
    assert (found.pixel_size_um, found.flags, found.data_bar_px) == (0.25, (), 3)


def test_texts_that_came_with_a_pushed_file() -> None:
    found = acquisition_of(
        frame({"sidecars": {"a.txt": HITACHI, "b.txt": "a shopping list"}, "file": "a.tif"})
    )
    assert (found.pixel_size_um, found.instrument, found.source) == (pytest.approx(0.0992), "SU5000", "a.txt")
    assert found.flags == ()


def test_a_bar_higher_than_the_image_is_none() -> None:
    assert acquisition_of(frame({}), AcquisitionTable(data_bar_px=ROWS)).data_bar_px is None
    assert acquisition_of(frame({}), AcquisitionTable(data_bar_px=0)).data_bar_px == 0


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"pixel_size_um": 0.0}, "pixel_size_um"),
        ({"pixel_size_um": math.nan}, "pixel_size_um"),
        ({"voltage_kV": -1.0}, "voltage_kV"),
        ({"working_distance_mm": math.inf}, "working_distance_mm"),
        ({"data_bar_px": -1}, "data_bar_px"),
        ({"keys": {"pixelsize": "a"}}, "keys: 'pixelsize' is not one of pixel_size_um"),
        ({"factors": {"pixel_size_um": 0.0}}, r"factors\.pixel_size_um"),
        ({"factors": {"detector": 2.0}}, r"factors\.detector"),
    ],
)
def test_a_configuration_that_cannot_be(table: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AcquisitionTable(**table)


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_OTHER_NAMES = (
    "acquisition ndattr user_data sidecars file statements guesses flags source pixel_um size problems"
)
_NAMES = st.sampled_from([*KEYS, *_OTHER_NAMES.split(), "width_um", "a.txt"])
_METADATA = st.dictionaries(
    _NAMES, _PLAIN | st.dictionaries(_NAMES, _PLAIN | st.lists(st.dictionaries(_NAMES, _PLAIN))), max_size=5
)


@settings(max_examples=150, deadline=None)
@given(_METADATA)
def test_rubbish_harms_nothing(metadata: dict[str, Any]) -> None:
    found = acquisition_of(frame(metadata))
    assert found.pixel_size_um is None or 1e-6 <= found.pixel_size_um <= 1e3
    assert (found.pixel_size_um is None) == (PIXEL_SIZE_UNKNOWN in found.flags)
    assert found.data_bar_px is None or 0 <= found.data_bar_px < ROWS
    for value in (found.voltage_kV, found.working_distance_mm):
        assert value is None or 0.0 < value < math.inf
    msgspec.msgpack.encode(asdict(found))


@pytest.mark.parametrize(
    "metadata",
    [
        {"file": "\udcff.tif"},
        {"sidecars": {"\udcff.hdr": "[MAIN]\nPixelSizeX=1e-9\nPixelSizeY=5e-9\n"}},
        {"acquisition": {"remarks": ["\udcff"], "statements": [{"source": "a", "problems": ["\udcff"]}]}},
        {"acquisition": {"remarks": ["x" * 100_000] * 100}},
    ],
)
def test_what_is_said_of_an_image_can_be_sent(metadata: dict[str, Any]) -> None:
    pixels = PlainImage(np.zeros((ROWS, COLUMNS), np.uint8))
    found = acquisition_of(Frame(FrameKey("sem", "u", 0), pixels, metadata=metadata))
    assert found.remarks
    assert len(msgspec.msgpack.encode(asdict(found))) < 50_000


@pytest.mark.parametrize("name", ["pixel_um", "width_um", "voltage_kV", "data_bar_px", "size"])
@pytest.mark.parametrize("value", [-1, 0, math.nan, 1e300, "x", [0, -4], [1, 2, 3]])
def test_a_sender_cannot_forge_an_acquisition_that_breaks_anything(name: str, value: Any) -> None:
    statement = {"source": "x" * 999, "vendor": "a\nb", name: value, "pixel_height_um": 0.1}
    given_ = {"statements": [statement], "flags": ["anything", METADATA_DAMAGED]}
    found = acquisition_of(frame({"acquisition": given_}))
    assert found.pixel_size_um is None
    assert "anything" not in found.flags
    assert METADATA_DAMAGED in found.flags or (name, value) == ("data_bar_px", 0)
    assert found.vendor == ""
