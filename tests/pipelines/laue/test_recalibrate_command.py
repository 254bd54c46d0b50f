"""``grainwatch recalibrate`` as it is typed: results or images in, .det out, refusals with a reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import fabio
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import typer
from testkit.laue import AREA, CALIBRATION, material, random_turns, simulated
from typer.testing import CliRunner, Result

from daemon.sinks import results_file
from daemon.sinks.base import Published, SeriesClosed, SeriesOpened, SinkContext, SinkEvent
from grainwatch.config import ConfigError
from grainwatch.messages import DriftReport, FrameKey, LaueResult, ModelInfo, Provenance, encode
from pipelines.files import read_images
from pipelines.laue.analysis import FrameAnalysis, LaueAnalysis
from pipelines.laue.calibration import Calibrator
from pipelines.laue.calibration_fit import vector_of, with_vector
from pipelines.laue.geometry import Calibration
from pipelines.laue.lauetools_files import read_det, write_det
from pipelines.laue.peaks import find_peaks
from pipelines.laue.pipeline import peak_array
from pipelines.laue.recalibrate_command import recalibrate
from pipelines.laue.recent_frames import reference_of
from pipelines.laue.render import render_frame
from pipelines.results_files import ResultsFile

CONFIG = """
[streams.laue]
source = {{type = "replay", files = ["x"]}}
pipeline = {{type = "laue", materials = ["Cu", "Ge"], geometry = "lab.det"{drift}}}
[sinks.hdf5]
folder = "results"
"""
WATCHED = CONFIG.format(drift=', drift = {material = "Ge"}')
MOVE = np.array([0.2, 1.5, -1.0, 0.1, 0.05])
NOW = with_vector(CALIBRATION, vector_of(CALIBRATION) + MOVE)

_app = typer.Typer(pretty_exceptions_enable=False)
_app.command()(recalibrate)


def typed(*words: object) -> Result:
    return CliRunner().invoke(_app, [str(word) for word in words])


def refused(*words: object) -> str:
    result = typed(*words)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def result_of(found: FrameAnalysis, frame: int, analysis: LaueAnalysis, uid: str = "a" * 32) -> LaueResult:
    return LaueResult(
        key=FrameKey("laue", uid, frame),
        provenance=Provenance(ModelInfo("classical", "1"), analysis.calibration_hash),
        n_peaks=len(found.xy_px),
        peaks=peak_array(found),
        crystals=found.crystals,
    )


def write(folder: Path, results: Sequence[LaueResult], config: str = WATCHED, started: float = 1.0) -> Path:
    """A results file, by the daemon's own sink."""
    uid = results[0].key.series_uid
    sink = results_file.open_sink(
        results_file.Config(folder=str(folder)), SinkContext("test", folder, config_text=config)
    )
    events: list[SinkEvent] = [SeriesOpened("laue", uid, started, "1")]
    for seq, result in enumerate(results, start=1):
        numbered = msgspec.structs.replace(result, seq=seq)
        events.append(Published("laue", numbered, encode(numbered)))
    sink.handle(events)
    path = sink.path(uid)
    sink.handle([SeriesClosed("laue", uid, 2.0, {})])
    sink.close()
    assert path is not None
    return path


@pytest.fixture(scope="module")
def moved() -> list[LaueResult]:
    """Frames of a germanium wafer with a copper grain, taken after a move, indexed as if there was none."""
    analysis = LaueAnalysis([material("Cu"), material("Ge")], CALIBRATION, AREA)
    turns = random_turns(2, 3)
    results = []
    for frame in range(6):
        made = simulated(["Ge", "Cu"], turns, 50 + frame, calibration=NOW)
        results.append(result_of(analysis.analyse_peaks(made.xy_px), frame, analysis))
    assert any(c.material == "Ge" for c in results[0].crystals)
    return results


@pytest.fixture
def lab(tmp_path: Path, moved: list[LaueResult]) -> Path:
    """A folder as a daemon leaves it: calibration, configuration, results."""
    write_det(tmp_path / "lab.det", CALIBRATION, material="Ge")
    (tmp_path / "lab.toml").write_text(WATCHED)
    write(tmp_path / "results", moved)
    return tmp_path


def is_now(det: Path, said: dict[str, dict[str, float]]) -> None:
    sigma = np.array(list(said["sigma"].values()))
    assert np.all(np.abs(vector_of(read_det(det).calibration) - vector_of(NOW)) < 3.5 * sigma)
    assert np.all(sigma < 0.1)


