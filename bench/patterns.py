"""The peak lists of the benchmarks: the same ones for this project and for its peers.

Pattern number i of a condition depends on the seed, the condition and i alone, so that five of
them are the first five of a hundred.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from bench.report import Report
from pipelines import rotations
from pipelines.laue.crystal import load_material
from pipelines.laue.forward import Pattern, random_positions, simulate_pattern
from pipelines.laue.geometry import Calibration, DetectorArea, two_theta_chi_deg
from pipelines.laue.lauetools_files import PeakFile, write_cor
from pipelines.laue.reflections import ReflectionList, build_reflections

BAND_KEV = (5.0, 22.0)
GEOMETRY_C = Calibration.from_lauetools(
    (79.612, 977.81, 932.17, 0.477, 0.447), pixel_size_mm=0.0734, shape=(2018, 2016), label="sCMOS"
)
"""A real calibration of an sCMOS camera, the geometry of all rows unless they say otherwise."""


@dataclass(frozen=True)
class Condition:
    """What kind of peak list.

    Attributes
    ----------
    material : str
    grains : int
        Crystals of uniformly random orientation and equal volume; 0 for random peaks alone.
    noise_px : float
        Standard deviation of a position, in x and in y.
    missing : float
        Share of each crystal's spots that is lost, four in five of them among its weakest 40 %.
    spurious : float
        Random peaks for each real one that is left.
    peaks : int
        Number of random peaks where there are no grains.
    """

    material: str
    grains: int
    noise_px: float = 0.2
    missing: float = 0.2
    spurious: float = 0.1
    peaks: int = 0

    def __str__(self) -> str:
        """Return what goes into the column of conditions."""
        if self.grains == 0:
            return f"{self.peaks} random peaks"
        return (
            f"{self.material} {self.grains} grain{'s' if self.grains > 1 else ''}, {self.noise_px} px noise,"
            f" {100 * self.missing:.0f} % missing, {100 * self.spurious:.0f} % spurious"
        )


@cache
def reflections(material: str) -> ReflectionList:
    """Return the reflections of a built-in material in the band of the benchmarks."""
    return build_reflections(load_material(material), BAND_KEV)


def pattern(
    report: Report, condition: Condition, number: int, calibration: Calibration = GEOMETRY_C
) -> Pattern:
    """Return pattern ``number`` of a condition."""
    rng = report.rng("pattern", *map(str, vars(condition).values()), number)
    area = DetectorArea.of(calibration)
    if condition.grains == 0:
        return _random_peaks(condition.peaks, area, rng)
    listed = reflections(condition.material)
    turns = rotations.to_matrix(rotations.random_rotations(condition.grains, rng))
    return simulate_pattern(
        [listed] * condition.grains,
        turns @ listed.material.B0,
        calibration,
        area,
        rng,
        noise_px=condition.noise_px,
        missing_fraction=condition.missing,
        spurious_fraction=condition.spurious,
        energy_keV=BAND_KEV,
    )


def write_peaks(path: Path, peaks: Pattern, calibration: Calibration = GEOMETRY_C) -> None:
    """Write a peak list as a LaueTools .cor file, for a peer."""
    two_theta, chi = two_theta_chi_deg(calibration.directions(peaks.xy_px))
    path.parent.mkdir(parents=True, exist_ok=True)
    # The peers sort and cut by intensity: give them a range as a camera has it.
    intensity = 60000 * peaks.intensity / peaks.intensity.max()
    write_cor(path, PeakFile(peaks.xy_px, intensity, two_theta, chi), calibration)


def _random_peaks(n: int, area: DetectorArea, rng: np.random.Generator) -> Pattern:
    order = np.sort(rng.lognormal(0.0, 1.5, n))[::-1]
    return Pattern(
        xy_px=random_positions(n, area, rng),
        intensity=order,
        crystal=np.full(n, -1, dtype=np.int32),
        hkl=np.zeros((n, 3), dtype=np.int16),
        ubs=np.empty((0, 3, 3)),
        materials=(),
        spots_expected=np.empty(0, dtype=np.int32),
    )
