"""What names, headers and patterns mean."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from daemon.sources.folder.names import (
    Names,
    header_number,
    header_position,
    header_time,
    header_value,
    value_of,
)
from daemon.sources.folder.pattern import FilePattern, Mark

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=12)
SUFFIX = st.sampled_from([".tif", ".tif.gz", ".edf.bz2", ".mar3450", ".CBF", ".h5", ""])


@given(TEXT.filter(lambda t: not t[-1:].isdigit()), st.integers(0, 10**12), st.integers(1, 9), SUFFIX)
def test_the_last_digits_are_the_number(prefix: str, number: int, width: int, suffix: str) -> None:
    # Where nothing follows, ".h5" is a suffix and no number 5.
    assume(suffix or not re.search(r"\.[A-Za-z][A-Za-z0-9]*$", prefix))
    name = f"{prefix}{number:0{width}d}{suffix}"
    assert Names().number(name) == number


@pytest.mark.parametrize(
    ("name", "number", "series"),
    [
        ("0._0000", 0, "0._#"),
        ("wire_2.5um_0042", 42, "wire_2.5um_#"),
        ("wire_2.5um_0042.tif", 42, "wire_2.5um_#.tif"),
        ("image.0042", 42, "image.#"),
        ("scan12.h5", 12, "scan#.h5"),
        ("scan12.mar3450.gz", 12, "scan#.mar3450.gz"),
    ],
)
def test_dots_in_a_name_and_digits_in_its_suffix(name: str, number: int, series: str) -> None:
    assert Names().number(name) == number
    assert Names().series(name, "name", "/data") == f"/data/{series}"


@given(TEXT, st.integers(0, 999), st.integers(0, 999), SUFFIX)
@example("0.", 0, 1, "")
def test_a_series_is_the_same_for_all_its_numbers(prefix: str, one: int, other: int, suffix: str) -> None:
    names = [f"{prefix}_{n:04d}{suffix}" for n in (one, other)]
    keys = {Names().series(name, "name", "/data") for name in names}
    assert keys == {f"/data/{prefix}_#{suffix}"}
    assert {Names().series(name, "folder", "/data") for name in names} == {"/data"}


@given(
    st.integers(0, 10**6),
    st.tuples(*[st.floats(-1e4, 1e4, allow_subnormal=False).map(lambda v: round(v, 3))] * 2),
    st.booleans(),
)
def test_positions_are_not_taken_for_numbers(number: int, xy: tuple[float, float], ahead: bool) -> None:
    names = Names(position_pattern=r"x(?P<x>-?[0-9.]+)mm_y(?P<y>-?[0-9.]+)mm")
    where = f"x{xy[0]:.3f}mm_y{xy[1]:.3f}mm"
    name = f"{where}_{number}.tif" if ahead else f"scan_{number}_{where}.tif"
    assert names.number(name) == number
    assert names.position(name) == pytest.approx(xy)
    assert names.series(name, "name", "/d") == ("/d/@_#.tif" if ahead else "/d/scan_#_@.tif")


@given(TEXT)
def test_any_name_can_be_read(name: str) -> None:
    names = Names(position_pattern="x(?P<x>.*)y(?P<y>.*)")
    number, position = names.number(name), names.position(name)
    assert number is None or number >= 0
    assert position is None or len(position) == 2
    assert names.series(name, "name", "/d").startswith("/d/")


@pytest.mark.parametrize(
    ("pattern", "name", "number"),
    [
        ("", "image.0012", 12),
        ("", "2026-11-21_scan.tif", 21),
        ("", "scan.tif", None),
        ("", "x.gz", None),
        ("", "42.tif", 42),
        (r"_n(?P<n>\d+)_", "s7_n12_t300.tif", 12),
        (r"_n(\d+)_", "s7_n12_t300.tif", 12),
        (r"\d+", "s7_n12.tif", 7),
        (r"_n(\d+)_", "other.tif", None),
        (r"(a)|(\d+)", "7.tif", None),
        ("(?P<n>[a-z]+)", "abc.tif", None),
    ],
)
def test_numbers_in_names(pattern: str, name: str, number: int | None) -> None:
    assert Names(pattern).number(name) == number


HEADER = {
    "motor_mne": "sx sy sz",
    "motor_pos": "1.5 -2e-1",
    "_array_data.header_contents": "# Exposure_time 0.1 s\r\n# Start_angle -3.5 deg.\r\n",
    "info": "Frame: 17\nX = 5",
    "Exposure": 3,
    "nothing": "",
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sx", 1.5),
        ("sy", -0.2),
        ("sz", None),
        ("Exposure_time", 0.1),
        ("Start_angle", -3.5),
        ("Frame", 17.0),
        ("X", 5.0),
        ("Exposure", 3.0),
        ("nothing", None),
        ("angle", None),
    ],
)
def test_values_of_headers(key: str, value: float | None) -> None:
    assert value_of(header_value(HEADER, key)) == value


def test_whole_numbers_and_positions_of_headers() -> None:
    assert header_number(HEADER, "Frame") == 17
    assert header_number(HEADER, "sx") is None
    assert header_position(HEADER, ("sx", "sy")) == (1.5, -0.2)
    assert header_position(HEADER, ("sx", "sz")) is None
    assert header_position(HEADER, ()) is None
    assert header_position({"x": float("nan")}, ("x",)) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1795255200.25", 1795255200.25),
        ("2026-11-21T10:00:00", 1795255200.0),
        ("2026-11-21T10:00:00Z", 1795255200.0),
        ("2026-11-21T11:00:00.5+01:00", 1795255200.5),
        ("2026:11:21 10:00:00", 1795255200.0),
        ("yesterday", 0.0),
        ("-5", 0.0),
        ("", 0.0),
        ("0001-01-01T00:00:00+14:00", 0.0),
    ],
)
def test_times_of_headers(text: str, seconds: float) -> None:
    assert header_time({"t": text}, "t") == seconds


@given(st.one_of(st.text(), st.floats(), st.integers(), st.none(), st.booleans()))
def test_any_header_can_be_read(value: object) -> None:
    header = {"t": value, "motor_mne": value, "motor_pos": value}
    assert header_time(header, "t") >= 0
    header_number(header, "t")
    header_position(header, ("t", "sx"))


# Patterns.

FILES = (
    "a_1.tif",
    "b_1.edf",
    "[x]_1.tif",
    "s/a_1.tif",
    "s/t/a_2.tif",
    "s/t/u/b_3.tif",
    "r/t/a_1.tif",
    "s2/t2/deep/a_9.tif",
)
PART = st.sampled_from(["**", "*", "s*", "t", "?", "a_[12].tif", "*.tif", "*_1.*", "deep", "[[]x]_1.tif"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(path: str, **options: str) -> list[str]:
    try:
        listing = FilePattern(path, **options).listing({})
    except FileNotFoundError:
        return []
    return sorted(os.path.join(folder, entry.name) for folder, entry in listing.files)


@given(parts=st.lists(PART, min_size=1, max_size=4))
@settings(deadline=None)
def test_patterns_mean_what_those_of_a_shell_mean(tree: Path, parts: list[str]) -> None:
    path = str(tree.joinpath(*parts))
    expected = sorted({p for p in glob.glob(path, recursive=True) if os.path.isfile(p)})
    assert found(path) == expected


def test_a_folder_means_the_files_in_it(tree: Path) -> None:
    assert [os.path.basename(p) for p in found(str(tree))] == ["[x]_1.tif", "a_1.tif", "b_1.edf"]
    assert [os.path.basename(p) for p in found(str(tree / "s" / "t"))] == ["a_2.tif"]
    assert found(str(tree / "s" / "a_1.tif")) == [str(tree / "s" / "a_1.tif")]


def test_what_is_ignored_known_or_a_sign(tmp_path: Path) -> None:
    for name in ("a.tif", "b.tif", "a.tif~", ".snapshot/a.tif", "s/END", "s/a.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.tif").mkdir()
    os.mkfifo(tmp_path / "pipe.tif")
    (tmp_path / "s" / "loop").symlink_to(tmp_path)
    (tmp_path / "dead.tif").symlink_to(tmp_path / "nowhere")
    pattern = FilePattern(str(tmp_path / "**" / "*.tif"), (".*", "*~"), "END")
    inode = (tmp_path / "a.tif").stat().st_ino
    listing = pattern.listing({str(tmp_path): {"a.tif": Mark(inode, 0, 0, 1), "b.tif": Mark(-1, 0, 0, 1)}})
    assert sorted(entry.path for _, entry in listing.files) == [
        str(tmp_path / "b.tif"),
        str(tmp_path / "s" / "a.tif"),
    ]
    assert [entry.name for _, entry in listing.ends] == ["END"]
    single = FilePattern(str(tmp_path / "*.tif")).listing({})
    assert single.folders == [str(tmp_path / "folder.tif")]


def test_a_root_that_is_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "gone"))):
        FilePattern(str(tmp_path / "gone" / "*.tif")).listing({})
