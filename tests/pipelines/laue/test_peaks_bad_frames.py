"""What must not be a peak, frames that cannot be searched, and bounded time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from testkit.peaks import blank, nearest

from pipelines.frame import BadFrame
from pipelines.laue.peaks import EDGE, PeakSearch, find_peaks
from pipelines.laue.render import Background, add_noise, render_frame

# ---------------------------------------------------------------- what must not be a peak


def test_hot_pixels_and_pairs_are_no_spots() -> None:
    image, rng = blank(), np.random.default_rng(9)
    at = rng.integers(5, 507, (60, 2))
    image[at[:30, 0], at[:30, 1]] += rng.integers(200, 40000, 30).astype(np.uint16)
    image[at[30:40, 0], at[30:40, 1]] = 65535
    for (r, c), (dr, dc) in zip(at[40:], [(0, 1), (1, 0), (1, 1), (1, -1)] * 5, strict=True):
        image[r, c] += 5000
        image[r + dr, c + dc] += 4500
    table = find_peaks(image)
    assert (nearest(table.xy_px, at[:, ::-1].astype(float))[0] > 3).all()
    assert len(find_peaks(image, PeakSearch(max_sharpness=np.inf))) > 50


def test_masked_pixels_make_no_peaks_and_spots_beside_them_stay() -> None:
    rng = np.random.default_rng(10)
    usable = np.ones((512, 512), np.uint8)
    usable[250:260] = 0
    usable[:, 100:104] = 0
    usable[rng.integers(0, 512, 800), rng.integers(0, 512, 800)] = 0
    xy = np.array([[300.0, 240.0], [300.0, 268.0], [90.0, 400.0], [112.0, 60.0]])
    for gap in (0, 65535):
        image = render_frame((512, 512), xy, 4000.0, 2.5, np.random.default_rng(1))
        image[usable == 0] = gap
        table = find_peaks(image, usable=usable)
        distance = nearest(xy, table.xy_px)[0]
        assert (distance < 0.2).all()
        assert len(table) <= len(xy) + 1
    on_edge = np.array([[300.0, 248.6]])
    image = render_frame((512, 512), on_edge, 8000.0, 2.5, np.random.default_rng(1))
    table = find_peaks(image, usable=usable)
    assert table.flags[0] & EDGE
    assert np.hypot(*(table.xy_px[0] - on_edge[0])) < 1.0


def test_gap_markers_without_a_mask_are_no_spots() -> None:
    image = blank()
    image[200:220] = 65535
    image[:, 300:310] = 65535
    assert len(find_peaks(image)) == 0


def test_a_round_detector_needs_no_mask() -> None:
    shape = (512, 512)
    y, x = np.indices(shape)
    outside = np.hypot(x - 255.5, y - 255.5) > 250
    xy = np.array([[256.0, 20.0], [100.0, 300.0], [400.0, 111.0]])
    image = render_frame(shape, xy, 3000.0, 2.2, np.random.default_rng(0), background=Background(40.0))
    image[outside] = 0
    table = find_peaks(image)
    assert len(table) == 3
    assert (nearest(xy, table.xy_px)[0] < 0.2).all()


def test_not_a_number_is_no_peak() -> None:
    xy = np.array([[60.0, 60.0], [200.0, 200.0]])
    image = render_frame((256, 256), xy, 5000.0, 2.2, np.random.default_rng(0), dtype=np.float32)
    clean = find_peaks(image)
    image[100:110, :] = np.nan
    image[5, 5], image[6, 200], image[7, 100] = np.inf, -np.inf, np.nan
    table = find_peaks(image)
    assert len(clean) == len(table) == 2
    assert np.isfinite(table.xy_px).all()
    assert (nearest(xy, table.xy_px)[0] < 0.1).all()


def test_steps_and_shadows_are_no_spots() -> None:
    expected = np.full((512, 512), 100.0, np.float32)
    y, x = np.indices(expected.shape)
    expected[y > 400 + 30 * np.sin(x / 60)] = 40.0  # a shadow with a sharp edge
    expected[:, 255:257] *= 0.8  # a seam between two halves
    image = add_noise(expected, np.random.default_rng(2))
    assert len(find_peaks(image)) <= 1


# ---------------------------------------------------------------- bad frames


@pytest.mark.parametrize(
    ("image", "usable", "words"),
    [
        (np.zeros((256, 256), np.uint16), None, "all pixels are zero"),
        (np.full((256, 256), 65535, np.uint16), None, "saturated"),
        (np.full((256, 256), np.nan, np.float32), None, "no pixel can be used"),
        (np.full((256, 256), 7, np.uint16), np.zeros((256, 256), np.uint8), "masked"),
        (np.zeros((4, 256, 256), np.uint16), None, "2-D"),
        (np.zeros((256, 3), np.uint16), None, "16 pixels"),
        (np.zeros((256, 256), np.complex128), None, "real numbers"),
        (np.zeros((256, 256), np.uint16), np.ones((255, 256), np.uint8), "mask of shape"),
    ],
)
def test_a_frame_that_cannot_be_searched_says_why(image: np.ndarray, usable: Any, words: str) -> None:
    with pytest.raises(BadFrame, match=words):
        find_peaks(image, usable=usable)


@pytest.mark.parametrize("value", [1, 7, 5000])
def test_a_constant_frame_has_no_peaks(value: int) -> None:
    assert len(find_peaks(np.full((128, 128), value, np.uint16))) == 0
    assert len(find_peaks(np.full((128, 128), value, np.float32))) == 0


@pytest.mark.parametrize("shape", [(16, 16), (17, 300), (63, 65), (300, 17)])
def test_small_and_odd_frames_are_searched(shape: tuple[int, int]) -> None:
    image = render_frame(shape, [[4.0, 4.0]], 5000.0, 1.8, np.random.default_rng(0))
    table = find_peaks(image)
    assert np.hypot(*(table.xy_px[0] - 4.0)) < 0.3


def test_more_maxima_than_allowed_take_bounded_time() -> None:
    rng = np.random.default_rng(1)
    y, x = np.mgrid[6:2040:12, 6:2040:12]
    xy = np.stack([x.ravel(), y.ravel()], axis=1) + rng.uniform(-2, 2, (x.size, 2))
    strength = 10 ** rng.uniform(3.0, 4.0, len(xy))
    image = render_frame((2048, 2048), xy, strength, 2.0, rng)
    start = time.thread_time()
    table = find_peaks(image, PeakSearch(max_peaks=20000))
    assert time.thread_time() - start < 5.0
    assert table.truncated
    assert 19000 < len(table) <= 20000
    # The strongest were taken.
    strong = np.argsort(-strength)[:15000]
    assert np.mean(nearest(xy[strong[:300]], table.xy_px)[0] < 0.5) > 0.99
    assert not find_peaks(image[:256, :256]).truncated
    noise = rng.integers(0, 60000, (1024, 1024)).astype(np.uint16)
    assert len(find_peaks(noise, PeakSearch(2.0, max_peaks=500))) <= 500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold_sigma": 0.0}, "threshold_sigma"),
        ({"box_px": 2}, "box_px"),
        ({"tile_px": 3}, "tile_px"),
        ({"max_peaks": 0}, "max_peaks"),
        ({"gain": -1.0}, "gain"),
        ({"max_sharpness": 0.0}, "max_sharpness"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PeakSearch(**change)
