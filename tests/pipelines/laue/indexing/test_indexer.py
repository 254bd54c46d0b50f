"""Crystals out of peak lists whose crystals are known; their number is not told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import cKDTree
from testkit.laue import (
    AREA,
    BAND_KEV,
    CALIBRATION,
    ONE_OF_EACH_SYSTEM,
    equivalent_of,
    found_and_false,
    indexer,
    misorientation_deg,
    phase,
    random_strain,
    random_turns,
    simulated,
    turn_about,
)

from pipelines.laue.forward import Pattern, simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.indexing.assign import IndexedCrystal
from pipelines.laue.indexing.indexer import Hint, Indexer
from pipelines.laue.indexing.match import predict
from pipelines.laue.indexing.parameters import IndexingParameters, Phase
from pipelines.laue.indexing.refine import decompose, strain_sigma


def check(returned: Sequence[IndexedCrystal], names: Sequence[str], truths: object, *materials: str) -> None:
    phases = indexer(*(materials or dict.fromkeys(names))).phases
    assert found_and_false(returned, phases, names, np.asarray(truths)) == (len(names), 0)


def same(one: Sequence[IndexedCrystal], other: Sequence[IndexedCrystal]) -> bool:
    return len(one) == len(other) and all(
        a.phase == b.phase
        and a.matrix.tobytes() == b.matrix.tobytes()
        and a.covariance.tobytes() == b.covariance.tobytes()
        and a.spots.tobytes() == b.spots.tobytes()
        and a.log_false == b.log_false
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "grains", "patterns"),
    [("Cu", 1, 12), ("Cu", 2, 12), ("Cu", 5, 10), ("Cu", 10, 6), ("ZrO2", 2, 4)],
)
def test_crystals_are_found_and_no_others(name: str, grains: int, patterns: int) -> None:
    near = []
    for seed in range(patterns):
        truths = random_turns(grains, seed=1000 * grains + seed)
        returned = indexer(name).index(simulated(name, truths, seed).xy_px)
        check(returned, [name] * grains, truths)
        near += [
            min(misorientation_deg(c.matrix, truth, phase(name).material) for truth in truths)
            for c in returned
        ]
    assert np.median(near) < 0.015


@pytest.mark.parametrize("name", ONE_OF_EACH_SYSTEM)
def test_every_crystal_system(name: str) -> None:
    for seed in range(3):
        truths = random_turns(1 + seed % 2, seed=seed)
        check(indexer(name).index(simulated(name, truths, seed).xy_px), [name] * len(truths), truths)


def test_what_is_said_of_a_crystal_belongs_together() -> None:
    truths = random_turns(3, seed=8)
    pattern = simulated("Ti", truths, seed=8)
    listed = phase("Ti").scene.reflections
    for crystal in indexer("Ti").index(pattern.xy_px):
        number = int(np.argmin([misorientation_deg(crystal.matrix, t, listed.material) for t in truths]))
        expected = simulate_spots(crystal.matrix @ listed.material.B0, listed, CALIBRATION, AREA)
        assert crystal.expected == len(expected)
        place = dict(zip(expected.reflection.tolist(), expected.xy_px, strict=True))
        computed = np.array([place[row] for row in crystal.reflections.tolist()])
        distance = np.linalg.norm(computed - pattern.xy_px[crystal.spots], axis=1)
        np.testing.assert_allclose(crystal.distance_px, distance, atol=1e-6)
        assert len(np.unique(crystal.spots)) == len(crystal.spots)
        assert np.mean(pattern.crystal[crystal.spots] == number) > 0.9
        # Nearly every spot that the crystal left in the list is among its matches.
        assert len(crystal.spots) >= 0.97 * np.count_nonzero(pattern.crystal == number)
        assert crystal.false_probability < 1e-20
        assert 0 < crystal.chance_rate < 0.02


def merged(pattern: Pattern, within_px: float = 2.0) -> np.ndarray:
    """The peaks as a peak search gives them: two spots in one place are one peak."""
    pairs = cKDTree(pattern.xy_px).query_pairs(within_px, output_type="ndarray")
    return np.delete(pattern.xy_px, pairs.max(axis=1), axis=0)


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("Cu", turn_about([1, 1, 1], 60)),
        ("Si", turn_about([1, -1, 1], 60)),
        ("Cu", turn_about([1, 1, 0], 38.942441)),  # Σ9
    ],
    ids=["Cu-3", "Si-3", "Cu-9"],
)
def test_a_true_twin_is_kept(name: str, twin: np.ndarray) -> None:
    for seed in range(4):
        parent = random_turns(1, seed)[0]
        truths = [parent, parent @ twin]
        pattern = simulated(name, truths, seed, volumes=[1.0, 0.4])
        check(indexer(name).index(merged(pattern)), [name] * 2, truths)


@pytest.mark.parametrize("name", ["Cu", "Ti", "ZrO2"])
@pytest.mark.parametrize("angle_deg", [1.0, 2.0])
def test_a_subgrain_is_kept(name: str, angle_deg: float) -> None:
    for seed in range(3):
        parent = random_turns(1, seed)[0]
        axis = np.random.default_rng(seed).normal(size=3)
        truths = [parent, turn_about(axis, angle_deg) @ parent]
        check(indexer(name).index(merged(simulated(name, truths, seed))), [name] * 2, truths)


@pytest.mark.parametrize("names", [("Cu", "Ti"), ("Si", "GaN"), ("ZrO2", "Zr"), ("Al2O3", "Ni")])
def test_two_phases_in_one_frame_whatever_their_order(names: tuple[str, str]) -> None:
    for seed in range(2):
        truths = random_turns(3, seed=20 + seed)
        which = [names[0], names[1], names[1]]
        xy = simulated(which, truths, seed).xy_px
        there, back = indexer(*names).index(xy), indexer(*names[::-1]).index(xy)
        check(there, which, truths, *names)
        check(back, which, truths, *names[::-1])
        for one in there:
            assert any(
                names[one.phase] == names[::-1][other.phase] and np.array_equal(one.spots, other.spots)
                for other in back
            )


@pytest.mark.parametrize(("there", "searched"), [("Cu", "Ti"), ("Ti", "Cu"), ("ZrO2", "Cu"), ("Cu", "ZrO2")])
def test_another_material_is_not_found(there: str, searched: str) -> None:
    for seed in range(3):
        assert indexer(searched).index(simulated(there, random_turns(2, seed), seed).xy_px) == []


def test_names_that_share_their_angles_go_to_the_one_that_explains_more() -> None:
    # All cubic crystals have the same angles; Si shows spots that Cu cannot, Cu lacks what Si shows.
    for name in ("Cu", "Si", "W"):
        truth = random_turns(1, seed=31)
        xy = simulated(name, truth, seed=31).xy_px
        for materials in (("Cu", "Si", "W"), ("W", "Si", "Cu")):
            check(indexer(*materials).index(xy), [name], truth, *materials)


def test_two_names_for_one_lattice_give_one_crystal() -> None:
    ni = phase("Ni")
    twice = Indexer([ni, replace(ni)])
    truths = random_turns(2, seed=4)
    returned = twice.index(simulated("Ni", truths, seed=4).xy_px)
    assert found_and_false(returned, twice.phases, ["Ni", "Ni"], truths) == (2, 0)


def test_the_same_input_gives_the_same_bits() -> None:
    xy = simulated(["Cu", "Ti", "Ti"], random_turns(3, seed=2), seed=2).xy_px
    first = indexer("Cu", "Ti").index(xy)
    again = indexer("Cu", "Ti").index(xy.copy())
    fresh = Indexer(
        [Phase.prepare(p.material, CALIBRATION, AREA, BAND_KEV) for p in indexer("Cu", "Ti").phases]
    )
    assert len(first) == 3
    assert same(first, again)
    assert same(first, fresh.index(np.asfortranarray(xy)))


def test_hints_spare_the_search_and_wrong_ones_do_no_harm() -> None:
    truths = random_turns(3, seed=6)
    xy = simulated("Cu", truths, seed=6).xy_px
    plain = indexer("Cu").index(xy)
    near = [Hint(0, turn_about([1, 2, 3], 0.1) @ t) for t in truths]
    wrong = [Hint(0, m) for m in random_turns(5, seed=77)]
    check(indexer("Cu").index(xy, hints=[*wrong, *near]), ["Cu"] * 3, truths)
    misled = indexer("Cu").index(xy, hints=wrong)
    assert same(misled, plain)
    # With one seed to try and nothing found by it, what is there comes from the hints.
    hinted = Indexer(indexer("Cu").phases, IndexingParameters(max_seeds=1, max_voters=1))
    assert hinted.index(xy) == []
    check(hinted.index(xy, hints=near), ["Cu"] * 3, truths)
    # The same hint twice is one crystal.
    check(hinted.index(xy, hints=near + near), ["Cu"] * 3, truths)


def test_hints_do_not_exceed_the_largest_number_of_crystals() -> None:
    truths = random_turns(5, seed=9)
    xy = simulated("Cu", truths, seed=9).xy_px
    few = Indexer(indexer("Cu").phases, IndexingParameters(max_crystals=2))
    assert found_and_false(few.index(xy), few.phases, ["Cu"] * 5, truths) == (2, 0)
    hints = [Hint(0, t) for t in truths]
    assert found_and_false(few.index(xy, hints=hints), few.phases, ["Cu"] * 5, truths) == (2, 0)


@pytest.mark.parametrize("name", ["Cu", "Ti", "ZrO2"])
def test_strained_crystals_are_found_and_their_strain_is_right(name: str) -> None:
    material = phase(name).material
    for seed in range(8):
        rng = np.random.default_rng(seed)
        strain = random_strain(rng, 1.0)
        strain *= 3e-3 / np.abs(strain).max()
        truth = random_turns(1, seed)[0] @ np.linalg.inv(np.eye(3) + strain)
        returned = indexer(name).index(simulated(name, truth, seed).xy_px)
        check(returned, [name], truth)
        rotation, found = decompose(equivalent_of(returned[0].matrix, truth, material))
        assert returned[0].strain is not None
        sigma = strain_sigma(returned[0].covariance, rotation.T)
        assert np.abs((found - strain) / sigma).max() < 5


def test_errors_are_as_large_as_their_sigmas() -> None:
    material = phase("Cu").material
    strain_z, rotation_z = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        strain = random_strain(rng, 1e-3)
        turn = random_turns(1, seed)[0]
        truth = turn @ np.linalg.inv(np.eye(3) + strain)
        (crystal,) = indexer("Cu").index(simulated("Cu", truth, seed).xy_px)
        rotation, found = decompose(equivalent_of(crystal.matrix, truth, material))
        sigma = strain_sigma(crystal.covariance, rotation.T)
        strain_z.append(((found - strain) / sigma)[np.triu_indices(3)])
        error = rotation @ turn.T
        vector = (
            np.array([error[2, 1] - error[1, 2], error[0, 2] - error[2, 0], error[1, 0] - error[0, 1]]) / 2
        )
        rotation_z.append(vector / np.sqrt(np.diag(crystal.covariance)[:3]))
    assert 0.9 < np.std(strain_z) < 1.1
    assert 0.9 < np.std(rotation_z) < 1.1
    assert np.abs(np.mean(strain_z, axis=0)).max() < 0.25


def test_a_depth_that_hard_photons_have_is_recovered() -> None:
    from pipelines.laue.indexing.refine import depth_shift

    truth = random_turns(1, seed=3)[0]
    scene = phase("Si").scene
    expected = predict(scene, truth)
    shift = depth_shift(expected.xy_px, expected.energy_keV, scene.projection, CALIBRATION.dd_mm)
    noise = np.random.default_rng(1).normal(0, 0.05, expected.xy_px.shape)
    (crystal,) = indexer("Si").index(expected.xy_px + 0.03 * shift + noise)
    assert crystal.depth_mm == pytest.approx(0.03, abs=5 * np.sqrt(crystal.covariance[8, 8]))
    assert crystal.strain is not None
    assert np.abs(crystal.strain).max() < 1e-4
    (flat,) = indexer("Si").index(expected.xy_px + noise)
    assert flat.depth_mm == 0.0


def test_half_of_the_detector_is_masked() -> None:
    mask = np.zeros(CALIBRATION.shape, dtype=bool)
    mask[:, : CALIBRATION.shape[1] // 2] = True
    mask[1000:1040] = True
    area = DetectorArea.of(CALIBRATION, mask)
    masked = Indexer([Phase.prepare(phase("Ti").material, CALIBRATION, area, BAND_KEV)])
    truths = random_turns(2, seed=12)
    returned = masked.index(simulated("Ti", truths, seed=12, area=area).xy_px)
    assert found_and_false(returned, masked.phases, ["Ti", "Ti"], truths) == (2, 0)
    for crystal in returned:
        assert crystal.expected < 0.7 * 83
        assert len(crystal.spots) / crystal.expected > 0.7  # 20 % of what can be seen are missing


@pytest.mark.parametrize(
    "turn",
    [np.eye(3), turn_about([0, 1, 0], -40), turn_about([0, 1, 0], -45), turn_about([0, 0, 1], 90)],
    ids=["lab", "tilt40", "tilt45", "turned"],
)
@pytest.mark.parametrize("name", ["Cu", "Ti", "ZrO2"])
def test_a_crystal_whose_axes_lie_along_the_instrument(name: str, turn: np.ndarray) -> None:
    check(indexer(name).index(simulated(name, turn, seed=3).xy_px), [name], turn)


@pytest.mark.parametrize(
    "calibration",
    [
        Calibration(250.0, 740.0, 830.0, -1.2, 0.3, 0.172, (1679, 1475), "PILATUS"),
        Calibration(60.0, 740.0, 830.0, -1.2, 0.3, 0.172, (1679, 1475), "PILATUS"),
        Calibration(60.0, 2000.0, 1900.0, 1.0, 0.3, 0.05, (4000, 4000)),
        Calibration(150.0, 977.0, 932.0, 0.4, 0.4, 0.0734, (2018, 2016), "sCMOS"),
    ],
    ids=["pilatus-far", "pilatus-near", "fine-near", "scmos-far"],
)
def test_other_detectors_and_distances(calibration: Calibration) -> None:
    for name in ("Cu", "Ti"):
        there = indexer(name, calibration=calibration)
        for seed in range(3):
            truths = random_turns(2, seed)
            returned = there.index(simulated(name, truths, seed, calibration=calibration).xy_px)
            assert found_and_false(returned, there.phases, [name] * 2, truths) == (2, 0)


@pytest.mark.parametrize(("name", "band"), [("Cu", (5.0, 30.0)), ("W", (8.0, 14.0)), ("Ti", (15.0, 22.0))])
def test_other_energy_bands(name: str, band: tuple[float, float]) -> None:
    there = indexer(name, energy_keV=band)
    for seed in range(3):
        truths = random_turns(2, seed)
        returned = there.index(simulated(name, truths, seed, energy_keV=band).xy_px)
        assert found_and_false(returned, there.phases, [name] * 2, truths) == (2, 0)


@pytest.mark.parametrize("name", ["Cu", "Ti"])
def test_weak_crystals_beside_strong_ones(name: str) -> None:
    truths = random_turns(6, seed=14)
    pattern = simulated(name, truths, seed=14, volumes=np.logspace(0, -3, 6))
    check(indexer(name).index(pattern.xy_px), [name] * 6, truths)


def test_many_crystals() -> None:
    truths = random_turns(20, seed=15)
    check(indexer("Cu").index(simulated("Cu", truths, seed=15).xy_px), ["Cu"] * 20, truths)


@pytest.mark.parametrize(
    "error",
    [{"dd_mm": 80.0}, {"xbet_deg": 0.8}, {"dd_mm": 79.3, "ycen_px": 934.2, "xbet_deg": 0.3}],
    ids=lambda error: " ".join(error),
)
@pytest.mark.parametrize("name", ["Cu", "ZrO2"])
def test_a_calibration_that_is_a_little_wrong_hides_no_crystal(name: str, error: dict[str, float]) -> None:
    wrong = indexer(name, calibration=CALIBRATION.with_parameters(**error))
    for seed in range(3):
        truths = random_turns(2, seed)
        returned = wrong.index(simulated(name, truths, seed).xy_px)
        # The crystals turn with the detector: half of its angle.
        assert found_and_false(returned, wrong.phases, [name] * 2, truths, within_deg=0.5) == (2, 0)


def test_spots_that_are_blurred_want_a_larger_radius() -> None:
    truths = random_turns(2, seed=16)
    xy = simulated("Ti", truths, seed=16, noise_px=1.5).xy_px
    wide = Indexer(indexer("Ti").phases, IndexingParameters(match_radius_px=6.0))
    assert found_and_false(wide.index(xy), wide.phases, ["Ti"] * 2, truths) == (2, 0)
    usual = indexer("Ti").index(xy)
    assert found_and_false(usual, wide.phases, ["Ti"] * 2, truths)[1] == 0


@pytest.mark.parametrize("name", ["Cu", "Ti"])
def test_split_peaks_are_no_second_crystal(name: str) -> None:
    truths = random_turns(2, seed=18)
    xy = simulated(name, truths, seed=18).xy_px
    split = np.stack([xy, xy + np.array([2.5, 1.0])], axis=1).reshape(-1, 2)
    check(indexer(name).index(split), [name] * 2, truths)
