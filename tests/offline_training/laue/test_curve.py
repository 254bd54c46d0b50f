"""What a curve learns from: the orientations it was given, each spot once an epoch; numbers of recipes."""

from __future__ import annotations

import numpy as np
import pytest
from testkit.laue import BAND_KEV, CALIBRATION, material

pytest.importorskip("torch", reason="torch is absent: see docs/how-to/train-a-network.md")

from offline_training.laue.curve import FixedSpots
from offline_training.laue.domain import GeometryRange, PatternRange
from offline_training.laue.networks import RECIPES, Tuning, parse_tuning, recipe_of
from offline_training.laue.preparation import families_up_to
from offline_training.laue.simulator import PatternSimulator
from pipelines import rotations
from pipelines.laue.features import FeatureMaker
from pipelines.laue.reflections import build_reflections

FIXED = GeometryRange(0.0, 0.0, 0.0, 0.0)
EXACT = PatternRange((1, 1), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 0.0, 0.0)


def test_crystals_have_the_orientations_that_were_given_and_no_other() -> None:
    listed = build_reflections(material("Cu"), BAND_KEV)
    pool = rotations.to_matrix(rotations.random_rotations(3, np.random.default_rng(1)))
    simulator = PatternSimulator(
        listed, families_up_to(listed, 3), CALIBRATION, FIXED, EXACT, orientations=pool
    )
    seen = set()
    for number in range(20):
        made = simulator.pattern(number)
        g = listed.g[made.reflection]
        u, _, v = np.linalg.svd(made.q.T @ (g / np.linalg.norm(g, axis=1, keepdims=True)))
        off = np.abs(pool - u @ v).max(axis=(1, 2))
        assert off.min() < 1e-6
        seen.add(int(off.argmin()))
    assert seen == {0, 1, 2}


def test_an_epoch_has_every_spot_with_a_class_once() -> None:
    listed = build_reflections(material("Cu"), BAND_KEV)
    classes = families_up_to(listed, 3)
    simulator = PatternSimulator(listed, classes, CALIBRATION, FIXED, PatternRange(crystals=(1, 3)))
    spots, every = FixedSpots(simulator, 6, unlisted=False), FixedSpots(simulator, 6, unlisted=True)
    assert (spots.labels > 0).all()
    patterns = [simulator.pattern(number) for number in range(6)]
    assert len(every) == sum(len(p.label) for p in patterns)
    assert len(spots) == sum(np.count_nonzero(p.label) for p in patterns)
    maker = FeatureMaker(RECIPES["lauenn-2022"].features)
    x, y = spots.batch(0, len(spots), maker, 1)
    expected = np.concatenate([maker.features(p.q, np.flatnonzero(p.label)) for p in patterns])
    # Positions are kept in single precision: an angle at the edge of a bin may change its side.
    assert np.mean(np.abs(np.sort(x, axis=0) - np.sort(expected, axis=0)) > 1e-6) < 1e-3
    np.testing.assert_array_equal(np.bincount(y), np.bincount(spots.labels))
    # A batch over the end of an epoch begins the next, in another order.
    over, _ = spots.batch(len(spots) - 1, 2, maker, 1)
    assert len(over) == 2
    again, _ = spots.batch(len(spots), len(spots), maker, 1)
    np.testing.assert_array_equal(np.sort(again, axis=0), np.sort(x, axis=0))


def test_families_up_to_an_index_are_those_of_integers() -> None:
    # Coprime triples up to 3 under m-3m: 13 families; fcc and 5 to 22 keV take none of them away.
    listed = build_reflections(material("Cu"), BAND_KEV)
    classes = families_up_to(listed, 3)
    families = {tuple(sorted(abs(i) for i in hkl)) for hkl in classes.hkl.tolist()}
    triples = {
        (h, k, m) for h in range(4) for k in range(h, 4) for m in range(k, 4) if np.gcd.reduce([h, k, m]) == 1
    }
    assert families == triples
    with pytest.raises(ValueError, match="max_index 0: no reflection of Cu has so low ones"):
        families_up_to(listed, 0)


def test_a_tuning_changes_what_it_names() -> None:
    given = parse_tuning(["learning_rate=0.003", "width=64", "bin_deg=0.1", "range_deg=60", "batch=256"])
    recipe = recipe_of("residual", given)
    assert (recipe.learning_rate, recipe.batch) == (0.003, 256)
    assert (recipe.features.bins, recipe.features.step_deg) == (600, 0.1)
    assert recipe.make(recipe.features.width, 5).first.out_features == 64
    assert recipe_of("residual", Tuning()) == RECIPES["residual"]
    assert recipe.values() | given.given() == recipe.values()


def test_the_published_network_of_lauenn_has_its_size() -> None:
    # ZrO2 in the published logs: 1450-4715-7980-266, 48.7 million parameters.
    recipe = recipe_of("lauenn-2022", Tuning(width=30, bin_deg=0.1, range_deg=145.0))
    network = recipe.make(recipe.features.width, 266)
    shapes = [tuple(p.shape) for p in network.parameters() if p.ndim == 2]
    assert shapes == [(1450, 1450), (4715, 1450), (7980, 4715), (266, 7980)]
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(48.7e6, rel=1e-3)
