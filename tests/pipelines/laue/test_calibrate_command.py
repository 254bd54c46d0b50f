"""``grainwatch calibrate`` as it is typed: files in, .det out, refusals with a status and a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fabio
import h5py
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
    assert "did you mean Ge? built in" in refused(peaks, "-m", "germanium", "-s", start, "-o", out)
    assert "--camera (MARCCD165, sCMOS)" in refused(peaks, "-m", "Ge", "-o", out)
    assert "did you mean sCMOS?" in refused(peaks, "-m", "Ge", "-o", out, "--camera", "scmos")
    assert "'webcam' is unknown; known: MARCCD165" in refused(
        peaks, "-m", "Ge", "-o", out, "--camera", "webcam"
    )
    assert "--camera: is in the file of --start" in refused(peaks, *good, "--camera", "sCMOS")
    assert "--dd: is in the file of --start" in refused(peaks, *good, "--dd", "70")
    for distance in ("-1", "0.07", "nan"):  # the second one in metres
        said = refused(peaks, "-m", "Ge", "-o", out, "--camera", "sCMOS", "--dd", distance)
        assert f"--dd {distance}: expected 5 to 5000 mm" in said
    assert "--energy: expected 0 < lowest < highest" in refused(peaks, *good, "--energy", "22", "5")
    assert "Ge puts at most" in refused(peaks, *good, "--energy", "5", "5.5")
    assert "Ge reflects nothing in 0.1-0.5 keV" in refused(peaks, *good, "--energy", "0.1", "0.5")
    assert "--threshold -1.0 must be" in refused(peaks, *good, "--threshold", "-1")
    assert "--max-residual -1.0: expected" in refused(peaks, *good, "--max-residual", "-1")
    sideways = tmp_path / "sideways.det"
    sideways.write_text(start.read_text().replace("Z>0", "X>0"))
    assert "only kf_direction Z>0" in refused(peaks, "-m", "Ge", "-s", sideways, "-o", out)
    assert not out.exists()


def test_a_file_that_is_absent_or_something_else_is_named(tmp_path: Path, peaks: Path, start: Path) -> None:
    out, no = tmp_path / "new.det", tmp_path / "none"
    good = ("-m", "Ge", "-s", start, "-o", out)
    absent = "cannot be read: no such file"
    assert refused(no.with_suffix(".dat"), *good) == f"calibrate: {no}.dat: {absent}"
    assert "none.tif: cannot be read: No such file" in refused(no.with_suffix(".tif"), *good)
    assert refused(peaks, "-m", "Ge", "-s", no, "-o", out) == f"calibrate: --start: {no}: {absent}"
    mask = no.with_suffix(".npy")
    assert refused(peaks, *good, "--mask", mask) == f"calibrate: --mask: {mask}: {absent}"
    for content in (b"", b"no array", b"\x93NUMPY truncated"):
        mask.write_bytes(content)
        assert f"--mask: {mask}: is no .npy file with a mask" in refused(peaks, *good, "--mask", mask)
    np.save(mask, np.zeros((10, 10), dtype=bool))
    assert "does not fit" in refused(peaks, *good, "--mask", mask)
    text = tmp_path / "text.tif"
    text.write_text("no image")
    assert "text.tif: cannot be read as an image" in refused(text, *good)
    assert "a folder" in refused(peaks, "-m", "Ge", "-s", tmp_path, "-o", out).replace("directory", "folder")
    assert not out.exists()


def test_where_results_go_is_known_before_the_work(tmp_path: Path, peaks: Path, start: Path) -> None:
    good = ("-m", "Ge", "-s", start)
    out = tmp_path / "new.det"
    # --out is what --overwrite replaces: never the frame.
    assert "expected a name that ends in .det" in refused(peaks, *good, "-o", peaks, "--overwrite")
    assert "ends in .png" in refused(peaks, *good, "-o", out, "--plot", tmp_path / "a.xyz")
    for option, name in (("--plot", "a.png"), ("--json", "a.json")):
        lost = tmp_path / "no" / name
        assert f"{option} {lost}: there is no folder" in refused(peaks, *good, "-o", out, option, lost)
    assert "is a folder" in refused(peaks, *good, "-o", out, "--json", tmp_path)
    assert not out.exists()


def test_the_first_of_several_images_is_used_and_said(tmp_path: Path, start: Path) -> None:
    stack = tmp_path / "stack.h5"
    with h5py.File(stack, "w") as file:
        file["/entry/data/data"] = np.full((2, 2018, 2016), 10, dtype=np.uint16)
    result = typed(stack, "-m", "Ge", "-s", start, "-o", tmp_path / "new.det")
    assert result.exit_code == 1
    assert f"calibrate: {stack} holds several images, {stack}::/entry/data/data#0 is used" in result.stderr


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
