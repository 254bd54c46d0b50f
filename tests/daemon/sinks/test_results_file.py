"""Results files, written by the sink and read by others while it writes and after it was killed."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest
from testkit.process import eventually

from daemon.sinks import results_file
from daemon.sinks.base import SeriesClosed, SeriesOpened, SinkContext
from daemon.sinks.simulator import (
    published,
    running,
    synthetic_health,
    synthetic_micrograph,
    synthetic_result,
)
from grainwatch.config import ConfigError
from grainwatch.messages import (
    ChangeReport,
    Crystal,
    DriftReport,
    Grain,
    LaueResult,
    MapPoint,
    MapUpdate,
    Times,
    encode,
)
from pipelines.results_files import (
    ResultsFile,
    ResultsFileError,
    crystals_table,
    read_results,
    results_files,
)
from pipelines.results_layout import CRYSTALS

UID = "0123456789abcdef0123456789abcdef"
STARTED = 1_790_000_000.0  # 2026-09-21T14:13:20 UTC


@pytest.fixture
def context(tmp_path: Path) -> SinkContext:
    return SinkContext(
        "beamline", tmp_path / "state", config_text='[daemon]\nname = "béta"\n', config_hash="c0ffee"
    )


@pytest.fixture
def results(rng: np.random.Generator) -> list[LaueResult]:
    return [
        synthetic_result(frame, rng, seq=10 + 2 * frame, series_uid=UID, crystals=frame % 4)
        for frame in range(40)
    ]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261120)


def opened(uid: str = UID) -> SeriesOpened:
    return SeriesOpened("laue", uid, STARTED, "7/abc", 40, (8, 5), {"photon_energy": 12.4})


def sink_in(folder: Path, context: SinkContext, **keys: float) -> results_file.ResultsFileSink:
    return results_file.open_sink(results_file.Config(folder=str(folder), **keys), context)


def write(folder: Path, context: SinkContext, results: list[LaueResult]) -> Path:
    sink = sink_in(folder, context)
    sink.handle([opened(), *map(published, results[:25])])
    sink.handle(
        [*map(published, results[25:]), SeriesClosed("laue", UID, STARTED + 9, {"received": 41, "done": 40})]
    )
    sink.close()
    (path,) = results_files(folder)
    return path


def test_payloads_and_columns_come_back_exactly(
    tmp_path: Path, context: SinkContext, results: list[LaueResult]
) -> None:
    path = write(tmp_path, context, results)
    assert path.name == "laue-20260921T141320Z-01234567.h5"
    with ResultsFile(path) as file:
        assert [s.payload for s in file.payloads()] == [encode(r) for r in results]
        assert (file.stream, file.series_uid, file.publisher, file.started) == (
            "laue",
            UID,
            "beamline",
            STARTED,
        )
        assert file.finished
        assert file.counts()["received"] == 41
        assert file.damaged == 0
        frames = file.frames()
        crystals = file.crystals()
    assert list(read_results(path)) == results
    assert frames["n_crystals"].tolist() == [len(r.crystals) for r in results]
    assert frames["grid_index"][33].tolist() == [3, 3, -1]
    for row, result in enumerate(results):
        first = frames["first_crystal"][row]
        for rank, crystal in enumerate(result.crystals):
            at = first + rank
            assert crystals["frame"][at] == result.key.frame
            assert crystals["material"][at] == crystal.material
            np.testing.assert_array_equal(crystals["UB"][at], crystal.UB.numpy())
            np.testing.assert_array_equal(crystals["quaternion"][at], crystal.quaternion)
            assert crystals["residual_px"][at] == crystal.residual_px
    assert len(crystals_table(path)["UB"]) == sum(len(r.crystals) for r in results)


def test_which_payloads(tmp_path: Path, context: SinkContext, results: list[LaueResult]) -> None:
    with ResultsFile(write(tmp_path, context, results)) as file:
        assert [r.key.frame for r in file.results(5, 7)] == [5, 6, 7]
        assert [r.key.frame for r in file.results(38)] == [38, 39]
        assert [s.seq for s in file.payloads(seqs=(13, 18))] == [14, 16, 18]
        assert [s.seq for s in file.payloads(after_seq=86)] == [88]
        assert list(file.payloads(seqs=(-5, -1))) == []
        assert list(file.payloads(seqs=(2**70, None))) == []
        assert list(file.payloads(schemas=("grainwatch.map/1",))) == []


def test_it_is_nexus_with_default_plots(
    tmp_path: Path, context: SinkContext, results: list[LaueResult]
) -> None:
    # Plain h5py, as any other program would.
    with h5py.File(write(tmp_path, context, results)) as file:
        entry = file[file.attrs["default"]]
        assert entry.attrs["NX_class"] == "NXentry"
        assert entry["end_time"].asstr()[()] == "2026-09-21T14:13:29.000Z"
        assert entry["provenance/config"].asstr()[()] == context.config_text
        plots = []
        file.visititems(
            lambda name, item: plots.append(item) if item.attrs.get("NX_class") == "NXdata" else None
        )
        assert {p.name for p in plots} >= {"/entry/crystals", "/entry/frames"}
        for plot in plots:
            signal_data = plot[plot.attrs["signal"]]
            for axis in plot.attrs["axes"]:
                assert len(plot[axis]) == len(signal_data)


def test_readable_within_a_second_while_written(
    tmp_path: Path, context: SinkContext, results: list[LaueResult]
) -> None:
    sink = sink_in(tmp_path, context)
    sink.handle([opened()])
    for result in results[:20]:
        sink.handle([published(result)])
    begun = time.monotonic()
    (path,) = results_files(tmp_path)
    script = "import sys; from pipelines.results_files import *; print(len(list(read_results(sys.argv[1]))))"
    while time.monotonic() - begun < 1.0:
        sink.idle()
        time.sleep(0.05)
    elsewhere = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert elsewhere.stdout.strip() == "20"
    with ResultsFile(path) as file:  # in the writer's own process too
        assert len(list(file.results())) == 20
        assert not file.finished
        sink.handle([published(results[20])])
        sink.close()
        assert len(list(file.results())) == 21
    with h5py.File(path) as plain:  # closed in order, so SWMR is not needed to open it
        assert len(plain["entry/frames/frame"]) == 21


def numbered(folder: Path) -> int:
    """How many results the files of a folder have by now."""
    found = 0
    for path in results_files(folder):
        with ResultsFile(path) as file:
            found += len(file.index()["seq"])
    return found


@pytest.mark.system
def test_killed_in_the_middle_and_continued(tmp_path: Path) -> None:
    arguments = ["--folder", str(tmp_path), "--count", "100000", "--rate", "400"]
    with running(*arguments) as simulator:
        stored = int(eventually(lambda: n if (n := numbered(tmp_path)) >= 200 else 0))
        simulator.process.send_signal(signal.SIGKILL)
        simulator.process.wait()
    (path,) = results_files(tmp_path)
    with ResultsFile(path) as file:
        results = list(file.results())
        assert not file.finished
        assert file.damaged == 0
        assert len(results) >= stored
        assert [r.key.frame for r in results] == list(range(len(results)))
        assert len(file.crystals()["UB"]) >= 2 * len(results)
    before, killed = hashlib.sha256(path.read_bytes()).digest(), numbered(tmp_path)
    with running("--folder", str(tmp_path), "--count", "10", "--rate", "1000", "--first-seq", "100001"):
        eventually(lambda: numbered(tmp_path) == killed + 10)
    first, second = results_files(tmp_path)
    assert sorted(p.stem.removeprefix(path.stem) for p in (first, second)) == ["", "-part2"]
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert len(list(read_results(path.with_name(f"{path.stem}-part2.h5")))) == 10


def test_a_payload_that_was_not_flushed_is_skipped_and_counted(
    tmp_path: Path, context: SinkContext, results: list[LaueResult]
) -> None:
    path = write(tmp_path, context, results)
    with h5py.File(path, "r+") as file:
        begin = int(file["entry/messages/offset"][3])
        file["entry/messages/data"][begin : begin + 50] = 0
    with ResultsFile(path) as reader:
        assert [r.key.frame for r in reader.results(0, 5)] == [0, 1, 2, 4, 5]
        assert reader.damaged == 1


def test_an_unwritable_folder_is_named_with_its_key(tmp_path: Path, context: SinkContext) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"^folder: .*file/results cannot be written to"):
        sink_in(tmp_path / "file" / "results", context)
    with pytest.raises(ConfigError, match=r"^flush_s: expected more than 0 and at most 1"):
        sink_in(tmp_path, context, flush_s=3.0)


@pytest.mark.system
def test_a_full_disk_is_said_once_and_nothing_is_lost_when_there_is_room_again(tmp_path: Path) -> None:
    # The limit of a file's size stands for the full disk; it holds for a whole process.
    script = """
