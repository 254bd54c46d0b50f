"""Novelty: its numbers against closed forms and other programs, its level on images of any size."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree
from scipy.spatial.distance import jensenshannon

from pipelines.micrograph.novelty import (
    CodeSpace,
    HeldOut,
    ImageFeatures,
    LatentSpace,
    NoveltyReference,
    bits_per_code,
    code_histogram,
    fit_novelty,
    js_divergence_bits,
    nearest_distance,
)

CODES = 24
HABITS = np.stack([np.roll(np.exp(-np.arange(CODES) / 4.0), k) for k in (0, 6)])
"""Two textures that images mix."""
FOREIGN = np.roll(np.exp(-np.arange(CODES) / 4.0), 14)


def image(rng: np.random.Generator, patches: int = 16, *, foreign: float = 0.0) -> ImageFeatures:
    """Patches of one image resemble each other; `foreign` is the share of a texture of its own."""
    mixed = rng.dirichlet([2.0, 2.0])
    p = mixed @ (HABITS / HABITS.sum(axis=1, keepdims=True))
    p = (1.0 - foreign) * p + foreign * FOREIGN / FOREIGN.sum()
    codes = rng.choice(CODES, size=(patches, 8, 8), p=p)
    latents = np.array([mixed[0], mixed[1] ** 2, 0.0]) + rng.normal(0.0, [0.2, 0.2, 0.02], (patches, 3))
    nats = np.log(p)[codes].sum(axis=(1, 2))
    return ImageFeatures(latents, codes, nats[:, None] + np.array([0.0, -3.0]))


@pytest.fixture(scope="module")
def reference() -> NoveltyReference:
    return learnt(np.random.default_rng(5))


def learnt(rng: np.random.Generator, level: float = 0.05) -> NoveltyReference:
    training = [image(rng) for _ in range(60)]
    return fit_novelty(
        np.concatenate([each.latents for each in training]),
        [image(rng) for _ in range(120)],
        training_images=np.repeat(np.arange(60), 16),
        training_codes=np.concatenate([each.codes for each in training if each.codes is not None]),
        codebook=CODES,
        level=level,
    )


def test_what_is_kept_of_held_out_images_shows_nothing_of_them(reference: NoveltyReference) -> None:
    assert reference.held_out.codes is not None
    for codes in reference.held_out.codes:
        flat = codes.reshape(len(codes), -1)
        np.testing.assert_array_equal(flat, np.sort(flat, axis=1))


def test_what_fits_no_candidate_is_not_weighed_among_what_cannot_fit_one() -> None:
    rng = np.random.default_rng(6)
    training = [image(rng) for _ in range(60)]
    inside = [replace(image(rng), condition=0) for _ in range(100)]
    # Held out, too: images made otherwise than any candidate says.
    outside = [image(rng, foreign=0.5) for _ in range(40)]
    learn = {
        "training_images": np.repeat(np.arange(60), 16),
        "training_codes": np.concatenate([each.codes for each in training if each.codes is not None]),
        "codebook": CODES,
    }
    latents = np.concatenate([each.latents for each in training])
    both = fit_novelty(latents, outside + inside, **learn)  # type: ignore[arg-type]
    alone = fit_novelty(latents, inside, **learn)  # type: ignore[arg-type]
    assert both.held_out.has_candidate is not None
    assert both.held_out.has_candidate.sum() == 100
    assert alone.held_out.has_candidate is None
    asked = [image(rng, foreign=0.5) for _ in range(30)]
    found = [both.fit_typicality(each) for each in asked]
    assert found == [alone.fit_typicality(each) for each in asked]
    assert np.mean(np.array(found) < 0.05) > 0.9
    usual = [both.fit_typicality(image(rng)) for _ in range(400)]
    assert np.mean(np.array(usual) < 0.05) < 0.09
    # All of them are images of the known kind: none that is like them is novel.
    assert np.mean([both.judge(each).novel for each in asked]) < 0.2
    assert all(alone.judge(each).novel for each in asked)


def test_images_with_a_candidate_are_ranked_by_source_where_that_is_possible() -> None:
    held = HeldOut((), None, None, np.repeat(np.arange(30), 2), True, np.arange(60) >= 12)
    images, sources = held.of_candidates(0.05)
    np.testing.assert_array_equal(images, np.arange(12, 60))
    np.testing.assert_array_equal(sources, np.repeat(np.arange(24), 2))
    fewer = replace(held, has_candidate=np.arange(60) >= 24)
    np.testing.assert_array_equal(fewer.of_candidates(0.05)[1], np.arange(36))
    every = replace(held, has_candidate=None)
    np.testing.assert_array_equal(every.of_candidates(0.05)[1], held.sources)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(2, 40))
def test_divergence_is_that_of_scipy(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(n, 0.3)), rng.dirichlet(np.full(n, 0.3))
    found = float(js_divergence_bits(p, q))
    assert found == pytest.approx(float(jensenshannon(p, q, base=2.0)) ** 2, abs=1e-9)
    assert found == pytest.approx(float(js_divergence_bits(q, p)), abs=1e-12)


def test_divergence_in_closed_form() -> None:
    # One code of two against both equally: H(1/4) - 1/2.
    p, q = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert float(js_divergence_bits(p, q)) == pytest.approx(entropy - 0.5)
    assert float(js_divergence_bits(p, p)) == 0.0
    assert float(js_divergence_bits(p, p[::-1])) == pytest.approx(1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_nearest_distances_are_those_of_a_tree(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    points, known = rng.normal(size=(9, 6)), rng.normal(size=(40, 6))
    expected, _ = KDTree(known).query(points, k=k)
    found = nearest_distance(points, known, k)
    np.testing.assert_allclose(found, np.reshape(expected, (9, k)).mean(axis=1), rtol=1e-6)


def test_the_latent_space_has_unit_variance() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 10)) + 7.0
    space = LatentSpace.fit(latents)
    assert space.whitening.shape == (10, 4)  # the other six have no variance
    np.testing.assert_allclose(np.cov(space.whitened(latents), rowvar=False), np.eye(4), atol=1e-9)
    for bad in (np.ones((5, 2)), np.ones((1, 2)), np.full((5, 2), np.nan)):
        with pytest.raises(ValueError, match="latents"):
            LatentSpace.fit(bad)


def test_mixtures_of_what_was_seen_are_near_and_other_codes_are_not() -> None:
    p = HABITS / HABITS.sum(axis=1, keepdims=True)
    shares = np.linspace(0.2, 0.8, 30)[:, None]
    space = CodeSpace.fit(shares * p[0] + (1.0 - shares) * p[1])
    mixed = space.divergence_bits(0.45 * p[0] + 0.55 * p[1])
    foreign = space.divergence_bits(FOREIGN / FOREIGN.sum())
    assert mixed < 1e-4
    assert foreign > 0.1


def test_codes_and_bits_are_checked() -> None:
    assert code_histogram(np.array([[0, 1], [1, 3]]), 5).tolist() == [0.25, 0.5, 0.0, 0.25, 0.0]
    for bad in (np.array([5]), np.array([-1]), np.array([], dtype=int)):
        with pytest.raises(ValueError, match="codes: expected 0 to 4"):
            code_histogram(bad, 5)
    # 64 codes of one bit each, and a condition that fits worse.
    nats = np.full((3, 1), -64.0 * math.log(2.0)) - np.array([0.0, 5.0])
    assert bits_per_code(nats, 64) == pytest.approx(1.0)


@pytest.mark.parametrize("patches", [3, 16, 40])
def test_the_level_holds_for_images_of_any_size(reference: NoveltyReference, patches: int) -> None:
    # 16 is what the held-out images have; of larger ones fewer are called novel, not more.
    rng = np.random.default_rng(patches)
    n = 250
    novel = sum(reference.judge(image(rng, patches)).novel for _ in range(n))
    # The level itself was drawn with the held-out images: twice the variance of the count.
    assert novel / n <= 0.05 + 5.0 * math.sqrt(0.05 * 0.95 * (1 / n + 1 / 120))


def test_a_foreign_texture_is_novel(reference: NoveltyReference) -> None:
    rng = np.random.default_rng(8)
    found = [reference.judge(image(rng, foreign=0.3)) for _ in range(40)]
    assert sum(each.novel for each in found) >= 36
    assert all(each.novel == (each.typicality < each.level) for each in found)
    odd = sum(reference.fit_typicality(image(rng, foreign=0.3)) < 0.05 for _ in range(40))
    assert odd >= 36


def test_what_lies_off_in_the_latent_space_is_novel_though_its_codes_are_usual(
    reference: NoveltyReference,
) -> None:
    own = image(np.random.default_rng(9))
    off = ImageFeatures(own.latents + np.array([0.0, 0.0, 0.2]), own.codes, own.log_likelihood)
    assert not reference.judge(own).novel
    found = reference.judge(off)
    assert found.novel
    assert found.image_distance > 5.0
    assert reference.fit_typicality(off) == reference.fit_typicality(own)


def test_a_blank_image_and_numbers_that_are_none_are_never_typical(reference: NoveltyReference) -> None:
    own = image(np.random.default_rng(10))
    for found in (
        reference.judge(own, blank=True),
        reference.judge(ImageFeatures(own.latents * np.nan, own.codes, own.log_likelihood)),
    ):
        assert (found.typicality, found.novel) == (0.0, True)


def test_without_codes_the_latent_space_judges_alone() -> None:
    rng = np.random.default_rng(11)
    latents = [image(rng).latents for _ in range(60)]
    held_out = [ImageFeatures(each) for each in latents[30:]]
    reference = fit_novelty(
        np.concatenate(latents[:30]), held_out, training_images=np.repeat(np.arange(30), 16)
    )
    found = reference.judge(ImageFeatures(latents[0]))
    assert (found.code_divergence_bits, found.bits_per_code) == (None, None)
    assert reference.fit_typicality(ImageFeatures(latents[0])) == 1.0
    assert reference.judge(ImageFeatures(latents[0] + 3.0)).novel


def test_what_cannot_be_learnt_from_is_refused() -> None:
    rng = np.random.default_rng(12)
    many = [image(rng) for _ in range(30)]
    latents = np.concatenate([each.latents for each in many])
    with pytest.raises(ValueError, match="hold out 20 or more"):
        fit_novelty(latents, many[:19])
    with pytest.raises(ValueError, match="one has no patch"):
        fit_novelty(latents, [*many, ImageFeatures(np.empty((0, 3)))])
    with pytest.raises(ValueError, match="training_images: expected 480"):
        fit_novelty(latents, many, training_images=np.arange(7))
    without = [ImageFeatures(each.latents) for each in many]
    with pytest.raises(ValueError, match="codes or log-likelihoods"):
        fit_novelty(latents, without, training_codes=np.zeros((480, 8, 8), int), codebook=CODES)
