from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.flow.ledger import Ledger, Series
from daemon.flow.ledger_store import audit
from daemon.flow.series import MOST_OPEN, MOST_UNANNOUNCED, SeriesTracker, Taken
from daemon.sinks.base import SeriesOpened
from daemon.sources.base import Arrival, Bad, Event, Exhausted, Idle, SeriesEnd, SeriesStart
from grainwatch.config import ScanTable
from pipelines.frame import PlainImage


class Bench:
    """A tracker over a real ledger."""

    def __init__(self, path: Path, scan: ScanTable | None = None) -> None:
        self.path = path
        self.scan = scan
        self.opened: list[SeriesOpened] = []
        self.ledger = Ledger(path)
        self.restart_from(self.ledger.recover())

    def restart_from(self, series: list[Series]) -> None:
        self.tracker = SeriesTracker("s", self.ledger, self.scan, series, self.opened.append)

    def take(self, *events: Event) -> list[Taken]:
        return [t for e in events if (t := self.tracker.take(e)) is not None]

    def finish(self, *taken: Taken) -> None:
        for t in taken:
            self.ledger.end(t.frame.key, "done")

    @property
    def totals(self) -> dict[str, int]:
        total = self.ledger.totals("s")
        assert total["received"] == sum(total[k] for k in ("done", "failed", "dropped", "lost", "in_flight"))
        return total

    def close(self) -> None:
        self.ledger.close()
        assert audit(self.path) == []


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "ledger.sqlite")
    yield bench
    bench.close()


def image(
    frame: int, series: str = "1/a", shape: tuple[int, int] = (4, 5), dtype: str = "u2", channel: str = ""
) -> Arrival:
    return Arrival(series, frame, PlainImage(np.zeros(shape, dtype)), channel)


def test_each_start_is_a_series_of_its_own(bench: Bench) -> None:
    for _ in range(2):
        taken = bench.take(SeriesStart("1/a", 2), image(0), image(1), SeriesEnd("1/a"))
        bench.finish(*taken)
    uids = [o.series_uid for o in bench.opened]
    assert len(set(uids)) == 2
    assert [len(u) for u in uids] == [32, 32]
    assert bench.totals["done"] == 4
    assert bench.totals["missing"] == 0


def test_numbers_out_of_order_repeated_and_missing(bench: Bench) -> None:
    taken = bench.take(SeriesStart("1/a", 6), image(2), image(0), image(2), image(4))
    assert [t.frame.key.frame for t in taken] == [2, 0, 4]
    assert bench.totals["dropped"] == 1
    assert bench.totals["missing"] == 2
    assert "came again" in bench.tracker.last_error
    bench.finish(*taken)
    bench.take(SeriesEnd("1/a"))
    assert bench.totals["missing"] == 3


def test_an_image_without_a_start_fails_with_its_reason(bench: Bench) -> None:
    assert bench.take(image(3, "9/z")) == []
    assert bench.totals["failed"] == 1
    assert "9/z, which did not start" in bench.tracker.last_error


def test_an_image_after_the_end_fails_with_its_reason(bench: Bench) -> None:
    bench.finish(*bench.take(SeriesStart("1/a"), image(0)))
    assert bench.take(SeriesEnd("1/a"), image(1)) == []
    assert "after the end of series 1/a" in bench.tracker.last_error
    assert (bench.totals["failed"], bench.totals["missing"]) == (1, 0)


def test_a_start_closes_what_is_open(bench: Bench) -> None:
    bench.finish(*bench.take(SeriesStart("1/a", 10), image(0), SeriesStart("2/b"), image(0, "2/b")))
    (closed,) = bench.ledger.take_completed()
    assert closed.uid == bench.opened[0].series_uid
    assert closed.counts()["missing"] == 9


def test_an_end_without_a_start_does_nothing(bench: Bench) -> None:
    bench.take(SeriesEnd("1/a"), SeriesStart("2/b"), SeriesEnd("1/a"))
    assert bench.tracker.series_uid == bench.opened[0].series_uid