def test_the_configuration_is_enough(lab: Path) -> None:
    out, report, picture = (lab / name for name in ("new.det", "new.json", "new.png"))
    done = typed(lab / "lab.toml", "--out", out, "--json", report, "--plot", picture)
    assert done.exit_code == 0, done.output
    said = json.loads(report.read_text())
    is_now(out, said)
    assert said["frames"] == [0, 1, 2, 3, 4, 5]
    assert "Ge: 6 frames (0 to 5)" in done.output
    assert "the detector has moved" in done.output
    # The file counts from 1, and so does what is shown.
    assert said["old"]["xcen_px"] == pytest.approx(CALIBRATION.xcen_px + 1.0)
    assert said["xcen_px"] == pytest.approx(read_det(out).calibration.xcen_px + 1.0)
    assert said["change"]["xcen_px"] == pytest.approx(said["xcen_px"] - said["old"]["xcen_px"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "grainwatch recalibrate" in out.read_text()
    assert read_det(out).material == "Ge"


def test_after_a_reload_the_configuration_of_now_counts(lab: Path, moved: list[LaueResult]) -> None:
    """The series went on with another calibration: its file still has the configuration it began with."""
    other = with_vector(CALIBRATION, vector_of(CALIBRATION) + 0.5 * MOVE)
    write_det(lab / "other.det", other)
    hashed = LaueAnalysis([material("Ge")], other, AREA).calibration_hash
    later = [
        msgspec.structs.replace(
            r,
            key=FrameKey("laue", "f" * 32, r.key.frame),
            provenance=msgspec.structs.replace(
                r.provenance, calibration_hash=hashed if r.key.frame > 2 else "x"
            ),
        )
        for r in moved
    ]
    path = write(lab / "results", later, started=50.0)
    out, report = lab / "new.det", lab / "new.json"
    assert "give it with --start" in refused(path, "-o", out)
    (lab / "lab.toml").write_text(WATCHED.replace("lab.det", "other.det"))
    done = typed(lab / "lab.toml", "-o", out, "--json", report)
    assert done.exit_code == 0, done.output
    said = json.loads(report.read_text())
    is_now(out, said)
    assert said["old"]["dd_mm"] == pytest.approx(other.dd_mm)


def test_a_file_and_a_folder_do_as_well_and_frames_are_chosen(lab: Path) -> None:
    (path,) = (lab / "results").glob("*.h5")
    report = lab / "new.json"
    for number, (given, words, frames) in enumerate(
        (
            (path, ("--frames", "1:4"), [1, 2, 3]),
            (lab / "results", ("--last", "2"), [4, 5]),
            (path, ("--frames", "3", "--start", lab / "lab.det", "-m", "Ge"), [3]),
            (path, ("--frames", ":2"), [0, 1]),
        )
    ):
        out = lab / f"{number}.det"
        done = typed(given, "--out", out, "--json", report, *words)
        assert done.exit_code == 0, done.output
        said = json.loads(report.read_text())
        assert said["frames"] == frames
        is_now(out, said)


def test_the_newest_series_of_a_folder_counts(lab: Path, moved: list[LaueResult]) -> None:
    other = [msgspec.structs.replace(r, key=FrameKey("laue", "0" * 32, r.key.frame + 100)) for r in moved[:2]]
    write(lab / "results", other, started=100.0)
    done = typed(lab / "results", "--out", lab / "a.det", "--json", lab / "a.json")
    assert done.exit_code == 0, done.output
    assert json.loads((lab / "a.json").read_text())["frames"] == [100, 101]


def test_a_detector_that_moved_too_far_to_index_is_found_from_the_peaks(tmp_path: Path) -> None:
    far = with_vector(CALIBRATION, vector_of(CALIBRATION) + np.array([2.0, 25.0, -20.0, 0.6, 0.3]))
    analysis = LaueAnalysis([material("Ge")], CALIBRATION, AREA)
    turn = random_turns(1, 5)
    results = []
    for frame in range(3):
        made = simulated("Ge", turn, frame, calibration=far)
        results.append(result_of(analysis.analyse_peaks(made.xy_px), frame, analysis))
    assert not any(r.crystals for r in results)
    path = write(tmp_path / "results", results)
    write_det(tmp_path / "lab.det", CALIBRATION)
    done = typed(path, "--out", tmp_path / "new.det", "--json", tmp_path / "new.json")
    assert done.exit_code == 0, done.output
    assert "no result holds a crystal of Ge: searching" in done.stderr
    said = json.loads((tmp_path / "new.json").read_text())
    assert said["frames"] == [0, 1, 2]
    off = vector_of(read_det(tmp_path / "new.det").calibration) - vector_of(far)
    assert np.all(np.abs(off) < 3.5 * np.array(list(said["sigma"].values())))


@pytest.fixture(scope="module")
def still() -> list[LaueResult]:
    """Frames of a germanium wafer on a detector that stands where it is said to."""
    analysis = LaueAnalysis([material("Ge")], CALIBRATION, AREA)
    turn = random_turns(1, 6)
    return [
        result_of(analysis.analyse_peaks(simulated("Ge", turn, n).xy_px), n, analysis, "d" * 32)
        for n in range(3)
    ]


@pytest.mark.parametrize("seen", [True, False], ids=["moved too far", "beam off"])
def test_frames_before_the_last_ones_are_not_taken_for_now(
    seen: bool, tmp_path: Path, still: list[LaueResult]
) -> None:
    """Indexing ends with a large move: what is indexed shows where the detector stood before."""
    far = with_vector(CALIBRATION, vector_of(CALIBRATION) + np.array([2.0, 25.0, -20.0, 0.6, 0.3]))
    analysis = LaueAnalysis([material("Ge")], CALIBRATION, AREA)
    turn = random_turns(1, 6)
    after = []
    for frame in range(3, 7):
        xy = simulated("Ge", turn, frame, calibration=far).xy_px if seen else np.empty((0, 2))
        after.append(result_of(analysis.analyse_peaks(xy), frame, analysis, "d" * 32))
    assert all(r.crystals for r in still)
    assert all(reference_of(r, material("Ge"), 20) is None for r in after)
    path = write(tmp_path / "results", [*still, *after])
    write_det(tmp_path / "lab.det", CALIBRATION)
    done = typed(path, "--out", tmp_path / "new.det", "--json", tmp_path / "new.json")
    assert done.exit_code == 0, done.output
    assert "the last 4 frames hold no crystal of Ge any more" in done.stderr
    said = json.loads((tmp_path / "new.json").read_text())
    off = vector_of(read_det(tmp_path / "new.det").calibration) - vector_of(far if seen else CALIBRATION)
    assert np.all(np.abs(off) < 3.5 * np.array(list(said["sigma"].values())))
    if seen:
        assert said["frames"] == [3, 4, 5, 6]
    else:
        assert said["frames"] == [0, 1, 2]
        assert "taking frames up to 2: where the detector stood then" in done.stderr


def image_of(spots: npt.NDArray[np.float64], intensity: npt.NDArray[np.float64], seed: int) -> np.ndarray:
    height = 3e4 * np.sqrt(intensity / intensity.max())
    return render_frame(
        CALIBRATION.shape, spots, height, np.full((len(spots), 2), 2.0), np.random.default_rng(seed)
    )


def test_images_do_as_well(tmp_path: Path) -> None:
    made = simulated("Ge", random_turns(1, 6), 6, calibration=NOW)
    write_det(tmp_path / "lab.det", CALIBRATION)
    names = []
    for number in range(2):
        names.append(tmp_path / f"{number}.tif")
        image = image_of(made.xy_px, made.intensity, number)
        fabio.tifimage.TifImage(data=image).write(str(names[-1]))
    done = typed(
        *names,
        "-m",
        "Ge",
        "--start",
        tmp_path / "lab.det",
        "-o",
        tmp_path / "n.det",
        "--json",
        tmp_path / "n.json",
    )
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "n.json").read_text())
    is_now(tmp_path / "n.det", said)
    # Both show the same peak list, wrong by the same 0.2 px: a second image makes it no better.
    assert said["shared_residuals"] > 0.8


