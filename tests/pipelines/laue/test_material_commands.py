"""Bad materials and bundles as a user meets them: by the command, in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testkit.laue import CALIBRATION, material, misorientation_deg, random_turns, simulated

from daemon.commands.check_config import describe
from grainwatch.cli import main
from grainwatch.config import ConfigError, read_config
from pipelines.laue.lauetools_files import PeakFile, write_dat, write_det

BUNDLES = Path(__file__).resolve().parents[3] / "bundles"
TURN = random_turns(1, seed=9)
COPPER = """data_copper
_cell_length_a 3.6
_cell_length_b 3.6
_cell_length_c 3.6
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_space_group_name_H-M_alt 'F m -3 m'
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Cu1 0 0 0 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two calibrations and a peak list of one crystal of copper on each."""
    path = tmp_path_factory.mktemp("materials")
    for name, calibration in (("near", CALIBRATION), ("far", CALIBRATION.with_parameters(dd_mm=130.0))):
        made = simulated("Cu", TURN, seed=9, calibration=calibration)
        write_det(path / f"{name}.det", calibration)
        write_dat(path / f"{name}.dat", PeakFile(made.xy_px, made.intensity))
    return path


Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def index(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``grainwatch index`` in this process: exit status, JSON lines and messages."""

    def run(*words: str, where: str = "near") -> tuple[int, list[dict[str, Any]], str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(
            sys, "argv", ["grainwatch", "index", f"{where}.dat", "-g", f"{where}.det", *words]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code is None or isinstance(ended.value.code, int)
        return ended.value.code or 0, [json.loads(line) for line in out.splitlines()], err

    return run


def process(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("grainwatch")), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150, check=False)


def test_a_bad_cif_ends_index_with_one_line(folder: Path) -> None:
    (folder / "bad.cif").write_text(COPPER.replace("_cell_length_b 3.6\n", ""))
    done = process(folder, "index", "near.dat", "-g", "near.det", "-m", "bad.cif")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "grainwatch: index: --material: bad.cif: _cell_length_b is missing; the cell needs three lengths and"
        " three angles\n"
    )


def test_a_doubtful_cif_is_used_told_and_flagged(folder: Path, index: Run) -> None:
    (folder / "doubtful.cif").write_text(COPPER.replace("Cu1 0 0 0 1", "Cu1 0 0 0 ?"))
    status, (line,), err = index("-m", "doubtful.cif")
    assert status == 0
    assert err.startswith("index: material doubtful: of unknown occupancy (?), taken as full: Cu1\n")
    (crystal,) = line["crystals"]
    assert "doubtful_structure" in crystal["flags"]
    found = np.array(crystal["UB"]) @ np.linalg.inv(np.array(crystal["B0"]))
    assert misorientation_deg(found, TURN[0], material("Cu")) < 0.03


def test_a_band_without_spots_ends_index_with_one_line(index: Run) -> None:
    for band, words in ((("0.1", "0.5"), "Cu reflects nothing in 0.1-0.5"), (("5", "5.1"), "Cu puts ")):
        status, lines, err = index("-m", "Cu", "--energy", *band)
        assert (status, lines) == (2, [])
        assert err.startswith(f"grainwatch: index: {words}")
        assert "check " in err
        assert len(err.splitlines()) == 1


def test_what_is_named_twice_is_refused(index: Run) -> None:
    assert index("-m", "Cu", "-m", "Ti", "-m", "Cu")[::2] == (
        2,
        "grainwatch: index: --material: Cu is named twice; name each once, or rename one of the files\n",
    )
    bundle = ["--bundle", str(BUNDLES / "Cu")]
    status, _, err = index("-m", "Cu", *bundle, *bundle)
    assert (status, err.count("\n")) == (2, 1)
    assert "index: --bundle: laue-Cu-residual and laue-Cu-residual are both for Cu; name one" in err


