"""Peak search: time, and quality on rendered frames.

Spots lie anywhere on the frame, also at its border and on top of each other; intensities are
log-uniform over 2.5 decades, from below the threshold. "Above 5 sigma" is told twice: by the
expected height over the noise of a pixel, and, harder, by the expected signal-to-noise ratio in
the search's own filter, where noise alone passes 5 sigma two or three times a frame. A spot is
found when a peak lies within 1 px or half its width, each peak serving one spot. A peak is false
when no rendered spot of 2 sigma or more lies within 2 px or its width.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bench.report import Report, repetitions_s
from pipelines.laue.peaks import OVERLAP, SATURATED, PeakSearch, PeakTable, find_peaks
from pipelines.laue.render import (
    Background,
    Tail,
    least_snr,
    render_frame,
    spot_height_sigma,
    spot_snr,
)

FloatArray = npt.NDArray[np.float64]
SHAPE = (2048, 2048)
AIR = Background(50.0, (0.01, 0.005), 60.0, 1200.0)
"""A level of 50, a slope, and 60 more in the bump of air scatter."""


@dataclass(frozen=True)
class Case:
    """A kind of frame: number of spots, limits of their width and signal-to-noise ratio, background."""

    name: str
    spots: int
    fwhm_px: tuple[float, float] = (1.5, 3.0)
    snr: tuple[float, float] = (3.0, 1000.0)
    background: Background = AIR
    readout_noise: float = 0.0
    offset: float = 0.0
    tail: Tail | None = None
    saturation: float | None = None
    gates: bool = False
    """Whether the figures to reach belong to this case; otherwise the rows inform."""


CASES = (
    Case("130 spots", 130, gates=True),
    Case("200 spots", 200, gates=True),
    Case("30 spots", 30),
    Case("600 spots", 600),
    Case("1600 spots", 1600),
    Case("130 spots of 1.2-1.5 px", 130, (1.2, 1.5)),
    Case("130 spots of 3-4 px", 130, (3.0, 4.0)),
    Case("130 spots, background 2", 130, background=Background(2.0)),
    Case("130 spots, background 1000, read-out 3", 130, background=Background(1000.0), readout_noise=3.0),
    Case("130 spots, pedestal 1000", 130, background=Background(10.0), readout_noise=3.0, offset=1000.0),
    Case("130 spots with a halo of 10 %", 130, tail=Tail(0.1, 4.0)),
    Case("130 spots, saturated at 1000", 130, saturation=1000.0),
)


@dataclass(frozen=True)
class Truth:
    """What was rendered into a frame, and the frame; `snr`, `height` in sigma, `limit` for `snr`."""

    image: npt.NDArray[np.uint16]
    xy_px: FloatArray
    intensity: FloatArray
    fwhm_px: FloatArray
    snr: FloatArray
    height: FloatArray
    limit: FloatArray


@dataclass
class Score:
    """Counts over frames: (spots, found) by height, by response, by height and apart from others."""

    by_height: list[int] = field(default_factory=lambda: [0, 0])
    by_response: list[int] = field(default_factory=lambda: [0, 0])
    apart: list[int] = field(default_factory=lambda: [0, 0])
    peaks: int = 0
    false: int = 0
    errors_px: list[float] = field(default_factory=list)
    pulls: list[float] = field(default_factory=list)
    overlapping: int = 0
    saturated: int = 0


def make(case: Case, rng: np.random.Generator) -> Truth:
    """Render a frame of a case."""
    n = case.spots
    xy = rng.random((n, 2)) * np.array(SHAPE[::-1]) - 0.5
    fwhm = np.sort(rng.uniform(*case.fwhm_px, (n, 2)), axis=1)[:, ::-1]
    tilt = rng.uniform(-90, 90, n)
    ground = case.background.at(xy, SHAPE)
    low, high = np.log(case.snr)
    snr = np.exp(rng.uniform(low, high, n))
    noise = case.readout_noise
    intensity = snr / spot_snr(xy, 1.0, fwhm, ground, tilt_deg=tilt, readout_noise=noise)
    height = spot_height_sigma(xy, intensity, fwhm, ground, tilt_deg=tilt, readout_noise=noise)
    image = render_frame(
        SHAPE, xy, intensity, fwhm, rng, tilt_deg=tilt, background=case.background, psf_tail=case.tail,
        readout_noise=noise, offset=case.offset, saturation=case.saturation,
    )  # fmt: skip
    return Truth(image, xy, intensity, fwhm, snr, height, least_snr(5.0, ground, readout_noise=noise))


def partners(truth: FloatArray, found: FloatArray, reach_px: FloatArray) -> npt.NDArray[np.intp]:
    """Return for each true spot the peak that serves it, −1 for none; nearest pairs first."""
    partner, taken = np.full(len(truth), -1, np.intp), np.zeros(len(found), np.bool_)
    apart = np.linalg.norm(truth[:, None] - found[None], axis=2)
    i, j = np.nonzero(apart <= reach_px[:, None])
    for k in np.argsort(apart[i, j]):
        if partner[i[k]] < 0 and not taken[j[k]]:
            partner[i[k]] = j[k]
            taken[j[k]] = True
    return partner


def add(score: Score, truth: Truth, table: PeakTable) -> None:
    """Add a frame to the score."""
    partner = partners(truth.xy_px, table.xy_px, np.maximum(1.0, 0.5 * truth.fwhm_px[:, 0]))
    found = partner >= 0
    apart = np.linalg.norm(truth.xy_px[:, None] - truth.xy_px[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    # No spot of a tenth of its strength or more within 8 px: the windows of the fit do not meet.
    alone = ~((apart < 8.0) & (truth.intensity[None] > 0.1 * truth.intensity[:, None])).any(axis=1)
    high = truth.height >= 5.0
    for count, spots in (
        (score.by_height, high),
        (score.by_response, truth.snr >= truth.limit),
        (score.apart, high & alone),
    ):
        count[0] += int(spots.sum())
        count[1] += int((spots & found).sum())
    near = np.linalg.norm(truth.xy_px[None] - table.xy_px[:, None], axis=2)
    explained = (near <= np.maximum(2.0, truth.fwhm_px[:, 0])[None]) & (truth.snr >= 2.0)[None]
    score.peaks += len(table)
    score.false += int((~explained.any(axis=1)).sum())
    hit = high & found
    delta = table.xy_px[partner[hit]] - truth.xy_px[hit]
    score.errors_px += np.linalg.norm(delta, axis=1).tolist()
    flags = table.flags[partner[hit]]
    plain = (flags & (SATURATED | OVERLAP)) == 0
    score.pulls += (delta[plain] / table.sigma_px[partner[hit]][plain, None]).ravel().tolist()
    score.overlapping += int(np.count_nonzero(table.flags & OVERLAP))
    score.saturated += int(np.count_nonzero(table.flags & SATURATED))


def rows(report: Report) -> None:
    """Add the rows of every case, and what it takes to render a frame for simulation."""
    times = repetitions_s(
        lambda: make(CASES[0], report.rng("peaks", "render")), repeats=report.scale(full=10, quick=3)
    )
    report.add(
        f"render a frame, {CASES[0].name}",
        1e3 * statistics.median(times),
        "ms",
        at_most=200.0,
        conditions=f"median of {len(times)}, 2048x2048 uint16 with Poisson noise, seed {report.seed}",
        data={"times_s": times},
    )
    for case in CASES:
        _case(report, case)


def _case(report: Report, case: Case) -> None:
    params = PeakSearch(saturation=case.saturation)
    frames, score = report.scale(full=10, quick=4), Score()
    truth = make(case, report.rng("peaks", case.name, 0))
    add(score, truth, find_peaks(truth.image, params))
    cpu_start = time.process_time()
    times = repetitions_s(lambda: find_peaks(truth.image, params), repeats=report.scale(full=20, quick=5))
    cpu_ms = 1e3 * (time.process_time() - cpu_start) / (len(times) + 2)  # two to warm up
    for number in range(1, frames):
        other = make(case, report.rng("peaks", case.name, number))
        add(score, other, find_peaks(other.image, params))
    size = f"{case.fwhm_px[0]:g}-{case.fwhm_px[1]:g} px wide"
    conditions = f"{frames} frames 2048x2048 uint16, {size}, seed {report.seed}"

    def asked(figure: float) -> float | None:
        return figure if case.gates else None

    report.add(
        f"peak search with fit, {case.name}",
        1e3 * statistics.median(times),
        "ms",
        at_most=asked(25.0),
        peer=report.peer("lauetools.peaks.time", published="550-1040 ms") if case.gates else "",
        conditions=f"median of {len(times)}, processor time {cpu_ms:.1f} ms, {size}, seed {report.seed}",
        data={"times_s": times},
    )
    for what, (spots, found), least in (
        ("found, 5 sigma high or more", score.by_height, asked(98.0)),
        ("found, those with no other within 8 px", score.apart, None),
        ("found, 5 sigma or more in the filter", score.by_response, None),
    ):
        report.add(
            f"{what}, {case.name}",
            100.0 * found / max(spots, 1),
            "%",
            at_least=least,
            conditions=conditions,
            data={"spots": spots, "found": found},
        )
    report.add(
        f"false, {case.name}",
        100.0 * score.false / max(score.peaks, 1),
        "%",
        at_most=asked(1.0),
        conditions=conditions,
        data={"peaks": score.peaks, "false": score.false},
    )
    report.add(
        f"position error, median, {case.name}",
        float(np.median(score.errors_px)),
        "px",
        at_most=asked(0.1),
        conditions=conditions,
        data={"percentiles_50_90_99_px": np.percentile(score.errors_px, [50, 90, 99]).tolist()},
    )
    pull = 1.4826 * float(np.median(np.abs(score.pulls))) if score.pulls else float("nan")
    report.add(
        f"position error over its stated sigma, {case.name}",
        pull,
        conditions=f"1.4826 MAD, {len(score.pulls)} coordinates, overlapping and saturated left out",
    )
    report.add(
        f"flagged overlapping, saturated, {case.name}",
        f"{score.overlapping}, {score.saturated} of {score.peaks}",
        conditions=conditions,
    )
