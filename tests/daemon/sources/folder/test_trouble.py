"""Files that are half written, changed, moved or forbidden."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testkit.folders import FolderRun, tif, write_tif

import daemon.sources.folder.reader
import daemon.sources.folder.source
from daemon.sources.base import Arrival
from daemon.sources.folder.pattern import FilePattern
from daemon.sources.folder.watch import COARSE_S, FolderWatch
from pipelines.files import open_images

# Half written.


def test_a_writer_that_pauses_longer_than_a_file_must_stand_still(data: Path, state: Path) -> None:
    whole = {n: tif(n, state.parent, (64, 64)) for n in range(4)}

    def write() -> None:
        for n, content in whole.items():
            with (data / f"a_{n}.tif").open("wb", buffering=0) as file:
                for piece in range(4):
                    file.write(content[piece * len(content) // 4 : (piece + 1) * len(content) // 4])
                    time.sleep(0.12)

    writer = threading.Thread(target=write)
    with FolderRun(state, data, patience_s=20.0) as run:
        writer.start()
        assert run.frames(4) == [("a_#.tif", n, n) for n in range(4)]
        writer.join()
        for arrival in (e for e in run.events if isinstance(e, Arrival)):
            pixels = arrival.image.array()
            assert pixels.shape == (64, 64)
            assert len(np.unique(pixels)) == 1  # no part of it is missing
        assert run.totals == run.totals | {"done": 4, "failed": 0, "dropped": 0}


def test_a_file_that_has_its_size_from_the_start(data: Path, state: Path) -> None:
    """As writers on SMB shares do: it could be read at any time, and would have zeros in it."""
    whole = tif(7, state.parent, (64, 64))
    with FolderRun(state, data, settle_s=2.0) as run, (data / "a_0.tif").open("wb", buffering=0) as file:
        file.truncate(len(whole))
        for at in range(0, len(whole), 1024):
            file.seek(at)
            file.write(whole[at : at + 1024])
            run.step()
        run.frames(1)
        arrival = run.events[-1]
        assert isinstance(arrival, Arrival)
        assert (arrival.image.array() == 7).all()


@pytest.mark.parametrize("content", ["half", "empty", "garbage"])
def test_what_is_never_complete_fails_by_its_name(data: Path, state: Path, content: str) -> None:
    whole = tif(1, state.parent)
    for n in (0, 2):
        write_tif(data / f"a_{n}.tif", n)
    with FolderRun(state, data) as run:
        run.frames(2)
        (data / "a_1.tif").write_bytes({"half": whole[:100], "empty": b"", "garbage": b"\0" * 500}[content])
        what = f"not complete yet: {data}/a_1.tif: cannot be read"
        run.until(lambda: run.bad or what in run.source.problem)
        run.until(lambda: run.bad)
        (bad,) = run.bad
        assert bad.reason.startswith(f"{data}/a_1.tif: cannot be read as an image")
        assert bad.frame == 1
        run.for_a_while(0.2)
        run.until(lambda: run.source.problem == "")
        write_tif(data / "a_3.tif", 3)
        run.frames(3)
        assert run.totals == run.totals | {"received": 4, "done": 3, "failed": 1, "missing": 0}


def test_each_file_stands_still_by_its_own_clock(data: Path, state: Path) -> None:
    """Times in the future or long ago, and clocks that run wrong, mean nothing."""
    for n, when in enumerate((1.5, -1e9 + 0.5, 15_000_000_000.5)):  # the year 2445
        os.utime(write_tif(data / f"a_{n}.tif", n), (when, when))
    with FolderRun(state, data) as run:
        run.frames(3)


def test_times_of_whole_seconds_are_trusted_less(data: Path, state: Path) -> None:
    path = write_tif(data / "a_0.tif", 0)
    with FolderRun(state, data) as run:
        began = time.monotonic()
        while time.monotonic() - began < 1.0:  # the share says the same time all the while
            os.utime(path, (1_700_000_000, 1_700_000_000))
            run.step()
        assert run.numbers == []
        run.frames(1)
        assert time.monotonic() - began >= COARSE_S


def test_renamed_into_place_is_taken_at_once(data: Path, state: Path) -> None:
    with FolderRun(state, data, settle_s=0.0) as run:
        for n in range(20):
            write_tif(data / f"a_{n}.tif.tmp", n).rename(data / f"a_{n}.tif")
            run.step()
        assert [value for _, _, value in run.frames(20)] == list(range(20))
        assert run.totals["failed"] == 0


WRITER = """
import sys, h5py, numpy as np
file = h5py.File(sys.argv[1], "w", libver="latest")
data = file.create_dataset("d", (0, 8, 9), "u2", maxshape=(None, 8, 9), chunks=(1, 8, 9))
x = file.create_dataset("x", (0,), "f8", maxshape=(None,))
for line in sys.stdin:
    exec(line)
    print(line, end="", flush=True)
