"""Process conditions: calibrated on held-out images whose patches resemble each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.micrograph.novelty import ImageFeatures
from pipelines.micrograph.posterior import (
    PosteriorReference,
    calibration_error,
    fit_posterior,
    log_score,
    probabilities,
)

NAMES = ("slow", "medium", "fast")


def images(rng: np.random.Generator, n: int, patches: int = 16, sure: float = 4.0) -> list[ImageFeatures]:
    """Log-likelihoods with a known posterior, made `sure` times too large, of patches that are all alike."""
    found = []
    for _ in range(n):
        condition = int(rng.integers(3))
        # Normal evidence of mean m and variance 2 m is its own log-likelihood ratio.
        evidence = rng.normal(0.0, math.sqrt(2.0), 3)
        evidence[condition] += 2.0
        nats = np.repeat(sure * evidence[None], patches, axis=0) - 900.0
        found.append(ImageFeatures(np.zeros((patches, 1)), None, nats, condition=condition))
    return found


def fit(held_out: list[ImageFeatures], **options: object) -> PosteriorReference:
    inputs = np.arange(3, dtype=np.float32)[:, None]
    return fit_posterior("rate", NAMES, inputs, held_out, **options)  # type: ignore[arg-type]


def judged(reference: PosteriorReference, asked: list[ImageFeatures]) -> tuple[np.ndarray, np.ndarray]:
    p = [
        reference.judge(each.log_likelihood).probability for each in asked if each.log_likelihood is not None
    ]
    return np.array(p), np.array([each.condition for each in asked])


def test_probabilities_are_calibrated_whatever_the_network_overstates() -> None:
    rng = np.random.default_rng(1)
    reference = fit(images(rng, 400))
    # Sixteen equal patches are worth one, and it is four times too sure.
    assert reference.correlation > 0.95
    assert reference.sharpness == pytest.approx(0.25, rel=0.25)
    for patches in (16, 4, 1):
        p, true = judged(reference, images(rng, 4000, patches))
        assert calibration_error(p, true) <= 0.05
        assert log_score(p, true) > -math.log(3.0) + 0.3


def test_independent_patches_add_up() -> None:
    rng = np.random.default_rng(2)
    held_out = []
    for _ in range(400):
        condition = int(rng.integers(3))
        evidence = rng.normal(0.0, math.sqrt(0.4), (8, 3))
        evidence[:, condition] += 0.4
        held_out.append(ImageFeatures(np.zeros((8, 1)), None, evidence, condition=condition))
    reference = fit(held_out)
    assert reference.correlation < 0.15
    assert reference.sharpness == pytest.approx(1.0, rel=0.3)


def specimens(
    rng: np.random.Generator, count: int, images_each: int, name: str = "specimen"
) -> list[ImageFeatures]:
    """Images of specimens whose network sees a rate that is off, for all images of a specimen alike."""
    places = np.linspace(0.0, 3.4, 7)
    found = []
    for number in range(count):
        rate = rng.uniform(0.0, 3.4)
        seen = rate + rng.normal(0.0, 0.4)
        for _ in range(images_each):
            patches = seen + rng.normal(0.0, 0.05) + rng.normal(0.0, 0.3, 16)
            nats = -np.square(patches[:, None] - places) / (2.0 * 0.6**2) - 900.0
            condition = int(np.abs(places - rate).argmin())
            found.append(ImageFeatures(np.zeros((16, 1)), None, nats, f"{name} {number}", condition))
    return found


def fit_seven(held_out: list[ImageFeatures]) -> PosteriorReference:
    inputs = np.linspace(0.0, 3.4, 7, dtype=np.float32)[:, None]
    return fit_posterior("rate", [f"{v:.3g}" for v in inputs[:, 0]], inputs, held_out)


def test_specimens_count_alike_however_many_images_they_have() -> None:
    held_out = specimens(np.random.default_rng(4), 12, 2)
    one_more_often = held_out + held_out[:2] * 20
    first, again = fit_seven(held_out), fit_seven(one_more_often)
    assert (first.sources, again.sources) == (12, 12)
    assert again.sharpness == pytest.approx(first.sharpness, rel=1e-3)
    assert again.correlation == pytest.approx(first.correlation, abs=1e-3)
    # Images that nobody says the source of are one each.
    assert fit(images(np.random.default_rng(4), 15)).sources == 15


def test_images_of_one_specimen_do_not_make_it_sure_of_all_others() -> None:
    flat = -math.log(7.0)
    scores = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        reference = fit_seven(specimens(rng, 1, 20))
        assert reference.few_sources
        scores.append(log_score(*judged(reference, specimens(rng, 150, 1))))
    # Without what is expected beforehand, the worst was −8.3 and the mean that of a flat guess.
    assert min(scores) > flat
    assert np.mean(scores) > flat + 0.6
    # With ten it is as good as with many.
    rng = np.random.default_rng(0)
    ten, many = fit_seven(specimens(rng, 10, 4)), fit_seven(specimens(rng, 200, 1))
    fresh = specimens(rng, 400, 1)
    assert not ten.few_sources
    assert log_score(*judged(ten, fresh)) > log_score(*judged(many, fresh)) - 0.1


def test_probabilities_in_closed_form() -> None:
    nats = np.log([[0.2, 0.3, 0.5]])
    np.testing.assert_allclose(probabilities(nats, 1.0, 0.0), [0.2, 0.3, 0.5])
    twice = np.repeat(nats, 2, axis=0)
    np.testing.assert_allclose(probabilities(twice, 1.0, 1.0), [0.2, 0.3, 0.5])
    np.testing.assert_allclose(probabilities(twice, 1.0, 0.0), np.array([4, 9, 25]) / 38)
    np.testing.assert_allclose(probabilities(nats - 1e5, 1.0, 0.0), [0.2, 0.3, 0.5])


def test_what_is_said_of_an_image() -> None:
    reference = PosteriorReference("rate", NAMES, np.zeros((3, 1), np.float32), (0.0, 1.0, 2.0), 1.0, 1.0)
    found = reference.judge(np.log([[0.25, 0.5, 0.25]]), 0.5)
    assert (found.quantity, found.candidates, found.patches) == ("rate", NAMES, 1)
    assert found.mean == pytest.approx(1.0)
    assert found.sigma == pytest.approx(math.sqrt(0.5))
    assert not found.none_of_these
    assert reference.judge(np.log([[0.25, 0.5, 0.25]]), 0.049).none_of_these
    classes = PosteriorReference("heat", NAMES, np.arange(3), (), 1.0, 1.0)
    assert (classes.judge(np.zeros((1, 3))).mean, classes.judge(np.zeros((1, 3))).sigma) == (None, None)


def test_likelihoods_that_are_no_numbers_say_nothing_and_are_none_of_these() -> None:
    reference = PosteriorReference("rate", NAMES, np.zeros((3, 1), np.float32), (), 1.0, 1.0)
    found = reference.judge(np.array([[0.0, np.nan, 0.0]]), 0.9)
    assert found.probability == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert (found.typicality, found.none_of_these) == (0.0, True)


def test_scores_in_closed_form() -> None:
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert log_score(p, np.array([0, 1, 0, 1])) == pytest.approx(np.log([0.9, 0.1, 0.6, 0.4]).mean())
    # Two bins: right half of the time, sure by 0.9 and by 0.6.
    assert calibration_error(p, np.array([0, 1, 0, 1]), bins=2) == pytest.approx((0.4 + 0.1) / 2)


def test_what_does_not_fit_together_is_refused() -> None:
    held_out = images(np.random.default_rng(3), 20)
    with pytest.raises(ValueError, match="candidates: expected two or more"):
        fit_posterior("rate", NAMES, np.zeros((2, 1)), held_out)
    with pytest.raises(ValueError, match="held-out image 0: has no log-likelihoods"):
        fit([ImageFeatures(np.zeros((1, 1)))])
    with pytest.raises(ValueError, match=r"shape \(16, 3\), expected \(patches, 2\)"):
        fit_posterior("rate", NAMES[:2], np.zeros((2, 1)), held_out)
    with pytest.raises(ValueError, match="condition of 9 is among the candidates, calibration needs 10"):
        fit([*held_out[:9], *(ImageFeatures(i.latents, None, i.log_likelihood) for i in held_out[9:])])
    with pytest.raises(ValueError, match="condition 7 is none of 3 candidates"):
        fit([ImageFeatures(held_out[0].latents, None, held_out[0].log_likelihood, condition=7)])
