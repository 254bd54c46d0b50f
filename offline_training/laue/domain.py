"""What a network is trained over: the ranges that a bundle states, and random draws from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.laue.geometry import Calibration


@dataclass(frozen=True)
class GeometryRange:
    """Detectors and their positions around a calibration.

    Attributes
    ----------
    dd : float
        Relative half-width of the distance.
    centre_px, tilt_deg : float
        Half-widths of xcen and ycen, and of xbet and xgam.
    side : float
        Relative half-width of the detector's sides. It is drawn as the size of a pixel: what a network
        sees are angles, in which a large detector of few pixels is a small one of many.
    """

    dd: float = 0.15
    centre_px: float = 200.0
    tilt_deg: float = 3.0
    side: float = 0.1

    def draw(self, nominal: Calibration, rng: np.random.Generator) -> Calibration:
        """Return a calibration, uniform in the range."""
        u = rng.uniform(-1.0, 1.0, 6)
        return nominal.with_parameters(
            dd_mm=nominal.dd_mm * (1.0 + self.dd * u[0]),
            xcen_px=nominal.xcen_px + self.centre_px * u[1],
            ycen_px=nominal.ycen_px + self.centre_px * u[2],
            xbet_deg=nominal.xbet_deg + self.tilt_deg * u[3],
            xgam_deg=nominal.xgam_deg + self.tilt_deg * u[4],
            pixel_size_mm=nominal.pixel_size_mm * (1.0 + self.side * u[5]),
        )


@dataclass(frozen=True)
class PatternRange:
    """What patterns are like: every quantity is drawn anew for each pattern.

    Attributes
    ----------
    crystals : (int, int)
        Fewest and most.
    noise_px : (float, float)
        Standard deviation of a position.
    missing : (float, float)
        Share of a crystal's spots that is lost; four in five of them among its weakest 40 %.
    spurious : (float, float)
        Random peaks for each real one.
    log_volume : float
        Standard deviation of ln(volume) of the crystals of a pattern.
    strain : float
        Standard deviation of the strain components, at most; each crystal has its own.
    """

    crystals: tuple[int, int] = (1, 10)
    noise_px: tuple[float, float] = (0.05, 0.45)
    missing: tuple[float, float] = (0.0, 0.4)
    spurious: tuple[float, float] = (0.0, 0.3)
    log_volume: float = 0.7
    strain: float = 5e-4
