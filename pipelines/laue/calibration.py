"""Calibrate a detector from one frame of an unstrained crystal of a known lattice.

`calibration_search` finds the crystal although the start is wrong, `calibration_fit` refines detector and
orientation together; here the fit is brought to an end, judged, and refused where it would mislead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from grainwatch.config import did_you_mean
from pipelines.laue.calibration_fit import (
    CORE_VARIANCE,
    NAMES,
    PARAMETERS,
    WITH_DEPTH,
    FittedDetector,
    Geometry,
    Prior,
    covariance_of,
    gauss_newton,
    strain_left,
    vector_of,
    with_vector,
)
from pipelines.laue.calibration_search import Matches, Sky
from pipelines.laue.crystal import Material
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.indexing.parameters import IndexingParameters, Phase
from pipelines.laue.lauetools_files import FRAME_SHAPES
from pipelines.laue.reach import check_reach

FloatArray = npt.NDArray[np.float64]

NOMINAL_PIXEL_MM = {"sCMOS": 0.0734, "MARCCD165": 0.079142}
"""Pixel sizes of the cameras whose frames `FRAME_SHAPES` knows."""

DEEPEST_MM = 1.0
"""A fitted depth beyond is none."""

DEPTH_SIGMAS = 5.0
"""A depth of fewer standard deviations is not refined: it would cost the others precision."""

_ROUNDS = 30
_CONVERGED = 0.01  # a step below this share of every sigma
_SPOTS_FOR_DEPTH = 20
_BEYOND_DOUBT = -60.0
_ACCEPT = math.log(1e-5)
_MOST_SPOTS = 2000
_DETERMINED = 0.25
_BRIGHTEST = 40


class CalibrationError(ValueError):
    """A frame that yields no calibration; the message says why, and what to do."""


@dataclass(frozen=True)
class Spread:
    """How far off the start may be, as standard deviations: searched to about twice as far.

    The default is for a detector that was moved and put back; `UNKNOWN` for a camera of which only the
    approximate distance is known.
    """

    dd_mm: float = 1.5
    centre_px: float = 20.0
    tilt_deg: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in ("dd_mm", "centre_px", "tilt_deg"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"spread {name} {getattr(self, name)}: expected more than 0")

    def vector(self) -> FloatArray:
        """Return it in the order of `NAMES`."""
        return np.array([self.dd_mm, self.centre_px, self.centre_px, self.tilt_deg, self.tilt_deg])


UNKNOWN = Spread(dd_mm=6.0, centre_px=100.0, tilt_deg=1.0)


@dataclass(frozen=True)
class CalibrationSettings:
    """What a calibration may be told.

    Attributes
    ----------
    energy_keV : (float, float)
        Band of the beam on the sample.
    angle_tolerance_deg : float
        Of the votes; what a wrong start does to angles between scattering vectors.
    match_radius_px : float
        Of the last matching.
    min_spots : int
        Fewest spots of the crystal.
    max_residual_px : float
        A larger mean residual is refused: the crystal is strained, of another material, or the spots
        are smeared.
    max_dd_change, max_centre_px, max_tilt_deg : float
        Refused beyond: relative change of dd, shift of the centre, change of a tilt from the start.
    min_bright_share : float
        Share of the brightest 40 peaks that must be the crystal's.
    max_rival : float
        A second crystal with more than this share of the first one's spots is refused.
    depth : bool
        Refine the depth of penetration where the spots show one beyond doubt.
    """

    energy_keV: tuple[float, float] = (5.0, 22.0)
    angle_tolerance_deg: float = 0.6
    match_radius_px: float = 1.5
    min_spots: int = 15
    max_residual_px: float = 0.5
    max_dd_change: float = 0.2
    max_centre_px: float = 300.0
    max_tilt_deg: float = 5.0
    min_bright_share: float = 0.5
    max_rival: float = 0.4
    depth: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        low, high = self.energy_keV
        if not 0 < low < high < 200:
            raise ValueError(f"energy_keV: expected 0 < lowest < highest < 200, got {low:g} and {high:g}")
        if 2 * self.min_spots <= WITH_DEPTH:
            raise ValueError(f"min_spots {self.min_spots}: nine parameters need more than that")
        for name in ("angle_tolerance_deg", "match_radius_px", "max_residual_px", "max_rival"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: expected more than 0")


@dataclass(frozen=True, eq=False)
class CalibrationFit(FittedDetector):
    """A calibration, how sure it is, and what it rests on.

    Attributes
    ----------
    calibration, start : Calibration
    rotation : (3, 3) float64
        R: q = R B0 hkl, as LaueTools' orientation matrix.
    depth_mm : float
        Depth at 15 keV; 0 where it was not refined.
    covariance : (8, 8) or (9, 9) float64
        Of dd (mm), xcen, ycen (px), xbet, xgam (deg), ω (rad, lab), depth (mm).
    xy_px, residual_px : (n, 2) float64
        Measured positions, and measured minus computed, of the spots that were fitted.
    hkl : (n, 3) int64
        Lowest order in the band.
    energy_keV : (n,) float64
    spots : (n,) int64
        Their numbers in the peak list.
    matched, expected : int
        Spots within the match radius, and all that the crystal can put on the detector.
    mean_matched_px : float
        Mean residual of all matched spots, outliers included.
    log_false : float
        ln of the expected number of chance crystals as good.
    strain, strain_sigma : (3, 3) float64
        Deviatoric strain in the frame of B0 beside all that was fitted, and its standard deviations.
    unstrained_probability : float
        Of a crystal without strain to look as strained; small, the calibration is that of a strained one.
    rival_spots : int
        Spots of the strongest other crystal of the material among the rest; 0 without one.
    """

    calibration: Calibration
    start: Calibration
    rotation: FloatArray
    depth_mm: float
    covariance: FloatArray = field(repr=False)
    xy_px: FloatArray = field(repr=False)
    residual_px: FloatArray = field(repr=False)
    hkl: npt.NDArray[np.int64] = field(repr=False)
    energy_keV: FloatArray = field(repr=False)
    spots: npt.NDArray[np.int64] = field(repr=False)
    matched: int
    expected: int
    mean_matched_px: float
    log_false: float
    strain: FloatArray = field(repr=False)
    strain_sigma: FloatArray = field(repr=False)
    unstrained_probability: float
    rival_spots: int

    def correlation(self) -> FloatArray:
        """Return the correlations of the calibration's five parameters, (5, 5)."""
        return np.asarray(self.covariance[:5, :5] / np.outer(self.sigma, self.sigma))

    def correlated(self, least: float = 0.9) -> list[tuple[str, str, float]]:
        """Return the pairs of parameters correlated by at least so much, the strongest first."""
        rho = self.correlation()
        pairs = [(NAMES[i], NAMES[j], float(rho[i, j])) for i, j in itertools.combinations(range(5), 2)]
        return sorted((p for p in pairs if abs(p[2]) >= least), key=lambda p: -abs(p[2]))


