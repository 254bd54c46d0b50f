"""Simulated spots against a scalar calculation, LaueTools' simulations and the promises made."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipelines import rotations
from pipelines.laue.crystal import load_material
from pipelines.laue.forward import (
    bending_magnet_spectrum,
    random_positions,
    simulate_pattern,
    simulate_spots,
)
from pipelines.laue.geometry import HC_KEV_A, HC_LAUETOOLS_KEV_A, Calibration, DetectorArea
from pipelines.laue.lauetools_files import read_fit
from pipelines.laue.reflections import ReflectionList, build_reflections

VECTORS = Path(__file__).resolve().parents[2] / "data" / "geometry_vectors.json"
CALIBRATION = Calibration.from_lauetools(
    (79.612, 977.81, 932.17, 0.477, 0.447), 0.0734, (2018, 2016), "sCMOS"
)
AREA = DetectorArea.of(CALIBRATION)


@pytest.fixture(scope="module")
def copper() -> ReflectionList:
    return build_reflections(load_material("Cu"))


@pytest.fixture(scope="module")
def zirconia() -> ReflectionList:
    return build_reflections(load_material("ZrO2"))


def random_ubs(reflections: ReflectionList, n: int, seed: int) -> np.ndarray:
    q = rotations.random_rotations(n, np.random.default_rng(seed))
    return rotations.to_matrix(q) @ reflections.material.B0


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text(encoding="utf-8"))["cases"])
def test_known_spots_are_among_the_simulated(case: dict[str, object]) -> None:
    c = case["calibration"]
    parameters = (c["dd_mm"], c["xcen_px"], c["ycen_px"], c["xbet_deg"], c["xgam_deg"])
    calibration = Calibration.from_lauetools(parameters, c["pixel_size_mm"], (2048, 2048))
    ratio = HC_KEV_A / HC_LAUETOOLS_KEV_A
    reflections = build_reflections(load_material(case["material"]), (5 * ratio, 22 * ratio))
    ub = np.array(case["U"]) @ np.array(case["B0"])
    spots = simulate_spots(ub, reflections, calibration, DetectorArea.rectangle((2048, 2048)))
    by_hkl = {tuple(h): i for i, h in enumerate(spots.hkl.tolist())}
    for known in case["spots"]:
        i = by_hkl[tuple(known["hkl"])]
        np.testing.assert_allclose(spots.xy_px[i] + 1, (known["x_px"], known["y_px"]), atol=1e-9)
        assert spots.energy_keV[i] / ratio == pytest.approx(known["energy_keV"], abs=1e-9)


def test_the_simulation_is_the_scalar_one(zirconia: ReflectionList) -> None:
    # One real reflection at a time, from λ = 2 d sin θ and the λ⁴/sin²θ law per unit of wavelength.
    ub = random_ubs(zirconia, 1, seed=1)[0]
    spots = simulate_spots(ub, zirconia, CALIBRATION, AREA)
    material = zirconia.material
    expected: dict[tuple[int, ...], list[tuple[int, float, float, np.ndarray]]] = {}
    for row in range(len(zirconia)):
        for order in range(1, zirconia.max_order + 1):
            f2 = zirconia.f2[row, order - 1]
            q = ub @ (order * zirconia.hkl[row].astype(float))
            g = float(np.linalg.norm(q))
            if f2 == 0 or q[0] >= 0:
                continue
            sin_theta = -q[0] / g
            wavelength = 2 * sin_theta / g
            energy = HC_KEV_A / wavelength
            if not 5.0 <= energy <= 22.0:
                continue
            u = np.array([1.0, 0.0, 0.0]) + wavelength * q
            xy = CALIBRATION.pixels(u)
            if not AREA.contains(xy):
                continue
            per_wavelength = float(bending_magnet_spectrum(energy)) * energy**2 / HC_KEV_A
            photons = per_wavelength * wavelength**4 * f2 / (2 * sin_theta**2 * material.volume_A3**2)
            signal = energy * photons * (1 - u[1] ** 2)
            expected.setdefault(tuple(zirconia.hkl[row].tolist()), []).append((order, energy, signal, xy))
    assert len(spots) == len(expected)
    assert len(spots) > 300
    scale = []
    for i, hkl in enumerate(spots.hkl.tolist()):
        order = math.gcd(*hkl)
        orders = expected[tuple(v // order for v in hkl)]
        lowest = min(orders)
        assert order == lowest[0]
        assert spots.n_orders[i] == len(orders)
        assert spots.energy_keV[i] == pytest.approx(lowest[1], rel=1e-12)
        np.testing.assert_allclose(spots.xy_px[i], lowest[3], atol=1e-8)
        scale.append(spots.intensity[i] / sum(o[2] for o in orders))
    np.testing.assert_allclose(scale, scale[0], rtol=1e-9)  # one constant for all spots


def test_harmonics_are_one_spot(copper: ReflectionList) -> None:
    case = json.loads(VECTORS.read_text(encoding="utf-8"))["cases"][0]
    c = case["calibration"]
    parameters = (c["dd_mm"], c["xcen_px"], c["ycen_px"], c["xbet_deg"], c["xgam_deg"])
    calibration = Calibration.from_lauetools(parameters, c["pixel_size_mm"], (2048, 2048))
    ub = np.array(case["U"]) @ copper.material.B0
    spots = simulate_spots(ub, copper, calibration, DetectorArea.rectangle((2048, 2048)))
    i = spots.hkl.tolist().index([0, 0, 2])
    assert [0, 0, 4] not in spots.hkl.tolist()
    assert spots.n_orders[i] == 3  # 6.8, 13.7 and 20.5 keV
    # With a beam above 10 keV the same spot is (0 0 4).
    hard = simulate_spots(ub, copper, calibration, DetectorArea.rectangle((2048, 2048)), (10.0, 22.0))
    j = hard.hkl.tolist().index([0, 0, 4])
    np.testing.assert_allclose(hard.xy_px[j], spots.xy_px[i], atol=1e-9)
    assert hard.n_orders[j] == 2
    assert hard.intensity[j] < spots.intensity[i]


def test_many_crystals_are_the_same_as_one_at_a_time(copper: ReflectionList) -> None:
    ubs = random_ubs(copper, 7, seed=2)
    together = simulate_spots(ubs, copper, CALIBRATION, AREA)
    assert (np.diff(together.crystal) >= 0).all()
    for i, ub in enumerate(ubs):
        alone = simulate_spots(ub, copper, CALIBRATION, AREA)
        mine = together.crystal == i
        np.testing.assert_array_equal(together.reflection[mine], alone.reflection)
        np.testing.assert_array_equal(together.hkl[mine], alone.hkl)
        np.testing.assert_allclose(together.xy_px[mine], alone.xy_px, atol=1e-9)
        np.testing.assert_allclose(together.intensity[mine], alone.intensity, rtol=1e-12)


def test_equivalent_ubs_give_the_same_spots(copper: ReflectionList) -> None:
    u = rotations.to_matrix(rotations.random_rotations(1, np.random.default_rng(3))[0])
    reference = simulate_spots(u @ copper.material.B0, copper, CALIBRATION, AREA)
    for rotation in copper.material.lattice_rotations:
        spots = simulate_spots(u @ rotation @ copper.material.B0, copper, CALIBRATION, AREA)
        assert len(spots) == len(reference)
        order, other = np.lexsort(spots.xy_px.T), np.lexsort(reference.xy_px.T)
        np.testing.assert_allclose(spots.xy_px[order], reference.xy_px[other], atol=1e-6)
        np.testing.assert_allclose(spots.intensity[order], reference.intensity[other], rtol=1e-6)


def test_only_usable_pixels_are_hit(copper: ReflectionList) -> None:
    mask = np.zeros(CALIBRATION.shape, dtype=bool)
    mask[:, :1000] = True
    area = DetectorArea.of(CALIBRATION, mask)
    spots = simulate_spots(random_ubs(copper, 5, seed=4), copper, CALIBRATION, area)
    assert len(spots)
    assert (spots.xy_px[:, 0] > 999.5).all()


def test_a_band_wider_than_the_list_is_refused(copper: ReflectionList) -> None:
    with pytest.raises(ValueError, match="not inside"):
        simulate_spots(np.eye(3) / 3.6, copper, CALIBRATION, AREA, (5.0, 30.0))


@pytest.mark.truth
@pytest.mark.parametrize("level", [0, 2, 4])
def test_every_spot_that_lauetools_simulated_is_simulated(truth_dir: Path, level: int) -> None:
    for grain in read_fit(truth_dir / "truth" / "CuSi" / f"SiCustrain{level}.fit"):
        assert grain.calibration is not None
        area = DetectorArea.of(grain.calibration)
        reflections = build_reflections(load_material(grain.material), (4.9, 25.0))
        spots = simulate_spots(grain.UB, reflections, grain.calibration, area)
        coprime = spots.hkl // np.gcd.reduce(spots.hkl, axis=1)[:, None]
        where = {tuple(h): i for i, h in enumerate(coprime.tolist())}
        listed = grain.hkl // np.gcd.reduce(grain.hkl, axis=1)[:, None]
        on_chip = area.contains(grain.xy_px)  # the file holds some beyond the edges
        rows = [where[tuple(h)] for h in listed[on_chip].tolist()]
        np.testing.assert_allclose(spots.xy_px[rows], grain.xy_px[on_chip], atol=2e-4)
        # LaueTools sees a circle: what it has not, lies in the corners.
        others = np.delete(spots.xy_px, rows, axis=0)
        assert (np.linalg.norm(others - 1007.5, axis=1) > 1007.5).all()


# --- spectrum


def test_spectrum_of_a_bending_magnet() -> None:
    # H2(1) = 1.454 (X-ray Data Booklet, sec. 2.1), here at E = Ec without a filter.
    assert bending_magnet_spectrum(20.0, 20.0, 1e-9) == pytest.approx(1.454, abs=1e-3)
    energy = np.linspace(1, 40, 400)
    flux = bending_magnet_spectrum(energy)
    assert (flux > 0).all()
    peak = int(np.argmax(flux))
    assert 5 < energy[peak] < 12
    assert (np.diff(flux[: peak + 1]) > 0).all()
    assert (np.diff(flux[peak:]) < 0).all()
    assert bending_magnet_spectrum(5.0) / bending_magnet_spectrum(5.0, filter_keV=1e-9) == pytest.approx(
        math.exp(-1)
    )


# --- patterns


def test_a_pattern_keeps_its_promises(copper: ReflectionList, zirconia: ReflectionList) -> None:
    lists = [copper, zirconia, copper]
    ubs = np.concatenate([random_ubs(r, 1, seed) for seed, r in enumerate(lists)])
    rng = np.random.default_rng(5)
    pattern = simulate_pattern(lists, ubs, CALIBRATION, AREA, rng, noise_px=0.2)
    assert pattern.materials == ("Cu", "ZrO2", "Cu")
    assert (np.diff(pattern.intensity) <= 0).all()
    true = pattern.crystal >= 0
    for i, (reflections, ub) in enumerate(zip(lists, ubs, strict=True)):
        spots = simulate_spots(ub, reflections, CALIBRATION, AREA)
        assert pattern.spots_expected[i] == len(spots)
        mine = pattern.crystal == i
        assert mine.sum() == len(spots) - round(0.2 * len(spots))
        where = {tuple(h): j for j, h in enumerate(spots.hkl.tolist())}
        rows = [where[tuple(h)] for h in pattern.hkl[mine].tolist()]
        np.testing.assert_allclose(pattern.intensity[mine], spots.intensity[rows])
        error = pattern.xy_px[mine] - spots.xy_px[rows]
        assert np.abs(error).max() < 1.2
        if reflections is zirconia:
            assert error.std() == pytest.approx(0.2, rel=0.1)
            weakest = np.argsort(spots.intensity)[: round(0.4 * len(spots))]
            lost = np.setdiff1d(np.arange(len(spots)), rows)
            assert np.isin(lost, weakest).mean() == pytest.approx(0.8, abs=0.02)
    assert (~true).sum() == round(0.1 * true.sum())
    assert (pattern.hkl[~true] == 0).all()
    assert np.isin(pattern.intensity[~true], pattern.intensity[true]).all()
    assert AREA.contains(pattern.xy_px[~true]).all()


def test_the_same_seed_gives_the_same_pattern(copper: ReflectionList) -> None:
    ubs = random_ubs(copper, 3, seed=6)
    one, other = (
        simulate_pattern([copper] * 3, ubs, CALIBRATION, AREA, np.random.default_rng(7)) for _ in range(2)
    )
    np.testing.assert_array_equal(one.xy_px, other.xy_px)
    np.testing.assert_array_equal(one.crystal, other.crystal)


@pytest.mark.parametrize(("missing", "weakest"), [(0.0, 0.4), (1.0, 0.4), (0.9, 0.0), (0.5, 0.1), (0.5, 1.0)])
def test_any_share_of_the_spots_can_be_lost(copper: ReflectionList, missing: float, weakest: float) -> None:
    pattern = simulate_pattern(
        [copper],
        random_ubs(copper, 1, seed=8),
        CALIBRATION,
        AREA,
        np.random.default_rng(9),
        missing_fraction=missing,
        missing_from_weakest_fraction=weakest,
        spurious_fraction=0.0,
    )
    expected = pattern.spots_expected[0]
    assert len(pattern) == expected - round(missing * expected)


def test_volumes_scale_intensities(copper: ReflectionList) -> None:
    ubs = random_ubs(copper, 2, seed=10)
    plain, scaled = (
        simulate_pattern(
            [copper, copper],
            ubs,
            CALIBRATION,
            AREA,
            np.random.default_rng(11),
            spurious_fraction=0.0,
            missing_fraction=0.0,
            volumes=volumes,
        )
        for volumes in (None, [1.0, 0.1])
    )
    ratio = scaled.intensity[scaled.crystal == 1] / plain.intensity[plain.crystal == 1]
    np.testing.assert_allclose(ratio, 0.1)


def test_no_crystal_gives_no_peak() -> None:
    pattern = simulate_pattern([], np.empty((0, 3, 3)), CALIBRATION, AREA, np.random.default_rng(12))
    assert len(pattern) == 0


def test_random_positions_are_uniform_on_the_area() -> None:
    mask = np.zeros((200, 300), dtype=bool)
    mask[:, 100:] = True
    calibration = CALIBRATION.with_parameters(shape=(200, 300))  # type: ignore[arg-type]
    area = DetectorArea.of(calibration, mask)
    xy = random_positions(20_000, area, np.random.default_rng(13))
    assert area.contains(xy).all()
    assert stats.kstest(xy[:, 0], "uniform", args=(-0.5, 100)).pvalue > 0.01
    assert stats.kstest(xy[:, 1], "uniform", args=(-0.5, 200)).pvalue > 0.01
    blind = DetectorArea(np.zeros((10, 10), dtype=np.uint8))
    with pytest.raises(ValueError, match="no usable pixel"):
        random_positions(1, blind, np.random.default_rng(14))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"missing_fraction": 1.5}, "missing fractions"),
        ({"missing_from_weakest_fraction": -0.1}, "missing fractions"),
        ({"spurious_fraction": -0.1}, "must not be negative"),
        ({"volumes": [1.0, 2.0]}, "1 reflection lists, 1 UB, 2 volumes"),
    ],
)
def test_impossible_patterns_are_refused(
    copper: ReflectionList, arguments: dict[str, object], complaint: str
) -> None:
    ubs = random_ubs(copper, 1, seed=15)
    with pytest.raises(ValueError, match=complaint):
        simulate_pattern([copper], ubs, CALIBRATION, AREA, np.random.default_rng(16), **arguments)  # type: ignore[arg-type]