@pytest.mark.parametrize(("shape", "dtype"), [((5, 4), "u2"), ((4, 5), "u4")])
def test_a_detector_that_changes_in_mid_series_fails_those_frames(
    bench: Bench, shape: tuple[int, int], dtype: str
) -> None:
    taken = bench.take(SeriesStart("1/a"), image(0), image(1, shape=shape, dtype=dtype), image(2))
    assert [t.frame.key.frame for t in taken] == [0, 2]
    assert bench.totals["failed"] == 1
    assert f"{shape[0]} x {shape[1]} uint" in bench.tracker.last_error
    assert "began with 4 x 5 uint16" in bench.tracker.last_error


def test_channels_may_differ_in_form_and_are_accounted_apart(bench: Bench) -> None:
    taken = bench.take(
        SeriesStart("1/a", 2, channels=("low", "high")),
        image(0, channel="low"),
        image(0, channel="high", dtype="u4"),
        image(1, channel="low"),
    )
    assert len(taken) == 3
    bench.finish(*taken)
    bench.take(SeriesEnd("1/a"))
    assert bench.totals["missing"] == 1


def test_a_channel_that_was_not_announced_is_taken_and_said(bench: Bench) -> None:
    assert len(bench.take(SeriesStart("1/a"), image(0, channel="x"))) == 1
    assert "'x' was not announced" in bench.tracker.last_error


def test_bad_messages_with_and_without_a_number(bench: Bench) -> None:
    bench.take(
        Bad("garbage"),
        SeriesStart("1/a", 4),
        Bad("garbage"),
        Bad("wrong blob size", "1/a", 1),
        Bad("wrong blob size", "1/a", 1),
        Bad("wrong blob size", "8/y", 5),
    )
    totals = bench.totals
    assert (totals["failed"], totals["dropped"], totals["received"]) == (4, 1, 5)
    bench.take(SeriesEnd("1/a"))
    assert bench.totals["missing"] == 3


def test_what_is_no_frame_of_a_channel_makes_no_frames_missing(bench: Bench) -> None:
    taken = bench.take(
        SeriesStart("1/a", 3, channels=("low", "high")),
        *(image(n, channel=c) for n in range(3) for c in ("low", "high")),
        Bad("garbage"),
        image(0, channel="low"),
        image(1, channel="odd"),
        SeriesEnd("1/a"),
        image(2, channel="odder"),
    )
    bench.finish(*taken)
    assert (bench.totals["received"], bench.totals["done"]) == (10, 7)
    assert (bench.totals["failed"], bench.totals["dropped"], bench.totals["missing"]) == (2, 1, 0)


def test_a_message_that_failed_as_a_whole_fails_the_frame_in_all_channels(tmp_path: Path) -> None:
    dead = Bench(tmp_path / "ledger.sqlite")
    dead.finish(*dead.take(SeriesStart("1/a", 2, channels=("low", "high")), image(0, channel="low")))
    dead.ledger._flush()
    # Also after a restart in mid-series, when no start says which channels there are.
    bench = Bench(tmp_path / "ledger.sqlite")
    bench.take(Bad("truncated", "1/a", 1), SeriesEnd("1/a"))
    totals = bench.totals
    assert (totals["failed"], totals["done"], totals["missing"]) == (2, 1, 1)
    bench.close()


def test_channels_that_nobody_announced_cannot_go_on_for_ever(bench: Bench) -> None:
    taken = bench.take(SeriesStart("1/a", 1), *(image(0, channel=f"c{n}") for n in range(100)))
    assert len(taken) == MOST_UNANNOUNCED
    bench.finish(*taken)
    assert bench.totals["failed"] == 100 - MOST_UNANNOUNCED


@pytest.mark.parametrize("number", [5_000_000, 40])
def test_a_number_far_beyond_those_announced_makes_none_missing(bench: Bench, number: int) -> None:
    bench.finish(*bench.take(SeriesStart("1/a", 10), image(0), image(number)))
    assert f"number {number} makes no sense, expected 0 to 9" in bench.tracker.last_error
    bench.take(SeriesEnd("1/a"))
    assert (bench.totals["failed"], bench.totals["missing"]) == (1, 9)