@pytest.mark.truth
def test_a_real_frame_gives_what_calibrate_gives(tmp_path: Path, truth_dir: Path) -> None:
    truth = read_det(truth_dir / "truth" / "calibGe111.det").calibration
    image = next(iter(read_images(truth_dir / "Ge_blanc_0000.mccd.gz")))[1].astype(np.float64)
    start: Calibration = with_vector(truth, vector_of(truth) + np.array([0.2, 1.5, -1.5, 0.05, 0.05]))
    analysis = LaueAnalysis([material("Ge")], start)
    rng = np.random.default_rng(1)
    results = []
    for frame in range(3):
        # As if it had been exposed again: the counts' own noise once more.
        again = image if frame == 0 else image + rng.normal(0.0, np.sqrt(np.clip(image, 1.0, None)))
        found = analysis.analyse_image(np.clip(np.rint(again), 0, 65535).astype(np.uint16))
        results.append(result_of(found, frame, analysis))
    path = write(tmp_path / "results", results, CONFIG.format(drift=""))
    write_det(tmp_path / "start.det", start)
    done = typed(
        path,
        "-m",
        "Ge",
        "--start",
        tmp_path / "start.det",
        "-o",
        tmp_path / "n.det",
        "--json",
        tmp_path / "n.json",
    )
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "n.json").read_text())
    peaks = find_peaks(image.astype(np.uint16), usable=analysis.area.usable)
    alone = Calibrator(material("Ge"), start).calibrate(
        peaks.xy_px[np.argsort(-peaks.intensity, kind="stable")]
    )
    sigma = np.array(list(said["sigma"].values()))
    found_now = vector_of(read_det(tmp_path / "n.det").calibration)
    assert np.all(np.abs(found_now - alone.values) < alone.sigma)
    assert np.all(np.abs(found_now - vector_of(truth)) < 3.0 * sigma)
    # Three exposures of one pattern are not three calibrations: sigma / sqrt(3) would be a lie.
    assert said["shared_residuals"] > 0.5
    assert np.all(sigma > 0.7 * alone.sigma)
    assert np.all(sigma < 1.1 * alone.sigma)
    assert said["mean_residual_px"] <= 0.25


