"""The peak search on one spot and on neighbours: every kind of frame, overlap, saturation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testkit.peaks import blank, nearest, same

from pipelines.laue.peaks import FIT_FAILED, OVERLAP, SATURATED, PeakSearch, find_peaks
from pipelines.laue.render import Background, render_frame

TYPES = (np.uint8, np.uint16, np.uint32, np.int16, np.int32, np.float32, np.float64)

# ---------------------------------------------------------------- one spot, many kinds of frame


@settings(deadline=None, max_examples=60)
@given(
    x=st.floats(20, 75),
    y=st.floats(20, 75),
    minor=st.floats(1.3, 3.5),
    ratio=st.floats(1.0, 1.8),
    tilt=st.floats(-89, 89),
    intensity=st.floats(3e3, 1e5),
    seed=st.integers(0, 2**32 - 1),
)
def test_one_spot_is_measured(
    x: float, y: float, minor: float, ratio: float, tilt: float, intensity: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    fwhm = [[minor * ratio, minor]]
    image = render_frame((96, 96), [[x, y]], [intensity], fwhm, rng, tilt_deg=tilt, dtype=np.int32)
    table = find_peaks(image)
    # Sometimes noise passes the threshold somewhere: the spot is the strongest.
    assert 1 <= len(table) <= 2
    assert table.flags[0] == 0
    assert np.hypot(*(table.xy_px[0] - [x, y])) < 6 * table.sigma_px[0] + 0.01
    assert table.intensity[0] == pytest.approx(intensity, rel=0.1)
    assert table.background[0] == pytest.approx(50.0, abs=8.0 + 0.005 * table.amplitude[0])
    assert table.fwhm_px[0] == pytest.approx(fwhm[0], rel=0.15)
    if ratio > 1.4:
        assert abs((table.tilt_deg[0] - tilt + 90) % 180 - 90) < 20
        assert -90 < table.tilt_deg[0] <= 90


@pytest.mark.parametrize("dtype", TYPES)
def test_every_pixel_type_gives_the_same_peaks(dtype: Any) -> None:
    rng = np.random.default_rng(4)
    xy = rng.uniform(10, 118, (6, 2))
    base = render_frame(
        (128, 128), xy, np.linspace(150, 900, 6), 2.2, rng, background=Background(20.0), dtype=np.uint8
    )
    params = PeakSearch(saturation=255, min_noise=0.3)
    table = find_peaks(base.astype(dtype), params)
    assert same(table, find_peaks(base, params))
    assert (nearest(xy, table.xy_px)[0] < 0.5).all()


def test_byte_order_layout_and_read_only_make_no_difference() -> None:
    rng = np.random.default_rng(6)
    image = render_frame((140, 130), rng.uniform(5, 125, (9, 2)), 2000.0, 2.0, rng)
    table = find_peaks(image)
    assert len(table) >= 8
    locked = np.frombuffer(image.tobytes(), image.dtype).reshape(image.shape)
    odd = np.frombuffer(b"x" + image.tobytes(), image.dtype, offset=1).reshape(image.shape)
    for other in (image.astype(">u2"), np.asfortranarray(image), locked, odd, image.astype(np.int64)):
        params = PeakSearch(saturation=65535)
        assert same(find_peaks(other, params), table)
    assert same(find_peaks(image[::-1, ::-1][::-1, ::-1]), table)
    assert same(find_peaks(image), table)


def test_the_frame_is_not_changed_and_rows_are_sorted() -> None:
    rng = np.random.default_rng(7)
    image = render_frame((300, 300), rng.uniform(5, 295, (30, 2)), 10 ** rng.uniform(2.5, 4.5, 30), 2.0, rng)
    before = image.copy()
    table = find_peaks(image)
    assert np.array_equal(image, before)
    assert (np.diff(table.intensity) <= 0).all()
    part = table.take([2, 0])
    assert len(part) == 2
    assert part.intensity[0] == table.intensity[2]
    assert len(table.take(table.snr > 1e9)) == 0


# ---------------------------------------------------------------- overlap, saturation


@pytest.mark.parametrize("distance", [5.0, 6.5, 8.0])
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_two_spots_side_by_side_are_two_and_marked(distance: float, ratio: float) -> None:
    xy = np.array([[60.3, 64.1], [60.3 + distance * 0.8, 64.1 + distance * 0.6]])
    image = render_frame((128, 128), xy, [20000, 20000 * ratio], 2.4, np.random.default_rng(2))
    table = find_peaks(image)
    assert len(table) == 2
    assert (nearest(xy, table.xy_px)[0] < 0.05).all()
    assert table.intensity == pytest.approx([20000, 20000 * ratio], rel=0.08)
    assert (table.flags & OVERLAP > 0).all()


def test_a_lone_spot_is_not_marked() -> None:
    image = render_frame((128, 128), [[60, 60], [90, 90]], 20000.0, 2.4, np.random.default_rng(2))
    assert find_peaks(image).flags.tolist() == [0, 0]


@pytest.mark.parametrize("fwhm", [2.5, 6.0, 14.0])
def test_a_saturated_spot_is_one_spot(fwhm: float) -> None:
    xy = np.array([[70.3, 64.6]])
    total = 1.2e6 * (fwhm / 2.5) ** 2
    image = render_frame((160, 160), xy, total, fwhm, np.random.default_rng(2), saturation=20000)
    assert np.count_nonzero(image == 20000) >= 9
    table = find_peaks(image, PeakSearch(saturation=20000))
    assert len(table) == 1
    assert table.flags[0] & SATURATED
    assert not table.flags[0] & FIT_FAILED
    assert np.hypot(*(table.xy_px[0] - xy[0])) < 0.1
    assert table.intensity[0] == pytest.approx(total, rel=0.15)


def test_a_spot_at_the_limit_of_its_type_is_saturated_without_being_told() -> None:
    image = render_frame((96, 96), [[40.0, 44.0]], 3e6, 3.0, np.random.default_rng(2))
    table = find_peaks(image)
    assert image.max() == 65535
    assert table.flags.tolist() == [SATURATED]


def test_many_saturated_areas_and_an_odd_limit_are_borne() -> None:
    image = blank(shape=(768, 768)).astype(np.uint32)
    for r in range(0, 760, 14):
        for c in range(0, 760, 14):
            image[r : r + 9, c : c + 9] = 16777218
    table = find_peaks(image, PeakSearch(saturation=16777217.0))
    assert len(table) <= 55 * 55
    assert np.isfinite(table.xy_px).all()


def test_a_large_saturated_area_is_no_spot() -> None:
    image = blank()
    image[100:200, 100:200] = 65535
    assert len(find_peaks(image)) == 0
