"""Which files are pushed, when they are finished, and what their names say."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import grainwatch
from grainwatch.commands.push import read_metadata
from grainwatch.config import ConfigError
from grainwatch.push_files import Candidate, Naming, Watcher, is_image, is_temporary, natural_key, stem_of
from grainwatch.push_wire import metadata_error


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watching(*paths: Path, pattern: str = "", settle_s: float = 0.0, sidecars: bool = True) -> Watcher:
    return Watcher(paths, pattern, settle_s, sidecars, Clock())


def after(watcher: Watcher, seconds: float) -> list[Candidate]:
    """Return what is finished so much later."""
    clock = watcher._clock
    assert isinstance(clock, Clock)
    clock.now += seconds
    return watcher.look()


def test_images_of_a_folder_in_natural_order(tmp_path: Path) -> None:
    names = ["a_10.tif", "a_2.TIF", "a_1.tif.gz", "b.txt", ".a_3.tif", "a_4.tif.part", "a_5.h5", "c.mccd"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "d.tif").mkdir()
    watcher = watching(tmp_path)
    assert [c.name for c in watcher.look()] == ["a_1.tif.gz", "a_2.TIF", "a_10.tif", "c.mccd"]
    assert watcher.series == tmp_path.name


def test_a_pattern_reaches_into_folders(tmp_path: Path) -> None:
    for name in ("x/a_1.dat", "y/a_2.dat", "a_3.dat", "a_4.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    watcher = watching(tmp_path, pattern="**/*.dat")
    assert [c.name for c in watcher.look()] == ["a_3.dat", "x/a_1.dat", "y/a_2.dat"]


def test_files_are_called_as_their_common_folder_says(tmp_path: Path) -> None:
    for name in ("x/a_1.tif", "y/a_1.tif"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    both = watching(tmp_path / "x/a_1.tif", tmp_path / "y/a_1.tif")
    assert [c.name for c in both.look()] == ["x/a_1.tif", "y/a_1.tif"]
    one = watching(tmp_path / "x/a_1.tif")
    whole = watching(tmp_path / "x")
    assert one.look()[0].fingerprint == whole.look()[0].fingerprint
    assert one.series == whole.series == "x"


def test_a_file_that_grows_is_not_finished(tmp_path: Path) -> None:
    file = tmp_path / "a_1.tif"
    file.write_bytes(b"x")
    watcher = watching(tmp_path, settle_s=1.5)
    assert watcher.look() == []
    for _ in range(3):
        assert after(watcher, 1.4) == []
        with file.open("ab") as opened:
            opened.write(b"x")
        assert after(watcher, 1.4) == []
    assert watcher.growing == 1
    (found,) = after(watcher, 1.6)
    assert (found.size, watcher.growing) == (4, 0)
    watcher.finished("a_1.tif")
    assert after(watcher, 10.0) == []


def test_an_empty_file_is_given_more_time(tmp_path: Path) -> None:
    (tmp_path / "a_1.tif").touch()
    watcher = watching(tmp_path, settle_s=1.5)
    assert watcher.look() == []
    assert after(watcher, 8.0) == []
    assert [c.size for c in after(watcher, 3.0)] == [0]


def test_listings_are_not_made_all_the_time(tmp_path: Path) -> None:
    (tmp_path / "a_1.tif").write_bytes(b"x")
    watcher = watching(tmp_path)
    assert len(watcher.look()) == 1
    assert after(watcher, 0.1) == []
    assert len(after(watcher, 0.5)) == 1


def test_an_image_waits_for_its_text(tmp_path: Path) -> None:
    (tmp_path / "a_1.tif").write_bytes(b"x")
    text = tmp_path / "a_1.txt"
    text.write_bytes(b"HV=")
    watcher = watching(tmp_path, settle_s=1.5)
    assert watcher.look() == []
    text.write_bytes("\N{MICRO SIGN}m".encode("latin-1") + b" 20")
    assert after(watcher, 1.6) == []
    assert len(after(watcher, 1.6)) == 1
    (tmp_path / "a_1.tif.JSON").write_text("{}")
    assert after(watcher, 1.6) == []
    (found,) = after(watcher, 1.6)
    texts = {"a_1.txt": "\N{MICRO SIGN}m 20", "a_1.tif.JSON": "{}"}
    assert watcher.read_sidecars(found.path) == texts
    text.write_text("\N{MICRO SIGN}" * 30_000, encoding="utf-16")
    cut = watcher.read_sidecars(found.path)
    assert 8000 < len(cut["a_1.txt"]) < 8193
    assert set(cut["a_1.txt"]) == {"\N{MICRO SIGN}"}
    assert metadata_error({}, cut) == ""
    assert watching(tmp_path, sidecars=False).read_sidecars(found.path) == {}


def test_a_folder_that_goes_away(tmp_path: Path) -> None:
    folder = tmp_path / "share"
    folder.mkdir()
    (folder / "a_1.tif").write_bytes(b"x")
    watcher = watching(folder)
    folder.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        watcher.look()
    (tmp_path / "away").rename(folder)
    assert len(watcher.look()) == 1


def test_a_file_that_vanishes_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a_1.tif"
    file.symlink_to(tmp_path / "nowhere.tif")
    watcher = watching(tmp_path, pattern="*.tif")
    assert watcher.look() == []


@pytest.mark.parametrize("given", [["nowhere"], [".", "."], ["a.tif", "."]])
def test_what_cannot_be_pushed(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no such file|one folder"):
        watching(*(tmp_path / name for name in given))


@given(st.integers(0, 2**53), st.sampled_from(["scan7_", "x1.5_", "", "f-"]), st.integers(0, 12))
def test_the_last_digits_are_the_number(number: int, prefix: str, width: int) -> None:
    for ending in (".tif", ".tif.gz", ".TIFF", ".mccd.bz2"):
        assert Naming().number(f"day1/{prefix}{number:0{width}d}{ending}") == number


def test_numbers_where_a_pattern_finds_them() -> None:
    assert Naming(r"f(\d+)_").number("f12_x3.tif") == 12
    assert Naming(r"(x)(?P<n>\d+)").number("f12_x3.tif") == 3
    assert Naming(r"\d+").number("f12_x3.tif") == 12
    assert Naming(r"q(\d+)").number("f12_x3.tif") is None
    assert Naming(r"(f).*").number("f12_x3.tif") is None
    assert Naming().number("picture.tif") is None
    assert Naming().number("a_99999999999999999999.tif") is None
    assert Naming().number("image.0007") == 7
    assert Naming("", r"x(?P<x>\d+)").number("f12_x3.tif") == 12


def test_positions() -> None:
    naming = Naming("", r"y(?P<y>[-\d.]+)_x(?P<x>[-\d.]+)_", "mm")
    assert naming.position_um("y1.5_x-2_0001.tif") == (-2000.0, 1500.0)
    assert naming.position_um("y1.5.5_x-2_0001.tif") is None
    assert naming.position_um("other.tif") is None
    assert Naming().position_um("y1_x2_.tif") is None


@pytest.mark.parametrize("arguments", [("(",), ("", "("), ("", "a"), ("", "", "inch")])
def test_patterns_that_cannot_be_used(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"--number|--position"):
        Naming(*arguments)


def test_names_have_numbers_or_are_counted() -> None:
    counted = Naming()
    counted.settle(["a.tif", "b.tif"])
    assert counted.by_order
    numbered = Naming()
    numbered.settle(["a_1.tif", "a_2.tif"])
    assert not numbered.by_order
    with pytest.raises(ConfigError, match=r"a_1.tif and b_1.tif both have the number 1"):
        Naming().settle(["a_1.tif", "b_1.tif"])
    with pytest.raises(ConfigError, match=r"b.tif: no number"):
        Naming().settle(["a_1.tif", "b.tif"])
    with pytest.raises(ConfigError, match="no number"):
        Naming(r"q(\d+)").settle(["a_1.tif"])
    Naming("order").settle(["a_1.tif", "b_1.tif", "c.tif"])


def test_names() -> None:
    assert sorted(["a10", "a9", "b1", "a9b"], key=natural_key) == ["a9", "a9b", "a10", "b1"]
    for listed in (["a9", "a09"], ["a09", "a9"]):
        assert sorted(listed, key=natural_key) == ["a09", "a9"]
    assert [stem_of(n) for n in ("a.tif", "a.tif.gz", "a.b", "a.0001", "a")] == ["a", "a", "a", "a.0001", "a"]
    assert all(map(is_image, ("a.tif", "a.TIFF.GZ", "a.mccd", "a.edf.bz2", "a.cbf", "a.npy")))
    assert not any(map(is_image, ("a.h5", "a.txt", "tif", "a.tif.zip", "a.nxs")))
    assert all(map(is_temporary, (".a", "~$a.tif", "a.tif.part", "a.TMP", "a.tif~")))


def test_metadata_of_the_command_line() -> None:
    given = ["a=1", "b=1.5", "c=1e-3", "d=true", "e=x=y", "f=", "g=007", "h=nan", " i =-3"]
    expected = {"a": 1, "b": 1.5, "c": 1e-3, "d": True, "e": "x=y", "f": "", "g": "007", "h": "nan", "i": -3}
    assert read_metadata(given) == expected
    for bad in ("a", "=1", " =1", f"a={'x' * 30_000}"):
        with pytest.raises(ConfigError, match="--meta"):
            read_metadata([bad])


def test_times_may_go_backwards(tmp_path: Path) -> None:
    """The clock of a share is not ours: only changes count."""
    file = tmp_path / "a_1.tif"
    file.write_bytes(b"x")
    os.utime(file, (4e9, 4e9))
    watcher = watching(tmp_path)
    assert watcher.look()[0].modified_ns == 4_000_000_000_000_000_000


def test_nothing_of_unix_alone_is_used() -> None:
    """The client runs on Windows, where these tests were not run."""
    package = Path(grainwatch.__file__).parent
    modules = [*package.glob("push*.py"), package / "commands" / "push.py"]
    assert len(modules) >= 7
    unix = {"fcntl", "grp", "pwd", "resource", "pty", "termios", "select", "signal", "syslog", "subprocess"}
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not unix & {name.partition(".")[0] for name in names}, module