"""
APPEND = (
    "n = len(data); x.resize(n + 1, 0); x[n] = n / 2; x.flush();"
    " data.resize(n + 1, 0); data[n] = n; data.flush()"
)


@pytest.fixture
def hdf5_writer(data: Path) -> Iterator[Callable[[str], None]]:
    command = [sys.executable, "-c", WRITER, str(data / "scan.h5")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def does(line: str) -> None:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == line + "\n"

        yield does
        process.stdin.close()


def test_an_hdf5_file_that_grows(data: Path, state: Path, hdf5_writer: Callable[[str], None]) -> None:
    with FolderRun(state, data / "*.h5", dataset="d", position_keys=["x"]) as run:
        hdf5_writer("file.flush()")
        run.until(lambda: "its writer has it open and lets nobody read" in run.source.problem)
        hdf5_writer("file.swmr_mode = True")
        for n in range(4):
            hdf5_writer(APPEND)
            run.frames(n + 1)
        hdf5_writer("data.resize(6, 0); data.flush()")  # room, and no pixels
        run.for_a_while()
        assert len(run.taken) == 4
        hdf5_writer("data[4] = 4; data[5] = 5; data.flush(); file.close()")
        assert run.frames(6) == [("scan.h5", n, n) for n in range(6)]
        assert [t.frame.position_um for t in run.taken] == [*((n / 2,) for n in range(4)), None, None]
        run.until(lambda: run.source.problem == "")
        assert run.totals == run.totals | {"done": 6, "failed": 0, "dropped": 0}


def test_an_hdf5_file_that_never_stands_still(
    data: Path, state: Path, hdf5_writer: Callable[[str], None]
) -> None:
    hdf5_writer("file.swmr_mode = True")
    with FolderRun(state, data / "*.h5", dataset="d", settle_s=1000.0) as run:
        for n in range(5):
            hdf5_writer(APPEND)
            run.frames(n + 1)


def test_a_restart_while_an_hdf5_file_grows(
    data: Path, state: Path, hdf5_writer: Callable[[str], None]
) -> None:
    hdf5_writer("file.swmr_mode = True")
    for _ in range(3):
        hdf5_writer(APPEND)
    run = FolderRun(state, data / "scan.h5", dataset="d", hold=True)
    run.frames(3)
    for taken in (run.taken[0], run.taken[2]):
        run.ledger.end(taken.frame.key, "done")
    run.kill()
    hdf5_writer(APPEND)
    with FolderRun(state, data / "scan.h5", dataset="d") as run:
        run.frames(2)
        hdf5_writer(APPEND)
        assert [n for _, n, _ in run.frames(3)] == [1, 3, 4]
    hdf5_writer("file.close()")
    for _ in range(2):  # closing it changes its time, and is no news
        with FolderRun(state, data / "scan.h5", dataset="d", once=True) as run:
            run.to_the_end()
            assert run.numbers == []
            assert run.totals == run.totals | {"dropped": 0, "failed": 0}


def test_an_hdf5_file_of_a_writer_that_died(
    data: Path, state: Path, hdf5_writer: Callable[[str], None]
) -> None:
    hdf5_writer("file.swmr_mode = True")
    hdf5_writer(APPEND)
    with suppress(AssertionError):
        hdf5_writer("import os; os._exit(1)")
    with FolderRun(state, data / "scan.h5", dataset="d", once=True) as run:
        run.to_the_end()
        assert run.numbers == [0]


def test_an_hdf5_file_whose_writer_waits_for_a_trigger(
    data: Path, state: Path, hdf5_writer: Callable[[str], None]
) -> None:
    hdf5_writer("file.swmr_mode = True")
    with FolderRun(state, data / "scan.h5", dataset="d", patience_s=0.2) as run:
        run.until(lambda: "not complete yet" in run.source.problem)
        run.for_a_while(0.6)
        assert run.bad == []
        hdf5_writer(APPEND)
        run.frames(1)
        run.until(lambda: run.source.problem == "")


# Changed, moved, forbidden.


def test_names_in_no_known_encoding(data: Path, state: Path) -> None:
    """As old Windows programs leave them on shares: a micro sign of latin-1."""
    folder = os.fsencode(data) + b"/5\xb5m"
    os.mkdir(folder)
    whole = tif(4, state.parent)
    for name in (b"/s\xb5_0.tif", b"/s\xb5_1.tif", b"/bad\xb5_2.tif"):
        with open(folder + name, "wb") as file:
            file.write(whole if b"bad" not in name else whole[:30])
    for life in range(2):
        with FolderRun(state, data / "**" / "*.tif", once=True) as run:
            run.to_the_end()
            assert len(run.taken) == (2 if life == 0 else 0)
            assert len(run.bad) == (1 if life == 0 else 0)
            for event in run.events:
                str(event).encode()
                if isinstance(event, Arrival):
                    assert event.metadata["file"].endswith(f"5\\udcb5m/s\\udcb5_{event.frame}.tif")


def test_what_went_away_before_it_was_read_is_missing(data: Path, state: Path) -> None:
    whole = tif(1, state.parent)
    with FolderRun(state, data, patience_s=20.0) as run:
        write_tif(data / "a_0.tif", 0)
        (data / "a_1.tif").write_bytes(whole[:50])
        run.until(lambda: "a_1.tif" in run.source.problem)
        (data / "a_1.tif").unlink()
        write_tif(data / "a_2.tif", 2)
        run.frames(2)
        run.until(lambda: run.source.problem == "")
        assert run.totals == run.totals | {"received": 2, "done": 2, "missing": 1}


def test_a_file_that_is_moved_after_it_was_read_is_not_another_one(data: Path, state: Path) -> None:
    with FolderRun(state, data / "**" / "*.tif") as run:
        for n in range(3):
            write_tif(data / f"a_{n}.tif", n)
        run.frames(3)
        (data / "seen").mkdir()
        for n in range(3):
            (data / f"a_{n}.tif").rename(data / "seen" / f"a_{n}_seen.tif")
        run.for_a_while()
        write_tif(data / "a_3.tif", 3)
        run.frames(4)
        assert run.numbers == [0, 1, 2, 3]
        assert run.starts == ["a_#.tif"]
    with FolderRun(state, data / "**" / "*.tif") as run:
        run.for_a_while()
        assert run.numbers == []


def test_an_inode_that_is_used_again_is_no_file_that_was_moved(data: Path) -> None:
    a, kept, b = data / "a_0.tif", data / ".kept", data / "b_0.tif"
    watch = FolderWatch(FilePattern(str(data), (".*",)), lambda folder, name: folder, 0.01, 0.0)
    write_tif(a, 1)
    os.utime(a, ns=(1, 1_000_000_001))
    assert watch.look()
    (file,) = watch.pending.values()
    watch.finish(file)
    os.link(a, kept)
    copy = write_tif(data / ".copy", 1)
    os.utime(copy, ns=(1, 1_000_000_001))
    copy.rename(a)  # as a copying program does that keeps times
    assert watch.look()
    assert not watch.pending
    write_tif(a, 2, (20, 20))
    assert watch.look()
    assert list(watch.pending) == [str(a)]
    kept.rename(b)
    assert watch.look()
    assert sorted(watch.pending) == [str(a), str(b)]


def test_a_link_that_leads_in_a_circle_harms_no_other_file(data: Path, state: Path) -> None:
    (data / "a_7.tif").symlink_to(data / "a_7.tif")
    with FolderRun(state, data / "*.tif") as run:
        write_tif(data / "a_0.tif", 0)
        run.frames(1)
        assert f"{data}/a_7.tif cannot be read: too many levels of symbolic links" in run.source.problem
        (data / "a_7.tif").unlink()
        write_tif(data / "a_7.tif", 7)
        assert run.frames(2) == [("a_#.tif", 0, 0), ("a_#.tif", 7, 7)]
        run.until(lambda: run.source.problem == "")


def test_a_file_that_changes_while_it_is_read(
    data: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: str, **options: Any) -> Iterator[Any]:
        for image in open_images(path, **options):
            if not changed:
                changed.append(path)
                write_tif(Path(path), 8, (20, 20))
            yield image

    changed: list[str] = []
    monkeypatch.setattr(daemon.sources.folder.reader, "open_images", slow)
    write_tif(data / "a_0.tif", 1)
    with FolderRun(state, data) as run:
        assert run.frames(1) == [("a_#.tif", 0, 8)]
        run.for_a_while()
        assert len(run.taken) == len(changed) == 1


def test_a_file_that_was_read_may_go(data: Path, state: Path) -> None:
    with FolderRun(state, data) as run:
        for n in range(5):
            path = write_tif(data / f"a_{n}.tif", n)
            run.frames(n + 1)
            path.unlink()
        assert run.totals == run.totals | {"received": 5, "done": 5, "missing": 0}
        run.until(lambda: run.source.problem == "")


def without_override(what: Callable[[], None]) -> None:
    """Run something in a thread that may not read what it is forbidden to, also when root runs the tests."""

    def work() -> None:
        if os.geteuid() == 0:
            drop_capabilities()
        what()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(work).result()


def drop_capabilities() -> None:
    # capset(2) acts on the calling thread, and threads that it starts inherit.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0


def test_what_may_not_be_read(data: Path, state: Path) -> None:
    def run_it() -> None:
        with FolderRun(state, data / "**" / "*.tif", patience_s=20.0) as run:
            run.until(lambda: f"{data}/a_1.tif: cannot be read: permission denied" in run.source.problem)
            run.until(lambda: f"{data}/locked cannot be read: permission denied" in run.source.problem)
            write_tif(data / "a_2.tif", 2)
            (data / "a_1.tif").chmod(0o600)
            run.frames(3)
            (data / "locked").chmod(0o700)
            run.frames(4)
            assert sorted(run.numbers) == [0, 1, 2, 9]
            run.until(lambda: run.source.problem == "")

    write_tif(data / "a_0.tif", 0)
    write_tif(data / "a_1.tif", 1).chmod(0)
    write_tif(data / "locked" / "a_9.tif", 9)
    (data / "locked").chmod(0)
    without_override(run_it)


def test_a_file_that_stays_forbidden_fails(data: Path, state: Path) -> None:
    def run_it() -> None:
        with FolderRun(state, data) as run:
            run.until(lambda: run.bad)
            assert (run.bad[0].frame, run.totals["failed"]) == (1, 1)
            assert "a_1.tif" in run.bad[0].reason

    write_tif(data / "a_0.tif", 0)
    write_tif(data / "a_1.tif", 1).chmod(0)
    without_override(run_it)
