"""Distributions, the inverse question, texture: against closed forms, SciPy and scikit-image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from offline_training.micrograph.baselines import by_components, psnr_dB
from offline_training.micrograph.evaluation import (
    TABLE_HEAD,
    bins_of,
    compare_distributions,
    measure_patches,
    table_rows,
)
from offline_training.micrograph.inverse import UNLIKELY, ConditionLaw, judge_law
from offline_training.micrograph.labels import Conditions
from offline_training.micrograph.splits import GroupedFolds
from offline_training.micrograph.texture import classify, image_description, paired_figures
from pipelines.micrograph.synthetic import Condition, MicrographSimulator

RNG = np.random.default_rng


# Distributions.


def test_distances_are_those_of_the_closed_form() -> None:
    held_out = np.stack([np.linspace(0.0, 1.0, 1000), np.linspace(2.0, 4.0, 1000)], axis=1)
    # Moved by d, a distribution is d away; stretched about its middle from 1 to 2 it is a quarter of 1 away.
    moved = held_out + np.array([0.1, 0.0])
    stretched = (held_out - [0.5, 3.0]) * [1.0, 2.0] + [0.5, 3.0]
    fraction, path = compare_distributions("c", held_out, moved, stretched, np.arange(1000) % 2)
    assert (fraction.quantity, path.quantity) == ("fraction", "free_path_px")
    assert fraction.w1_shown == pytest.approx(0.1)
    assert fraction.w1 == pytest.approx(0.0, abs=1e-12)
    assert path.w1 == pytest.approx(0.5, rel=0.01)
    assert path.generated[1] == pytest.approx(2 * path.held_out[1])
    # Every other one is moved by the distance of two neighbours.
    assert fraction.w1_halves == pytest.approx(1 / 999, rel=0.01)
    assert len(table_rows([fraction, path])[0]) == len(TABLE_HEAD)


def test_patches_without_a_boundary_are_left_out_and_none_at_all_is_told() -> None:
    some = np.array([[0.5, np.nan], [0.6, 4.0], [0.7, 5.0]])
    fraction, path = compare_distributions("c", some, some, some, np.arange(3))
    assert (fraction.patches, path.patches) == (3, 2)
    with pytest.raises(ValueError, match="c: free_path_px cannot be compared"):
        compare_distributions("c", some, some, some[:1], np.arange(3))


def test_a_patch_of_one_grey_has_no_fraction_to_compare() -> None:
    # By its own threshold it would be all of one phase: which, nothing says.
    stripes = np.tile(np.repeat(np.uint8([60, 200]), 8), (32, 2))
    patches = np.stack(
        [stripes, stripes + np.tile(np.uint8([[0], [40]]), (16, 1)), np.full_like(stripes, 90)]
    )
    found = measure_patches(patches)
    assert np.isfinite(found[:, 0]).tolist() == [True, True, False]
    fraction, _ = compare_distributions(
        "c", *[np.stack([found[:, 0], found[:, 0]], axis=1)] * 3, np.arange(3)
    )
    assert (fraction.patches, fraction.drawn, fraction.w1) == (2, 2, 0.0)


def test_bins_hold_each_patch_once() -> None:
    images = np.arange(40) % 10
    numbers = Conditions(("rate",), np.linspace(0, 9, 10, dtype=np.float32)[:, None])
    bins = bins_of(numbers, images)
    assert len(bins) == 4
    assert sorted(np.concatenate([members for _, members in bins]).tolist()) == list(range(40))
    assert bins[0][0] == "rate 0 to 2.25"
    few = Conditions(("rate",), np.array([[1.0], [2.0]] * 5, dtype=np.float32))
    assert [name for name, _ in bins_of(few, images)] == ["rate 1", "rate 2"]
    classes = Conditions(("class",), np.array([0, 2] * 5), ("a", "b", "c"))
    assert [(name, len(members)) for name, members in bins_of(classes, images)] == [("a", 20), ("c", 20)]
    assert [name for name, _ in bins_of(None, images)] == ["all"]


# The inverse question.


def _law(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Fraction and free path of a known law, correlated, with spreads that grow."""
    noise = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], len(x))
    fraction = 0.7 - 0.05 * x + 0.005 * x**2 + 0.01 * np.exp(0.2 * x) * noise[:, 0]
    return np.stack([fraction, np.exp(1.8 - 0.2 * x + 0.05 * noise[:, 1])], axis=1)


