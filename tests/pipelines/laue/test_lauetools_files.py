"""LaueTools' files: the published ones, round trips, and what is wrong with bad ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.laue.crystal import load_material
from pipelines.laue.geometry import HC_LAUETOOLS_KEV_A, Calibration, beams_of, two_theta_chi_deg
from pipelines.laue.lauetools_files import (
    FitGrain,
    PeakFile,
    read_cor,
    read_dat,
    read_det,
    read_fit,
    write_cor,
    write_dat,
    write_det,
    write_fit,
)
from pipelines.laue.text_tables import FileFormatError

SCMOS = Calibration.from_lauetools((79.612, 977.81, 932.17, 0.477, 0.447), 0.0734, (2018, 2016), "sCMOS")

DET = """79.61200, 977.8100, 932.1700, 0.4770000, 0.4470000, 0.07340000, 2018, 2016
Sample-Detector distance(IM), xO, yO, angle1, angle2, pixelsize, dim1, dim2
Calibration done with Si at Wed Sep 15 12:01:40 2021 with LaueToolsGUI.py
Experimental Data file: somewhere.dat
Orientation Matrix:
[[0.6504412,0.5025610,0.5695250],[-0.0269536,0.7646121,-0.6439269],[-0.7590783,0.4034858,0.5108810]]
# Material : Si
# CCDLabel : sCMOS
# framedim : (2018, 2016)
# kf_direction : Z>0"""

COR = """2theta chi X Y I
58.429200   20.128222   623.120000   1657.730000   29239.300
80.926191   0.659485   933.040000   1215.440000   21725.720
# Calibration parameters
# dd     :   79.612
# xcen     :   977.81
# ycen     :   932.17
# xbet     :   0.477
# xgam     :   0.447
# pixelsize     :   0.0734
# CCDLabel    :   sCMOS"""

FIT = """#Strain and Orientation Refinement from experimental file: somewhere.cor
#Number of indexed spots: 2
#Element
#Cu
#grainIndex
#G_0
#Mean Deviation(pixel): 0.120
##spot_index intensity h k l 2theta Chi Xexp Yexp Energy GrainIndex PixDev
0.000000 29239.3 4.000000 2.000000 -2.000000 58.4 20.1 623.12 1657.73 10.998 0.0 0.05
1 21725 1 -9 9 96.7 -41.5 1734.95 921.15 18.71 0 0.09
#UB matrix in q= (UB) B0 G*
#[[ 1.   0.  -0.  ]
# [ 0.   0.8 -0.6 ]
# [ 0.   0.6  0.8 ]]
#B0 matrix in q= UB (B0) G*
#[[ 0.27777778 -0.         -0.        ]
# [ 0.          0.27777778 -0.        ]
# [ 0.          0.          0.27777778]]
#deviatoric strain in direct crystal frame (10-3 unit)
#[[ 0.51 -0.41 -0.9 ]
# [-0.41 -0.52  0.31]
# [-0.9   0.31  0.01]]
#new lattice parameters
#[ 3.6        3.5963001  3.5982646 89.9642124 90.102727  90.0466688]
#CCDLabel
#sCMOS
#DetectorParameters
#[79.612, 977.81, 932.17, 0.477, 0.447]
#pixelsize
#0.0734
#Frame dimensions
#[2018, 2016]"""


