"""`grainwatch init`: what it writes, a daemon can be run with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from grainwatch.cli import main
from grainwatch.config import read_config
from pipelines.laue.geometry import Calibration
from pipelines.laue.lauetools_files import write_det

DETECTOR = Calibration(79.612, 976.81, 931.17, 0.477, 0.447, 0.0734, (2018, 2016), "sCMOS")


@pytest.fixture
def det(tmp_path: Path) -> Path:
    path = tmp_path / "calib.det"
    write_det(path, DETECTOR, material="Ge")
    return path


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object
) -> tuple[int, str]:
    """Exit status of the command, and its stdout, or stderr where it failed."""
    monkeypatch.setattr("sys.argv", ["grainwatch", *(str(a) for a in args)])
    with pytest.raises(SystemExit) as done:
        main()
    printed = capsys.readouterr()
    code = int(done.value.code or 0)
    return code, printed.err if code else printed.out


def test_the_older_stream(
    det: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = det.parent / "old.toml"
    arguments = ["init", "--det", det, "--source", "tcp://h:9999", "--out", out, "--type"]
    code, printed = run(capsys, monkeypatch, *arguments, "dectris-v3")
    assert (code, "expected one of dectris-v2, dectris-v1, got 'dectris-v3'" in printed) == (2, True)
    assert run(capsys, monkeypatch, *arguments, "dectris-v1")[0] == 0
    source = read_config(out)[0].streams["laue"].source
    assert source == {"type": "dectris-v1", "address": "tcp://h:9999"}
    assert run(capsys, monkeypatch, "check-config", out)[0] == 0


@pytest.mark.parametrize("folder", ["plain", 'Müller\'s "scan" #3', "back\\slash é 日本"])
def test_the_file_passes_check_config(
    folder: str, det: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = det.parent / folder
    place.mkdir()
    own = det.rename(place / "calib.det")
    out = place / "grainwatch.toml"
    address = "tcp://192.168.1.5:31001"
    code, printed = run(
        capsys, monkeypatch, "init", "--det", own, "--source", address, "--scan", "20x30", "--out", out
    )
    assert code == 0
    assert str(out) in printed
    config, _ = read_config(out)
    stream = config.streams["laue"]
    assert stream.source == {"type": "dectris-v2", "address": address}
    assert stream.pipeline["geometry"] == str(own)
    assert stream.pipeline["materials"] == ["Ge"]  # what the detector was calibrated with
    assert stream.scan is not None
    assert stream.scan.shape == (20, 30)
    assert config.sinks["hdf5"]["folder"] == str(place / "results")
    code, printed = run(capsys, monkeypatch, "check-config", out)
    assert code == 0, printed
    assert "scan: 20 x 30" in printed


def test_every_key_has_a_comment(
    det: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.toml"
    run(capsys, monkeypatch, "init", "--det", det, "--out", out, "--scan", "4x5x6", "-m", "Cu", "-m", "ZrO2")
    text = out.read_text(encoding="utf-8")
    for line in text.splitlines():
        assert not line or line[0] in "[#" or re.fullmatch(r"\w+ = .+  # \S.+", line), line
    assert tomllib.loads(text)["streams"]["laue"]["pipeline"]["materials"] == ["Cu", "ZrO2"]
    # the step of the scan is there to be filled in: taking the comment sign away makes it count
    out.write_text(text.replace("# step_um", "step_um"), encoding="utf-8")
    scan = read_config(out)[0].streams["laue"].scan
    assert scan is not None
    assert scan.step_um == (1.0, 1.0, 1.0)


def test_a_detector_larger_than_a_slot_gets_a_larger_slot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.det"
    write_det(path, Calibration(80.0, 2000.0, 2000.0, 0.4, 0.4, 0.05, (4371, 4150)), material="Cu")
    out = tmp_path / "c.toml"
    run(capsys, monkeypatch, "init", "--det", path, "--out", out)
    assert read_config(out)[0].ring.slot_bytes == 4371 * 4150 * 4


def test_without_a_calibration_the_place_for_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.toml"
    code, printed = run(capsys, monkeypatch, "init", "--out", out)
    assert code == 0
    assert "first put the path of your LaueTools .det file where it says calibration.det" in printed
    assert read_config(out)[0].streams["laue"].scan is None
    code, printed = run(capsys, monkeypatch, "check-config", out)
    assert code == 2
    assert "streams.laue.pipeline.geometry" in printed


def test_nothing_is_overwritten_without_force(
    det: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.toml"
    out.write_text("mine")
    code, printed = run(capsys, monkeypatch, "init", "--det", det, "--out", out)
    assert code == 2
    assert "is there already: add --force" in printed
    assert out.read_text() == "mine"
    code, _ = run(capsys, monkeypatch, "init", "--det", det, "--out", out, "--force")
    assert code == 0
    assert "[streams.laue.source]" in out.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.toml", "calib.det"]  # nothing is left beside


def test_wrong_options_are_one_line_and_write_nothing(
    det: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.toml"
    (tmp_path / "bad.det").write_text("no numbers\n")
    for args, message in [
        (("--source", "detector:31001"), "--source: address: expected tcp://host:port"),
        (("--source", "tcp://a:99999"), "--source: address: expected tcp://host:port"),
        (("--scan", "20"), None),
        (("--scan", "20x0"), "--scan: expected the points along each axis, as 20x20, got '20x0'"),
        (("--scan", "2x2x2x2"), "--scan: expected"),
        (("--det", tmp_path / "absent.det"), "absent.det"),
        (("--det", tmp_path / "bad.det"), "bad.det"),
        (("--material", "Unobtainium"), "--material: material 'Unobtainium' is neither built in"),
        (("--material", tmp_path / "x.cif"), "x.cif: no such CIF"),
        (("--out", tmp_path / "no" / "folder" / "c.toml"), "cannot be written"),
    ]:
        options = args if "--out" in args else (*args, "--out", out)
        code, printed = run(capsys, monkeypatch, "init", *options)
        if message is None:  # a line scan is a scan
            assert code == 0
            out.unlink()
            continue
        assert code == 2
        assert message in printed
        assert printed.count("\n") == 1, printed
        assert not out.exists()


@pytest.mark.truth
def test_a_calibration_of_lauetools(
    truth_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.toml"
    code, _ = run(capsys, monkeypatch, "init", "--det", truth_dir / "truth" / "calibGe111.det", "--out", out)
    assert code == 0
    assert 'materials = ["Ge"]' in out.read_text()
    assert "MARCCD165 2048 x 2048, 70.78 mm away" in out.read_text()
    code, printed = run(capsys, monkeypatch, "check-config", out)
    assert code == 0, printed
