"""The peak search against rendered truth, bad frames and published peak lists."""

from __future__ import annotations

import gzip
import io
import time
from pathlib import Path
from typing import Any

import fabio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.frame import BadFrame
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.peaks import (
    EDGE,
    FIT_FAILED,
    OVERLAP,
    SATURATED,
    PeakSearch,
    PeakTable,
    background_map,
    find_peaks,
)
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

TYPES = (np.uint8, np.uint16, np.uint32, np.int16, np.int32, np.float32, np.float64)


def same(a: PeakTable, b: PeakTable) -> bool:
    names = (
        "xy_px",
        "intensity",
        "amplitude",
        "background",
        "fwhm_px",
        "tilt_deg",
        "sigma_px",
        "snr",
        "flags",
    )
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def nearest(truth: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each true spot to the nearest peak, and the peak's row."""
    if len(found) == 0:
        return np.full(len(truth), np.inf), np.zeros(len(truth), np.intp)
    apart = np.linalg.norm(truth[:, None] - found[None], axis=2)
    return apart.min(axis=1), apart.argmin(axis=1)


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


# ---------------------------------------------------------------- quality


GROUNDS = {
    "air": (Background(50.0, (0.02, 0.01), 60.0, 600.0), 0.0, 0.0, None),
    "few counts": (Background(2.0), 0.0, 0.0, None),
    "strong background, read-out": (Background(1000.0, (0.1, 0.3)), 5.0, 0.0, None),
    "pedestal": (Background(10.0), 3.0, 1000.0, None),
    "halo": (Background(50.0), 0.0, 0.0, Tail(0.1, 4.0)),
}


@pytest.mark.parametrize("kind", GROUNDS)
def test_spots_above_five_sigma_are_found_and_nothing_else(kind: str) -> None:
    ground, readout, offset, tail = GROUNDS[kind]
    shape, true, found, peaks, false = (1024, 1024), 0, 0, 0, 0
    errors, pulls = [], []
    for seed in range(4):
        rng = np.random.default_rng([seed, 77])
        n = 90
        xy = rng.uniform(-0.5, 1023.5, (n, 2))
        fwhm = np.sort(rng.uniform(1.5, 3.0, (n, 2)), axis=1)[:, ::-1]
        level = ground.at(xy, shape)
        snr = np.exp(rng.uniform(np.log(3), np.log(1000), n))
        intensity = snr / spot_snr(xy, 1.0, fwhm, level, readout_noise=readout)
        image = render_frame(
            shape,
            xy,
            intensity,
            fwhm,
            rng,
            background=ground,
            psf_tail=tail,
            readout_noise=readout,
            offset=offset,
        )
        table = find_peaks(image)
        distance, row = nearest(xy, table.xy_px)
        high = spot_height_sigma(xy, intensity, fwhm, level, readout_noise=readout) >= 5
        hit = high & (distance < 1.0)
        true += int(high.sum())
        found += int(hit.sum())
        peaks += len(table)
        false += int((nearest(table.xy_px, xy[snr > 2])[0] > 3.0).sum())
        errors += distance[hit].tolist()
        plain = hit & (table.flags[row] == 0)
        pulls += ((table.xy_px[row] - xy)[plain] / table.sigma_px[row][plain, None]).ravel().tolist()
    assert found >= 0.98 * true
    assert false <= 0.01 * peaks
    assert np.median(errors) <= 0.1
    # The stated uncertainty is right: the spread of error/sigma is 1.
    assert 1.4826 * np.median(np.abs(pulls)) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("level", [0.02, 0.3, 3.0, 30.0, 3000.0])
def test_noise_alone_gives_no_more_peaks_than_its_sigma_allows(level: float) -> None:
    rng = np.random.default_rng(12)
    threshold, frames, size = 4.5, 4, 700
    n = sum(
        len(find_peaks(add_noise(np.full((size, size), level, np.float32), rng), PeakSearch(threshold)))
        for _ in range(frames)
    )
    # Maxima above u of Gaussian noise smoothed by s = 1 px: area (2π)^−3/2 / (2 s²) u exp(−u²/2).
    allowed = frames * size**2 * (2 * np.pi) ** -1.5 / 2 * threshold * np.exp(-(threshold**2) / 2)
    assert n <= allowed + 3 * np.sqrt(allowed)
    if level > 100:
        assert n >= 0.3 * allowed


def test_background_and_noise_are_measured() -> None:
    ground = Background(200.0, (0.2, -0.1), 150.0, 1000.0)
    image = render_frame((512, 512), np.zeros((0, 2)), [], 2.0, np.random.default_rng(0), background=ground)
    xy = np.random.default_rng(1).uniform(0, 511, (200, 2))
    level, response_noise, pixel_noise = background_map(image, PeakSearch()).at(xy).T
    truth = ground.at(xy, (512, 512))
    assert np.abs(level - truth).max() < 0.25 * np.sqrt(truth).max()
    assert pixel_noise == pytest.approx(np.sqrt(truth), rel=0.15)
    assert response_noise == pytest.approx(0.2734 * np.sqrt(truth), rel=0.15)


# ---------------------------------------------------------------- what must not be a peak


def blank(level: float = 60.0, shape: tuple[int, int] = (512, 512), seed: int = 3) -> np.ndarray:
    return add_noise(np.full(shape, level, np.float32), np.random.default_rng(seed))


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


def test_the_limit_of_the_search_is_where_half_of_the_spots_are_found() -> None:
    rng = np.random.default_rng(21)
    params = PeakSearch(5.0)
    y, x = np.mgrid[16:1008:24, 16:1008:24]
    xy = np.stack([x.ravel(), y.ravel()], axis=1) + rng.uniform(-0.5, 0.5, (x.size, 2))
    ground = Background(100.0)
    unit = spot_snr(xy, 1.0, 2.2, 100.0)
    limit = float(least_snr(5.0, 100.0))
    share = {}
    for factor in (0.7, 1.0, 1.4):
        image = expected_frame((1024, 1024), xy, factor * limit / unit, 2.2, 0.0, ground)
        table = find_peaks(add_noise(image, rng), params)
        share[factor] = float(np.mean(nearest(xy, table.xy_px)[0] < 1.5))
    assert share[0.7] < 0.12
    assert 0.4 < share[1.0] < 0.6
    assert share[1.4] > 0.95


# ---------------------------------------------------------------- published peak lists


def frame_of(folder: Path, name: str) -> np.ndarray:
    with fabio.open(str(folder / name)) as file:
        return np.array(file.data)


@pytest.mark.truth
def test_germanium_on_a_round_detector(truth_dir: Path) -> None:
    # Columns peak_X peak_Y ...; pixels count from 1.
    listed = np.loadtxt(truth_dir / "truth" / "Ge_blanc_0000_LT_5.dat", skiprows=1)[:, :2] - 1.0
    image = frame_of(truth_dir, "Ge_blanc_0000.mccd.gz")
    calibration = Calibration(70.775, 940.74, 1081.56, 0.63, -0.682, 0.079142, (2048, 2048), "MARCCD165")
    area = DetectorArea.of(calibration)
    for usable in (None, area.usable):
        table = find_peaks(image, usable=usable)
        distance = nearest(listed, table.xy_px)[0]
        assert np.mean(distance < 0.5) >= 0.98
        assert np.median(distance) < 0.1
        assert len(table) <= 1.15 * len(listed)
        assert area.contains(table.xy_px).all()


@pytest.mark.truth
def test_germanium_on_a_fibre_coupled_camera(truth_dir: Path) -> None:
    path = truth_dir / "truth" / "img_Ge_sCMOS_0000_181peaks.cor"
    listed = np.loadtxt(path, skiprows=1, comments="#")
    # Columns X, Y are 2, 3 (from 1); 13 and 14 are the list's own errors: five rows, on the streak
    # of the strongest spot and on the seam of the camera, are uncertain by 0.3 px or more.
    clear = np.hypot(listed[:, 13], listed[:, 14]) < 0.3
    assert np.count_nonzero(~clear) <= 6
    table = find_peaks(frame_of(truth_dir, "img_Ge_sCMOS_0000.tif.gz"))
    distance = nearest(listed[clear, 2:4] - 1.0, table.xy_px)[0]
    assert np.mean(distance < 0.5) >= 0.98
    assert np.median(distance) < 0.1


@pytest.mark.truth
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("nw1_0000.tif.gz", 74, 180), ("nw1_0001.tif.gz", 138, 320), ("HS17O_1_C_0000.tif.gz", 300, 700)],
)
def test_frames_without_a_list_give_sensible_tables(
    truth_dir: Path, name: str, least: int, most: int
) -> None:
    image = frame_of(truth_dir, name)
    table = find_peaks(image)
    assert least <= len(table) <= most
    assert not table.truncated
    rows, columns = image.shape
    assert (table.xy_px > -1).all()
    assert (table.xy_px < [columns, rows]).all()
    assert (table.intensity > 0).all()
    # Bright spots look like spots.
    bright = table.take(table.snr > 100)
    assert np.mean(bright.flags & FIT_FAILED > 0) < 0.1
    assert 1.5 < np.median(bright.fwhm_px[:, 1]) < 6.0


def test_a_gzipped_frame_opens_as_it_is(tmp_path: Path) -> None:
    image = render_frame((64, 64), [[30.0, 30.0]], 5000.0, 2.0, np.random.default_rng(0))
    raw = io.BytesIO()
    fabio.tifimage.TifImage(data=image).write(str(tmp_path / "a.tif"))
    raw.write(gzip.compress((tmp_path / "a.tif").read_bytes()))
    (tmp_path / "a.tif.gz").write_bytes(raw.getvalue())
    assert same(find_peaks(frame_of(tmp_path, "a.tif.gz")), find_peaks(image))