def file(folder: Path, text: str, name: str = "file.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- .det


def test_det(tmp_path: Path) -> None:
    calibration, orientation, material = read_det(file(tmp_path, DET))
    assert calibration == SCMOS
    assert (calibration.xcen_px, calibration.ycen_px) == pytest.approx((976.81, 931.17))
    assert material == "Si"
    assert orientation is not None
    assert orientation[1, 2] == -0.6439269


def test_a_det_of_five_numbers_and_comments(tmp_path: Path) -> None:
    rest = "\n# pixelsize : 0.0734\n# framedim : (2018, 2016)\n# CCDLabel : sCMOS\n"
    calibration, orientation, material = read_det(file(tmp_path, "79.612 977.81 932.17 0.477 0.447" + rest))
    assert calibration == SCMOS
    assert orientation is None
    assert material is None


@given(
    st.tuples(st.floats(10, 500), *[st.floats(-3000, 3000)] * 2, *[st.floats(-90, 90)] * 2),
    st.floats(0.001, 1.0),
)
def test_det_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    parameters: tuple[float, float, float, float, float],
    pixel_size: float,
) -> None:
    path = tmp_path_factory.mktemp("det") / "calib.det"
    calibration = Calibration.from_lauetools(parameters, pixel_size, (2018, 2016), "sCMOS")
    matrix = np.array([[0.1, -1e-12, 3.0], [0.0, 1 / 3, 2e-7], [1.0, 0.5, -0.25]])
    write_det(path, calibration, matrix, "Ge")
    read = read_det(path)
    assert read.calibration.to_lauetools() == pytest.approx(parameters, abs=1e-9)
    assert read.calibration.shape == (2018, 2016)
    assert read.material == "Ge"
    np.testing.assert_array_equal(read.orientation_matrix, matrix)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("Z>0", "X>0"), r"line 10: only kf_direction Z>0 .*'X>0'"),
        (("977.8100", "nan"), "line 1: .*not a number"),
        (("79.61200, 977.8100, 932.1700, 0.4770000, ", "79.6, 977.8 "), "line 1: xbet and xgam"),
        (("79.61200", "-79.61200"), "line 1: .*must be positive"),
        (("0.5025610,", ""), "line 6: expected an orientation matrix of 3 x 3"),
        (("2018, 2016\nS", "2018.5, 2016\nS"), "whole numbers of rows and columns"),
    ],
)
def test_a_bad_det_is_refused_with_its_line(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    assert change[0] in DET
    path = file(tmp_path, DET.replace(*change))
    with pytest.raises(FileFormatError, match=complaint) as caught:
        read_det(path)
    assert str(path) in str(caught.value)


def test_a_det_needs_the_shape_of_the_frame(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="rows and columns"):
        read_det(file(tmp_path, "79.612 977.81 932.17 0.477 0.447 0.0734\n"))
    with pytest.raises(FileFormatError, match="pixelsize"):
        read_det(file(tmp_path, "79.612 977.81 932.17 0.477 0.447\n# framedim : (2018, 2016)"))
    with pytest.raises(FileFormatError, match="square pixels"):
        read_det(file(tmp_path, DET + "\n# xpixelsize : 0.07\n# ypixelsize : 0.08"))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.det").write_bytes(bytes(range(256)))
    with pytest.raises(FileFormatError, match="not a text file"):
        read_det(tmp_path / "image.det")
    for reader in (read_det, read_cor, read_dat, read_fit):
        with pytest.raises(FileFormatError, match="empty"):
            reader(file(tmp_path, ""))
    with pytest.raises(FileNotFoundError):
        read_det(tmp_path / "absent.det")


# --- .cor and .dat


def test_cor(tmp_path: Path) -> None:
    peaks = read_cor(file(tmp_path, COR))
    np.testing.assert_allclose(peaks.xy_px, [[622.12, 1656.73], [932.04, 1214.44]])
    np.testing.assert_allclose(peaks.intensity, [29239.3, 21725.72])
    assert peaks.two_theta_deg is not None
    assert peaks.two_theta_deg[1] == 80.926191
    assert peaks.calibration() == SCMOS


def test_columns_may_stand_in_any_order_and_case(tmp_path: Path) -> None:
    text = "I y x chi 2theta extra\n10 1657 623 20 58 7\n"
    peaks = read_cor(file(tmp_path, text))
    np.testing.assert_allclose(peaks.xy_px, [[622, 1656]])
    assert peaks.intensity.tolist() == [10]
    assert peaks.extra["extra"].tolist() == [7]
    assert peaks.calibration() is None


def test_a_cor_without_names_has_the_usual_columns(tmp_path: Path) -> None:
    peaks = read_cor(file(tmp_path, COR.split("\n", 1)[1]))
    np.testing.assert_allclose(peaks.xy_px[0], [622.12, 1656.73])


def test_an_unknown_camera_needs_a_shape(tmp_path: Path) -> None:
    peaks = read_cor(file(tmp_path, COR.replace("sCMOS", "Unheard")))
    with pytest.raises(ValueError, match=r"'Unheard' is unknown.*rows and columns"):
        peaks.calibration()
    calibration = peaks.calibration((100, 200))
    assert calibration is not None
    assert calibration.shape == (100, 200)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("  29239.300", ""), r"line 2: expected 5 numbers \(2theta chi X Y I\)"),
        (("1215.44", "oops"), "line 3: expected 5 numbers"),
        (("2theta chi", "theta chi"), "line 1: expected column names with 2theta"),
        (("2theta chi X", "2theta X X"), "line 1: expected column names with chi"),
        (("X Y I", "X Y x"), "line 1: column names are repeated"),
        (("ycen     :   932.17", "ycen     :   high"), "line 7: expected a number for ycen; found 'high'"),
        (("# ycen     :   932.17\n", ""), "'# ycen : number'; there is none"),
    ],
)
def test_a_bad_cor_is_refused_with_its_line(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    assert change[0] in COR
    with pytest.raises(FileFormatError, match=complaint):
        read_cor(file(tmp_path, COR.replace(*change)))


finite = st.floats(-1e5, 1e5)


@given(st.lists(st.tuples(*[finite] * 6), max_size=20))
def test_cor_and_dat_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, ...]]
) -> None:
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    peaks = PeakFile(
        xy_px=table[:, :2],
        intensity=table[:, 2],
        two_theta_deg=table[:, 3],
        chi_deg=table[:, 4],
        extra={"peak_bkg": table[:, 5]},
    )
    folder = tmp_path_factory.mktemp("peaks")
    write_cor(folder / "a.cor", peaks, SCMOS)
    read = read_cor(folder / "a.cor")
    np.testing.assert_allclose(read.xy_px, peaks.xy_px, atol=1e-9)
    np.testing.assert_array_equal(read.intensity, peaks.intensity)
    np.testing.assert_array_equal(read.two_theta_deg, peaks.two_theta_deg)
    np.testing.assert_array_equal(read.chi_deg, peaks.chi_deg)
    np.testing.assert_array_equal(read.extra["peak_bkg"], table[:, 5])
    assert read.calibration() == SCMOS
    write_dat(folder / "a.dat", peaks)
    read = read_dat(folder / "a.dat")
    np.testing.assert_allclose(read.xy_px, peaks.xy_px, atol=1e-9)
    np.testing.assert_array_equal(read.intensity, peaks.intensity)
    np.testing.assert_array_equal(read.extra["peak_bkg"], table[:, 5])
    with pytest.raises(ValueError, match="2theta and chi"):
        write_cor(folder / "b.cor", read)


