"""Peak search: time and quality on rendered frames, figures beside those to reach.

Run as ``python -m bench.peaks``; one thread, seeds printed. Spots lie anywhere on the frame,
also across its border and on top of each other; intensities are log-uniform, so a tenth of them
lies near the threshold. A true spot counts when its expected signal-to-noise ratio in the
search's own filter reaches the threshold (`render.least_snr`); it is found when a peak lies
within 1 px and half its width, each peak serving one spot. A peak is false when no rendered
spot of 2 sigma or more lies within 2 px and its width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.laue.peaks import OVERLAP, SATURATED, PeakSearch, PeakTable, find_peaks
from pipelines.laue.render import Background, Tail, least_snr, render_frame, spot_snr

FloatArray = npt.NDArray[np.float64]
SHAPE = (2048, 2048)


@dataclass(frozen=True)
class Case:
    """A kind of frame; spot widths between two limits, intensities between two sigmas."""

    name: str
    spots: int
    fwhm_px: tuple[float, float] = (1.5, 3.0)
    snr: tuple[float, float] = (3.0, 1000.0)
    background: Background = Background(50.0, (0.01, 0.005), 60.0, 1200.0)
    readout_noise: float = 0.0
    offset: float = 0.0
    tail: Tail | None = None
    saturation: float | None = None


@dataclass(frozen=True)
class Truth:
    """What was rendered into a frame, and the frame."""

    image: npt.NDArray[np.uint16]
    xy_px: FloatArray
    intensity: FloatArray
    fwhm_px: FloatArray
    snr: FloatArray
    limit: FloatArray


@dataclass
class Score:
    """Counts over frames."""

    frames: int = 0
    true: int = 0
    found: int = 0
    apart: int = 0
    apart_found: int = 0
    peaks: int = 0
    false: int = 0
    errors: tuple[float, ...] = ()
    pulls: tuple[float, ...] = ()
    overlapped: int = 0
    saturated: int = 0


def make(case: Case, seed: int, params: PeakSearch) -> Truth:
    """Render a frame of a case."""
    rng = np.random.default_rng(seed)
    n = case.spots
    xy = rng.uniform(-0.5, np.array(SHAPE[::-1]) - 0.5, (n, 2))
    fwhm = np.sort(rng.uniform(*case.fwhm_px, (n, 2)), axis=1)[:, ::-1]
    tilt = rng.uniform(-90, 90, n)
    ground = case.background.at(xy, SHAPE)
    snr = np.exp(rng.uniform(*np.log(case.snr), n))
    intensity = snr / spot_snr(xy, 1.0, fwhm, ground, tilt_deg=tilt, readout_noise=case.readout_noise)
    image = render_frame(
        SHAPE, xy, intensity, fwhm, rng, tilt_deg=tilt, background=case.background, psf_tail=case.tail,
        readout_noise=case.readout_noise, offset=case.offset, saturation=case.saturation,
    )  # fmt: skip
    limit = least_snr(params.threshold_sigma, ground, readout_noise=case.readout_noise)
    return Truth(image, xy, intensity, fwhm, snr, limit)


def pairs(truth: FloatArray, found: FloatArray, reach_px: FloatArray) -> npt.NDArray[np.intp]:
    """Return for each true spot the peak that serves it, −1 for none; nearest pairs first."""
    if len(truth) == 0 or len(found) == 0:
        return np.full(len(truth), -1, np.intp)
    apart = np.linalg.norm(truth[:, None] - found[None], axis=2)
    i, j = np.nonzero(apart <= reach_px[:, None])
    order = np.argsort(apart[i, j])
    partner, taken = np.full(len(truth), -1, np.intp), np.zeros(len(found), np.bool_)
    for k in order:
        if partner[i[k]] < 0 and not taken[j[k]]:
            partner[i[k]] = j[k]
            taken[j[k]] = True
    return partner


def add(score: Score, truth: Truth, table: PeakTable, saturation: float | None) -> None:
    """Add a frame to the score."""
    partner = pairs(truth.xy_px, table.xy_px, np.maximum(1.0, 0.5 * truth.fwhm_px[:, 0]))
    counts = truth.snr >= truth.limit
    apart = np.linalg.norm(truth.xy_px[:, None] - truth.xy_px[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    # No spot of comparable or greater strength so near that two maxima cannot be told apart.
    rival = truth.intensity[None] > 0.1 * truth.intensity[:, None]
    near = 1.5 * np.maximum(truth.fwhm_px[:, 0][:, None], truth.fwhm_px[:, 0][None])
    alone = ~((apart < near) & rival).any(axis=1)
    score.frames += 1
    score.true += int(counts.sum())
    score.found += int((counts & (partner >= 0)).sum())
    score.apart += int((counts & alone).sum())
    score.apart_found += int((counts & alone & (partner >= 0)).sum())
    score.peaks += len(table)
    visible = truth.snr >= 2.0
    distance = np.linalg.norm(truth.xy_px[visible][None] - table.xy_px[:, None], axis=2)
    within = distance <= np.maximum(2.0, truth.fwhm_px[visible, 0])[None]
    score.false += int((~within.any(axis=1)).sum())
    hit = counts & (partner >= 0)
    delta = table.xy_px[partner[hit]] - truth.xy_px[hit]
    score.errors += tuple(np.linalg.norm(delta, axis=1))
    good = (table.flags[partner[hit]] & (SATURATED | OVERLAP)) == 0
    score.pulls += tuple((delta[good] / table.sigma_px[partner[hit]][good, None]).ravel())
    score.overlapped += int((table.flags & OVERLAP > 0).sum())
    score.saturated += int((table.flags & SATURATED > 0).sum())


def milliseconds(image: npt.NDArray[np.uint16], params: PeakSearch, repeats: int = 20) -> tuple[float, float]:
    """Return the median wall time and CPU time of a search."""
    wall, cpu = [], []
    for _ in range(repeats):
        t0, c0 = time.perf_counter(), time.thread_time()
        find_peaks(image, params)
        wall.append(time.perf_counter() - t0)
        cpu.append(time.thread_time() - c0)
    return 1e3 * float(np.median(wall)), 1e3 * float(np.median(cpu))


CASES = (
    Case("30 spots", 30),
    Case("130 spots", 130),
    Case("200 spots", 200),
    Case("600 spots", 600),
    Case("1600 spots", 1600),
    Case("130 spots, 1.2-1.5 px", 130, (1.2, 1.5)),
    Case("130 spots, 3-4 px", 130, (3.0, 4.0)),
    Case("130 spots, background 2", 130, background=Background(2.0)),
    Case("130 spots, background 1000, read-out 3", 130, background=Background(1000.0), readout_noise=3.0),
    Case("130 spots, pedestal 1000, read-out 3", 130, background=Background(10.0), readout_noise=3.0, offset=1000.0),
    Case("130 spots with halo", 130, tail=Tail(0.1, 4.0)),
    Case("130 spots, half of the bright ones saturated", 130, saturation=1500.0),
)


def main(frames: int = 8, cases: tuple[Case, ...] = CASES) -> None:
    """Print time and quality of every case."""
    params = PeakSearch()
    print("what | asked | measured | peer")
    for case in cases:
        score = Score()
        truth = make(case, 1, params)
        for seed in range(1, frames + 1):
            truth = make(case, seed, params)
            add(score, truth, find_peaks(truth.image, params), case.saturation)
        wall, cpu = milliseconds(truth.image, params)
        print(f"{case.name}: seeds 1-{frames}, {case.fwhm_px[0]}-{case.fwhm_px[1]} px, snr {case.snr}")
        print(f"  time, ms | <= 25 | {wall:.1f} wall, {cpu:.1f} CPU | LaueTools 550-1040")
        print(f"  found above 5 sigma | >= 98 % | {100 * score.found / score.true:.2f} % of {score.true} |")
        print(f"  found, not on another spot | | {100 * score.apart_found / score.apart:.2f} % of {score.apart} |")
        print(f"  false | <= 1 % | {100 * score.false / score.peaks:.2f} % of {score.peaks} |")
        print(f"  position error, median, px | <= 0.1 | {np.median(score.errors):.3f} |")
        pull = 1.4826 * np.median(np.abs(score.pulls)) if score.pulls else np.nan
        print(f"  error / stated sigma | about 1 | {pull:.2f} |")
        print(f"  flagged overlap, saturated | | {score.overlapped}, {score.saturated} |")


if __name__ == "__main__":
    main()