def nominal_calibration(label: str, dd_mm: float = 75.0) -> Calibration:
    """Return what is known of a camera before any calibration: centre in the middle, no tilt.

    Raises
    ------
    ValueError
        If the camera is not known.
    """
    if label not in FRAME_SHAPES or label not in NOMINAL_PIXEL_MM:
        known = ", ".join(sorted(NOMINAL_PIXEL_MM))
        meant = did_you_mean(label, NOMINAL_PIXEL_MM) or ";"
        raise ValueError(
            f"camera {label!r} is unknown{meant} known: {known}; or give a calibration to start from"
        )
    rows, columns = FRAME_SHAPES[label]
    centre = ((columns - 1) / 2, (rows - 1) / 2)
    return Calibration(dd_mm, *centre, 0.0, 0.0, NOMINAL_PIXEL_MM[label], (rows, columns), label)


class Calibrator:
    """Calibrates one detector from frames of one material. Keeps nothing between frames.

    Parameters
    ----------
    material : Material
        Its cell is taken for exact; the crystal for free of deviatoric strain.
    start : Calibration
    area : DetectorArea, optional
        The camera's outline by default.
    settings : CalibrationSettings, optional
    spread : Spread, optional
        How far off the start may be.

    Raises
    ------
    ValueError
        If the material cannot show enough spots on this detector in this band.
    """

    def __init__(
        self,
        material: Material,
        start: Calibration,
        area: DetectorArea | None = None,
        settings: CalibrationSettings | None = None,
        spread: Spread | None = None,
    ) -> None:
        self.material = material
        self.start = start
        self.area = area or DetectorArea.of(start)
        self.settings = settings or CalibrationSettings()
        self.spread = spread or Spread()
        self._phase = Phase.prepare(material, start, self.area, self.settings.energy_keV)
        check_reach(self._phase.scene.reflections, start, self.area, self.settings.min_spots)

    def calibrate(self, xy_px: npt.ArrayLike) -> CalibrationFit:
        """Find the crystal and refine detector and orientation.

        Parameters
        ----------
        xy_px : (n, 2) array
            Peak positions from 0, x is the column, the brightest first.

        Raises
        ------
        CalibrationError
            If the frame does not yield a calibration to rely on.
        """
        s = self.settings
        xy = np.asarray(xy_px, dtype=np.float64).reshape(-1, 2)[:_MOST_SPOTS]
        if not np.all(np.isfinite(xy)):
            raise CalibrationError("peak positions hold values that are not numbers")
        if len(xy) < s.min_spots:
            raise CalibrationError(
                f"{len(xy)} peaks are too few, at least {s.min_spots} of one crystal are needed: expose"
                " longer, lower the threshold, or check that the sample is in the beam"
            )
        sky = Sky(self._phase, xy)
        found = self._search(sky)
        geometry, used = self._converge(sky, found, with_depth=False)
        if s.depth and len(used) >= _SPOTS_FOR_DEPTH:
            geometry, used = self._deepened(sky, geometry, used)
        return self._judged(sky, geometry, used)

    def _search(self, sky: Sky) -> Geometry:
        s = self.settings
        prior = Prior.about(self.start, self.spread.vector())
        best: tuple[float, Geometry] | None = None
        most = 0
        for trial in self._trials():
            for _, proposal in sky.proposals(
                trial, range(min(8, len(sky.xy))), 100, s.angle_tolerance_deg, keep=12
            ):
                geometry = sky.follow(proposal, prior)
                if geometry is None:
                    continue
                matches = sky.match(geometry, s.match_radius_px)
                most = max(most, len(matches))
                evidence = sky.log_false(geometry, matches, s.match_radius_px)
                if best is None or evidence < best[0]:
                    best = (evidence, geometry)
            if best is not None and best[0] < _BEYOND_DOUBT:
                break
        if best is None or best[0] > _ACCEPT:
            raise CalibrationError(
                f"no crystal of {self.material.name} found among {len(sky.xy)} peaks (best attempt: {most}"
                " spots, no more than chance gives): is it the right material, and is the start within"
                f" {2 * self.spread.dd_mm:g} mm, {2 * self.spread.centre_px:g} px and"
                f" {2 * self.spread.tilt_deg:g} deg?"
            )
        return best[1]

    def _trials(self) -> Iterator[Calibration]:
        # One start reaches 4 mm and 40 px; a wider spread is laid out with several, the nearest first.
        offsets = []
        for spread, step in ((self.spread.dd_mm, 4.0), (self.spread.centre_px, 50.0)):
            n = math.ceil(max(0.0, 1.5 * spread - step) / (1.5 * step))
            offsets.append([1.5 * step * k for k in range(-n, n + 1)])
        distances, centres = offsets
        grid = np.array(list(itertools.product(distances, centres, centres)))
        order = np.argsort(np.sum(np.square(grid / (4.0, 50.0, 50.0)), axis=1), kind="stable")
        for dd, x, y in grid[order]:
            moved = vector_of(self.start) + np.array([dd, x, y, 0.0, 0.0])
            if moved[0] > 0:
                yield with_vector(self.start, moved)

    def _converge(self, sky: Sky, geometry: Geometry, with_depth: bool) -> tuple[Geometry, Matches]:
        # Match and fit in turn until neither changes.
        before: npt.NDArray[np.int64] | None = None
        for _ in range(_ROUNDS):
            used = sky.match(geometry, self.settings.match_radius_px).core()
            if len(used) < self.settings.min_spots:
                raise CalibrationError(
                    f"only {len(used)} spots of {self.material.name} match, at least"
                    f" {self.settings.min_spots} are needed: take a frame with more spots"
                )
            energy = used.energy_keV if with_depth else None
            g, xy = sky.g(used), sky.xy[used.spot]
            new = gauss_newton(geometry, g, xy, energy_keV=energy, iterations=1)
            if new is None:
                raise CalibrationError(
                    f"the {len(used)} matched spots do not determine the detector: take a frame whose spots"
                    " cover more of it"
                )
            sigma = np.sqrt(np.diag(self._covariance(new, g, xy, energy)[0])[:5])
            small = np.all(
                np.abs(vector_of(new.calibration) - vector_of(geometry.calibration)) <= _CONVERGED * sigma
            )
            same = before is not None and np.array_equal(before, used.spot)
            geometry, before = new, used.spot
            if small and same:
                return geometry, used
        raise CalibrationError(
            f"the fit did not converge within {_ROUNDS} rounds: spots at the edge of the match radius"
            f" ({self.settings.match_radius_px:g} px) come and go; change it, or take a sharper frame"
        )

    def _deepened(self, sky: Sky, plain: Geometry, used: Matches) -> tuple[Geometry, Matches]:
        # A depth only where it is beyond doubt, as in indexing: it costs the others precision.
        try:
            deep, again = self._converge(sky, plain, with_depth=True)
            covariance, _ = self._covariance(deep, sky.g(again), sky.xy[again.spot], again.energy_keV)
        except CalibrationError:
            return plain, used
        sigma = math.sqrt(float(covariance[PARAMETERS, PARAMETERS]))
        beyond_doubt = 0.0 < deep.depth_mm < DEEPEST_MM and deep.depth_mm > DEPTH_SIGMAS * sigma
        return (deep, again) if beyond_doubt else (plain, used)

    @staticmethod
    def _covariance(
        geometry: Geometry, g: FloatArray, xy: FloatArray, energy: FloatArray | None
    ) -> tuple[FloatArray, FloatArray]:
        try:
            return covariance_of(geometry, g, xy, energy)
        except ValueError as error:
            raise CalibrationError(f"{error}: take a frame whose spots cover more of the detector") from error

    def _judged(self, sky: Sky, geometry: Geometry, used: Matches) -> CalibrationFit:
        s = self.settings
        energy = used.energy_keV if geometry.depth_mm else None
        xy = sky.xy[used.spot]
        covariance, residual = self._covariance(geometry, sky.g(used), xy, energy)
        matches = sky.match(geometry, s.match_radius_px)
        strain, strain_sigma, probability = strain_left(geometry, sky.g(used), xy, energy)
        fit = CalibrationFit(
            calibration=geometry.calibration,
            start=self.start,
            rotation=geometry.rotation,
            depth_mm=geometry.depth_mm,
            covariance=covariance / CORE_VARIANCE,
            xy_px=xy,
            residual_px=residual,
            hkl=self._phase.scene.reflections.hkl[used.reflection].astype(np.int64) * used.order[:, None],
            energy_keV=used.energy_keV,
            spots=used.spot,
            matched=len(matches),
            expected=len(matches.computed_px),
            mean_matched_px=float(np.mean(matches.distance_px)),
            log_false=sky.log_false(geometry, matches, s.match_radius_px),
            strain=strain,
            strain_sigma=strain_sigma,
            unstrained_probability=probability,
            rival_spots=self._rival(sky, geometry),
        )
        self._refuse(fit)
        bright = min(_BRIGHTEST, len(sky.xy))
        explained = int(np.count_nonzero(matches.spot < bright))
        if explained < s.min_bright_share * bright:
            raise CalibrationError(
                f"only {explained} of the {bright} brightest peaks belong to the crystal that was found:"
                f" wrong material, or not a single crystal of {self.material.name}"
            )
        return fit

    def _rival(self, sky: Sky, geometry: Geometry) -> int:
        # The strongest other crystal of the material in what this one leaves.
        taken = np.zeros(len(sky.xy), dtype=bool)
        taken[sky.match(geometry, 2.0 * self.settings.match_radius_px).spot] = True
        phase = Phase.prepare(self.material, geometry.calibration, self.area, self.settings.energy_keV)
        others = Indexer((phase,), IndexingParameters(max_crystals=3)).index(sky.xy[~taken])
        return max((len(other.spots) for other in others), default=0)

    def _refuse(self, fit: CalibrationFit) -> None:
        s = self.settings
        if fit.rival_spots > s.max_rival * fit.matched:
            raise CalibrationError(
                f"more than one crystal: beside the one with {fit.matched} spots another {self.material.name}"
                f" crystal has {fit.rival_spots}; calibrate on a single crystal"
            )
        refuse_outcome(
            s,
            self.material.name,
            fit.start,
            fit.calibration,
            fit.sigma,
            fit.mean_residual_px,
            "take a frame with more spots over more of the detector",
        )