def test_a_dat_without_intensity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="line 1: expected a column peak_Isub"):
        read_dat(file(tmp_path, "peak_X peak_Y\n1 2\n"))
    with pytest.raises(FileFormatError, match="expected column names"):
        read_dat(file(tmp_path, "# nothing here\n"))


# --- .fit


def test_fit(tmp_path: Path) -> None:
    (grain,) = read_fit(file(tmp_path, FIT))
    assert grain.material == "Cu"
    assert grain.hkl.tolist() == [[4, 2, -2], [1, -9, 9]]
    np.testing.assert_allclose(grain.xy_px, [[622.12, 1656.73], [1733.95, 920.15]])
    np.testing.assert_allclose(
        grain.UB, np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]) / 3.6, atol=1e-8
    )
    assert grain.strain_crystal is not None
    assert grain.strain_crystal[0, 2] == pytest.approx(-0.9e-3)
    assert grain.strain_sample is None
    assert grain.lattice_A_deg is not None
    assert grain.lattice_A_deg[1] == 3.5963001
    assert grain.calibration == SCMOS
    assert grain.mean_deviation_px == 0.12
    assert grain.extra["PixDev"].tolist() == [0.05, 0.09]


def test_fit_round_trip(tmp_path: Path) -> None:
    (grain,) = read_fit(file(tmp_path, FIT))
    other = replace(grain, material="Si", strain_sample=grain.strain_crystal, calibration=None)
    write_fit(tmp_path / "a.fit", [grain, other])
    first, second = read_fit(tmp_path / "a.fit")
    assert (first.material, second.material) == ("Cu", "Si")
    assert second.calibration is None
    for read, written in ((first, grain), (second, other)):
        for name in ("UB", "hkl", "xy_px", "energy_keV", "lattice_A_deg"):
            np.testing.assert_allclose(getattr(read, name), getattr(written, name), atol=1e-12)
        assert read.strain_crystal is not None
        assert written.strain_crystal is not None
        np.testing.assert_allclose(read.strain_crystal, written.strain_crystal, atol=1e-15)
        assert {k: v.tolist() for k, v in read.extra.items()} == {
            k: v.tolist() for k, v in written.extra.items()
        }


