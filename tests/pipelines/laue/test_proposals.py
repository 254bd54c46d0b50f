"""A network in the indexer: right names, the same crystals, refused outside of its domain."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from testkit.laue import CALIBRATION, found_and_false, indexer, phase, random_turns, simulated

from grainwatch.config import ConfigError
from pipelines.files import read_images
from pipelines.laue.analysis import OUTSIDE_BUNDLE, LaueAnalysis
from pipelines.laue.crystal import load_material
from pipelines.laue.geometry import Calibration
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.lauetools_files import read_det, write_det
from pipelines.laue.pipeline import CLASSICAL, Config, model_of, open_analysis
from pipelines.laue.proposals import Proposer, SpotClassifier

BUNDLES = Path(__file__).resolve().parents[3] / "bundles"


@cache
def classifier(name: str = "Cu") -> SpotClassifier:
    return SpotClassifier(BUNDLES / name)


def _named(seed: int, grains: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # True classes, classes by the network, probabilities of them.
    made = simulated("Cu", random_turns(grains, seed), seed)
    of = phase("Cu").scene.reflections
    row = {tuple(h): r for r, h in enumerate(of.hkl.tolist())}
    labels = classifier().classes.of_reflections(of)
    coprime = made.hkl // np.maximum(np.gcd.reduce(made.hkl, axis=1), 1)[:, None]
    truth = np.array([labels[row[tuple(h)]] if any(h) else 0 for h in coprime.tolist()])
    names = classifier().names(np.ascontiguousarray(CALIBRATION.scattering_vectors(made.xy_px)))
    return truth, names.best, names.probability


def test_confident_spots_are_right_and_rejects_are_not_confident() -> None:
    truth, best, probability = (np.concatenate(parts) for parts in zip(*map(_named, range(12)), strict=True))
    confident = (best > 0) & (probability >= classifier().threshold)
    assert np.mean(best[confident] == truth[confident]) >= 0.98
    assert np.mean(confident[truth == 0]) <= 0.03  # 2 % stated, on a sample of some 400
    assert np.mean(confident[truth > 0]) >= 0.9


def test_pure_noise_makes_hardly_any_spot_confident() -> None:
    rng = np.random.default_rng(3)
    xy = rng.uniform(0, 2000, (150, 2))
    names = classifier().names(np.ascontiguousarray(CALIBRATION.scattering_vectors(xy)))
    assert np.mean((names.best > 0) & (names.probability >= classifier().threshold)) < 0.05


def test_the_court_decides_and_the_crystals_are_the_same() -> None:
    of = phase("Cu")
    proposer = Proposer(classifier(), of.scene.reflections, of.angles)
    named = Indexer((of,), proposers=(proposer,))
    for seed in range(4):
        turns = random_turns(3, 100 + seed)
        made = simulated("Cu", turns, seed)
        found = named.index(made.xy_px)
        assert found_and_false(found, [of], ["Cu"] * 3, turns) == (3, 0)
        classical = indexer("Cu").index(made.xy_px)
        assert sorted(len(c.spots) for c in found) == sorted(len(c.spots) for c in classical)


def test_proposals_hold_the_true_hypothesis() -> None:
    of = phase("Cu")
    proposer = Proposer(classifier(), of.scene.reflections, of.angles)
    made = simulated("Cu", random_turns(1, 8), 8)
    q = np.ascontiguousarray(CALIBRATION.scattering_vectors(made.xy_px))
    proposed = proposer.propose(q, 10)
    assert sum(len(h) > 0 for h in proposed) >= 8
    for hypotheses, hkl in zip(proposed, made.hkl[:10], strict=True):
        if len(hypotheses) == 0:
            continue
        listed = of.scene.reflections.hkl[of.angles.hypothesis[hypotheses]]
        assert sorted(abs(hkl // np.gcd.reduce(hkl)).tolist()) in np.sort(np.abs(listed), axis=1).tolist()


def test_random_peaks_give_no_crystal_with_a_network_either() -> None:
    of = phase("Cu")
    named = Indexer((of,), proposers=(Proposer(classifier(), of.scene.reflections, of.angles),))
    rng = np.random.default_rng(11)
    assert not any(named.index(rng.uniform(0, 2000, (n, 2))) for n in (3, 60, 150))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"dd_mm": 120.0}, "dd_mm 120 is outside"),
        ({"xcen_px": 100.0}, "centre_x_mm -6"),
        ({"pixel_size_mm": 0.06}, "width_mm 120.96 is outside"),
        ({"xbet_deg": 10.0}, "xbet_deg 10 is outside"),
    ],
)
def test_outside_of_the_domain_the_classical_search_works_and_says_so(
    changes: dict[str, float], name: str
) -> None:
    calibration: Calibration = CALIBRATION.with_parameters(**changes)
    analysis = LaueAnalysis([load_material("Cu")], calibration, classifiers=[classifier()])
    assert len(analysis.mismatches) == 1
    assert name in analysis.mismatches[0]
    assert model_of(analysis) == CLASSICAL
    turns = random_turns(1, 1)
    found = analysis.analyse_peaks(simulated("Cu", turns, 1, calibration=calibration).xy_px)
    assert OUTSIDE_BUNDLE in found.flags
    assert len(found.crystals) == 1


def test_a_detector_of_other_pixels_is_inside_where_its_size_is_that_of_training() -> None:
    domain, material, band = classifier().domain, load_material("Cu"), (5.0, 22.0)
    of_four = Calibration(79.0, 488.0, 465.0, 0.5, 0.4, 2 * CALIBRATION.pixel_size_mm, (1009, 1008))
    assert domain.mismatch(material, of_four, band) is None
    round_one = Calibration(70.8, 940.0, 1081.0, 0.63, -0.68, 0.079142, (2048, 2048))
    assert domain.mismatch(material, round_one, band) is None
    of_nine = Calibration(79.0, 325.0, 310.0, 0.5, 0.4, 3 * CALIBRATION.pixel_size_mm, (673, 672))
    assert "pixels of 0.2202 mm are larger" in (domain.mismatch(material, of_nine, band) or "")


def test_another_material_or_band_is_named() -> None:
    domain = classifier().domain
    assert domain.mismatch(load_material("Cu"), CALIBRATION, (5.0, 22.0)) is None
    assert "is not Cu" in (domain.mismatch(load_material("Ti"), CALIBRATION, (5.0, 22.0)) or "")
    assert "energy_keV (5.0, 30.0)" in (domain.mismatch(load_material("Cu"), CALIBRATION, (5.0, 30.0)) or "")


def test_results_say_which_model_made_them(tmp_path: Path) -> None:
    write_det(tmp_path / "cal.det", CALIBRATION)
    plain = Config(materials=("Cu",), geometry=str(tmp_path / "cal.det"))
    assert model_of(open_analysis(plain, "x")) == CLASSICAL
    named = Config(materials=("Cu",), geometry=str(tmp_path / "cal.det"), bundle=(str(BUNDLES / "Cu"),))
    model = model_of(open_analysis(named, "x"))
    assert model.name == "laue-Cu-residual"
    assert len(model.sha256) == 64
    wrong = Config(materials=("Cu",), geometry=str(tmp_path / "cal.det"), bundle=(str(tmp_path),))
    with pytest.raises(ConfigError, match=r"x\.bundle: .*manifest\.sha256: cannot be read"):
        open_analysis(wrong, "x")


@pytest.mark.truth
def test_confident_spots_of_a_real_frame_are_right(truth_dir: Path) -> None:
    calibration = read_det(truth_dir / "truth" / "GaN_Si" / "calib.det").calibration
    _, image = next(iter(read_images(str(truth_dir / "nw1_0000.tif.gz"))))
    named = LaueAnalysis([load_material("Si")], calibration, classifiers=[classifier("Si")])
    assert not named.mismatches
    found = named.analyse_image(image)
    (crystal,) = found.indexed
    labels = classifier("Si").classes.of_reflections(named.phases[0].scene.reflections)
    truth = labels[crystal.reflections]
    q = np.ascontiguousarray(calibration.scattering_vectors(found.xy_px))
    names = classifier("Si").names(q, crystal.spots)
    confident = (names.best > 0) & (names.probability >= classifier("Si").threshold)
    assert np.count_nonzero(confident) > 50
    assert np.mean(names.best[confident] == truth[confident]) >= 0.98
    assert len(LaueAnalysis([load_material("Si")], calibration).analyse_image(image).indexed) == 1
