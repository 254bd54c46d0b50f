"""Preparation: any image becomes 8-bit grey without its data bar, filtered and matched, or is refused."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage
from testkit.micrographs import data_bar, two_phase

from pipelines.frame import BadFrame
from pipelines.micrograph.acquisition import Acquisition
from pipelines.micrograph.data_bar import find_data_bar
from pipelines.micrograph.filters import gradient_histogram, median_filter
from pipelines.micrograph.grey import NOT_FINITE, ONE_GREY, TRUE_COLOUR, TWO_LEVELS, to_grey
from pipelines.micrograph.image_statistics import OUT_OF_FOCUS, SATURATED, STATISTICS, TOO_SMALL
from pipelines.micrograph.matching import ReferenceHistogram
from pipelines.micrograph.preparation import (
    DATA_BAR_GUESSED,
    DATA_BAR_ONLY,
    PreparationParameters,
    centre_crop,
    cut_patches,
    prepare,
)

IMAGE = two_phase(200, 300, seed=1)
NO_BAR = Acquisition(data_bar_px=0)


@pytest.mark.parametrize(
    ("pixels", "flags"),
    [
        (IMAGE, ()),
        (IMAGE.astype(np.uint16) * 257, ()),
        (IMAGE.astype(np.uint16) * 10 + 300, ()),
        (IMAGE.astype(np.int16) - 500, ()),
        (IMAGE.astype(np.uint32) * 100_000, ()),
        (IMAGE.astype(np.float32) / 255.0, ()),
        (IMAGE.astype(np.float64) * 1e-9, ()),
        (IMAGE.astype(">u2"), ()),
        (IMAGE[:, :, None], ()),
        (np.stack([IMAGE] * 3, axis=2), ()),
        (np.dstack([IMAGE, IMAGE, IMAGE, np.full_like(IMAGE, 255)]), ()),
        (np.dstack([IMAGE, np.full_like(IMAGE, 255)]), ()),
        (IMAGE[::-1, ::-1][::-1, ::-1], ()),
    ],
)
def test_all_kinds_of_grey_become_the_same_image(pixels: np.ndarray, flags: tuple[str, ...]) -> None:
    grey = to_grey(pixels)
    assert grey.image.dtype == np.uint8
    assert grey.flags == flags
    if pixels.dtype == np.uint8:
        assert np.array_equal(grey.image, IMAGE)
    else:
        # The two percentiles, of pixels that here are all looked at, are black and white.
        low, high = np.percentile(IMAGE, (0.1, 99.9))
        expected = np.clip((IMAGE - low) / (high - low), 0.0, 1.0) * 255.0
        assert np.abs(grey.image - expected).max() <= 0.51
    assert np.array_equal(grey.counts, np.bincount(grey.image.ravel(), minlength=256))


def test_brightness_is_told_as_it_came() -> None:
    for pixels, full in ((IMAGE, 255), (IMAGE.astype(">u2") * 100, 65535), (IMAGE / 7.0, 1)):
        grey = to_grey(pixels)
        assert grey.mean == pytest.approx(pixels.mean() / full)
        assert grey.std == pytest.approx(pixels.std() / full)


def test_a_hot_pixel_does_not_decide_over_the_contrast() -> None:
    pixels = IMAGE.astype(np.uint16)
    pixels[3, 4] = 65535
    assert np.ptp(to_grey(pixels).image[100:]) > 200


def test_one_bit_images() -> None:
    bits = IMAGE > 120
    for pixels in (bits, bits.astype(np.uint8), bits.astype(np.uint8) * 255, bits.astype(np.uint16)):
        grey = to_grey(pixels)
        assert TWO_LEVELS in grey.flags
        assert np.array_equal(grey.image > 127, bits)
        assert set(np.unique(grey.image)) == {0, 255}
    assert SATURATED not in prepare(bits).flags


def test_true_colour_is_flagged_and_made_luminance() -> None:
    colour = np.dstack([IMAGE, IMAGE // 2, IMAGE // 3])
    grey = to_grey(colour)
    assert grey.flags == (TRUE_COLOUR,)
    assert np.abs(grey.image - colour @ [0.299, 0.587, 0.114]).max() <= 0.5
    # What JPEG makes of grey is grey.
    encoded = io.BytesIO()
    Image.fromarray(np.stack([IMAGE] * 3, axis=2)).save(encoded, "jpeg", quality=80)
    assert to_grey(np.asarray(Image.open(encoded))).flags == ()
    assert to_grey(np.stack([IMAGE > 99, IMAGE > 120, IMAGE > 150], axis=2)).flags[0] == TRUE_COLOUR


def test_not_a_number() -> None:
    pixels = IMAGE.astype(np.float32)
    pixels[:20, :30], pixels[50, 60], pixels[51, 60] = np.nan, np.inf, -np.inf
    grey = to_grey(pixels)
    assert grey.flags == (NOT_FINITE,)
    assert not grey.image[:20, :30].any()
    assert not grey.image[50:52, 60].any()
    assert grey.mean == pytest.approx(pixels[np.isfinite(pixels)].mean(), rel=1e-5)
    nothing = prepare(np.full((200, 200), np.nan))
    assert {NOT_FINITE, ONE_GREY} <= set(nothing.flags)


@pytest.mark.parametrize("pixels", [np.zeros((1, 1), np.uint8), np.full((1, 1), 7.0), np.ones((1, 1), bool)])
def test_one_pixel(pixels: np.ndarray) -> None:
    ready = prepare(pixels, PreparationParameters(reference=ReferenceHistogram.of([IMAGE])))
    assert ready.image.shape == (1, 1)
    assert set(ready.flags) == {ONE_GREY, TOO_SMALL}
    assert cut_patches(ready.image).count == 0


def test_a_hundred_megapixels_in_little_memory() -> None:
    tile = two_phase(1000, 1000, seed=2)
    large = np.tile(tile, (10, 10))
    tracemalloc.start()
    ready = prepare(large, PreparationParameters(reference=ReferenceHistogram.of([tile])))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ready.image.shape == (10_000, 10_000)
    assert ready.flags == ()
    assert peak < 4 * large.size
    assert cut_patches(ready.image).count == 78 * 78


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.broadcast_to(np.uint8(7), (20_000, 20_000)), "20000 x 20000 pixels is too large"),
        (np.zeros((0, 5)), "5 x 0 pixels"),
        (np.zeros(5), r"shape \(5,\)"),
        (np.zeros((4, 5, 7)), r"shape \(4, 5, 7\)"),
        (np.zeros((4, 5), complex), "complex128"),
        (np.zeros((4, 5), "S3"), r"\|S3"),
    ],
)
def test_what_is_no_image_is_refused(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(BadFrame, match=message):
        prepare(pixels)


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int16, np.int64, np.float32, np.float64, np.bool_]),
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=24).filter(lambda s: len(s) == 2 or s[2] <= 4),
    )
)
def test_no_image_makes_it_stumble(pixels: np.ndarray) -> None:
    ready = prepare(pixels, PreparationParameters(patch_px=8))
    assert ready.image.shape == (pixels.shape[0] - ready.data_bar_px, pixels.shape[1])
    assert ready.statistics is None or 0.0 <= ready.statistics.entropy_bits <= 8.0


@pytest.mark.parametrize("rows", [20, 44, 70])
@pytest.mark.parametrize(("background", "ink"), [(0, 255), (255, 0), (40, 255)])
@pytest.mark.parametrize("style", ["plain", "framed"])
@pytest.mark.parametrize("quality", [0, 75])
def test_data_bars_are_found(rows: int, background: int, ink: int, style: str, quality: int) -> None:
    image = np.vstack([two_phase(480, 640, seed=rows), data_bar(640, rows, background, ink, style)])
    if quality:
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "jpeg", quality=quality)
        image = np.asarray(Image.open(encoded))
    assert abs(find_data_bar(image) - rows) <= 2
    assert DATA_BAR_GUESSED in prepare(image).flags


def test_what_is_no_data_bar() -> None:
    stripes = np.repeat(np.tile(np.uint8([40, 200]), 12), 20)[:, None] * np.ones((1, 640), np.uint8)
    hole = two_phase(480, 640, seed=3)
    hole[np.hypot(*np.ogrid[-520:-40, -320:320]) < 300] = 0
    for image in (stripes, hole, np.zeros((480, 640), np.uint8), two_phase(480, 640, 4, noise=0.0)):
        assert find_data_bar(image) == 0


def test_metadata_say_where_the_data_bar_is() -> None:
    image = np.vstack([IMAGE, data_bar(300, 30, 0, 255, "plain")])
    ready = prepare(image, acquisition=Acquisition(data_bar_px=30))
    assert ready.data_bar_px == 30
    assert DATA_BAR_GUESSED not in ready.flags
    # Told that there is none, it keeps what looks like one.
    assert prepare(image, acquisition=NO_BAR).image.shape == image.shape


def test_a_data_bar_does_not_stretch_16_bit_contrast() -> None:
    bar = data_bar(640, 40, 0, 255, "plain").astype(np.uint16) * 257
    dim = two_phase(480, 640, seed=5).astype(np.uint16) * 8 + 1000
    ready = prepare(np.vstack([dim, bar]))
    assert ready.data_bar_px == pytest.approx(40, abs=2)
    assert ready.filtered.std() > 60


def test_nothing_but_a_data_bar() -> None:
    ready = prepare(data_bar(1024, 60, 0, 255, "framed"))
    assert {DATA_BAR_ONLY, TOO_SMALL} <= set(ready.flags)
    assert ready.image.size == 0
    assert ready.statistics is None


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)), st.sampled_from([3, 5, 9])
)
def test_median_filter_is_scipys(image: np.ndarray, size: int) -> None:
    assert np.array_equal(median_filter(image, size), ndimage.median_filter(image, size=size, mode="nearest"))


def test_median_filter_has_no_seams() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 1 << 19), dtype=np.uint8)  # two rows a band
    for size in (3, 5):
        expected = ndimage.median_filter(image, size=size, mode="nearest")
        assert np.array_equal(median_filter(image, size), expected)


def test_gradients_by_numpy() -> None:
    wide = IMAGE.astype(int)
    steep = np.maximum(np.abs(np.diff(wide, axis=0))[:, :-1], np.abs(np.diff(wide, axis=1))[:-1])
    assert np.array_equal(gradient_histogram(IMAGE), np.bincount(steep.ravel(), minlength=256))


def test_histogram_matching_is_scikit_images() -> None:
    exposure = pytest.importorskip("skimage.exposure", reason="scikit-image is absent")
    rng = np.random.default_rng(1)
    for shape in ((64, 80), (33, 50)):
        source = np.clip(rng.normal(90, 25, shape), 0, 255).astype(np.uint8)
        reference = np.clip(rng.gamma(4.0, 20.0, (70, 90)), 0, 255).astype(np.uint8)
        expected = exposure.match_histograms(source, reference)
        matched = ReferenceHistogram.of([reference]).match(source)
        assert np.abs(matched - expected).max() <= 0.5


def test_matching_moves_the_histogram_to_the_reference_and_keeps_the_order() -> None:
    reference = two_phase(256, 256, seed=7, noise=20.0)
    source = (two_phase(256, 256, seed=8, noise=15.0) * 0.4 + 90).astype(np.uint8)
    to = ReferenceHistogram.of([reference])
    matched = to.match(source)
    wanted, got = (np.cumsum(np.bincount(a.ravel(), minlength=256)) / a.size for a in (reference, matched))
    was = np.cumsum(np.bincount(source.ravel(), minlength=256)) / source.size
    assert np.abs(got - wanted).max() < 0.05
    assert np.abs(was - wanted).max() > 0.3
    assert np.all(np.diff(to.lookup(np.bincount(source.ravel(), minlength=256)).astype(int)) >= 0)
    assert np.array_equal(to.match(reference), reference)


def test_a_reference_is_256_counts() -> None:
    for counts in ((1,) * 255, (0,) * 256, (-1,) + (1,) * 255):
        with pytest.raises(ValueError, match="reference histogram"):
            ReferenceHistogram(counts)


def test_statistics_are_taken_before_matching() -> None:
    use = PreparationParameters(reference=ReferenceHistogram.of([IMAGE]))
    bright = prepare(IMAGE, use)
    dim = prepare((IMAGE * 0.6).astype(np.uint8), use)
    assert dim.statistics is not None
    assert bright.statistics is not None
    assert dim.statistics.mean == pytest.approx(0.6 * bright.statistics.mean, rel=0.02)
    assert abs(dim.image.mean() - bright.image.mean()) < 1.0  # matching hides it
    assert len(bright.statistics.vector()) == len(STATISTICS)


def test_what_is_wrong_with_an_image_is_flagged() -> None:
    assert prepare(IMAGE).flags == ()
    burnt = np.clip(two_phase(200, 300, 9, noise=30.0).astype(int) + 90, 0, 255).astype(np.uint8)
    assert SATURATED in prepare(burnt).flags
    twelve_bits = np.minimum(IMAGE.astype(np.uint16) * 30, 4095)
    assert SATURATED in prepare(twelve_bits).flags
    blurred = ndimage.gaussian_filter(two_phase(300, 300, 10, scale_px=12.0).astype(float), 8.0)
    assert OUT_OF_FOCUS in prepare(np.rint(blurred).astype(np.uint8)).flags
    assert TOO_SMALL in prepare(IMAGE[:100]).flags
    assert prepare(np.full((200, 200), 9, np.uint8)).flags == (ONE_GREY,)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 30), st.integers(0, 20))
def test_patches_cover_the_image_evenly(rows: int, columns: int, size: int, stride: int) -> None:
    image = np.arange(rows * columns, dtype=np.uint64).reshape(rows, columns).astype(np.uint8)
    patches = cut_patches(image, size, stride)
    step = stride or size
    down, across = ((n - size) // step + 1 if min(rows, columns) >= size else 0 for n in (rows, columns))
    assert patches.count == down * across
    for number in range(patches.count):
        i, j = divmod(number, across)
        top, left = patches.origin[0] + i * step, patches.origin[1] + j * step
        assert np.array_equal(patches.view[i, j], image[top : top + size, left : left + size])
    if patches.count:
        assert np.shares_memory(patches.view, image)
        assert np.array_equal(patches.some([patches.count - 1])[0], patches.view[-1, -1])
        margins = rows - ((down - 1) * step + size), columns - ((across - 1) * step + size)
        assert patches.origin == (margins[0] // 2, margins[1] // 2)


def test_crops_are_the_middle() -> None:
    assert np.array_equal(centre_crop(IMAGE, (100, 100)), IMAGE[50:150, 100:200])
    assert centre_crop(IMAGE, (999, 100)).shape == (200, 100)
    assert prepare(IMAGE, PreparationParameters(crop=(128, 128))).image.shape == (128, 128)


@pytest.mark.parametrize(
    "wrong",
    [
        {"percentiles": (50.0, 50.0)},
        {"median_px": 4},
        {"crop": (0, 5)},
        {"patch_px": 0},
        {"stride_px": -1},
        {"max_pixels": 0},
    ],
)
def test_wrong_parameters_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PreparationParameters(**wrong)


@pytest.mark.truth
def test_real_micrographs_are_ready_as_they_come(micrographs: Path) -> None:
    files = sorted(micrographs.glob("*/images/*"))
    assert len(files) >= 168
    flags: dict[str, int] = {}
    sharpness = []
    for file in files:
        ready = prepare(np.asarray(Image.open(file)))
        assert ready.data_bar_px == 0, file  # they were cut off before publication
        assert ready.statistics is not None
        sharpness.append(ready.statistics.sharpness)
        for flag in ready.flags:
            flags[flag] = flags.get(flag, 0) + 1
    assert set(flags) <= {SATURATED}
    assert flags.get(SATURATED, 0) <= 0.1 * len(files)
    assert min(sharpness) > 0.18


@pytest.mark.truth
def test_real_micrographs_blurred_are_out_of_focus(micrographs: Path) -> None:
    found = 0
    files = sorted(micrographs.glob("*/images/*"))[::6]
    for file in files:
        blurred = ndimage.gaussian_filter(np.asarray(Image.open(file)).astype(np.float32), 5.0)
        found += OUT_OF_FOCUS in prepare(np.rint(blurred).astype(np.uint8)).flags
    assert found >= 0.9 * len(files)


@pytest.mark.truth
def test_data_bars_under_real_micrographs(micrographs: Path) -> None:
    right = total = 0
    for number, file in enumerate(sorted(micrographs.glob("*/images/*"))[::4]):
        image = np.asarray(Image.open(file))
        style, (background, ink) = ("plain", "framed")[number % 2], ((0, 255), (255, 0))[number // 2 % 2]
        bar = data_bar(image.shape[1], 24 + number, background, ink, style)
        right += abs(find_data_bar(np.vstack([image, bar])) - len(bar)) <= 2
        total += 1
    assert right >= 0.95 * total


def test_the_typical_reference_is_an_image_and_not_a_mixture_of_bright_and_dark_ones() -> None:
    rng = np.random.default_rng(0)
    images = [rng.normal(mean, 5.0, (64, 64)).round().astype(np.uint8) for mean in (60, 118, 120, 124, 200)]
    chosen = ReferenceHistogram.typical(images)
    assert chosen == ReferenceHistogram.of([images[2]])
    assert abs(chosen.match(images[0]).mean() - 120.0) < 1.0
    assert chosen.match(images[4]).std() < 6.0