def test_a_bundle_for_another_geometry_is_told_flagged_and_replaced(folder: Path, index: Run) -> None:
    words = ["-m", "Cu", "--bundle", str(BUNDLES / "Cu")]
    done = process(folder, "index", "far.dat", "-g", "far.det", *words)
    assert done.returncode == 0, done.stderr
    first, line = done.stderr.splitlines()[0], json.loads(done.stdout)
    assert first.startswith("index: not used, the classical search does its work: bundle laue-Cu-residual: ")
    assert "dd_mm 130 is outside" in first
    assert line["flags"] == ["outside_bundle_domain"]
    assert line["model"]["name"] == "classical-indexer"
    assert [c["material"] for c in line["crystals"]] == ["Cu"]
    status, (line,), err = index(*words)
    assert (status, line["flags"], line["model"]["name"]) == (0, [], "laue-Cu-residual")
    assert "not used" not in err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.onnx", b"\x08\x08garbage", "model.onnx: is not the file that the manifest names"),
        ("manifest.sha256", b"not a manifest\n", "manifest.sha256: line 1 is no sha256 and file name"),
        ("manifest.sha256", None, "manifest.sha256: cannot be read: No such file or directory"),
        ("classes.npz", None, "classes.npz: cannot be read: No such file or directory"),
    ],
)
def test_a_spoilt_bundle_ends_index_with_one_line(
    index: Run, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    copy = shutil.copytree(BUNDLES / "Cu", tmp_path / "bundle")
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    status, lines, err = index("-m", "Cu", "--bundle", str(copy))
    assert (status, lines) == (2, [])
    assert err.startswith(f"grainwatch: index: --bundle: {copy}/{words}")
    assert len(err.splitlines()) == 1


def config(folder: Path, name: str, pipeline: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(
        f"""
[daemon]
state_dir = "state"
runtime_dir = "run"
[streams.laue]
source = {{type = "dectris-v2", address = "tcp://127.0.0.1:31001"}}
[streams.laue.pipeline]
type = "laue"
geometry = "{folder}/near.det"
{pipeline}
"""
    )
    return path


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        (
            'materials = ["{folder}/two.cif"]',
            r"pipeline\.materials: .*two\.cif: holds 2 structures \(one, two\)",
        ),
        (
            'materials = ["Cu"]\nenergy_keV = [5.0, 5.1]',
            r"pipeline: Cu puts .* check energy band, calibration",
        ),
        ('materials = ["Cu"]\nenergy_keV = [0.1, 0.5]', r"pipeline: Cu reflects nothing in 0\.1-0\.5 keV"),
        ('materials = ["Coper"]', r"pipeline\.materials: material 'Coper' is .*: did you mean Cu\?"),
    ],
)
def test_check_config_names_the_key_and_the_material(folder: Path, pipeline: str, words: str) -> None:
    text = COPPER.replace("data_copper", "data_one") + COPPER.replace("data_copper", "data_two")
    (folder / "two.cif").write_text(text)
    path = config(folder, "bad", pipeline.format(folder=folder))
    with pytest.raises(ConfigError, match=words):
        describe(*read_config(path), str(path))


def test_check_config_tells_doubts_and_bundles_that_are_not_used(folder: Path) -> None:
    (folder / "doubtful.cif").write_text(COPPER.replace("Cu1 0 0 0 1", "Cu1 0 0 0 ?"))
    words = f'materials = ["{folder}/doubtful.cif", "Ti"]\nbundle = ["{BUNDLES}/ZrO2"]'
    path = config(folder, "doubtful", words)
    said = describe(*read_config(path), str(path))
    assert "  material doubtful: of unknown occupancy (?), taken as full: Cu1" in said
    not_used = "  not used, the classical search does its work: bundle laue-ZrO2-residual: material doubtful"
    assert any(line.startswith(not_used) for line in said)


def test_check_config_and_run_end_with_one_line_and_status_2(folder: Path) -> None:
    (folder / "empty.cif").write_text("")
    path = config(folder, "empty", f'materials = ["{folder}/empty.cif"]')
    for command in ("check-config", "run"):
        done = process(folder, command, str(path))
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.splitlines()[-1] == (
            f"grainwatch: {path}: streams.laue.pipeline.materials: {folder}/empty.cif: the file is empty;"
            " expected a CIF with a structure"
        )
        assert "Traceback" not in done.stderr
