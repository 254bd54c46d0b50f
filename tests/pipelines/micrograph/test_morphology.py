"""Fraction and mean free path: closed forms, invariances, and masks of real micrographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from testkit.micrographs import discs, two_phase

from pipelines.micrograph.matching import ReferenceHistogram
from pipelines.micrograph.morphology import (
    NO_BOUNDARY,
    UNCLEAR_PHASES,
    morphology,
    patch_morphology,
)
from pipelines.micrograph.otsu import otsu
from pipelines.micrograph.preparation import cut_patches, prepare

BINARY = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=20)).map(
    lambda image: (image > 127).astype(np.uint8) * np.uint8(255)
)
THRESHOLD = np.array([127])


def one(image: np.ndarray, **how: object) -> tuple[float, float, float]:
    found = patch_morphology(image[None, None], thresholds=THRESHOLD, **how)
    return float(found.fraction[0]), float(found.free_path_rows_px[0]), float(found.free_path_columns_px[0])


@pytest.mark.parametrize("field", [1, 3, 8])
def test_checkerboard(field: int) -> None:
    # Fields of one size: every chord is a field, in both directions.
    board = np.kron(np.indices((64, 64)).sum(axis=0) % 2, np.ones((field, field))).astype(np.uint8) * 255
    found = morphology(board)
    crossings = 63 / (64 * field - 1)  # a place to cross; 1 / field in an endless board
    assert found.fraction == 0.5
    assert found.free_path_rows_px == found.free_path_columns_px == pytest.approx(1.0 / crossings)
    assert found.free_path_px == pytest.approx(field, rel=0.02)
    assert found.separability == pytest.approx(1.0)


@pytest.mark.parametrize(("bright", "dark"), [(5, 11), (20, 3), (1, 1), (30, 70)])
def test_stripes_at_any_offset_average_to_their_width(bright: int, dark: int) -> None:
    # Over all offsets of the stripes the estimate has no bias: mean area over mean chords is the width.
    period, length = bright + dark, 128
    line = np.tile(np.repeat(np.uint8([255, 0]), (bright, dark)), 300)
    rows = np.stack([line[offset : offset + length] for offset in range(period)])
    fraction, along, _ = one(rows)
    assert fraction == pytest.approx(bright / period)
    assert along == pytest.approx(bright)
    assert one(rows, phase="dark")[1] == pytest.approx(dark)
    # The same stripes upright, and a line along a stripe never crosses.
    assert one(rows.T)[2] == pytest.approx(bright)
    upright = np.repeat(line[None, :length], 50, axis=0)
    assert np.isnan(one(upright)[2])
    assert NO_BOUNDARY in morphology(upright).flags
    # Counting cut stripes as whole ones underrates their width: the more, the wider they are.
    assert one(rows, paper_compat=True)[1] != pytest.approx(bright, rel=1e-3) or period == 2


def test_boolean_model_of_discs() -> None:
    # Between discs chords are exponential with mean 1 / (2 r γ), their share is exp(−γ π r²) (Matheron,
    # Random Sets and Integral Geometry, 1975, chapter 5; Chiu et al., Stochastic Geometry, 2013, 3.1).
    radius, intensity = 14.0, 1.2e-3
    share = np.exp(-intensity * np.pi * radius**2)
    between = 1.0 / (2.0 * radius * intensity)
    images = np.stack([discs(128, 256, radius, intensity, seed) for seed in range(150)])
    for phase in ("dark", "bright"):
        found = patch_morphology(images[None], phase=phase, thresholds=np.full(150, 127))
        for chords, along, lines in (
            (found.chords_rows, 255, 128),
            (found.chords_columns, 127, 256),
        ):
            path = found.fraction.mean() * along * lines / chords.mean()
            expected = between if phase == "dark" else between * (1.0 - share) / share
            assert path == pytest.approx(expected, rel=0.03)
        assert found.fraction.mean() == pytest.approx(share if phase == "dark" else 1.0 - share, abs=0.015)
    # Patches are not much larger than the chords here: runs of cut chords taken as whole ones are too short.
    lines = (images <= 127).transpose(0, 2, 1).reshape(-1, 128)
    runs = np.count_nonzero(lines[:, 0]) + np.count_nonzero(lines[:, 1:] & ~lines[:, :-1])
    assert np.count_nonzero(lines) / runs < 0.9 * between


@settings(max_examples=80, deadline=None)
@given(BINARY, st.sampled_from(["bright", "dark"]))
def test_turned_and_inverted_images(image: np.ndarray, phase: str) -> None:
    fraction, rows, columns = one(image, phase=phase)
    for turned in (image.T, np.rot90(image), np.rot90(image, 3)):
        assert one(np.ascontiguousarray(turned), phase=phase) == pytest.approx(
            (fraction, columns, rows), nan_ok=True
        )
    for turned in (image[::-1], image[:, ::-1], np.rot90(image, 2)):
        assert one(turned, phase=phase) == pytest.approx((fraction, rows, columns), nan_ok=True)
    other = "dark" if phase == "bright" else "bright"
    assert one(255 - image, phase=other) == pytest.approx((fraction, rows, columns), nan_ok=True)
    counted = [
        patch_morphology(image[None, None], phase=p, thresholds=THRESHOLD).chords_rows for p in (phase, other)
    ]
    assert counted[0] == counted[1]  # a boundary has two sides


@settings(max_examples=60, deadline=None)
@given(BINARY, st.integers(2, 4))
def test_a_magnified_image_has_magnified_chords(image: np.ndarray, factor: int) -> None:
    fraction, rows, columns = one(image)
    large = one(np.kron(image, np.ones((factor, factor), np.uint8)))
    down, across = image.shape
    assert large[0] == pytest.approx(fraction)
    # Pixels of a magnified image have their places to cross at the edges of the old ones only.
    assert large[1] == pytest.approx(rows * (across * factor - 1) / (across - 1), nan_ok=True)
    assert large[2] == pytest.approx(columns * (down * factor - 1) / (down - 1), nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(BINARY)
def test_counts_by_a_plain_program(image: np.ndarray) -> None:
    bits = image > 127
    found = patch_morphology(image[None, None], thresholds=THRESHOLD)
    assert found.chords_rows[0] == np.count_nonzero(np.diff(bits, axis=1)) / 2
    assert found.chords_columns[0] == np.count_nonzero(np.diff(bits, axis=0)) / 2
    paper = patch_morphology(image[None, None], thresholds=THRESHOLD, paper_compat=True)
    for lines, counted in ((bits, paper.chords_rows[0]), (bits.T, paper.chords_columns[0])):
        expected = 0
        for line in lines:
            crossings = int(np.count_nonzero(np.diff(line)))
            if not line[0] and crossings % 2 == 0:
                expected += (crossings - 2) // 2  # the mistake: n / 2 grains
            elif line[0] and crossings % 2 == 0:
                expected += crossings // 2 + 1
            else:
                expected += (crossings + 1) // 2
        assert counted == expected


def test_the_papers_count_overrates_few_grains() -> None:
    image = np.zeros((128, 128), np.uint8)
    image[:, 40:50] = image[:, 80:90] = 255
    fraction, along, _ = one(image, paper_compat=True)
    assert fraction == pytest.approx(20 / 128)
    assert along == pytest.approx(20.0)  # one grain a line instead of two
    assert one(image)[1] == pytest.approx(10.0, rel=0.01)


def test_pixel_size_scales_lengths_and_nothing_else() -> None:
    image = two_phase(256, 256, seed=1)
    plain, small, large = (morphology(image, pixel_size_um=size) for size in (None, 0.05, 0.5))
    assert plain.free_path_um is None
    assert small.free_path_um == pytest.approx(0.05 * plain.free_path_px)
    assert large.free_path_spread_um == pytest.approx(0.5 * plain.free_path_spread_px)
    assert small.fraction == large.fraction == plain.fraction
    for wrong in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="pixel_size_um"):
            morphology(image, pixel_size_um=wrong)


def test_spreads_are_those_of_the_patches() -> None:
    image = two_phase(384, 512, seed=2, scale_px=6.0, noise=0.0)
    found = morphology(image, patch_px=128)
    parts = [
        one((image[r : r + 128, c : c + 128] > found.threshold).astype(np.uint8) * 255)
        for r in range(0, 384, 128)
        for c in range(0, 512, 128)
    ]
    assert found.patches == 12
    assert found.fraction_spread == pytest.approx(np.std([p[0] for p in parts], ddof=1))
    assert found.free_path_spread_px == pytest.approx(np.std([(p[1] + p[2]) / 2 for p in parts], ddof=1))
    assert found.fraction == pytest.approx(np.mean([p[0] for p in parts]))


def test_patches_are_thresholded_one_by_one_as_in_the_paper() -> None:
    image = two_phase(256, 256, seed=3)
    patches = cut_patches(image, 128).view
    own = patch_morphology(patches)
    for number, patch in enumerate(patches.reshape(4, 128, 128)):
        alone = morphology(patch)
        assert own.threshold[number] == alone.threshold
        assert own.fraction[number] == alone.fraction
        assert own.separability[number] == pytest.approx(alone.separability)
    with pytest.raises(ValueError, match="expected 4, one a patch"):
        patch_morphology(patches, thresholds=THRESHOLD)
    with pytest.raises(ValueError, match="bright or dark"):
        patch_morphology(patches, phase="grey")  # type: ignore[arg-type]


def test_otsu_is_scikit_images() -> None:
    filters = pytest.importorskip("skimage.filters", reason="scikit-image is absent")
    rng = np.random.default_rng(4)
    for seed in range(20):
        image = two_phase(64, 64, seed, noise=float(rng.uniform(0, 40)))
        threshold, _ = otsu(np.bincount(image.ravel(), minlength=256))
        assert int(threshold) == filters.threshold_otsu(image)


def test_separability_of_known_histograms() -> None:
    levels = np.arange(256)
    two = np.zeros(256, np.int64)
    two[[40, 200]] = 500, 100
    normal = np.round(1e9 * np.exp(-0.5 * ((levels - 128) / 20.0) ** 2)).astype(np.int64)
    flat = np.ones(256, np.int64)
    one_level = np.bincount([7] * 9, minlength=256)
    thresholds, eta = otsu(np.stack([two, normal, flat, one_level]))
    assert eta == pytest.approx([1.0, 2.0 / np.pi, 0.75, 0.0], abs=2e-3)
    assert 40 <= thresholds[0] < 200
    assert thresholds[3] == 255


def test_images_without_phases() -> None:
    rng = np.random.default_rng(5)
    noise = np.clip(rng.normal(128, 20, (256, 256)), 0, 255).astype(np.uint8)
    assert UNCLEAR_PHASES in morphology(noise).flags
    # ±0.16 σ of a normal distribution: a tenth of the distance of its halves' means, 2 √(2/π) σ.
    assert morphology(noise).doubtful == pytest.approx(0.1265, abs=0.01)
    even = rng.integers(0, 256, (256, 256), dtype=np.uint8)
    assert morphology(even).doubtful == pytest.approx(0.1, abs=0.01)
    clear = morphology(two_phase(256, 256, seed=6))
    assert clear.flags == ()
    assert clear.doubtful < 0.01
    rare = morphology(np.maximum(discs(256, 256, 6.0, 2e-4, seed=3), 40), phase="bright")
    assert rare.fraction < 0.05
    assert rare.flags == ()
    grey = morphology(np.full((256, 256), 9, np.uint8))
    assert set(grey.flags) == {UNCLEAR_PHASES, NO_BOUNDARY}
    assert (grey.separability, grey.doubtful) == (0.0, 1.0)
    pixel = morphology(np.full((1, 1), 9, np.uint8))
    assert NO_BOUNDARY in pixel.flags
    with pytest.raises(ValueError, match="no pixels"):
        morphology(np.zeros((0, 5), np.uint8))


@pytest.mark.parametrize("phase", ["bright", "dark"])
@pytest.mark.parametrize("paper_compat", [False, True])
def test_one_grey_may_be_either_phase(phase: str, paper_compat: bool) -> None:
    how = {"phase": phase, "paper_compat": paper_compat}
    for side, level in ((512, 9), (256, 0), (256, 255), (1, 0)):
        image = np.full((side, side), level, np.uint8)
        found = morphology(image, pixel_size_um=0.5, **how)
        lengths = (found.free_path_px, found.free_path_um, found.free_path_spread_px)
        assert np.isnan([found.fraction, found.fraction_spread, *lengths]).all()
    # A threshold from elsewhere says which phase it is.
    assert morphology(image, threshold=100, **how).fraction == (phase == "dark")
    # So does the threshold of an image for those of its patches that have one grey.
    half = np.zeros((256, 256), np.uint8)
    half[:, 128:] = 200
    found = morphology(half, **how)
    assert found.fraction == 0.5
    assert (found.fraction_spread == pytest.approx(np.sqrt(1 / 3))) is not paper_compat
    own = patch_morphology(cut_patches(half, 128).view, **how)
    assert np.isnan(own.fraction).all()
    assert np.isnan(own.free_path_px).all()


def test_matching_the_histogram_would_set_the_fraction() -> None:
    # Why morphology takes images as they are before it.
    few = discs(256, 256, 9.0, 6e-4, seed=1)
    many = discs(256, 256, 9.0, 4e-3, seed=2)
    rng = np.random.default_rng(6)
    few, many = (
        np.clip(60 + 0.5 * image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        for image in (few, many)
    )
    assert morphology(many).fraction > 3 * morphology(few).fraction
    matched = ReferenceHistogram.of([few]).match(many)
    assert morphology(matched).fraction == pytest.approx(morphology(few).fraction, abs=0.05)


@pytest.mark.truth
def test_real_superalloys_against_their_masks(micrographs: Path) -> None:
    # Otsu takes γ′ (dark here, mask 1 and 2) by its grey alone; people drew the masks.
    agreement, fractions = [], []
    for file in sorted((micrographs / "ni_superalloy" / "images").glob("*.png")):
        mask = np.asarray(Image.open(file.parent.parent / "masks" / f"{file.stem}_mask.png"))
        ready = prepare(np.asarray(Image.open(file)))
        found = morphology(ready.filtered, phase="dark")
        agreement.append(np.mean((ready.filtered <= found.threshold) == (mask > 0)))
        fractions.append((found.fraction, np.mean(mask > 0)))
    assert np.median(agreement) > 0.8
    assert np.median([abs(a - b) for a, b in fractions]) < 0.1
