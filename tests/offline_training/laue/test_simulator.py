"""The training simulator against the forward simulation, and its conditions as stated."""

from __future__ import annotations

import numpy as np
import pytest
from testkit.laue import AREA, BAND_KEV, CALIBRATION, material

from offline_training.laue.domain import GeometryRange, PatternRange
from offline_training.laue.simulator import PatternSimulator
from pipelines.laue.classes import ClassList, choose_classes
from pipelines.laue.features import FeatureMaker, FeatureSpec
from pipelines.laue.forward import simulate_spots
from pipelines.laue.reflections import ReflectionList, build_reflections

FIXED = GeometryRange(0.0, 0.0, 0.0, 0.0)


def _plain(crystals: int = 1, **changes: object) -> PatternRange:
    values: dict[str, object] = {
        "crystals": (crystals, crystals),
        "noise_px": (0.0, 0.0),
        "missing": (0.0, 0.0),
        "spurious": (0.0, 0.0),
        "log_volume": 0.0,
        "strain": 0.0,
    }
    return PatternRange(**(values | changes))  # type: ignore[arg-type]


def _listed(name: str) -> tuple[ReflectionList, ClassList]:
    listed = build_reflections(material(name), BAND_KEV)
    return listed, choose_classes(listed, [CALIBRATION] * 30, np.random.default_rng(0), 0.4, 3000)


@pytest.mark.parametrize("name", ["Cu", "Ti", "rutile", "ZrO2", "triclinic"])
def test_a_crystal_has_the_spots_of_the_forward_simulation(name: str) -> None:
    listed, classes = _listed(name)
    made = PatternSimulator(listed, classes, CALIBRATION, FIXED, _plain(), seed=4).pattern(0)
    # The orientation is not handed out: it follows from the spots' own directions.
    g = listed.g[made.reflection]
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    left, _, right = np.linalg.svd(made.q.T @ unit)
    turn = left @ right
    spots = simulate_spots(turn @ listed.material.B0, listed, CALIBRATION, AREA)
    order = np.argsort(made.reflection)
    np.testing.assert_array_equal(made.reflection[order], spots.reflection)
    np.testing.assert_allclose(made.xy_px[order], spots.xy_px, atol=1e-6)
    np.testing.assert_allclose(made.intensity[order], spots.intensity, rtol=2e-3)
    np.testing.assert_array_equal(made.label, classes.of_reflections(listed)[made.reflection])
    assert (np.diff(made.intensity) <= 0).all()
    assert np.linalg.det(turn) == pytest.approx(1.0)


def test_numbers_of_missing_and_spurious_spots_are_as_asked() -> None:
    listed, classes = _listed("Cu")
    kept, spurious, full = 0, 0, 0
    for number in range(40):
        full += len(PatternSimulator(listed, classes, CALIBRATION, FIXED, _plain(5)).pattern(number).label)
        conditions = _plain(5, missing=(0.2, 0.2), spurious=(0.1, 0.1))
        made = PatternSimulator(listed, classes, CALIBRATION, FIXED, conditions).pattern(number)
        kept += np.count_nonzero(made.crystal >= 0)
        spurious += np.count_nonzero(made.crystal < 0)
        assert not made.label[made.crystal < 0].any()
        assert AREA.contains(made.xy_px).all()
    assert kept / full == pytest.approx(0.8, abs=0.02)
    assert spurious / kept == pytest.approx(0.1, abs=0.005)


def test_noise_has_the_width_that_was_asked_for() -> None:
    listed, classes = _listed("Cu")
    errors = []
    for number in range(30):
        exact = PatternSimulator(listed, classes, CALIBRATION, FIXED, _plain(5)).pattern(number)
        noisy = PatternSimulator(listed, classes, CALIBRATION, FIXED, _plain(5, noise_px=(0.3, 0.3))).pattern(
            number
        )
        errors.append((noisy.xy_px - exact.xy_px).ravel())
    error = np.concatenate(errors)
    assert error.std() == pytest.approx(0.3, rel=0.05)
    assert abs(error.mean()) < 0.02


def test_numbers_of_crystals_span_the_range() -> None:
    listed, classes = _listed("Cu")
    simulator = PatternSimulator(listed, classes, CALIBRATION, FIXED, PatternRange(crystals=(1, 10)))
    counts = {int(simulator.pattern(i).crystal.max()) + 1 for i in range(100)}
    assert counts == set(range(1, 11))


def test_geometry_stays_in_its_range() -> None:
    rng = np.random.default_rng(2)
    drawn = [GeometryRange().draw(CALIBRATION, rng) for _ in range(300)]
    dd = np.array([c.dd_mm for c in drawn]) / CALIBRATION.dd_mm - 1
    centre = np.array([c.xcen_px for c in drawn]) - CALIBRATION.xcen_px
    assert 0.14 < np.abs(dd).max() <= 0.15
    assert 180 < np.abs(centre).max() <= 200
    assert max(abs(c.xbet_deg - CALIBRATION.xbet_deg) for c in drawn) <= 3


def test_patterns_depend_on_seed_and_number_alone() -> None:
    listed, classes = _listed("Cu")
    one, other = (PatternSimulator(listed, classes, CALIBRATION, seed=3) for _ in range(2))
    other.pattern(0)
    np.testing.assert_array_equal(one.pattern(7).xy_px, other.pattern(7).xy_px)
    elsewhere = PatternSimulator(listed, classes, CALIBRATION, seed=4).pattern(7)
    assert not np.array_equal(one.pattern(7).xy_px[:1], elsewhere.xy_px[:1])
    maker = FeatureMaker(FeatureSpec())
    x, y = one.batch(5, 4, maker, 8)
    x2, y2 = other.batch(7, 2, maker, 8)
    np.testing.assert_array_equal(x[16:], x2)
    np.testing.assert_array_equal(y[16:], y2)