@pytest.mark.parametrize("number", [-1, 2**62])
def test_a_number_that_makes_no_sense_is_no_gap(bench: Bench, number: int) -> None:
    assert bench.take(SeriesStart("1/a", 10), image(number)) == []
    assert bench.totals["failed"] == 1
    assert bench.totals["missing"] == 0


def test_more_images_than_announced_are_taken(bench: Bench) -> None:
    assert len(bench.take(SeriesStart("1/a", 1), image(0), image(1))) == 2


def test_a_series_goes_on_after_the_daemon_died(tmp_path: Path) -> None:
    dead = Bench(tmp_path / "ledger.sqlite")
    taken = dead.take(SeriesStart("1/a", 10), image(0), image(1))
    dead.finish(taken[0])
    dead.ledger._flush()
    bench = Bench(tmp_path / "ledger.sqlite")
    taken = bench.take(image(5), image(1), image(0))
    assert [(t.frame.key.frame, t.again) for t in taken] == [(5, False), (1, True)]
    assert {t.frame.key.series_uid for t in taken} == {dead.opened[0].series_uid}
    assert bench.opened[0].series_uid == dead.opened[0].series_uid
    assert bench.opened[0].n_frames == 10
    bench.finish(*taken)
    bench.take(SeriesEnd("1/a"))
    totals = bench.totals
    assert (totals["done"], totals["dropped"], totals["lost"], totals["missing"]) == (3, 1, 0, 7)
    bench.close()


def test_after_a_restart_a_start_of_the_same_name_is_a_new_series(tmp_path: Path) -> None:
    dead = Bench(tmp_path / "ledger.sqlite")
    dead.take(SeriesStart("1/a", 10), image(0))
    dead.ledger._flush()
    bench = Bench(tmp_path / "ledger.sqlite")
    taken = bench.take(SeriesStart("1/a", 10), image(0))
    assert taken[0].frame.key.series_uid != dead.opened[0].series_uid
    assert not taken[0].again
    bench.finish(*taken)
    assert bench.totals["lost"] == 1
    bench.close()
    assert len(Ledger(tmp_path / "ledger.sqlite").recover()) == 1


def test_of_two_open_series_of_one_name_the_later_goes_on(tmp_path: Path) -> None:
    dead = Bench(tmp_path / "ledger.sqlite")
    for _ in range(2):
        dead.ledger.open_series("s", "1/a", 0, None, ("",), 1.0)
    bench = Bench(tmp_path / "ledger.sqlite")
    (taken,) = bench.take(image(0))
    bench.finish(taken)
    bench.take(SeriesEnd("1/a"))
    assert len(bench.ledger.take_completed()) == 2
    bench.close()
    assert Ledger(tmp_path / "ledger.sqlite").recover() == []


def test_an_orderly_stop_lets_a_series_go_on(tmp_path: Path) -> None:
    first = Bench(tmp_path / "ledger.sqlite")
    first.finish(*first.take(SeriesStart("1/a", 10), image(0)))
    first.tracker.stop()
    assert len(first.ledger.take_completed()) == 1
    first.close()
    second = Bench(tmp_path / "ledger.sqlite")
    second.finish(*second.take(image(1), SeriesEnd("1/a")))
    assert second.totals["missing"] == 8
    second.close()


def test_a_source_that_is_exhausted_closes_the_series(bench: Bench) -> None:
    bench.finish(*bench.take(SeriesStart("1/a", 1), image(0), Exhausted()))
    assert len(bench.ledger.take_completed()) == 1


def test_frames_know_their_place_in_the_scan(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "ledger.sqlite", ScanTable(shape=(2, 2), snake=True))
    start = SeriesStart("1/a", first_frame=1)
    taken = bench.take(start, *(image(n) for n in range(1, 6)))
    assert [t.frame.grid_index for t in taken] == [(0, 0), (1, 0), (1, 1), (0, 1), None]
    assert bench.opened[0].scan_shape == (2, 2)
    bench.close()