@pytest.mark.parametrize("given", ["both", "fraction", "free path"])
def test_intervals_hold_the_true_condition_as_often_as_they_say(given: str) -> None:
    rng = RNG(1)
    drawn = rng.uniform(0.0, 3.0, 2000)
    law = ConditionLaw.fit(drawn, _law(rng, drawn))
    true = rng.uniform(0.0, 3.0, 1000)
    held, widths = 0, []
    for x, (fraction, path) in zip(true, _law(rng, true), strict=True):
        answer = law.ask(
            None if given == "free path" else float(fraction), None if given == "fraction" else float(path)
        )
        held += answer.low <= x <= answer.high
        widths.append(answer.high - answer.low)
    # Three standard deviations of a share of 1000.
    assert held / 1000 == pytest.approx(0.9, abs=0.03)
    assert np.median(widths) < 2.2


def test_what_is_asked_with_more_patches_is_known_better() -> None:
    rng = RNG(2)
    drawn = rng.uniform(0.0, 3.0, 2000)
    law = ConditionLaw.fit(drawn, _law(rng, drawn))
    path = float(np.exp(1.8 - 0.2 * 1.5))
    fraction = 0.7 - 0.05 * 1.5 + 0.005 * 1.5**2
    one, many = law.ask(fraction, path), law.ask(fraction, path, patches=16)
    assert many.best == pytest.approx(1.5, abs=0.1)
    assert many.high - many.low == pytest.approx((one.high - one.low) / 4, rel=0.15)
    assert float(np.trapezoid(one.density, one.grid)) == pytest.approx(1.0)
    assert one.chance > 0.5
    assert law.ask(0.2, path).chance < UNLIKELY
    # At an end of the range, the most probable condition is inside.
    end = law.ask(0.7 - 0.05 * 3 + 0.005 * 9 - 0.02, float(np.exp(1.1)))
    assert end.high == pytest.approx(end.best, abs=0.01)


@pytest.mark.parametrize("drawn", [200, 2000])
@pytest.mark.parametrize("patches", [1, 16, 100])
def test_intervals_of_means_of_many_patches_hold_too(drawn: int, patches: int) -> None:
    # With many patches it counts that the law is known from so many drawn ones alone, and that a mean of
    # free paths is not the free path of the mean logarithm: here a patch's scatters by a third.
    rng = RNG(7)

    def wide(x: np.ndarray) -> np.ndarray:
        fraction = 0.7 - 0.05 * x + 0.03 * rng.standard_normal(x.shape)
        return np.stack([fraction, np.exp(1.8 - 0.2 * x + 0.3 * rng.standard_normal(x.shape))], axis=1)

    held = 0
    for _ in range(20):
        x = rng.uniform(0.0, 3.0, drawn)
        law = ConditionLaw.fit(x, wide(x))
        for true in rng.uniform(0.0, 3.0, 20):
            fraction, path = wide(np.full(patches, true)).mean(axis=0)
            answer = law.ask(float(fraction), float(path), patches)
            held += answer.low <= true <= answer.high
    # Four standard deviations of a share of 400, which come in twenties of one law.
    assert held / 400 == pytest.approx(0.9, abs=0.06)


def _images_off(x: np.ndarray, rng: np.random.Generator, each: int = 16) -> np.ndarray:
    """Patches of images, (images, each, 2), that have more in common than the law knows, and are biased.

    Fraction and free path of images go against each other, where those of patches go together.
    """
    own = np.stack([_law(rng, np.full(each, value)) for value in x])
    image = rng.standard_normal((len(x), 1))
    own[..., 0] += 0.01 + 0.02 * image
    own[..., 1] *= np.exp(-0.05 - 0.04 * image)
    return own


def test_what_images_are_off_by_is_measured_and_makes_intervals_hold_for_them() -> None:
    rng = RNG(8)
    drawn = rng.uniform(0.0, 3.0, 2000)
    law = ConditionLaw.fit(drawn, _law(rng, drawn))
    known, asked = rng.uniform(0.0, 3.0, 400), rng.uniform(0.0, 3.0, 400)
    images = np.repeat(np.arange(400), 16)
    off = law.off(np.repeat(known, 16), _images_off(known, rng).reshape(-1, 2), images)
    expected = [[0.01**2 + 0.02**2, -0.01 * 0.05 - 0.02 * 0.04], [0.0, 0.05**2 + 0.04**2]]
    np.testing.assert_allclose(off[np.triu_indices(2)], np.array(expected)[np.triu_indices(2)], rtol=0.2)
    new = np.repeat(asked, 16), _images_off(asked, rng).reshape(-1, 2), images
    trusting, told = judge_law(law, np.zeros((2, 2)), *new), judge_law(law, off, *new)
    assert trusting["images"]["holds_the_true_one"] < 0.5
    assert told["images"]["holds_the_true_one"] == pytest.approx(0.9, abs=0.06)
    assert told["holds_the_true_one"] > 0.86
    assert told["images"]["none_gives_it"] < 0.1 < trusting["images"]["none_gives_it"]
    assert told["images"]["patches_each"] == 16
    assert told["off"] == off.tolist()