def refuse_outcome(
    s: CalibrationSettings,
    material: str,
    start: Calibration,
    found: Calibration,
    sigma: FloatArray,
    mean_residual_px: float,
    remedy: str,
) -> None:
    """Refuse a fit with large residuals, far from its start, or of a detector that it leaves undetermined.

    Raises
    ------
    CalibrationError
        With `remedy` where the spots do not determine a parameter.
    """
    if mean_residual_px > s.max_residual_px:
        raise CalibrationError(
            f"mean residual {mean_residual_px:.2f} px is above {s.max_residual_px:g} px: the crystal"
            f" is strained, not {material}, or its spots are smeared"
        )
    values = vector_of(found)
    limits = np.array([s.max_dd_change * start.dd_mm, *[s.max_centre_px] * 2, *[s.max_tilt_deg] * 2])
    for name, change, limit, value in zip(NAMES, values - vector_of(start), limits, values, strict=True):
        if abs(change) > limit:
            raise CalibrationError(
                f"{name} came out as {value:.4g}, {abs(change):.3g} from the start (at most {limit:.3g}):"
                " give a start that is nearer, or check camera, pixel size and material"
            )
    # Known no better than it may have been off at the start, it is not calibrated.
    for name, unsure, spread in zip(NAMES, sigma, Spread().vector(), strict=True):
        if unsure > _DETERMINED * spread:
            raise CalibrationError(f"the spots do not determine {name} (sigma {unsure:.2g}): {remedy}")
