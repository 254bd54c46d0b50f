"""Documents in any order and state: which become frames, where these lie, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from daemon.flow.ledger import Ledger
from daemon.flow.ledger_store import audit
from daemon.flow.series import SeriesTracker
from daemon.sinks.base import SeriesOpened
from daemon.sources.base import Arrival, Bad, Event, SeriesEnd, SeriesStart
from daemon.sources.bluesky.documents import MOST_DRAINING, Documents, Rules
from daemon.sources.bluesky.framing import Document

MOTORS = {
    "x": {"dtype": "number", "shape": [], "source": "s", "units": "mm"},
    "y": {"dtype": "number", "shape": [], "source": "s", "units": "um"},
}
INLINE = {"dtype": "array", "shape": [4, 5], "source": "s"}
STREAMED = {"dtype": "array", "shape": [1, 4, 5], "source": "s", "external": "STREAM:"}


def image(value: int) -> Any:
    return np.full((4, 5), value, np.uint16)


class Bench:
    """Documents of one rule set, at a time that the test sets."""

    def __init__(self, **rules: Any) -> None:
        self.documents = Documents(Rules(**rules), "s")
        self.now = 0.0

    def take(self, kind: str, /, **body: Any) -> list[Event]:
        return self.documents.take(Document(kind, body), self.now) + self.due()

    def due(self) -> list[Event]:
        return self.documents.due(self.now, 1000)

    def start(self, run: str = "r", **body: Any) -> list[Event]:
        dimensions = [[["y"], "primary"], [["x"], "primary"]]
        grid = {
            "num_points": 6, "shape": [2, 3], "extents": [[0, 10], [1.0, 0.0]], "snaking": [False, True],
            "hints": {"dimensions": dimensions}, "plan_name": "grid_scan",
        }  # fmt: skip
        return self.take("start", uid=run, time=1.0, **{**grid, **body})

    def describe(self, run: str = "r", camera: Any = INLINE, **body: Any) -> list[Event]:
        keys = {"camera": camera, **MOTORS}
        told = {"uid": f"d-{run}", "run_start": run, "name": "primary", "data_keys": keys}
        return self.take("descriptor", **{**told, **body})

    def event(self, seq_num: int, run: str = "r", **data: Any) -> list[Event]:
        times = {"camera": 1000.0 + seq_num}
        return self.take(
            "event", descriptor=f"d-{run}", seq_num=seq_num, time=7.0, data=data, timestamps=times
        )

    def stop(self, events: int | None, run: str = "r", status: str = "success") -> list[Event]:
        counted = {} if events is None else {"num_events": {"primary": events}}
        return self.take("stop", run_start=run, exit_status=status, **counted)

    def resource(self, file: Path, run: str = "r", **body: Any) -> list[Event]:
        told = {
            "uid": f"s-{run}", "run_start": run, "data_key": "camera", "mimetype": "application/x-hdf5",
            "uri": f"file://localhost{file}", "parameters": {"dataset": "/entry/data/data"},
        }  # fmt: skip
        return self.take("stream_resource", **{**told, **body})

    def streamed(
        self, first: int, stop: int, run: str = "r", seq: tuple[int, int] | None = None
    ) -> list[Event]:
        numbers = seq or (first + 1, stop + 1)
        return self.take(
            "stream_datum",
            stream_resource=f"s-{run}",
            descriptor=f"d-{run}",
            indices={"start": first, "stop": stop},
            seq_nums={"start": numbers[0], "stop": numbers[1]},
        )


def stack(path: Path, frames: int, first: int = 0) -> Path:
    with h5py.File(path, "w") as file:
        data = np.stack([image(first + n) for n in range(frames)])
        file.create_dataset("/entry/data/data", data=data, chunks=(1, 4, 5), maxshape=(None, 4, 5))
    return path


def frames(events: list[Event]) -> list[tuple[int, int]]:
    return [(e.frame, int(e.image.array()[0, 0])) for e in events if isinstance(e, Arrival)]


def reasons(events: list[Event]) -> list[str]:
    return [e.reason for e in events if isinstance(e, Bad)]


# A run and its place.


def test_how_micrographs_are_taken_goes_with_each_frame() -> None:
    bench = Bench()
    said = {"pixel_size_um": 0.25, "detector": "BSE", "data_bar_px": 0}
    bench.start(**said, vendor="x" * 999, voltage_kV=10**40, instrument=["no text"])
    bench.describe()
    _, first = bench.event(1, camera=image(9), x=1.0, y=0.0)
    assert isinstance(first, Arrival)
    assert first.metadata == {"run": "r", "seq_num": 1, "motors": {"x": 1.0, "y": 0.0}, **said}


def test_an_event_with_its_image_and_where_it_was_taken() -> None:
    bench = Bench()
    assert bench.start() + bench.describe() == []
    start, first = bench.event(1, camera=image(9), x=1.0, y=0.0)
    assert isinstance(start, SeriesStart)
    assert (start.detector_series, start.n_frames, start.first_frame, start.beside) == ("r", 6, 1, True)
    assert start.scan is not None
    # x runs from 1 mm to 0, y from 0 to 10 um: the index grows with the coordinate.
    assert (start.scan.shape, start.scan.step_um) == ((3, 2), (500.0, 10.0))
    assert isinstance(first, Arrival)
    assert (first.frame, first.grid_index, first.position_um) == (1, (2, 0), (1000.0, 0.0))
    assert first.acquired == 1001.0
    assert first.metadata == {"run": "r", "seq_num": 1, "motors": {"x": 1.0, "y": 0.0}}
    (fourth,) = bench.event(4, camera=image(9), x=0.0, y=10.0)
    assert isinstance(fourth, Arrival)
    assert fourth.grid_index == (0, 1)
    assert bench.stop(4) == [SeriesEnd("r", 4)]


def test_a_run_without_images_is_no_series() -> None:
    bench = Bench()
    bench.start()
    bench.take("descriptor", uid="d-r", run_start="r", name="primary", data_keys=MOTORS)
    bench.take("descriptor", uid="b", run_start="r", name="baseline", data_keys={"camera": INLINE})
    assert bench.event(1, x=1.0) + bench.take("event", descriptor="b", seq_num=1, data={}) == []
    assert bench.stop(1) == []
    assert bench.documents.open_runs == 0


def test_motors_without_a_unit_give_a_map_in_points() -> None:
    for unit, step in (("", ()), ("mm", (500.0, 10000.0))):
        bench = Bench(position_unit=unit)
        bench.start()
        keys = {"camera": INLINE, **{m: {**key, "units": None} for m, key in MOTORS.items()}}
        bench.describe(data_keys=keys)
        start, first = bench.event(1, camera=image(1), x=1.0, y=0.0)
        assert isinstance(start, SeriesStart)
        assert isinstance(first, Arrival)
        assert start.scan is not None
        assert start.scan.step_um == step
        assert first.grid_index == (2, 0)
        assert (first.position_um is None) == (unit == "")


def test_an_angle_is_no_length() -> None:
    bench = Bench(position_unit="mm")
    bench.start()
    keys = {"camera": INLINE, "x": MOTORS["x"], "y": {**MOTORS["y"], "units": "deg"}}
    bench.describe(data_keys=keys)
    start, first = bench.event(1, camera=image(1), x=1.0, y=0.0)
    assert isinstance(start, SeriesStart)
    assert isinstance(first, Arrival)
    assert start.scan is not None
    assert (start.scan.shape, start.scan.step_um, first.position_um) == ((3, 2), (), None)


def test_two_frames_at_each_point_are_placed_by_their_positions() -> None:
    bench = Bench()
    bench.start(num_points=6)
    bench.describe()
    found = [
        bench.event(2 * n + k + 1, camera=image(1), x=1.0 - 0.5 * n, y=0.0)[-1]
        for n in range(3)
        for k in (0, 1)
    ]
    places = [a.grid_index for a in found if isinstance(a, Arrival)]
    assert places == [(2, 0), (2, 0), (1, 0), (1, 0), (0, 0), (0, 0)]


def test_several_images_an_event_take_a_number_each() -> None:
    bench = Bench()
    bench.start()
    bench.describe(camera={**INLINE, "shape": [3, 4, 5]})
    events = bench.event(2, camera=np.stack([image(n) for n in range(3)]), x=1.0, y=0.0)
    assert frames(events) == [(4, 0), (5, 1), (6, 2)]
    assert {e.grid_index for e in events if isinstance(e, Arrival)} == {(1, 0)}
    (wrong,) = {e.reason for e in bench.event(3, camera=image(1), x=1.0, y=0.0) if isinstance(e, Bad)}
    assert wrong == "event with 1 images, the run began with 3"
    assert bench.stop(6) == [SeriesEnd("r", 18)]


def test_pages_are_rows_of_events() -> None:
    bench = Bench()
    bench.start()
    bench.describe()
    data = {"camera": [image(5), image(6)], "x": [1.0, 0.5], "y": [0.0, 0.0]}
    times = {"camera": [3.0, 4.0]}
    events = bench.take(
        "event_page", descriptor="d-r", seq_num=[1, 2], time=[1, 2], data=data, timestamps=times
    )
    assert frames(events) == [(1, 5), (2, 6)]
    assert [e.acquired for e in events if isinstance(e, Arrival)] == [3.0, 4.0]
    data["x"] = [1.0]
    uneven = bench.take("event_page", descriptor="d-r", seq_num=[1, 2], data=data)
    assert reasons(uneven) == ["event_page: its columns are not of one length"]


# What is wrong with documents.


def test_documents_of_a_run_that_began_before_we_listened() -> None:
    bench = Bench()
    mid = "(subscribed in mid-run, or documents were lost)"
    assert reasons(bench.describe()) == [f"descriptor of run r, whose start did not come {mid}"]
    assert reasons(bench.event(5, camera=image(1))) == [f"event 5: its descriptor d-r did not come {mid}"]
    assert reasons(bench.stop(9)) == [f"stop of run r, whose start did not come {mid}"]
    bench.start("next")
    bench.describe("next")
    assert frames(bench.event(1, "next", camera=image(3), x=1.0, y=0.0)) == [(1, 3)]


def test_an_event_before_its_descriptor_costs_that_event() -> None:
    bench = Bench()
    bench.start()
    assert "event 1: its descriptor d-r did not come" in reasons(bench.event(1, camera=image(1)))[0]
    bench.describe()
    assert frames(bench.event(2, camera=image(2), x=0.5, y=0.0)) == [(2, 2)]


def test_documents_that_come_again_are_said_and_change_nothing(tmp_path: Path) -> None:
    bench = Bench()
    bench.start()
    assert "came again (is the publisher subscribed twice?)" in reasons(bench.start())[0]
    bench.describe()
    assert reasons(bench.describe()) == ["descriptor d-r came again"]
    bench.resource(tmp_path / "a.h5")
    assert reasons(bench.resource(tmp_path / "a.h5")) == ["stream_resource s-r came again"]
    # A frame that comes again is for the accounts to judge: they know its number.
    for _ in range(2):
        assert frames(bench.event(1, camera=image(1), x=1.0, y=0.0)) == [(1, 1)]
    assert bench.stop(1) == [SeriesEnd("r", 1)]
    assert reasons(bench.stop(1)) == ["stop of run r, which has ended"]
    assert "start of run r came again" in reasons(bench.start())[0]
    late = bench.event(2, camera=image(1), x=1.0, y=0.0)
    assert late == [Bad("event 2 of run r came after the end of the run", "r", 2)]


def test_a_stop_that_never_comes(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(open_runs=2)
    for number, run in enumerate(("first", "second")):
        bench.now = number
        bench.start(run)
        bench.describe(run)
        bench.event(1, run, camera=image(1), x=1.0, y=0.0)
    bench.now = 5.0
    bench.event(2, "first", camera=image(1), x=1.0, y=0.0)
    assert bench.start("third") == [SeriesEnd("second", 1)]  # it was silent for longest
    assert "run second: no stop document came, and run third starts" in caplog.text
    assert bench.documents.open_runs == 2
    late = bench.event(2, "second", camera=image(1), x=1.0, y=0.0)
    assert late == [Bad("event 2 of run second came after the end of the run", "second", 2)]


def test_an_aborted_plan_is_as_long_as_it_came(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.start()
    bench.describe()
    bench.event(1, camera=image(1), x=1.0, y=0.0)
    bench.event(3, camera=image(1), x=1.0, y=0.0)
    assert bench.stop(None, status="abort") == [SeriesEnd("r", 3)]
    assert "s: run r ended by 'abort'" in caplog.text


def test_a_run_whose_frames_were_all_lost_is_a_series_with_missing_frames() -> None:
    bench = Bench()
    bench.start()
    bench.describe()
    start, end = bench.stop(6)
    assert isinstance(start, SeriesStart)
    assert end == SeriesEnd("r", 6)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.zeros(7), "image has 1 dimensions of float64"),
        (np.zeros((2, 2, 2, 2)), "image has 4 dimensions"),
        (np.zeros((0, 5)), "image has 2 dimensions of float64, expected 2 or 3 of numbers"),
        (np.array([["a", "b"]]), "image has 2 dimensions of <U1"),
        ([[1, 2], [3]], "is no array"),
        (17, "image has 0 dimensions"),
        ({"a": 1}, "image has 0 dimensions of object"),
        (None, "event 1 has no image 'camera'"),
    ],
)
def test_an_image_that_is_none_fails_its_frame(value: Any, reason: str) -> None:
    bench = Bench()
    bench.start()
    bench.describe()
    data = {} if value is None else {"camera": value}
    bad = bench.event(1, x=1.0, y=0.0, **data)[-1]
    assert isinstance(bad, Bad)
    assert (bad.detector_series, bad.frame) == ("r", 1)
    assert reason in bad.reason


def test_json_pixels_take_the_type_that_was_announced() -> None:
    bench = Bench()
    bench.start()
    bench.describe(camera={**INLINE, "dtype_numpy": "<u2"})
    events = bench.event(1, camera=image(700).tolist(), x=1.0, y=0.0)
    assert [e.image.dtype for e in events if isinstance(e, Arrival)] == [np.dtype("u2")]
    assert reasons(bench.event(2, camera=[[70000, 1]], x=1.0, y=0.0)) == [
        "image has pixels that are no uint16"
    ]


def test_which_data_key_is_the_image() -> None:
    two = {"camera": INLINE, "other": INLINE, **MOTORS}
    bench = Bench()
    bench.start()
    refused = "descriptor: 'camera', 'other' are images: say which in image_key"
    assert reasons(bench.describe(data_keys=two)) == [refused]
    assert bench.event(1, camera=image(1), other=image(2), x=1.0, y=0.0) == []
    bench = Bench(image_key="other")
    bench.start()
    bench.describe(data_keys=two)
    assert frames(bench.event(1, camera=image(1), other=image(2), x=1.0, y=0.0)) == [(1, 2)]
    bench = Bench(image_key="absent")
    bench.start()
    assert "image_key 'absent' is none of its data keys: 'camera'" in reasons(bench.describe())[0]


# Frames in files.


def test_a_frame_waits_for_its_position_either_way_round(tmp_path: Path) -> None:
    bench = Bench(position_wait_s=5.0)
    bench.start()
    bench.describe(camera=STREAMED)
    bench.resource(stack(tmp_path / "a.h5", 3, first=30))
    first = bench.streamed(0, 2)
    assert frames(first) == []  # only the start: where it was taken is not known
    assert frames(bench.event(1, x=1.0, y=0.0)) == [(1, 30)]
    assert bench.event(3, x=0.0, y=0.0) == []
    bench.now = 4.9
    assert bench.due() == []
    bench.now = 5.1
    (late,) = bench.due()  # the second one's event is lost: its number says where it lies
    assert isinstance(late, Arrival)
    assert (late.frame, late.grid_index, late.position_um) == (2, (1, 0), None)
    (third,) = bench.streamed(2, 3)
    assert isinstance(third, Arrival)
    assert (third.frame, third.grid_index, third.position_um) == (3, (0, 0), (0.0, 0.0))
    assert bench.stop(3) == [SeriesEnd("r", 3)]


def test_a_file_that_comes_late_and_grows_late(tmp_path: Path) -> None:
    bench = Bench(position_wait_s=0.0, asset_wait_s=30.0)
    path = tmp_path / "late.h5"
    bench.start()
    bench.describe(camera=STREAMED)
    bench.resource(path)
    bench.streamed(0, 3)
    bench.now = 20.0
    stack(path, 2, first=50)
    assert frames(bench.due()) == [(1, 50), (2, 51)]
    bench.stop(3)
    bench.now = 49.0
    assert bench.due() == []  # the file grew at 20 s
    with h5py.File(path, "a") as file:
        file["/entry/data/data"].resize(3, axis=0)
        bench.now += 0.5
        assert bench.due() == []  # room for a frame is no frame
        file["/entry/data/data"][2] = image(52)
    bench.now += 0.5
    assert frames(events := bench.due()) == [(3, 52)]
    assert events[-1] == SeriesEnd("r", 3)


def test_a_file_that_never_comes_fails_its_frames_by_name(tmp_path: Path) -> None:
    bench = Bench(position_wait_s=0.0, asset_wait_s=3.0)
    bench.start()
    bench.describe(camera=STREAMED)
    bench.resource(tmp_path / "absent.h5")
    bench.streamed(0, 2)
    bench.stop(2)
    bench.now = 2.9
    assert bench.due() == []
    bench.now = 3.2
    *failed, end = bench.due()
    said = f"{tmp_path}/absent.h5: no such file (waited for 3 s)"
    assert failed == [Bad(said, "r", 1), Bad(said, "r", 2)]
    assert end == SeriesEnd("r", 2)


def test_a_resource_that_is_not_read_fails_its_frames_with_the_reason(tmp_path: Path) -> None:
    bench = Bench()
    bench.start()
    bench.describe(camera=STREAMED)
    assert bench.resource(tmp_path / "a.zarr", mimetype="application/x-zarr") == []
    _, *failed = bench.streamed(0, 2)
    assert [
        (e.frame, "'application/x-zarr', expected" in e.reason) for e in failed if isinstance(e, Bad)
    ] == [
        (1, True),
        (2, True),
    ]
    # Other data of the same detector lie in resources of their own: nobody asked for them.
    bench.resource(tmp_path / "a.csv", uid="sum", data_key="camera-sum", mimetype="text/csv")
    other = {"indices": {"start": 0, "stop": 1}, "seq_nums": {"start": 1, "stop": 2}}
    assert bench.take("stream_datum", stream_resource="sum", descriptor="d-r", **other) == []
    unknown = bench.take("stream_datum", stream_resource="lost", descriptor="d-r", **other)
    assert "stream_datum of events 1 on: its stream_resource lost did not come" in reasons(unknown)[0]


def test_datum_and_event_find_each_other_either_way_round(tmp_path: Path) -> None:
    bench = Bench()
    bench.start()
    bench.describe(camera={**INLINE, "external": "FILESTORE:"})
    stack(tmp_path / "a.h5", 4, first=40)
    bench.take(
        "resource",
        uid="q",
        run_start="r",
        spec="AD_HDF5",
        root=str(tmp_path),
        resource_path="a.h5",
        resource_kwargs={"frame_per_point": 2},
    )
    bench.take("datum", datum_id="q/0", resource="q", datum_kwargs={"point_number": 0})
    assert frames(bench.event(1, camera="q/0", x=1.0, y=0.0)) == [(1, 40), (2, 41)]
    assert bench.event(2, camera="q/1", x=0.5, y=0.0) == []
    page = {"datum_id": ["q/1"], "resource": "q", "datum_kwargs": {"point_number": [1]}}
    assert frames(bench.take("datum_page", **page)) == [(3, 42), (4, 43)]
    assert bench.event(3, camera="q/2", x=0.0, y=0.0) == []
    *failed, end = bench.stop(3)
    assert failed == [Bad("datum 'q/2' of its frame did not come", "r", n) for n in (5, 6)]
    assert end == SeriesEnd("r", 6)


def test_runs_that_wait_for_their_files_are_bounded(tmp_path: Path) -> None:
    bench = Bench(asset_wait_s=1000.0)
    events: list[Event] = []
    for number in range(MOST_DRAINING + 3):
        run = f"run{number}"
        events += bench.start(run) + bench.describe(run, camera=STREAMED)
        events += bench.resource(tmp_path / "absent.h5", run) + bench.streamed(0, 1, run) + bench.stop(1, run)
    given_up = [e for e in events if isinstance(e, Bad)]
    assert [e.reason for e in given_up] == [
        f"run run{n}: given up with 1 documents of frames waiting" for n in range(2)
    ]
    assert [e.detector_series for e in events if isinstance(e, SeriesEnd)] == ["run0", "run1"]


def test_the_accounts_of_two_runs_at_once_repeats_gaps_and_an_abort(tmp_path: Path) -> None:
    """What documents become ends in the ledger of a real tracker."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    opened: list[SeriesOpened] = []
    tracker = SeriesTracker("s", ledger, None, [], opened.append)
    bench = Bench()

    def feed(events: list[Event]) -> None:
        for event in events:
            taken = tracker.take(event)
            if taken is not None:
                ledger.end(taken.frame.key, "done")

    for run in ("outer", "inner"):
        feed(bench.start(run) + bench.describe(run))
    for seq_num in (1, 2, 2, 4):
        for run in ("outer", "inner"):
            feed(bench.event(seq_num, run, camera=image(1), x=1.0, y=0.0))
    feed(bench.take("event", garbage=True))
    feed(bench.stop(4, "inner", "abort") + bench.stop(6, "outer"))
    total = ledger.totals("s")
    assert [o.detector_series for o in opened] == ["outer", "inner"]
    assert [o.scan_shape for o in opened] == [(3, 2)] * 2
    # Each run: three frames, one that came again; 3 did not come, and of the outer one 5 and 6 neither.
    assert (total["done"], total["dropped"], total["failed"], total["missing"]) == (6, 2, 1, 1 + 3)
    ledger.close()
    assert audit(tmp_path / "ledger.sqlite") == []
