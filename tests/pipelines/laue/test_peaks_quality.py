"""The peak search on many spots: what is found against rendered truth and published peak lists."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import fabio
import numpy as np
import pytest
from testkit.peaks import nearest, same

from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.peaks import FIT_FAILED, PeakSearch, background_map, find_peaks
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

# ---------------------------------------------------------------- rendered truth


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
