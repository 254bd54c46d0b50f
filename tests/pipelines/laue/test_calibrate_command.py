"""``grainwatch calibrate`` as it is typed: files in, .det out, refusals with a status and a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fabio
import numpy as np
import pytest
import typer
from testkit.laue import CALIBRATION, random_turns, simulated
from typer.testing import CliRunner, Result

from grainwatch.config import ConfigError
from pipelines.laue.calibrate_command import calibrate
from pipelines.laue.calibration_fit import vector_of, with_vector
from pipelines.laue.lauetools_files import PeakFile, read_det, write_dat, write_det

START = with_vector(CALIBRATION, vector_of(CALIBRATION) + np.array([1.0, -10.0, 10.0, 0.5, -0.5]))
_app = typer.Typer(pretty_exceptions_enable=False)
_app.command()(calibrate)


def typed(*words: object) -> Result:
    return CliRunner().invoke(_app, [str(word) for word in words])


def refused(*words: object) -> str:
    result = typed(*words)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


@pytest.fixture
def peaks(tmp_path: Path) -> Path:
    made = simulated("Ge", random_turns(1, 1), 1)
    path = tmp_path / "ge.dat"
    write_dat(path, PeakFile(made.xy_px, made.intensity))
    return path


@pytest.fixture
def start(tmp_path: Path) -> Path:
    path = tmp_path / "start.det"
    write_det(path, START)
    return path


def test_a_calibration_is_written_shown_and_drawn(tmp_path: Path, peaks: Path, start: Path) -> None:
    out, picture, report = (tmp_path / name for name in ("new.det", "new.png", "new.json"))
    result = typed(
        peaks, "--material", "Ge", "--start", start, "--out", out, "--plot", picture, "--json", report
    )
    assert result.exit_code == 0, result.output
    written = read_det(out)
    said = json.loads(report.read_text())
    sigma = np.array([said["sigma"][name] for name in said["covariance_of"][:5]])
    assert np.all(np.abs(vector_of(written.calibration) - vector_of(CALIBRATION)) < 3.5 * sigma)
    assert written.material == "Ge"
    assert written.calibration.label == "sCMOS"
    assert written.orientation_matrix is not None
    np.testing.assert_allclose(
        written.orientation_matrix @ written.orientation_matrix.T, np.eye(3), atol=1e-9
    )
    # The file counts from 1, and so does what is shown.
    assert said["xcen_px"] == pytest.approx(written.calibration.xcen_px + 1.0)
    row = re.search(r"^xcen +([\d.]+) +([\d.]+) +([+-][\d.]+) px$", result.output, re.MULTILINE)
    assert row is not None
    assert float(row[1]) == pytest.approx(said["xcen_px"], abs=1e-4)
    assert float(row[3]) == pytest.approx(said["change"]["xcen_px"], abs=1e-4)
    text = out.read_text()
    assert "with grainwatch calibrate" in text
    assert re.search(r"Calibration done with Ge at \w{3} \w{3} \d\d \d\d:\d\d:\d\d \d{4} ", text)
    assert str(peaks) in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_camera_alone_and_json_on_the_terminal(tmp_path: Path, peaks: Path) -> None:
    result = typed(
        peaks, "-m", "Ge", "-o", tmp_path / "a.det", "--camera", "sCMOS", "--dd", "78", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["spots_fitted"] > 70
    found = read_det(tmp_path / "a.det").calibration
    np.testing.assert_allclose(vector_of(found), vector_of(CALIBRATION), atol=0.5)


@pytest.mark.truth
def test_a_real_image_needs_no_start(tmp_path: Path, truth_dir: Path) -> None:
    result = typed(
        truth_dir / "nw1_0000.tif.gz", "-m", "Si", "-o", tmp_path / "a.det", "--plot", tmp_path / "a.png"
    )
    assert result.exit_code == 0, result.output
    assert "depth" in result.output


def test_an_unfit_frame_ends_with_status_1_and_writes_nothing(tmp_path: Path, start: Path) -> None:
    two = simulated("Ge", random_turns(2, 2), 2)
    frame, out = tmp_path / "two.dat", tmp_path / "new.det"
    write_dat(frame, PeakFile(two.xy_px, two.intensity))
    result = typed(frame, "-m", "Ge", "-s", start, "-o", out)
    assert result.exit_code == 1
    assert "more than one crystal" in result.stderr
    assert str(frame) in result.stderr
    assert not out.exists()


def test_bad_input_is_refused_by_name(tmp_path: Path, peaks: Path, start: Path) -> None:
    out = tmp_path / "new.det"
    good = ("-m", "Ge", "-s", start, "-o", out)
    assert "is there already" in refused(peaks, "-m", "Ge", "-s", start, "-o", start)
    assert "there is no folder" in refused(peaks, "-m", "Ge", "-s", start, "-o", tmp_path / "no" / "new.det")
    assert "none.dat" in refused(tmp_path / "none.dat", *good)
    assert "none.tif" in refused(tmp_path / "none.tif", *good)
    assert "--material" in refused(peaks, "-m", "unobtainium", "-s", start, "-o", out)
    assert "--start" in refused(peaks, "-m", "Ge", "-s", tmp_path / "none.det", "-o", out)
    assert "--camera" in refused(peaks, "-m", "Ge", "-o", out)
    assert "webcam" in refused(peaks, "-m", "Ge", "-o", out, "--camera", "webcam")
    assert "give one of the two" in refused(peaks, *good, "--camera", "sCMOS")
    assert "--dd" in refused(peaks, "-m", "Ge", "-o", out, "--camera", "sCMOS", "--dd", "-1")
    assert "--mask" in refused(peaks, *good, "--mask", tmp_path / "none.npy")
    assert "energy" in refused(peaks, *good, "--energy", "22", "5")
    sideways = tmp_path / "sideways.det"
    sideways.write_text(start.read_text().replace("Z>0", "X>0"))
    assert "only kf_direction Z>0" in refused(peaks, "-m", "Ge", "-s", sideways, "-o", out)
    np.save(tmp_path / "small.npy", np.zeros((10, 10), dtype=bool))
    assert "does not fit" in refused(peaks, *good, "--mask", tmp_path / "small.npy")
    assert not out.exists()


def test_a_frame_of_another_detector_is_refused(tmp_path: Path, start: Path) -> None:
    image = tmp_path / "small.tif"
    fabio.tifimage.TifImage(data=np.ones((64, 80), dtype=np.uint16)).write(str(image))
    message = refused(image, "-m", "Ge", "-s", start, "-o", tmp_path / "new.det")
    assert "64 rows and 80 columns" in message
    assert "2018" in message


def test_an_existing_file_is_replaced_when_asked(tmp_path: Path, peaks: Path, start: Path) -> None:
    before = start.read_text()
    assert typed(peaks, "-m", "Ge", "-s", start, "-o", start, "--overwrite").exit_code == 0
    assert start.read_text() != before