import json, logging, resource, sys, time
import numpy as np
from pathlib import Path
from daemon.sinks import results_file
from daemon.sinks.base import SeriesOpened, SeriesClosed, SinkContext
from daemon.sinks.simulator import published, synthetic_result
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("grainwatch").addHandler(handler)
folder = Path(sys.argv[1])
config = results_file.Config(folder=str(folder), flush_s=0.01, retry_s=0.05)
sink = results_file.open_sink(config, SinkContext("d", folder))
rng = np.random.default_rng(1)
sink.handle([SeriesOpened("laue", "f" * 32, time.time(), "1")])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for frame in range(150):
    if frame == 50:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    if frame == 100:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        errors_when_full = list(said)
    sink.handle([published(synthetic_result(frame, rng, seq=frame, series_uid="f" * 32))])
    time.sleep(0.012)
sink.handle([SeriesClosed("laue", "f" * 32, time.time(), {})])
sink.close()
print(json.dumps([errors_when_full, said, sink.write_errors, sink.lost_messages]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    when_full, said, errors, lost = json.loads(done.stdout)
    assert len(when_full) == 1
    assert str(tmp_path) in when_full[0]
    assert errors >= 1
    assert lost == 0
    assert any("written again" in line for line in said)
    frames = {r.key.frame for path in results_files(tmp_path) for r in read_results(path)}
    assert frames == set(range(150))


def test_a_disk_that_is_nearly_full_is_left_alone_until_there_is_room(
    tmp_path: Path, context: SinkContext, results: list[LaueResult], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"^folder: .* cannot be written to \(only \d+ MiB"):
        sink_in(tmp_path, context, reserve_mib=2**40)
    sink = sink_in(tmp_path, context, flush_s=0.001, retry_s=0.01)
    sink.handle([opened(), *map(published, results[:10])])
    reserve, sink._reserve_bytes = sink._reserve_bytes, 2**60
    for result in results[10:20]:
        sink.handle([published(result)])
        time.sleep(0.005)
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert "cannot be written to the folder" in sink.fault
    sink._reserve_bytes = reserve
    sink.handle([*map(published, results[20:]), SeriesClosed("laue", UID, STARTED + 9, {})])
    sink.close()
    (path,) = results_files(tmp_path)
    assert list(read_results(path)) == results
    assert (sink.lost_messages, sink.fault) == (0, "")


def test_maps_are_stored_and_health_is_not(
    tmp_path: Path, context: SinkContext, results: list[LaueResult]
) -> None:
    strain = (1e-4, 0.0, -1e-4, 0.0, 0.0, 0.0)
    point = MapPoint((2, 1), 12, 0, "Cu", (1.0, 0.0, 0.0, 0.0), 3, 0.7, 1e-9, 0.2, strain)
    grain = Grain(3, "Cu", 1, (1.0, 0.0, 0.0, 0.0), 0.0, (2.0, 1.0))
    common = {
        "source": "laue",
        "series_uid": UID,
        "shape": (8, 5),
        "step_um": (1.0, 2.0),
        "times": Times(published=1.0),
    }
    delta = MapUpdate(
        **common,
        kind="delta",
        seq=2,
        points=(point,),
        grains=(grain,),
        merged=((5, 3),),
        empty=((7, 0),),
        filled=2,
    )
    snapshot = MapUpdate(**common, kind="snapshot", seq=3, points=(point,), filled=1)
    sink = sink_in(tmp_path, context)
    sink.handle([opened(), published(delta), published(snapshot), published(synthetic_health(4, 1.0))])
    sink.close()
    with ResultsFile(results_files(tmp_path)[0]) as file:
        assert list(file.messages()) == [delta, snapshot]
        points, grains = file.map_points(), file.map_grains()
    assert points["grid_index"].tolist() == [[2, 1, -1], [7, 0, -1]]
    assert points["rank"].tolist() == [0, -1]
    assert points["strain_sample"][0].tolist() == list(strain)
    assert grains["grain_id"].tolist() == [5, 3]
    assert grains["merged_into"].tolist() == [3, -1]
    with h5py.File(results_files(tmp_path)[0]) as plain:
        assert plain["entry/map/shape"][0].tolist() == [8, 5, 0]


def test_reports_of_the_drift_watch_are_stored(tmp_path: Path, context: SinkContext) -> None:
    report = DriftReport(
        source="laue",
        series_uid=UID,
        seq=7,
        frame=40,
        channel="threshold_1",
        material="Ge",
        calibration_hash="c",
        state="moved",
        frames=41,
        unseen=0,
        change=(0.1, 1.0, -1.0),
        sigma=(0.01, 0.1, 0.2),
        offset=(0.0, 0.5, 0.0),
        offset_sigma=(0.01, 0.1, 0.1),
        statistic=1.5,
        limit=1.2,
        alarm_series_uid=UID,
        alarm_frame=38,
        text="detector moved",
    )
    sink = sink_in(tmp_path, context)
    sink.handle([opened(), published(report)])
    sink.close()
    with ResultsFile(results_files(tmp_path)[0]) as file:
        assert list(file.messages()) == [report]
        drift = file.drift()
    assert (drift["channel"][0], drift["frame"][0], drift["alarm_frame"][0]) == ("threshold_1", 40, 38)
    assert drift["change"].tolist() == [[0.1, 1.0, -1.0]]
    assert drift["sigma"].tolist() == [[0.01, 0.1, 0.2]]
    with h5py.File(results_files(tmp_path)[0]) as plain:
        assert plain["entry/drift"].attrs["signal"] == "change"


def test_every_field_of_a_crystal_has_a_column() -> None:
    in_payload_only = {"spot_indices", "hkl"}  # of varying length
    assert set(Crystal.__struct_fields__) - in_payload_only <= set(CRYSTALS)


def test_flags_beyond_the_bits_are_not_mistaken(
    tmp_path: Path, context: SinkContext, rng: np.random.Generator
) -> None:
    plain = synthetic_result(0, rng, seq=1, series_uid=UID, crystals=0)
    flagged = [
        LaueResult(
            **{f: getattr(plain, f) for f in plain.__struct_fields__}
            | {"seq": n, "flags": (f"flag-{n}", "x")}
        )
        for n in range(80)
    ]
    path = write(tmp_path, context, flagged)
    with ResultsFile(path) as file:
        texts = file.frames()["flags"]
    assert texts[5] == ("x", "flag-5")
    assert texts[79] == ("x", "other")


def test_a_series_that_was_open_before_a_restart_gets_a_file(
    tmp_path: Path, context: SinkContext, results: list[LaueResult]
) -> None:
    sink = sink_in(tmp_path, context)
    sink.handle([published(results[0])])
    sink.close()
    assert len(list(read_results(results_files(tmp_path, UID)[0]))) == 1


def test_files_that_are_no_results_are_named(tmp_path: Path) -> None:
    text, other = tmp_path / "text.h5", tmp_path / "other.h5"
    text.write_text("not HDF5")
    with h5py.File(other, "w") as file:
        file["entry/data"] = [1]
    for path, reason in (
        (text, "cannot be opened as HDF5"),
        (other, "expected results"),
        (tmp_path / "no", "cannot"),
    ):
        with pytest.raises(ResultsFileError, match=reason) as caught:
            list(read_results(path))
        assert str(path) in str(caught.value)


def test_parts_of_a_series_come_in_order(tmp_path: Path) -> None:
    base = f"laue-20260921T141320Z-{UID[:8]}"
    parts = [f"{base}.h5", *(f"{base}-part{n}.h5" for n in range(2, 12)), "laue-20260922T000000Z-ffffffff.h5"]
    for name in sorted(parts):
        (tmp_path / name).touch()
    assert [path.name for path in results_files(tmp_path)] == parts
    assert [path.name for path in results_files(tmp_path, UID)] == parts[:-1]


def test_micrographs_lie_in_a_table_of_their_own(
    tmp_path: Path, context: SinkContext, rng: np.random.Generator
) -> None:
    images = [synthetic_micrograph(n, rng, seq=n + 1, series_uid=UID) for n in range(3)]
    # Of the last one nothing is known but how bright it is.
    bare = msgspec.structs.replace(
        synthetic_micrograph(3, rng, seq=4, series_uid=UID, pixel_size_um=None),
        morphology=None, posterior=None, novelty=None, fingerprints=(), patches=None, neighbours=(),
    )  # fmt: skip
    change = ChangeReport(
        seq=5, source="sem", series_uid=UID, frame=3, state="changed", images=4, statistic=4.0, limit=3.0,
        images_between_false_alarms=1e4, components=("mean", "std"), change=(5.0, 0.1), foremost="mean",
        correlated=False, alarm_series_uid=UID, alarm_frame=3,
    )  # fmt: skip
    sink = sink_in(tmp_path, context)
    sink.handle([opened(), *(published(m, "sem") for m in (*images, bare, change))])
    sink.close()
    (path,) = results_files(tmp_path)
    with ResultsFile(path) as file:
        assert list(file.messages()) == [*images, bare, change]
        table, changes, frames = file.micrographs(), file.changes(), file.frames()
        assert list(file.results()) == []
        assert len(file.crystals()["frame"]) == 0
    assert frames["frame"].tolist() == table["frame"].tolist() == [0, 1, 2, 3]
    assert frames["compute_ms"].tolist() == [60.0] * 4
    for row, image in enumerate(images):
        assert image.morphology is not None
        assert image.posterior is not None
        assert table["fraction"][row] == image.morphology.fraction
        assert table["free_path_um"][row] == image.morphology.free_path_um
        best = int(np.argmax(image.posterior.probability))
        assert table["condition"][row] == image.posterior.candidates[best]
        assert table["condition_mean"][row] == image.posterior.mean
        assert table["typicality"][row] == 0.4
    assert table["flags"][3] == ("pixel_size_unknown",)
    assert table["condition"][3] == ""
    assert table["sharpness"][3] == 0.3
    assert all(
        np.isnan(table[name][3]) for name in ("pixel_size_um", "fraction", "typicality", "probability")
    )
    assert (changes["state"].tolist(), changes["foremost"].tolist()) == (["changed"], ["mean"])
    with h5py.File(path) as file:
        assert file["entry/micrographs"].attrs["signal"] == "fraction"