def test_images_that_are_as_the_law_says_are_off_by_little() -> None:
    rng = RNG(9)
    drawn = rng.uniform(0.0, 3.0, 2000)
    law = ConditionLaw.fit(drawn, _law(rng, drawn))
    known = np.repeat(rng.uniform(0.0, 3.0, 200), 16)
    off = law.off(known, _law(rng, known), np.repeat(np.arange(200), 16))
    assert np.all(np.sqrt(np.diagonal(off)) < [0.003, 0.01])
    lonely = known[:5], _law(rng, known[:5]), np.arange(5)
    with pytest.raises(ValueError, match="no held-out image has two patches"):
        law.off(*lonely)


def test_questions_that_cannot_be_are_refused() -> None:
    rng = RNG(3)
    x = rng.uniform(0, 1, 50)
    law = ConditionLaw.fit(x, _law(rng, x))
    for fraction, path, patches, said in (
        (None, None, 1, "give a fraction"),
        (1.5, None, 1, r"fraction 1\.5"),
        (None, -1.0, 1, "mean free path -1"),
        (0.5, None, 0, "patches 0"),
    ):
        with pytest.raises(ValueError, match=said):
            law.ask(fraction, path, patches)
    with pytest.raises(ValueError, match="expected 30 patches or more over a range"):
        ConditionLaw.fit(np.ones(50), _law(rng, x))
    with pytest.raises(ValueError, match="10 patches with a boundary"):
        ConditionLaw.fit(x[:10], _law(rng, x[:10]))


# Measures, components, classes.


def test_synthetic_patches_measure_as_their_law_says() -> None:
    simulator = MicrographSimulator(shape=(256, 256), seed=5)
    means = []
    for rate in (0.5, 3.0):
        samples = [simulator.sample(i, Condition(rate)) for i in range(6)]
        measured = measure_patches(np.stack([s.image for s in samples]))
        np.testing.assert_allclose(measured[:, 0], [s.fraction for s in samples], atol=0.02)
        means.append(measured.mean(axis=0))
    assert means[0][0] > means[1][0]
    assert means[0][1] > means[1][1]


def test_principal_components_are_those_of_the_singular_values() -> None:
    rng = RNG(4)
    training = rng.integers(0, 256, (12, 8, 8)).astype(np.uint8)
    asked = rng.integers(0, 256, (3, 8, 8)).astype(np.uint8)
    flat = training.reshape(12, -1).astype(float)
    _, _, directions = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    off = asked.reshape(3, -1) - flat.mean(axis=0)
    expected = np.clip(off @ directions[:5].T @ directions[:5] + flat.mean(axis=0), 0, 255)
    np.testing.assert_allclose(by_components(training, asked, 5).reshape(3, -1), expected, atol=1e-2)
    # All of them know the training patches by heart.
    assert psnr_dB(training, by_components(training, training, 99)) > 50.0


def test_texture_tells_structures_apart_that_grey_levels_do_not() -> None:
    pytest.importorskip("skimage", reason="scikit-image is absent: see docs/how-to/train-a-network.md")
    from offline_training.micrograph.texture import texture_features

    features, classes, groups = [], [], []
    for number, structure in enumerate(("islands", "labyrinth", "particles")):
        simulator = MicrographSimulator(shape=(96, 96), structure=structure, seed=number)  # type: ignore[arg-type]
        for sample in simulator.samples(0, 8):
            features.append(texture_features(sample.image))
            classes.append(number)
            groups.append(sample.source)
    table, truth = np.array(features), np.array(classes)
    split = GroupedFolds.draw(groups, 4, labels=classes)
    said = np.empty_like(truth)
    for fold in range(4):
        train, test = split.trained_on(fold), split.held_out(fold)
        said[test] = classify(table, truth, train, test, tuple(groups))
    assert np.mean(said == truth) > 0.8


