"""Shares that come and go, and disks that fail or hold very much."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testkit.folders import FolderRun, tif, write_tif

import daemon.sources.folder.reader
import daemon.sources.folder.source
from daemon.sources.folder.pattern import FilePattern
from daemon.sources.folder.watch import FolderWatch, is_away
from pipelines.files import open_images
from pipelines.frame import BadFrame


def test_a_share_that_goes_away_and_comes_back(data: Path, state: Path) -> None:
    away = data.parent / "elsewhere"
    half = tif(2, state.parent)[:60]
    with FolderRun(state, data / "*.tif", series_idle_s=2.5, patience_s=2.5) as run:
        for n in range(2):
            write_tif(data / f"a_{n}.tif", n)
        run.frames(2)
        (data / "a_2.tif").write_bytes(half)
        run.until(lambda: "a_2.tif" in run.source.problem)
        data.rename(away)
        run.until(lambda: run.source.problem.startswith(f"{data} cannot be read: no such file"))
        run.for_a_while(2.8)  # nobody's patience ends, nor a series, because a share is away
        assert run.bad == []
        assert run.ends == []
        write_tif(away / "a_3.tif", 3)
        away.rename(data)
        run.frames(3)
        write_tif(data / "a_2.tif", 2)
        run.frames(4)
        assert run.numbers == [0, 1, 3, 2]
        run.until(lambda: run.source.problem == "")
        assert run.totals == run.totals | {"received": 4, "done": 4, "missing": 0}


def test_a_share_that_is_not_there_at_the_start(data: Path, state: Path) -> None:
    with FolderRun(state, data / "later" / "*.tif") as run:
        run.until(lambda: f"{data}/later cannot be read: no such file or directory" in run.source.problem)
        write_tif(data / "later" / "a_0.tif", 0)
        run.frames(1)
        run.until(lambda: run.source.problem == "")


def test_the_empty_folder_below_a_share_is_not_the_share(data: Path, state: Path) -> None:
    """Unmounted, its folder is there and empty: a link to a folder of another disk looks the same."""
    below = Path("/dev/shm")
    if not below.is_dir() or below.stat().st_dev == data.stat().st_dev:
        pytest.skip("there is no other disk here")
    empty = below / f"grainwatch-{os.getpid()}"
    empty.mkdir()
    mount = data.parent / "mount"
    mount.symlink_to(data)
    try:
        with FolderRun(state, mount / "*.tif", series_idle_s=5.0) as run:
            write_tif(data / "a_0.tif", 0)
            run.frames(1)
            mount.unlink()
            mount.symlink_to(empty)
            run.until(lambda: "is the share mounted?" in run.source.problem)
            mount.unlink()
            mount.symlink_to(data)
            write_tif(data / "a_1.tif", 1)
            run.frames(2)
            assert run.numbers == [0, 1]
            assert run.starts == ["a_#.tif"]
    finally:
        empty.rmdir()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_share_that_breaks_off_while_it_is_read(
    data: Path, state: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The file is not to blame: it is read when the share is back, however long that takes."""
    broken = threading.Event()
    broken.set()

    def read(path: str, **options: Any) -> Iterator[Any]:
        if broken.is_set():
            try:
                raise OSError(number, os.strerror(number), path)
            except OSError as error:
                raise BadFrame(f"{path}: cannot be read as an image") from error
        yield from open_images(path, **options)

    monkeypatch.setattr(daemon.sources.folder.reader, "open_images", read)
    write_tif(data / "a_0.tif", 0)
    with FolderRun(state, data, patience_s=0.2) as run:
        run.until(lambda: f"{data}/a_0.tif" in run.source.problem)
        run.for_a_while(0.6)
        assert run.bad == []
        broken.clear()
        run.frames(1)
        run.until(lambda: run.source.problem == "")


def test_a_share_that_hangs_holds_up_nobody(data: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    def read(path: str, **options: Any) -> Iterator[Any]:
        answers.wait()
        yield from open_images(path, **options)

    monkeypatch.setattr(daemon.sources.folder.reader, "open_images", read)
    monkeypatch.setattr(daemon.sources.folder.reader, "SILENCE_S", 0.3)
    write_tif(data / "a_0.tif", 0)
    monkeypatch.setattr(daemon.sources.folder.source, "_CLOSE_S", 0.2)
    run = FolderRun(state, data)
    run.until(lambda: "does the share answer?" in run.source.problem)
    assert f"reading {data}/a_0.tif for" in run.source.problem
    began = time.monotonic()
    run.step()  # a sign of life
    run.stop()
    assert time.monotonic() - began < 30.0
    assert run.taken == []
    answers.set()
    with FolderRun(state, data) as run:
        assert [number for _, number, _ in run.frames(1)] == [0]


def test_a_file_on_a_bad_place_of_the_disk_does_not_hold_up_the_others(
    data: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str, **options: Any) -> Iterator[Any]:
        if path.endswith("a_0.tif"):
            raise OSError(errno.EIO, "Input/output error", path)
        yield from open_images(path, **options)

    monkeypatch.setattr(daemon.sources.folder.reader, "open_images", broken)
    for n in range(4):
        write_tif(data / f"a_{n}.tif", n)
    with FolderRun(state, data) as run:
        run.frames(3)
        assert run.numbers == [1, 2, 3]
        run.until(lambda: "a_0.tif" in run.source.problem)


def test_what_caused_an_error_says_whether_a_share_is_away() -> None:
    wrapped = BadFrame("no image")
    wrapped.__cause__ = OSError(errno.ESTALE, "stale")
    assert is_away(wrapped)
    assert not is_away(FileNotFoundError(errno.ENOENT, "gone"))
    assert not is_away(BadFrame("truncated"))


def test_a_full_disk_costs_the_journal_and_no_frame(data: Path, state: Path) -> None:
    with FolderRun(state, data) as run:
        write_tif(data / "a_0.tif", 0)
        run.frames(1)
        database = run.source._journal._db
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        for n in range(1, 200):
            write_tif(data / f"a_{n}_{'long' * 50}.tif", n)
        run.until(lambda: "disk is full" in run.source.problem)
        run.frames(200)
        database.execute("PRAGMA max_page_count = 1000000")
        write_tif(data / f"a_200_{'long' * 50}.tif", 200)
        run.frames(201)
        run.until(lambda: run.source.problem == "")


# Many files.


def test_files_that_were_taken_cost_next_to_nothing(data: Path) -> None:
    """A share's folder fills with tens of thousands: what is done is not looked at again."""
    n = 10_000
    for number in range(n):
        os.mknod(data / f"scan_{number:06d}.tif")
    watch = FolderWatch(FilePattern(str(data)), lambda folder, name: folder, 0.1, 0.0)
    watch.look()
    assert len(watch.pending) == n
    for file in list(watch.pending.values()):
        watch.finish(file)
    costs = []
    for _ in range(5):
        began = time.thread_time()
        watch.look()
        costs.append(time.thread_time() - began)
    assert watch.pending == {}
    assert min(costs) < 0.1  # 0.01 s where it was measured
