"""`grainwatch index` as it is typed: files in, JSON lines and pictures out, errors by name."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fabio.tifimage
import h5py
import matplotlib.image
import numpy as np
import pytest
from testkit.laue import (
    ARAGONITE,
    AREA,
    CALIBRATION,
    misorientation_deg,
    phase,
    random_turns,
    simulated,
)
from testkit.laue import (
    material as known,
)

from grainwatch.cli import main
from pipelines.files import read_images
from pipelines.laue.analysis import LaueAnalysis
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import two_theta_chi_deg
from pipelines.laue.lauetools_files import PeakFile, write_cor, write_dat, write_det
from pipelines.laue.plot import POOL, grey_scale
from pipelines.laue.render import render_frame

KEYS = {
    "material",
    "UB",
    "B0",
    "quaternion",
    "euler_deg",
    "strain",
    "strain_sample",
    "strain_sigma",
    "spots_matched",
    "spots_expected",
    "match_rate",
    "chance_match_rate",
    "false_probability",
    "residual_px",
    "flags",
}
TRUTH = random_turns(2, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration, peak lists and frames of two copper crystals, good ones and bad ones."""
    path = tmp_path_factory.mktemp("index")
    write_det(path / "c.det", CALIBRATION)
    write_peaks(path / "peaks.cor", simulated("Cu", TRUTH, seed=5).xy_px)
    write_dat(path / "peaks.dat", PeakFile(np.array([[5.0, 6.0]]), np.array([10.0])))
    turns = TRUTH @ known("Cu").B0
    spots = simulate_spots(turns, phase("Cu").scene.reflections, CALIBRATION, AREA)
    counts = np.clip(2e5 * spots.intensity / np.median(spots.intensity), 3e3, 3e5)
    pixels = render_frame(CALIBRATION.shape, spots.xy_px, counts, 2.2, np.random.default_rng(5))
    fabio.tifimage.TifImage(data=pixels).write(str(path / "frame.tif"))
    whole = (path / "frame.tif").read_bytes()
    (path / "frame.tif.gz").write_bytes(gzip.compress(whole, 1))
    (path / "truncated.tif").write_bytes(whole[: len(whole) // 2])
    (path / "truncated.tif.gz").write_bytes((path / "frame.tif.gz").read_bytes()[:100_000])
    fabio.tifimage.TifImage(data=pixels[:1000]).write(str(path / "small.tif"))
    with h5py.File(path / "stack.h5", "w") as file:
        file["/entry/data/data"] = np.stack([pixels, np.zeros_like(pixels), pixels])
    return path


def write_peaks(path: Path, xy: np.ndarray) -> None:
    two_theta, chi = two_theta_chi_deg(CALIBRATION.directions(xy))
    intensity = np.linspace(6e4, 1e2, len(xy))
    shuffled = np.random.default_rng(0).permutation(len(xy))  # a list need not be sorted
    peaks = PeakFile(xy[shuffled], intensity[shuffled], two_theta[shuffled], chi[shuffled])
    write_cor(path, peaks, CALIBRATION)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, JSON lines and messages of ``grainwatch index``, in this process."""
    argv = sys.argv
    sys.argv = ["grainwatch", "index", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    assert ended.value.code is None or isinstance(ended.value.code, int)
    return ended.value.code or 0, [json.loads(line) for line in out.splitlines()], err


def common(folder: Path, *more: object) -> Sequence[object]:
    return ["--material", "Cu", "--geometry", folder / "c.det", *more]


def check_truth(crystals: list[dict[str, Any]]) -> None:
    assert [c["material"] for c in crystals] == ["Cu", "Cu"]
    for truth in TRUTH:
        near = [
            misorientation_deg(np.array(c["UB"]) @ np.linalg.inv(np.array(c["B0"])), truth, known("Cu"))
            for c in crystals
        ]
        assert min(near) < 0.03


def test_the_command_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    names = ["frame.tif.gz", "peaks.cor", "absent.tif", "truncated.tif", "truncated.tif.gz", "small.tif"]
    out, plot = tmp_path / "out.jsonl", tmp_path / "plot.png"
    arguments = [*names, *common(folder, "--json", out, "--plot", plot)]
    command = [str(Path(sys.executable).with_name("grainwatch")), "index", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "4 of 6 frames failed"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["path"] for line in lines] == names
    for line in lines[:2]:
        check_truth(line["crystals"])
        assert "error" not in line
    assert lines[0]["peaks"] > 40
    assert "No such file" in lines[2]["error"]
    assert "truncated" in lines[3]["error"]
    assert "truncated" in lines[4]["error"]
    assert (
        "has 1000 rows and 2016 columns, but the calibration is for sCMOS of 2018 rows" in lines[5]["error"]
    )
    for name, line in zip(names[2:], lines[2:], strict=True):
        assert name in line["error"]
        assert f"{name}: failed: " in done.stderr
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["plot-0001.png", "plot-0002.png"]
    for name in pictures:
        picture = matplotlib.image.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 500
        assert picture[..., :3].std() > 0.01  # not an empty sheet


def test_a_line_holds_what_was_promised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, (line,), _ = run(capsys, folder / "peaks.cor", *common(folder))
    assert status == 0
    assert line["path"] == str(folder / "peaks.cor")
    assert set(line) >= {"path", "peaks", "crystals"}
    for crystal in line["crystals"]:
        assert set(crystal) >= KEYS
        for key in ("UB", "B0", "strain", "strain_sample", "strain_sigma"):
            assert np.array(crystal[key], dtype=float).shape == (3, 3)
        assert len(crystal["quaternion"]) == 4
        assert len(crystal["euler_deg"]) == 3
        assert crystal["match_rate"] == crystal["spots_matched"] / crystal["spots_expected"]
    check_truth(line["crystals"])


def test_what_was_not_determined_is_null(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = simulated("Cu", TRUTH[:1], seed=2, spurious_fraction=0.0).xy_px[:8]
    write_peaks(folder / "few.cor", few)
    status, (line,), _ = run(capsys, folder / "few.cor", *common(folder))
    assert status == 0
    (crystal,) = line["crystals"]
    assert crystal["strain"] == [[None] * 3] * 3
    assert crystal["strain_sigma"] == [[None] * 3] * 3
    assert crystal["flags"] == ["strain_not_refined", "low_match_rate"]


def test_spots_on_demand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (line,), _ = run(capsys, folder / "peaks.cor", *common(folder, "--spots"))
    peaks = np.array(line["peak_xy_px"])
    assert len(peaks) == line["peaks"]
    for crystal in line["crystals"]:
        hkl = np.array(crystal["hkl"]) @ np.array(crystal["UB"]).T
        u = [1.0, 0.0, 0.0] - 2 * hkl[:, :1] * hkl / np.sum(hkl**2, axis=1, keepdims=True)
        distance = np.linalg.norm(CALIBRATION.pixels(u) - peaks[crystal["spot_indices"]], axis=1)
        assert distance.mean() == pytest.approx(crystal["residual_px"], rel=1e-6)


def test_noise_is_white_in_the_picture_and_spots_are_dark(folder: Path) -> None:
    cu = LaueAnalysis([known("Cu")], CALIBRATION, AREA)
    ((_, pixels),) = read_images(str(folder / "frame.tif"))
    found = cu.analyse_image(pixels)
    assert found.peaks is not None
    grey, low, high = grey_scale(pixels, found)
    shade = np.clip((grey - low) / (high - low), 0, 1)
    assert np.mean(shade == 0) > 0.9
    x, y = (found.xy_px[found.peaks.snr > 20] + 0.5).astype(int).T // POOL
    assert np.median(shade[y, x]) > 0.6
    for shape in ((5, 7), (2018, 2016)):  # tiny, and without a peak
        _, low, high = grey_scale(np.zeros(shape, dtype=np.uint16), cu.analyse_peaks([]))
        assert low < high


def test_stacks_are_frame_by_frame_and_a_bad_one_is_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines, err = run(capsys, folder / "stack.h5", *common(folder))
    assert (status, len(lines)) == (1, 3)
    check_truth(lines[0]["crystals"])
    assert "all pixels are zero" in lines[1]["error"]
    assert lines[2]["crystals"] == lines[0]["crystals"]
    assert "1 of 3 frames failed" in err


def test_a_pattern_of_names_and_another_material(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, (line,), err = run(
        capsys, folder / "peak*.cor", "-m", "Ti", "--material", "Cu", "--geometry", folder / "c.det"
    )
    assert status == 0
    check_truth(line["crystals"])
    status, (line,), err = run(capsys, folder / "peaks.cor", "-m", "Ti", "-g", folder / "c.det")
    assert (status, line["crystals"]) == (0, [])
    assert "no crystal found" in err


def test_a_mask_is_not_expected_to_show_spots(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros(CALIBRATION.shape, dtype=np.uint8)
    mask[:900] = 1
    np.save(tmp_path / "mask.npy", mask)
    _, (whole,), _ = run(capsys, folder / "frame.tif", *common(folder))
    _, (masked,), _ = run(capsys, folder / "frame.tif", *common(folder, "--mask", tmp_path / "mask.npy"))
    check_truth(masked["crystals"])
    assert masked["peaks"] < whole["peaks"]
    expected = [sum(c["spots_expected"] for c in line["crystals"]) for line in (masked, whole)]
    assert expected[0] < 0.8 * expected[1]
    assert min(c["match_rate"] for c in masked["crystals"]) > 0.8


def test_a_peak_list_of_another_detector_and_a_broken_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.cor").write_text("2theta chi X Y I\n80 1 900 nan 5\n")
    (folder / "empty.cor").write_text("")
    far = PeakFile(
        np.full((10, 2), 5000.0) + np.arange(20).reshape(10, 2), np.ones(10), np.ones(10), np.ones(10)
    )
    write_cor(folder / "far.cor", far)
    names = ("broken.cor", "empty.cor", "far.cor", "peaks.cor")
    status, lines, _ = run(capsys, *(folder / name for name in names), *common(folder))
    assert status == 1
    assert "broken.cor: peak 1 of 1 has the position [899.0, nan]" in lines[0]["error"]
    assert "empty.cor: the file is empty" in lines[1]["error"]
    assert "10 of 10 peaks lie off the detector of 2018 rows" in lines[2]["error"]
    check_truth(lines[3]["crystals"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["-m", "Unobtainium"], "index: --material: material .Unobtainium. is neither built in"),
        (["-m", "cu"], r"--material: material .cu. is .*: did you mean Cu\? built in: Al, "),
        (["-m", "absent.cif"], "absent.cif"),
        (["-g", "absent.det"], "index: --geometry: absent.det: cannot be read: no such file"),
        (["--mask", "absent.npy"], "index: --mask: absent.npy: cannot be read: no such file"),
        (["--json", "absent/out.jsonl"], "--json .*absent/out.jsonl: No such file or directory"),
        (["--json", "."], "--json .: Is a directory"),
        (["--plot", "absent/plot.png"], "--plot absent/plot.png: absent is no folder"),
        (["--plot", "plot.xyz"], "--plot plot.xyz: expected a name that ends in .png"),
        (
            ["--energy", "22", "5"],
            "index: --energy: expected the lower first, both between 0 and 200 keV, got 22 5",
        ),
        (["--match-radius", "50"], "index: --match-radius 50.0: expected at most 16"),
        (["--threshold", "nan"], "index: --threshold nan"),
        (["--max-false-probability", "3"], "index: --max-false-probability 3.0: expected between 0 and 1"),
        (["--sample-frame", "tilt"], "index: --sample-frame: .tilt. is not known; known: lab, tilt40"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_named_and_ends_with_2(
    folder: Path,
    options: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    given = [] if "-g" in options else ["-g", "c.det"]
    status, lines, err = run(capsys, "peaks.cor", "-m", "Cu", *given, *options)
    assert (status, lines) == (2, [])
    assert re.search(complaint, err)
    assert len(err.strip().splitlines()) == 1


def test_names_that_stand_for_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, err = run(capsys, folder / "nothing*.tif", *common(folder))
    assert (status, lines) == (2, [])
    assert "nothing*.tif: no file there" in err
    status, _, err = run(capsys, *common(folder))
    assert status == 2
    assert "files" in err


def test_a_material_from_a_cif(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Aragonite as other programs write it: sites by label and symbol, a group of another setting.
    sites = "\n".join(f"{s.element}{i} {s.element} {s.x} {s.y} {s.z}" for i, s in enumerate(ARAGONITE.sites))
    lengths = "\n".join(f"_cell_length_{k} {v}" for k, v in zip("abc", ARAGONITE.cell_A_deg, strict=False))
    angles = "\n".join(f"_cell_angle_{k} 90" for k in ("alpha", "beta", "gamma"))
    loop = "loop_\n_atom_site_label\n_atom_site_type_symbol\n" + "\n".join(
        f"_atom_site_fract_{k}" for k in "xyz"
    )
    group = "_symmetry_space_group_name_H-M 'P m c n'"
    (folder / "aragonite.cif").write_text("\n".join(["data_aragonite", lengths, angles, group, loop, sites]))
    write_peaks(folder / "aragonite.cor", simulated("aragonite", TRUTH[:1], seed=1).xy_px)
    options = ["-m", folder / "aragonite.cif", "-m", "Cu", "-g", folder / "c.det"]
    status, (line,), _ = run(capsys, folder / "aragonite.cor", *options)
    assert status == 0
    (crystal,) = line["crystals"]
    found = np.array(crystal["UB"]) @ np.linalg.inv(ARAGONITE.B0)
    assert misorientation_deg(found, TRUTH[0], ARAGONITE) < 0.02
    assert "aragonite" in crystal["material"]