def test_a_classifier_learns_nothing_where_there_is_nothing() -> None:
    rng = RNG(6)
    truth = np.arange(300) % 3
    groups = tuple(map(str, range(300)))
    train, test = np.arange(200), np.arange(200, 300)
    noise = rng.normal(size=(300, 20))
    assert np.mean(classify(noise, truth, train, test, groups) == truth[test]) < 0.5
    noise[:, 3] = truth + 0.3 * rng.normal(size=300)
    noise[:, 4] = np.cos(truth) + 0.1 * rng.normal(size=300)
    assert np.mean(classify(noise, truth, train, test, groups) == truth[test]) > 0.8
    # A feature that never changes, or is huge, changes nothing.
    odd = np.hstack([noise, np.full((300, 1), 7.0), 1e9 * noise[:, :1]])
    assert np.mean(classify(odd, truth, train, test, groups) == truth[test]) > 0.8


def test_differences_are_paired_and_groups_count_as_one() -> None:
    truth = np.zeros(200, dtype=np.int64)
    texture = np.where(np.arange(200) < 160, 0, 1)
    fingerprint = np.where((np.arange(200) >= 10) & (np.arange(200) < 190), 0, 1)
    alone = GroupedFolds.draw([str(i) for i in range(200)], 5)
    figures = paired_figures(truth, fingerprint, texture, np.ones_like(truth), alone)
    assert figures.difference == pytest.approx(0.1)
    assert (figures.better, figures.worse, figures.majority_accuracy) == (30, 10, 0.0)
    # Exact: 40 tosses, 10 or fewer, both sides.
    assert figures.p_value == pytest.approx(0.0022, abs=2e-4)
    # Standard error of a mean of +1 (30), −1 (10) and 0 (160), normal approximation.
    half = 1.96 * np.sqrt((40 / 200 - 0.01) / 200)
    assert figures.interval == pytest.approx((0.1 - half, 0.1 + half), abs=0.01)
    ten = GroupedFolds.draw([str(i // 20) for i in range(200)], 5)
    wide = paired_figures(truth, fingerprint, texture, np.ones_like(truth), ten).interval
    assert wide[1] - wide[0] > 1.5 * (figures.interval[1] - figures.interval[0])


@pytest.mark.parametrize("groups", [6, 20])
def test_intervals_of_differences_hold_with_few_groups(groups: int) -> None:
    rng, held = RNG(11), 0
    each = 20
    truth = np.zeros(groups * each, dtype=np.int64)
    split = GroupedFolds.draw([str(i // each) for i in range(groups * each)], 3)
    for _ in range(300):
        # Each group is good for one description or the other, on average for neither.
        good, other = (np.repeat(rng.beta(4.0, 2.0, groups), each) for _ in range(2))
        one, two = ((rng.random(groups * each) > share).astype(np.int64) for share in (good, other))
        low, high = paired_figures(truth, one, two, truth, split).interval
        held += low <= 0.0 <= high
    assert held / 300 == pytest.approx(0.95, abs=0.04)


def test_descriptions_do_not_depend_on_the_order_of_patches() -> None:
    rng = RNG(7)
    latents, codes = rng.normal(size=(9, 4)), rng.integers(0, 5, (9, 2, 2))
    one = image_description(latents, codes, 5)
    assert one.shape == (4 + 4 + 5,)
    np.testing.assert_allclose(image_description(latents[::-1], codes[::-1], 5), one)
    assert np.sum(one[-5:] ** 2) == pytest.approx(1.0)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    from offline_training.micrograph import plots

    rng = RNG(8)
    images = rng.integers(0, 256, (9, 16, 16)).astype(np.uint8)
    plots.plot_reconstructions([("a", images), ("b", images[:3])], "t", tmp_path / "r.png")
    plots.plot_codebook(rng.normal(size=(12, 4)), np.arange(12) % 4, images, "t", tmp_path / "c.png")
    one_class = Conditions(("class",), np.array([0, 1, 0]), ("a", "b"))
    for number, conditions in enumerate(
        (None, one_class, Conditions(("rate",), np.ones((3, 1), np.float32)))
    ):
        plots.plot_latents(
            rng.normal(size=(9, 4)), conditions, np.arange(9) % 3, "t", tmp_path / f"l{number}.png"
        )
    table = rng.uniform(0.1, 0.9, (20, 2))
    table[0, 1] = np.nan
    plots.plot_distributions([("x", table, table, table)], "t", tmp_path / "d.png")
    x = rng.uniform(0, 3, 100)
    plots.plot_answer(ConditionLaw.fit(x, _law(rng, x)).ask(0.6, None), "rate", "t", tmp_path / "a.png")
    for picture in tmp_path.iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 7
