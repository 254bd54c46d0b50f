"""Which arrays make a series: gaps, restarts of the counter, late arrays, silence, restarts of the daemon."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon.flow.ranges import Ranges
from daemon.sources.areadetector import series as series_module
from daemon.sources.areadetector.codec import Array
from daemon.sources.areadetector.series import DISORDER, LARGEST_GAP, MOST_STARTS, SeriesBook
from daemon.sources.base import Arrival, Bad, Event, SeriesEnd, SeriesStart, Standing
from pipelines.images import EncodedImage

UNKNOWN: dict[str, Standing] = {}


def book_in(folder: Path, known: dict[str, Standing] = UNKNOWN, **options: Any) -> SeriesBook:
    return SeriesBook(folder / "note.json", known.get, **options)


def array(
    frame: int, stamp: float | None = None, shape: tuple[int, int] = (2, 3), kind: str = "<u2"
) -> Array:
    blob = memoryview(bytes(shape[0] * shape[1] * np.dtype(kind).itemsize))
    return Array(frame, stamp, EncodedImage(blob, shape, kind))


def told(events: Sequence[Event]) -> list[str | int]:
    """Starts as "start N", ends as "end", images as their numbers, failures as "bad N"."""
    said: list[str | int] = []
    for event in events:
        if isinstance(event, SeriesStart):
            said.append(f"start {event.first_frame}")
        elif isinstance(event, SeriesEnd):
            said.append("end")
        elif isinstance(event, Bad):
            said.append(f"bad {event.frame}")
        else:
            assert isinstance(event, Arrival)
            said.append(event.frame)
    return said


def take(book: SeriesBook, *arrays: Array) -> list[Event]:
    return [event for each in arrays for event in book.take(each)]


def test_numbers_go_on_from_the_first_that_came(tmp_path: Path) -> None:
    events = take(book_in(tmp_path), *(array(n, 100.0 + n) for n in (907, 908, 911, 912)))
    assert told(events) == ["start 907", 907, 908, 911, 912]
    names = {getattr(event, "detector_series", "") for event in events}
    assert len(names) == 1
    assert events[0].n_frames is None  # type: ignore[union-attr]


@pytest.mark.parametrize("stamps", [True, False])
def test_a_counter_that_starts_over_begins_a_series(tmp_path: Path, stamps: bool) -> None:
    numbers = [1, 2, 3, 1, 2, 0, 1]
    arrays = [array(n, 100.0 + k if stamps else None) for k, n in enumerate(numbers)]
    said = told(take(book_in(tmp_path), *arrays))
    assert said == ["start 1", 1, 2, 3, "end", "start 1", 1, 2, "end", "start 0", 0, 1]


def test_single_images_of_the_same_number_are_series_if_they_are_taken_anew(tmp_path: Path) -> None:
    book = book_in(tmp_path)
    assert told(take(book, array(1, 100.0), array(1, 101.0))) == ["start 1", 1, "end", "start 1", 1]
    # ProcessPlugin sends the last array again: same number, same time.
    assert told(take(book, array(1, 101.0))) == [1]


def test_late_arrays_belong_to_their_series(tmp_path: Path) -> None:
    """Plug-ins with several threads deliver out of order; the time stamp says which array is older."""
    book = book_in(tmp_path)
    said = told(take(book, *(array(n, 100.0 + n) for n in (10, 11, 14, 12, 13, 15, 13))))
    assert said == ["start 10", 10, 11, 14, 12, 13, 15, 13]  # the second 13 is a repeat: the tracker's matter
    assert told(take(book, array(9, 99.0))) == [9]  # before the first: the tracker says so
    without = book_in(tmp_path)
    assert told(take(without, *(array(n) for n in (10, 11, 14, 12, 13)))) == ["start 10", 10, 11, 14, 12, 13]
    assert told(take(without, array(13))) == ["end", "start 13", 13]


def test_a_late_array_that_is_too_late_is_a_restart(tmp_path: Path) -> None:
    """A clock that was set back must not swallow a series."""
    book = book_in(tmp_path)
    take(book, array(1, 500.0), array(2, 501.0), array(2 + DISORDER, 700.0))
    assert told(take(book, array(3, 600.0))) == [3]
    assert told(take(book, array(2, 90.0))) == ["end", "start 2", 2]


def test_a_jump_beyond_all_gaps_is_a_counter_that_was_set(tmp_path: Path) -> None:
    book = book_in(tmp_path)
    said = told(take(book, array(5), array(5 + LARGEST_GAP), array(6 + 2 * LARGEST_GAP)))
    assert said == ["start 5", 5, 5 + LARGEST_GAP, "end", f"start {6 + 2 * LARGEST_GAP}", 6 + 2 * LARGEST_GAP]


def test_another_form_begins_a_series(tmp_path: Path) -> None:
    book = book_in(tmp_path)
    said = told(
        take(book, array(1), array(2, shape=(3, 2)), array(3, shape=(3, 2)), array(4, None, (3, 2), "<u4"))
    )
    assert said == ["start 1", 1, "end", "start 2", 2, 3, "end", "start 4", 4]
    # The same pixels in another byte order are of the same form.
    assert told(take(book, array(5, None, (3, 2), ">u4"))) == [5]


def test_failed_arrays_count_and_begin_series_too(tmp_path: Path) -> None:
    book = book_in(tmp_path)
    bad = Array(4, 10.0, reason="broken")
    assert told(take(book, bad, array(5, 11.0), Array(7, 12.0, reason="x"), array(8, 13.0))) == [
        "start 4",
        "bad 4",
        5,
        "bad 7",
        8,
    ]
    assert told(take(book, Array(reason="no array at all"))) == ["bad None"]
    assert told(take(book, Array(1, 14.0, reason="x"), array(2, 15.0, (9, 9)))) == [
        "end",
        "start 1",
        "bad 1",
        2,
    ]


def test_so_many_numbers_make_a_series(tmp_path: Path) -> None:
    book = book_in(tmp_path, n_frames=4)
    events = take(book, *(array(n) for n in range(1, 8)))
    assert told(events) == ["start 1", 1, 2, 3, 4, "end", "start 5", 5, 6, 7]
    assert [e.n_frames for e in events if isinstance(e, SeriesStart)] == [4, 4]
    # 8, 9 and 10 were lost, around the end of the second series: each series misses its own.
    assert told(take(book, array(11), array(12))) == ["end", "start 9", 11, 12]
    assert told(take(book, array(13))) == ["end", "start 13", 13]
    # A restart of the counter is none of these.
    assert told(take(book, array(3))) == ["end", "start 3", 3]


def test_silence_ends_a_series(tmp_path: Path) -> None:
    book = book_in(tmp_path, idle_s=2.0, n_frames=4)
    assert told(take(book, array(1), array(2))) == ["start 1", 1, 2]
    assert book.silent(1.9) == []
    assert told(book.silent(2.1)) == ["end"]
    assert book.silent(50.0) == []
    assert told(take(book, array(7))) == ["start 7", 7]
    assert book_in(tmp_path).silent(1e9) == []


def test_series_that_begin_too_often_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = book_in(tmp_path)
    for n in range(MOST_STARTS):
        assert told(take(book, array(1, float(n)))) == (["end"] if n else []) + ["start 1", 1]
    refused = take(book, array(1, 1e6))
    assert told(refused) == ["bad None"]
    assert "more than 60 series began within a minute" in refused[0].reason  # type: ignore[union-attr]
    assert told(take(book, array(2, 1e6))) == [2]  # what belongs to the last one goes on
    later = time.monotonic() + 61
    monkeypatch.setattr(series_module.time, "monotonic", lambda: later)
    assert told(take(book, array(1, 2e6))) == ["end", "start 1", 1]


def test_a_complaint_is_said_once_a_series(tmp_path: Path) -> None:
    book = book_in(tmp_path)
    one = Array(1, 1.0, array(1).image, complaint="NDAttributes left out: x")
    two = Array(2, 2.0, array(1).image, complaint="NDAttributes left out: y")
    assert told(take(book, one, two, array(1, 3.0), one)) == [
        "start 1", "bad None", 1, 2, "end", "start 1", 1, "bad None", 1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("epoch", "stamp", "acquired"),
    [
        ("epics", 1149163200.25, 1780315200.25),
        ("unix", 1780315200.25, 1780315200.25),
        ("none", 1149163200.25, 0.0),
        ("epics", 12.5, 0.0),
        ("epics", -1.0, 0.0),
        ("epics", None, 0.0),
    ],
)
def test_times(tmp_path: Path, epoch: str, stamp: float | None, acquired: float) -> None:
    event = take(book_in(tmp_path, time_epoch=epoch), array(1, stamp))[-1]
    assert isinstance(event, Arrival)
    assert event.acquired == acquired


# After a restart of the daemon.


def open_series(folder: Path, *held: tuple[int, int], is_open: bool = True) -> dict[str, Standing]:
    name = json.loads((folder / "note.json").read_text())["series"]
    return {name: Standing(is_open, Ranges(held))}


def test_a_series_goes_on_after_a_restart(tmp_path: Path) -> None:
    take(book_in(tmp_path), *(array(n, 1.0 + n) for n in (5, 6, 7)))
    known = open_series(tmp_path, (5, 6))  # 7 was lost in the crash
    again = book_in(tmp_path, known, idle_s=30.0)
    assert again.resume() == []
    assert told(take(again, array(10, 20.0), array(11, 21.0))) == [10, 11]
    restarted = book_in(tmp_path, known)
    restarted.resume()
    assert told(take(restarted, array(5, 30.0))) == ["end", "start 5", 5]
    other_form = book_in(tmp_path, open_series(tmp_path, (5, 5)))
    other_form.resume()
    assert told(take(other_form, array(6, 31.0, (9, 9)))) == ["end", "start 6", 6]


def test_a_series_that_is_over_does_not_go_on(tmp_path: Path) -> None:
    take(book_in(tmp_path), array(5))
    for known in ({}, open_series(tmp_path, (5, 5), is_open=False)):
        book = book_in(tmp_path, known)
        assert book.resume() == []
        assert told(take(book, array(6))) == ["start 6", 6]
    known = open_series(tmp_path, (6, 6))
    long_ago = time.time() - 100
    os.utime(tmp_path / "note.json", (long_ago, long_ago))
    silent = book_in(tmp_path, known, idle_s=60.0)
    assert silent.resume() == [SeriesEnd(next(iter(known)))]
    assert told(take(silent, array(7))) == ["start 7", 7]


@pytest.mark.parametrize("note", [b"", b"{", b'{"series": 5}', b"\xff\xfe", b"[]"])
def test_a_broken_note_is_no_obstacle(tmp_path: Path, note: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "note.json").write_bytes(note)
    book = book_in(tmp_path)
    assert book.resume() == []
    assert "cannot be read, a new series begins" in caplog.text
    assert told(take(book, array(6))) == ["start 6", 6]


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = book_in(tmp_path / "absent")
    assert told(take(book, array(6), array(7))) == ["start 6", 6, 7]
    assert "after a restart a new series would begin" in caplog.text