names = st.sampled_from(["1/a", "2/b"])
events = st.one_of(
    st.builds(SeriesStart, names, st.sampled_from([None, 3])),
    st.builds(
        image,
        st.integers(-1, 5),
        names,
        st.sampled_from([(4, 5), (5, 4)]),
        channel=st.sampled_from(["", "x"]),
    ),
    st.builds(Bad, st.just("bad"), st.one_of(st.none(), names), st.one_of(st.none(), st.integers(-1, 5))),
    st.builds(SeriesEnd, names),
    st.just(Idle()),
    st.just(Exhausted()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(events, st.booleans()), max_size=40))
def test_whatever_a_detector_says_the_accounts_balance(
    tmp_path_factory: pytest.TempPathFactory, story: list[tuple[Event, bool]]
) -> None:
    bench = Bench(tmp_path_factory.mktemp("story") / "ledger.sqlite")
    arrivals = sum(isinstance(e, Arrival | Bad) for e, _ in story)
    flying: list[Taken] = []
    for event, finish in story:
        flying += bench.take(event)
        assert bench.totals["in_flight"] == len(flying)
        if finish and flying:
            bench.finish(flying.pop(0))
    bench.finish(*flying)
    assert bench.totals["received"] == arrivals
    assert bench.ledger.balance() == []
    bench.close()


def test_series_that_run_beside_each_other_stay_open(bench: Bench) -> None:
    taken = bench.take(
        SeriesStart("outer", 3, beside=True),
        image(0, "outer"),
        SeriesStart("inner", 2, beside=True),
        image(0, "inner"),
        image(1, "outer"),
        Bad("garbage"),
        SeriesEnd("inner"),
        image(2, "outer", shape=(4, 5)),
        SeriesEnd("outer"),
    )
    bench.finish(*taken)
    outer, inner = bench.opened
    assert [(t.frame.key.series_uid, t.frame.key.frame) for t in taken] == [
        (outer.series_uid, 0),
        (inner.series_uid, 0),
        (outer.series_uid, 1),
        (outer.series_uid, 2),
    ]
    assert bench.tracker.series_uid == ""
    assert (bench.totals["done"], bench.totals["failed"], bench.totals["missing"]) == (4, 1, 1)


def test_no_more_than_a_few_series_stay_open_beside_each_other(bench: Bench) -> None:
    bench.take(*(SeriesStart(str(n), 1, beside=True) for n in range(MOST_OPEN + 2)))
    closed = {s.detector_series for s in bench.ledger.take_completed()}
    assert closed == {"0", "1"}
    # One that does not run beside others ends all of them, and the same name is not open twice.
    bench.take(SeriesStart("9", 1, beside=True))
    assert {s.detector_series for s in bench.ledger.take_completed()} == {"9"}
    bench.take(SeriesStart("last", 1))
    assert len(bench.ledger.take_completed()) == MOST_OPEN


def test_an_end_may_say_how_many_frames_there_were(bench: Bench) -> None:
    bench.finish(*bench.take(SeriesStart("1/a", 100), image(0), image(2)))
    bench.take(SeriesEnd("1/a", 4))
    assert bench.totals["missing"] == 2


def test_the_scan_of_a_series_counts_where_the_configuration_has_none(tmp_path: Path) -> None:
    own = ScanTable(shape=(5, 4), step_um=(1.0, 2.0))
    placed = Arrival("1/a", 0, PlainImage(np.zeros((4, 5), "u2")), grid_index=(3, 2))
    for configured, index in ((None, (3, 2)), (ScanTable(shape=(2, 2)), (0, 0))):
        bench = Bench(tmp_path / f"{index}.sqlite", configured)
        (taken,) = bench.take(SeriesStart("1/a", 20, scan=own), placed)
        assert taken.frame.grid_index == index
        assert bench.opened[0].scan == (configured or own)
        assert bench.opened[0].scan_shape == (configured or own).shape
        bench.finish(taken)
        bench.close()
