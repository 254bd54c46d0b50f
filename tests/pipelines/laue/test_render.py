"""Rendered frames against closed forms and the laws of probability."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from pipelines.laue.peaks.rows import KERNEL_2D, KERNEL_NORM
from pipelines.laue.render import (
    Background,
    Tail,
    add_noise,
    expected_frame,
    least_snr,
    render_frame,
    spot_height_sigma,
    spot_snr,
)

PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))


def moments(image: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    rows, columns = np.indices(image.shape)
    total = image.sum(dtype=np.float64)
    mean = np.array([(image * columns).sum(dtype=np.float64), (image * rows).sum(dtype=np.float64)]) / total
    dx, dy = columns - mean[0], rows - mean[1]
    cov = np.array([[(image * dx * dx).sum(), (image * dx * dy).sum()], [0, (image * dy * dy).sum()]]) / total
    cov[1, 0] = cov[0, 1]
    return float(total), mean, cov


@settings(deadline=None, max_examples=40)
@given(
    x=st.floats(28, 36),
    y=st.floats(28, 36),
    major=st.floats(2.0, 6.0),
    ratio=st.floats(0.4, 1.0),
    tilt=st.floats(-90, 90),
)
def test_a_spot_keeps_its_intensity_place_and_shape(
    x: float, y: float, major: float, ratio: float, tilt: float
) -> None:
    minor = max(major * ratio, 2.0)  # narrower spots alias: their second moment depends on the phase
    image = expected_frame((65, 65), [[x, y]], [1e5], [[max(major, minor), minor]], tilt, None)
    total, mean, cov = moments(image.astype(np.float64))
    assert total == pytest.approx(1e5, rel=2e-4)
    assert mean == pytest.approx([x, y], abs=2e-3)
    # Integration over the pixel adds the variance of a unit box.
    turn = np.array([math.cos(math.radians(tilt)), math.sin(math.radians(tilt))])
    along, across = turn, np.array([-turn[1], turn[0]])
    assert along @ cov @ along == pytest.approx((max(major, minor) / PER_SIGMA) ** 2 + 1 / 12, rel=5e-3)
    assert across @ cov @ across == pytest.approx((minor / PER_SIGMA) ** 2 + 1 / 12, rel=5e-3)


def test_pixels_hold_the_integral_of_a_round_spot() -> None:
    sigma = 1.5 / PER_SIGMA
    image = expected_frame((21, 21), [[10.3, 9.8]], [1.0], 1.5, 0.0, None)
    edges = np.arange(22) - 0.5
    px = np.diff(stats.norm.cdf(edges, 10.3, sigma))
    py = np.diff(stats.norm.cdf(edges, 9.8, sigma))
    assert image == pytest.approx(np.outer(py, px), abs=2e-5)


def test_the_halo_holds_its_fraction() -> None:
    tail = Tail(fraction=0.2, radius_px=2.0, power=2.0, reach_px=60.0)
    image = expected_frame((141, 141), [[70.0, 70.0]], [1e5], 2.0, 0.0, None, tail)
    # A Moffat profile of power 2 cut at r holds 1 − 1/(1 + r²/radius²).
    expected = 1e5 * (0.8 + 0.2 * (1 - 1 / (1 + 30.0**2)))
    assert float(image.sum(dtype=np.float64)) == pytest.approx(expected, rel=0.01)
    assert image[70, 95] > 0.0


def test_background_is_level_slope_and_bump() -> None:
    ground = Background(100.0, (0.1, -0.2), 50.0, 30.0, (10.0, 20.0))
    image = ground.image((41, 61))
    assert image[20, 30] == pytest.approx(100 + 50 * 0.5 ** ((20 / 15) ** 2), rel=1e-5)
    xy = np.array([[3.0, 7.0], [60.0, 0.0]])
    assert ground.at(xy, (41, 61)) == pytest.approx([image[7, 3], image[0, 60]], rel=1e-5)
    assert Background(1.0, (-1.0, 0.0)).image((8, 50)).min() == 0.0


@pytest.mark.parametrize("level", [0.05, 1.0, 12.0, 29.9, 30.1, 100.0, 1000.0])
def test_noise_is_poisson(level: float) -> None:
    expected = np.full((400, 500), level, np.float32)
    counts = add_noise(expected, np.random.default_rng(3), dtype=np.int32).ravel()
    n = counts.size
    assert counts.mean() == pytest.approx(level, abs=5 * math.sqrt(level / n))
    spread = math.sqrt((level + 2 * level**2) / n)
    assert counts.var() == pytest.approx(level, abs=5 * spread)
    assert stats.skew(counts) == pytest.approx(
        1 / math.sqrt(level), abs=6 * math.sqrt(6 / n) * (1 + 1 / level)
    )
    # The whole law: chi square over bins with enough counts.
    edges = np.unique(stats.poisson.ppf(np.linspace(0.01, 0.99, 15), level)).astype(int)
    seen = np.histogram(counts, np.concatenate([[-1], edges, [10**9]]) + 0.5)[0]
    probability = np.diff(np.concatenate([[0.0], stats.poisson.cdf(edges, level), [1.0]]))
    use = probability * n > 5
    chi2 = float((((seen - probability * n) ** 2) / (probability * n))[use].sum())
    assert stats.chi2.sf(chi2, max(int(use.sum()) - 1, 1)) > 1e-4


@pytest.mark.parametrize("level", [4.0, 400.0])
def test_gain_and_read_out_noise_make_the_variance(level: float) -> None:
    expected = np.full((400, 500), level, np.float32)
    rng = np.random.default_rng(5)
    counts = add_noise(expected, rng, gain=0.5, readout_noise=3.0, offset=100.0, dtype=np.float64)
    assert counts.mean() == pytest.approx(100.0 + level, abs=0.1)
    assert counts.var() == pytest.approx(0.5 * level + 9.0, rel=0.03)


def test_values_are_cut_at_saturation_and_fit_the_type() -> None:
    rng = np.random.default_rng(1)
    spot = {"xy_px": [[20.0, 20.0]], "intensity": [1e7], "fwhm_px": 3.0}
    assert render_frame((40, 40), **spot, rng=rng, dtype=np.uint8).max() == 255
    assert render_frame((40, 40), **spot, rng=rng, saturation=4095).max() == 4095
    assert render_frame((40, 40), **spot, rng=rng).dtype == np.uint16
    huge = add_noise(np.full((9, 9), 1e12, np.float32), rng, dtype=np.uint32)
    assert huge.min() > 4.29e9


def test_one_seed_makes_one_frame() -> None:
    xy = np.array([[20.0, 20.0], [33.0, 10.0]])
    frames = [
        render_frame((50, 50), xy, [500, 900], [[2.0, 1.5], [3.0, 2.0]], np.random.default_rng(8))
        for _ in range(2)
    ]
    assert np.array_equal(*frames)


def test_signal_to_noise_is_that_of_the_filter() -> None:
    # The noise of the response on blank frames, and the response of a spot, by another program.
    level, readout = 40.0, 3.0
    rng = np.random.default_rng(2)
    blank = add_noise(np.full((600, 600), level, np.float32), rng, readout_noise=readout, dtype=np.float64)
    response = ndimage.convolve(blank - level, KERNEL_2D)
    assert response.std() == pytest.approx(KERNEL_NORM * math.sqrt(level + readout**2), rel=0.02)
    xy = np.array([[20.37, 20.81]])
    alone = expected_frame((41, 41), xy, [700.0], [[2.6, 1.7]], 33.0, None)
    by_hand = ndimage.convolve(alone.astype(float), KERNEL_2D).max() / (KERNEL_NORM * 7.0)
    snr = spot_snr(xy, [700.0], [[2.6, 1.7]], level, tilt_deg=33.0, readout_noise=readout)
    assert snr == pytest.approx([by_hand], rel=1e-4)
    height = spot_height_sigma(xy, [700.0], [[2.6, 1.7]], level, tilt_deg=33.0, readout_noise=readout)
    assert height == pytest.approx([alone.max() / 7.0], rel=1e-4)
    assert spot_snr(np.zeros((0, 2)), [], 2.0, 1.0).shape == (0,)


def test_the_limit_grows_where_counts_are_few() -> None:
    limits = least_snr(5.0, [1e6, 10.0, 0.1])
    assert limits[0] == pytest.approx(5.0, abs=0.01)
    assert limits[0] < limits[1] < limits[2]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: expected_frame((9, 9), [[1, 1]], [1], 0.0), "full widths"),
        (lambda: expected_frame((9, 9), [[1, 1]], [1], np.nan), "full widths"),
        (lambda: Tail(fraction=1.5), "fraction"),
        (lambda: add_noise(np.ones((9, 9), np.float32), np.random.default_rng(0), gain=0.0), "gain"),
    ],
)
def test_nonsense_is_refused_by_name(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