def test_what_is_refused_says_why_and_writes_nothing(lab: Path, moved: list[LaueResult]) -> None:
    (path,) = (lab / "results").glob("*.h5")
    out = lab / "new.det"
    assert "is there already" in refused(path, "-o", lab / "lab.det")
    assert "there is no folder" in refused(path, "-o", lab / "no" / "new.det")
    frame = lab / "frame.tif"
    frame.write_bytes(b"frame")
    assert "ends in .det" in refused(frame, "-o", frame, "--overwrite", "-m", "Ge", "-s", lab / "lab.det")
    assert frame.read_bytes() == b"frame"
    assert "--plot" in refused(path, "-o", out, "--plot", lab / "no" / "new.png")
    assert "--json" in refused(path, "-o", out, "--json", lab / "no" / "new.json")
    assert "--min-spots 2" in refused(path, "-o", out, "--min-spots", "2")
    assert "no such file" in refused(lab / "none.h5", "-o", out)
    (lab / "empty").mkdir()
    assert "no results files in this folder" in refused(lab / "empty", "-o", out)
    for text in ("a", "5:5", ":", "1-3"):
        assert "--frames" in refused(path, "-o", out, "--frames", text)
    assert "--material" in refused(path, "-o", out, "-m", "unobtainium")
    assert "--start" in refused(path, "-o", out, "--start", lab / "none.det")
    assert refused(path, "-o", out, "--mask", lab / "none.npy").count("recalibrate: ") == 1
    assert "--mask" in refused(path, "-o", out, "--mask", lab / "none.npy")
    assert "--energy" in refused(path, "-o", out, "--energy", "22", "5")
    assert "--stream" in refused(lab / "lab.toml", "-o", out, "--stream", "other")
    silent = lab / "silent.toml"
    silent.write_text(WATCHED.partition("[sinks")[0])
    assert "no sink hdf5" in refused(silent, "-o", out)
    # The calibration was changed meanwhile: what the results were made with is not known any more.
    write_det(lab / "lab.det", NOW)
    assert "not there any more, or was changed" in refused(path, "-o", out)
    unwatched = write(lab / "other", moved, CONFIG.format(drift=""))
    assert "--material Ge" in refused(unwatched, "-o", out, "-s", lab / "lab.det")

    done = typed(path, "-o", out, "-s", lab / "lab.det", "--frames", "900:")
    assert done.exit_code == 1
    assert "no frame to search for Ge in" in done.stderr
    done = typed(path, "-o", out, "-s", lab / "lab.det", "--max-residual", "0.1")
    assert done.exit_code == 1
    assert "above 0.1 px" in done.stderr
    assert not out.exists()


def test_an_alarm_in_the_file_chooses_the_frames_after_it(lab: Path, moved: list[LaueResult]) -> None:
    uid = "e" * 32
    folder = lab / "alarmed"
    sink = results_file.open_sink(
        results_file.Config(folder=str(folder)), SinkContext("test", folder, config_text=WATCHED)
    )
    keyed = [msgspec.structs.replace(r, key=replace_uid(r.key, uid)) for r in moved]
    report = DriftReport(
        source="laue", series_uid=uid, frame=4, material="Ge", calibration_hash="c", state="moved", frames=5,
        unseen=0, change=(0.0, 1.0, 0.0), sigma=(1.0, 0.1, 0.1), offset=(0.0, 0.0, 0.0),
        offset_sigma=(1.0, 1.0, 1.0), statistic=2.0, limit=1.2, alarm_series_uid=uid, alarm_frame=4,
    )  # fmt: skip
    events: list[SinkEvent] = [SeriesOpened("laue", uid, 1.0, "1")]
    for seq, message in enumerate([*keyed, report], start=1):
        numbered = msgspec.structs.replace(message, seq=seq)
        events.append(Published("laue", numbered, encode(numbered)))
    sink.handle(events)
    sink.close()
    (path,) = folder.glob("*.h5")
    with ResultsFile(path) as file:
        assert len(list(file.messages())) == 7
    done = typed(path, "-o", lab / "a.det", "--json", lab / "a.json")
    assert done.exit_code == 0, done.output
    assert json.loads((lab / "a.json").read_text())["frames"] == [4, 5]
    assert "frames from 4 on" in done.stderr


def replace_uid(key: FrameKey, uid: str) -> FrameKey:
    return msgspec.structs.replace(key, series_uid=uid)