def test_a_grain_of_ones_own_is_written(tmp_path: Path) -> None:
    grain = FitGrain(
        material="Cu",
        UB=np.eye(3) / 3.6,
        orientation_matrix=np.eye(3),
        B0=np.eye(3) / 3.6,
        hkl=np.array([[1, 1, 3]]),
        xy_px=np.array([[10.25, 20.5]]),
        energy_keV=np.array([8.0]),
        calibration=SCMOS,
    )
    write_fit(tmp_path / "a.fit", [grain])
    assert " 11.25 21.5 " in (tmp_path / "a.fit").read_text()  # files count from 1
    (read,) = read_fit(tmp_path / "a.fit")
    assert read.calibration == SCMOS
    assert np.isnan(read.mean_deviation_px)
    assert read.strain_crystal is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("spots: 2", "spots: 3"), "line 2: expected as many rows as announced, there are 2"),
        (("4.000000 2.000000", "4.500000 2.000000"), "line 8: expected integer Miller indices"),
        ((" h k l", " k l m"), "line 8: expected columns h"),
        (("#B0 matrix in q= UB (B0) G*\n", ""), r"line 2: expected '#B0 matrix in q='"),
        (("# [ 0.   0.8 -0.6 ]\n", ""), "line 14: expected 3 numbers"),
        (("0.0 0.05", "0.05"), "line 9: expected 12 numbers"),
        (("Number of indexed", "Something else"), "is this a .fit file"),
    ],
)
def test_a_bad_fit_is_refused_with_its_line(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    assert change[0] in FIT
    with pytest.raises(FileFormatError, match=complaint):
        read_fit(file(tmp_path, FIT.replace(*change)))


@pytest.mark.parametrize("end", [400, FIT.index("# [ 0.          0.27")])
def test_a_truncated_fit_is_refused(tmp_path: Path, end: int) -> None:
    with pytest.raises(FileFormatError):
        read_fit(file(tmp_path, FIT[:end]))


# --- the published files


@pytest.mark.truth
def test_published_calibrations(truth_dir: Path) -> None:
    truth = truth_dir / "truth"
    for path, material, shape in [
        ("calibGe111.det", "Ge", (2048, 2048)),
        ("GaN_Si/calib.det", "Si", (2018, 2016)),
        ("ZnCuOCl/calib.det", "Ge", (2018, 2016)),
    ]:
        read = read_det(truth / path)
        assert read.material == material
        assert read.calibration.shape == shape
        assert read.orientation_matrix is not None
        np.testing.assert_allclose(read.orientation_matrix @ read.orientation_matrix.T, np.eye(3), atol=1e-3)
    assert read_det(truth / "GaN_Si" / "calib.det").calibration == SCMOS


@pytest.mark.truth
def test_published_peak_lists_agree_with_their_own_calibration(truth_dir: Path) -> None:
    # 2theta and chi of a .cor are computed from X, Y and the calibration in its footer.
    counts = {}
    for path in sorted((truth_dir / "truth").rglob("*.cor")):
        peaks = read_cor(path)
        counts[path.stem] = len(peaks.xy_px)
        calibration = peaks.calibration(None if peaks.label else (2048, 2048))
        assert calibration is not None
        two_theta, chi = two_theta_chi_deg(calibration.directions(peaks.xy_px))
        np.testing.assert_allclose(two_theta, peaks.two_theta_deg, atol=1e-3)
        np.testing.assert_allclose(chi, peaks.chi_deg, atol=1e-3)
    assert counts["Ge_blanc_0000_LT_5"] == 97
    assert counts["img_Ge_sCMOS_0000_181peaks"] == 181
    assert counts["SiCustrain2"] == 210


@pytest.mark.truth
def test_a_dat_and_its_cor_hold_the_same_peaks(truth_dir: Path) -> None:
    dat = read_dat(truth_dir / "truth" / "Ge_blanc_0000_LT_5.dat")
    cor = read_cor(truth_dir / "truth" / "Ge_blanc_0000_LT_5.cor")
    np.testing.assert_allclose(dat.xy_px, cor.xy_px)
    np.testing.assert_allclose(dat.intensity, cor.intensity)
    assert len(dat.extra) == 8


def computed(grain: FitGrain) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (n, 2), px from 0, and energies (n,) of a grain's reflections."""
    assert grain.calibration is not None
    u, wavelength = beams_of(grain.hkl @ grain.UB.T)
    return grain.calibration.pixels(u), HC_LAUETOOLS_KEV_A / wavelength


@pytest.mark.truth
def test_germanium_spots_lie_where_its_ub_puts_them(truth_dir: Path) -> None:
    (grain,) = read_fit(truth_dir / "truth" / "Ge_blanc_0000_LT_5.fit")
    assert (grain.material, len(grain.hkl)) == ("Ge", 95)
    np.testing.assert_allclose(grain.B0, load_material("Ge").B0, atol=1e-8)
    xy, energy = computed(grain)
    theory = np.stack([grain.extra["Xtheo"], grain.extra["Ytheo"]], axis=1) - 1
    np.testing.assert_allclose(xy, theory, atol=0.02)  # the file rounds xbet, xgam to 1e-3 deg
    np.testing.assert_allclose(energy, grain.energy_keV, atol=1e-5)
    deviation = np.linalg.norm(xy - grain.xy_px, axis=1)
    assert deviation.mean() == pytest.approx(0.191, abs=0.001)
    # ... and with the full digits of the calibration that stand in the peak list:
    footer = read_cor(truth_dir / "truth" / "Ge_blanc_0000_LT_5.cor").calibration((2048, 2048))
    assert footer is not None
    u, _ = beams_of(grain.hkl @ grain.UB.T)
    np.testing.assert_allclose(footer.pixels(u), theory, atol=1e-4)


@pytest.mark.truth
@pytest.mark.parametrize("level", [0, 2, 4])
def test_silicon_and_copper_of_one_file(truth_dir: Path, level: int) -> None:
    grains = read_fit(truth_dir / "truth" / "CuSi" / f"SiCustrain{level}.fit")
    assert [(g.material, len(g.hkl)) for g in grains] == [("Si", 155), ("Cu", 55)]
    for grain in grains:
        np.testing.assert_allclose(grain.B0, load_material(grain.material).B0, atol=1e-8)
        xy, energy = computed(grain)
        np.testing.assert_allclose(energy, grain.energy_keV, atol=2e-6)
        deviation = np.linalg.norm(xy - grain.xy_px, axis=1)
        np.testing.assert_allclose(deviation, grain.extra["PixDev"], atol=1e-5)
        assert deviation.max() < 2e-4


@pytest.mark.truth
def test_zirconia_spots_lie_where_its_ub_puts_them(truth_dir: Path) -> None:
    (grain,) = read_fit(truth_dir / "truth" / "ZrO2" / "testZrO2_0_g0.fit")
    assert (grain.material, len(grain.hkl)) == ("ZrO2", 543)
    np.testing.assert_allclose(grain.B0, load_material("ZrO2").B0, atol=1e-8)
    xy, energy = computed(grain)
    np.testing.assert_allclose(energy, grain.energy_keV, atol=2e-6)
    # The file was refined for a source 78 µm off along the beam (a study of depth effects), which
    # moves every spot by the same vector and is not written down. With it the printed deviations follow.
    assert grain.calibration is not None
    source_mm = 0.0777856
    shift_px = np.array([0.0, source_mm / grain.calibration.pixel_size_mm])
    deviation = np.linalg.norm(xy + shift_px - grain.xy_px, axis=1)
    np.testing.assert_allclose(deviation, grain.extra["PixDev"], atol=1e-4)
    assert deviation.mean() == pytest.approx(grain.mean_deviation_px, abs=5e-4)
