"""A watched folder: files become frames once, in series, with their numbers and positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fabio.edfimage
import h5py
import numpy as np
import pytest
from testkit.folders import FolderRun, write_tif

from daemon.sources.base import Arrival, Exhausted, Idle, SeriesStart, SourceContext
from daemon.sources.folder.source import Config, open_source
from grainwatch.config import ConfigError, ScanTable, convert

IMAGE = np.zeros((8, 9), np.uint16)


def edf(path: Path, n: int = 1, **header: str) -> None:
    image = fabio.edfimage.EdfImage(data=IMAGE, header=header)
    for k in range(1, n):
        image.append_frame(data=IMAGE + k)
    image.write(str(path))


# What lies there.


def test_what_lies_there_is_taken_in_order_with_gaps(data: Path, state: Path) -> None:
    for n in (10, 2, 1, 5):
        write_tif(data / f"scan_{n}.tif", n)
    (data / "notes.txt").write_text("hello")
    (data / ".scan_3.tif").write_bytes(b"hidden")
    (data / "scan_4.tif.part").write_bytes(b"half")
    with FolderRun(state, data, once=True) as run:
        run.to_the_end()
        assert run.seen == [("scan_#.tif", n, n) for n in (1, 2, 5, 10)]
        start = run.events[0]
        assert isinstance(start, SeriesStart)
        assert (start.first_frame, start.n_frames) == (1, None)
        assert start.metadata == {"folder": str(data), "files": f"{data}/scan_#.tif"}
        first = run.events[1]
        assert isinstance(first, Arrival)
        assert first.metadata["file"] == str(data / "scan_1.tif")
        totals = run.totals
        assert (totals["received"], totals["done"], totals["missing"]) == (4, 4, 6)
        run.until(lambda: run.source.problem == "")
        assert run.source.describe() == f"folder {data}, 4 images taken"
        assert isinstance(run.step(), Idle)


def test_what_comes_late_fills_its_gap(data: Path, state: Path) -> None:
    for n in (0, 1, 4):
        write_tif(data / f"a_{n}.tif", n)
    with FolderRun(state, data) as run:
        run.frames(3)
        assert run.totals["missing"] == 2
        write_tif(data / "a_3.tif", 3)
        run.frames(4)
        assert run.totals["missing"] == 1
        write_tif(data / "a_2.tif", 2)
        run.frames(5)
        assert run.numbers == [0, 1, 4, 3, 2]
        assert run.totals["missing"] == 0


def test_what_lies_there_can_be_passed_over_for_good(data: Path, state: Path) -> None:
    for n in range(3):
        write_tif(data / f"a_{n}.tif", n)
    with FolderRun(state, data, existing=False) as run:
        run.for_a_while()
        write_tif(data / "a_3.tif", 3)
        assert run.frames(1) == [("a_#.tif", 3, 3)]
    write_tif(data / "a_4.tif", 4)  # while nobody looked
    with FolderRun(state, data, existing=False) as run:
        assert run.frames(1) == [("a_#.tif", 4, 4)]
        run.for_a_while()
        assert run.numbers == [4]


def test_folders_below_by_a_pattern(data: Path, state: Path) -> None:
    for folder in ("s1", "s2", "deep/s3"):
        for n in range(2):
            write_tif(data / folder / f"f{n}.tif", n)
        (data / folder / "f2.edf").write_bytes(b"of another kind")
    (data / "@eaDir").mkdir()
    with FolderRun(state, data / "**" / "*.tif", once=True) as run:
        run.to_the_end()
        assert len(run.taken) == 6
        assert len(run.starts) == len(run.ends) == 3
        assert run.totals == run.totals | {"done": 6, "failed": 0, "missing": 0}


# Series.


def test_a_new_name_or_folder_is_a_new_series(data: Path, state: Path) -> None:
    with FolderRun(state, data / "**") as run:
        write_tif(data / "a_0.tif", 1)
        run.frames(1)
        write_tif(data / "b_0.tif", 2)
        run.frames(2)
        write_tif(data / "sub" / "b_0.tif", 3)
        run.frames(3)
        write_tif(data / "a_1.tif", 4)
        run.frames(4)
        assert run.starts == ["a_#.tif", "b_#.tif", "b_#.tif", "a_#.tif (2)"]
        assert run.ends == run.starts[:3]


def test_one_series_for_a_folder_or_for_all(data: Path, state: Path) -> None:
    for name in ("x_0.tif", "y_1.tif", "sub/z_2.tif"):
        write_tif(data / name, 0)
    with FolderRun(state.parent / "other", data / "**", series="folder", once=True) as run:
        run.to_the_end()
        assert run.starts == ["data", "sub"]
    with FolderRun(state, data / "**", series="all", once=True) as run:
        run.to_the_end()
        assert run.starts == ["data"]
        assert sorted(run.numbers) == [0, 1, 2]


@pytest.mark.parametrize("how", ["idle", "file", "number"])
def test_what_ends_a_series(data: Path, state: Path, how: str) -> None:
    config: dict[str, Any] = {
        "idle": {"series_idle_s": 1.0},
        "file": {"end_file": "*.done"},
        "number": {"frames_per_series": 3},
    }[how]
    with FolderRun(state, data / "*.tif", **config) as run:
        for n in (0, 2):
            write_tif(data / f"a_{n}.tif", n)
        if how == "file":
            (data / "scan.done").touch()
        elif how == "number":
            run.frames(2)
            assert run.ends == []
            write_tif(data / "a_1.tif", 1)
        run.until(lambda: run.ends)
        assert run.ends == ["a_#.tif"]
        assert len(run.taken) == (3 if how == "number" else 2)
        assert run.totals["missing"] == (0 if how == "number" else 1)
        # It goes on as another one.
        write_tif(data / "a_3.tif", 3)
        run.until(lambda: len(run.starts) == 2)
        assert run.starts[1] == "a_#.tif (2)"
    # The mark that lies there from the first series does not end the one that is open.
    with FolderRun(state, data / "*.tif", **(config if how == "file" else {})) as run:
        run.for_a_while()
        assert run.ends == []


def test_announced_frames_that_never_came_are_missing(data: Path, state: Path) -> None:
    for n in (1, 2):
        write_tif(data / f"a_{n}.tif", n)
    with FolderRun(state, data, frames_per_series=10, first_number=0, once=True) as run:
        run.to_the_end()
        assert run.totals["missing"] == 8


def test_a_number_that_comes_again(data: Path, state: Path) -> None:
    for n in range(3):
        write_tif(data / f"a_{n}.tif", n)
    with FolderRun(state, data) as run:
        run.frames(3)
        write_tif(data / "new.tmp", 77, (10, 11)).rename(data / "a_0.tif")
        run.until(lambda: run.totals["dropped"] == 1)
        assert "frame 0 came again" in run.tracker.last_error
        assert run.starts == ["a_#.tif"]
    with FolderRun(state, data, repeats="series") as run:
        for n in range(2):
            write_tif(data / "new.tmp", 100 + n, (12, 12)).rename(data / f"a_{n}.tif")
            run.frames(n + 1)
        assert run.starts == ["a_#.tif (2)"]
        assert [value for _, _, value in run.seen] == [100, 101]


def test_an_image_of_another_series_waits_for_one_that_is_being_written(data: Path, state: Path) -> None:
    write_tif(data / "a_0.tif", 0)
    whole = write_tif(data / "whole.tmp", 1).read_bytes()
    with FolderRun(state, data, patience_s=20.0) as run:
        run.frames(1)
        (data / "a_1.tif").write_bytes(whole[:-20])
        run.until(lambda: "a_1.tif" in run.source.problem)
        write_tif(data / "b_0.tif", 2)
        run.for_a_while()
        assert run.numbers == [0]
        (data / "a_1.tif").write_bytes(whole)
        assert run.frames(3)[1:] == [("a_#.tif", 1, 1), ("b_#.tif", 0, 2)]


def test_a_file_that_is_no_image_does_not_end_a_series(data: Path, state: Path) -> None:
    write_tif(data / "a_0.tif", 0)
    with FolderRun(state, data) as run:
        run.frames(1)
        (data / "holiday_7.doc").write_bytes(b"words")
        write_tif(data / "snapshot.tif", 3)
        run.until(lambda: len(run.bad) == 2)
        assert sorted(b.reason.split(":")[0] for b in run.bad) == [
            str(data / "holiday_7.doc"),
            str(data / "snapshot.tif"),
        ]
        write_tif(data / "a_1.tif", 1)
        run.frames(2)
        assert run.starts == ["a_#.tif"]
        assert run.totals["failed"] == 2


# Several images in a file.


def test_a_stack_is_a_series_of_its_own(data: Path, state: Path) -> None:
    edf(data / "scan_0001.edf", 3)
    with h5py.File(data / "scan_0002.h5", "w") as file:
        file["/entry/data/data"] = np.stack([IMAGE + 10 + k for k in range(2)])
    with FolderRun(state, data, once=True) as run:
        run.to_the_end()
        first = [("scan_0001.edf", k, k) for k in range(3)]
        assert run.seen == first + [("scan_0002.h5", k, 10 + k) for k in range(2)]
        assert run.totals["missing"] == 0


def test_stacks_that_are_parts_of_a_series(data: Path, state: Path) -> None:
    for part in (1, 3):
        edf(data / f"run_data_{part:06d}.edf", 2)
    edf(data / "run_data_000004.edf", 3)
    with FolderRun(state, data, images_per_file=2, once=True) as run:
        run.to_the_end()
        assert run.starts == ["run_data_#.edf"]
        assert run.numbers == [2, 3, 6, 7, 8, 9]
        assert [b.reason for b in run.bad] == [
            f"{data}/run_data_000004.edf: images_per_file is 2, and this is image 3"
        ]
        assert run.totals["missing"] == 2


def test_a_stack_that_grows_after_it_was_taken(data: Path, state: Path) -> None:
    edf(data / "s.edf", 2)
    with FolderRun(state, data) as run:
        run.frames(2)
        edf(data / "s.edf", 5)  # the same file, longer
        assert run.frames(5) == [("s.edf", k, k) for k in range(5)]
        assert run.totals["dropped"] == 0


def test_count_in_order_of_arrival(data: Path, state: Path) -> None:
    write_tif(data / "cat.tif", 5)
    edf(data / "dog.edf", 2)
    with FolderRun(state, data, numbers="count", series="folder", first_number=1) as run:
        run.frames(3)
        write_tif(data / "ant.tif", 6)
        assert [n for _, n, _ in run.frames(4)] == [1, 2, 3, 4]
        assert run.starts == ["data"]


def test_numbers_positions_and_times_of_headers(data: Path, state: Path) -> None:
    for n in range(3):
        edf(
            data / f"{'cab'[n]}.edf",
            point=str(20 + n),
            motor_mne="sx sy",
            motor_pos=f"0.{n} 7",
            Date="2026-11-21T10:00:00",
        )
    keys: dict[str, Any] = {"number_key": "point", "position_keys": ["sx", "sy"], "time_key": "Date"}
    with FolderRun(
        state, data, numbers="header", series="folder", position_unit_um=1000.0, once=True, **keys
    ) as run:
        run.to_the_end()
        # "a" comes first, so that 20 is below the first number.
        assert run.numbers == [21, 22]
        assert "its number 20 is below the first of the series, 21: set first_number" in run.bad[0].reason
        assert run.taken[0].frame.position_um == pytest.approx((100.0, 7000.0))
        assert run.taken[0].frame.acquired == 1795255200.0


def test_positions_of_names_place_frames_in_a_scan(data: Path, state: Path) -> None:
    scan = ScanTable(shape=(3, 2), step_um=(0.5, 2.0))
    points = {0: (10.0, -4.0), 1: (10.5, -4.0), 2: (10.0, -2.0), 3: (11.0, -2.0)}
    for n, (x, y) in points.items():
        write_tif(data / f"s_{n:03d}_x{x:.2f}_y{y:.2f}.tif", n)
    pattern = r"_x(?P<x>-?[\d.]+)_y(?P<y>-?[\d]+\.\d+)"
    with FolderRun(state, data, scan=scan, position_pattern=pattern, once=True) as run:
        run.to_the_end()
        assert run.starts == ["s_#@.tif"]
        assert [t.frame.grid_index for t in run.taken] == [(0, 0), (1, 0), (0, 1), (2, 1)]
        assert run.taken[3].frame.position_um == (11.0, -2.0)


def test_the_first_number_may_be_told(data: Path, state: Path) -> None:
    write_tif(data / "a_3.tif", 3)
    with FolderRun(state, data, first_number=1, once=True) as run:
        run.to_the_end()
        assert run.totals["missing"] == 2
    write_tif(data / "b_5.tif", 5)
    with FolderRun(state, data, first_number=6, once=True) as run:
        run.to_the_end()
        assert "set first_number" in run.bad[0].reason
        assert run.totals["failed"] == 1


# Restarts.


def test_nothing_is_taken_twice_after_a_stop(data: Path, state: Path) -> None:
    for n in range(4):
        write_tif(data / f"a_{n}.tif", n)
    with FolderRun(state, data) as run:
        run.frames(3)  # the last one may be read already, and is not taken in
    write_tif(data / "a_4.tif", 4)
    with FolderRun(state, data) as run:
        run.until(lambda: run.totals["done"] == 5)
        run.for_a_while()
        assert run.numbers == [3, 4]
        assert run.starts == []
        assert run.totals == run.totals | {"received": 5, "done": 5, "missing": 0, "dropped": 0}


def test_what_a_crash_lost_is_read_again(data: Path, state: Path) -> None:
    for n in range(3):
        write_tif(data / f"a_{n}.tif", n)
    edf(data / "b.edf", 3)
    run = FolderRun(state, data, hold=True)
    run.frames(5)
    for taken in (run.taken[0], run.taken[3]):  # the second image of the stack is the first one lost
        run.ledger.end(taken.frame.key, "done")
    run.kill()
    with FolderRun(state, data) as run:
        run.until(lambda: run.totals["lost"] == 0 and len(run.taken) >= 4)
        run.for_a_while()
        again = {(Path(t.frame.metadata["file"]).name, t.frame.key.frame): t.again for t in run.taken}
        assert again == {
            ("a_1.tif", 1): True,
            ("a_2.tif", 2): True,
            ("b.edf", 1): True,
            ("b.edf", 2): False,
        }
        assert run.totals["dropped"] == 0


def test_an_ended_series_stays_ended(data: Path, state: Path) -> None:
    for n in range(2):
        write_tif(data / f"a_{n}.tif", n)
    for _ in range(3):
        with FolderRun(state, data, once=True) as run:
            run.to_the_end()
            last = run.events
        write_tif(data / "never.tmp", 0)
    assert last == [Exhausted()]


def test_a_sign_of_the_end_that_was_taken_still_stands(data: Path, state: Path) -> None:
    write_tif(data / "a_0.tif", 0)
    (data / "END").touch()
    for _ in range(2):
        with FolderRun(state, data, once=True, end_file="END") as run:
            run.to_the_end()
            last = run.events
    assert last == [Exhausted()]
    (data / "END").unlink()
    with FolderRun(state, data, once=True, end_file="END") as run:
        run.for_a_while()
        assert Exhausted() not in run.events
        (data / "END").touch()
        run.to_the_end()


# Configuration.


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "the key `path` is missing"),
        ({"path": ""}, "path: expected a folder"),
        ({"path": "d", "poll_s": 0}, "poll_s: expected more than 0"),
        ({"path": "d", "settle_s": -1}, "settle_s: expected 0 or more"),
        ({"path": "d", "first_number": -1}, "first_number: expected 0"),
        ({"path": "d", "number_pattern": "("}, "number_pattern: is no regular expression"),
        ({"path": "d", "position_pattern": r"\d"}, r"position_pattern: expected one of the groups \(\?P<x>"),
        ({"path": "d", "position_keys": list("xyzw")}, "position_keys: expected up to 3"),
        ({"path": "d", "numbers": "header"}, "number_key: goes with numbers"),
        ({"path": "d", "numbers": "count"}, 'series: with numbers = "count" expected "folder"'),
        ({"path": "d", "position_unit_um": 0}, "position_unit_um: expected more"),
    ],
)
def test_configuration_errors_name_the_key(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(table, Config, "config.toml: streams.laue.source")


def test_a_journal_that_cannot_be_used(data: Path, tmp_path: Path) -> None:
    (tmp_path / "folder-s.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(
        ConfigError, match=r"daemon\.state_dir: the journal .*folder-s\.sqlite cannot be used"
    ):
        open_source(Config(path=str(data)), "s", SourceContext(tmp_path))
