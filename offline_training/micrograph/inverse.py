"""The inverse question: which condition gives this fraction and this mean free path.

Images are drawn over the range of one number of the condition and measured. Fraction and the logarithm of the
free path are taken as normally distributed about a parabola in that number, with standard deviations that
change exponentially with it; Bayes' rule with a flat prior over the range says the rest. What comes out is
as good as what the model draws: `grainwatch train pixelcnn` prints how near that is to held-out images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]

_GRID: Final = 401
_LEAST: Final = 30
UNLIKELY: Final = 0.01
"""With less chance than that under the best condition, none gives what was measured."""


@dataclass(frozen=True, eq=False)
class Answer:
    """Which conditions give what was measured.

    Attributes
    ----------
    grid, density : (g,) float64
        Conditions, and their probability density under a flat prior over the range.
    best : float
        The most probable condition.
    low, high : float
        Ends of the shortest interval that holds 90 %: with one maximum, it is inside, at an end of the range,
        too.
    chance : float
        Of something as far off, or further, under the best condition.
    """

    grid: FloatArray
    density: FloatArray
    best: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True, eq=False)
class ConditionLaw:
    """Fraction and logarithm of the free path as they follow from one number.

    Attributes
    ----------
    range : (float, float)
        Of the number.
    mean : (3, 2) float64
        Coefficients of 1, u, u², u being −1 to 1 over the range.
    log_deviation : (2, 2) float64
        Coefficients of 1, u of the logarithm of the standard deviations.
    correlation : (2, 2) float64
        Of what remains.
    """

    range: tuple[float, float]
    mean: FloatArray
    log_deviation: FloatArray
    correlation: FloatArray

    @classmethod
    def fit(cls, values: FloatArray, measures: FloatArray) -> Self:
        """Fit to patches: conditions (n,), fraction and free path (n, 2).

        Raises
        ------
        ValueError
            If there are fewer than 30 patches with a boundary, or one condition only.
        """
        good = np.isfinite(measures).all(axis=1)
        values, measures = values[good], measures[good]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
        if len(values) < _LEAST or not high > low:
            raise ValueError(
                f"{len(values)} patches with a boundary, conditions from {low:g} to {high:g}: expected"
                f" {_LEAST} patches or more over a range"
            )
        u = _unit(values, (low, high))
        seen = np.stack([measures[:, 0], np.log(measures[:, 1])], axis=1)
        basis = np.stack([np.ones_like(u), u, u * u], axis=1)
        mean = np.linalg.lstsq(basis, seen, rcond=None)[0]
        rest = seen - basis @ mean
        # The logarithm of the square of a normal number is −1.27 on average.
        logs = 0.5 * (np.log(rest**2 + 1e-12) + 1.2704)
        log_deviation = np.linalg.lstsq(basis[:, :2], logs, rcond=None)[0]
        unit = rest / np.exp(basis[:, :2] @ log_deviation)
        # What the logarithms got wrong together is put right.
        log_deviation[0] += 0.5 * np.log(np.mean(unit**2, axis=0))
        return cls((low, high), mean, log_deviation, np.corrcoef(rest, rowvar=False))

    def ask(self, fraction: float | None, free_path_px: float | None, patches: int = 1) -> Answer:
        """Return the conditions that give means over so many patches, taken as independent.

        Raises
        ------
        ValueError
            If neither is given, or one cannot be.
        """
        check_measured(fraction, free_path_px, patches)
        log_path = None if free_path_px is None else float(np.log(free_path_px))
        given = [(i, v) for i, v in enumerate((fraction, log_path)) if v is not None]
        which = [i for i, _ in given]
        u = np.linspace(-1.0, 1.0, _GRID)
        basis = np.stack([np.ones_like(u), u, u * u], axis=1)
        off = np.array([v for _, v in given]) - (basis @ self.mean)[:, which]
        deviation = np.exp(basis[:, :2] @ self.log_deviation)[:, which] / np.sqrt(patches)
        unit = off / deviation
        inverse = np.linalg.inv(self.correlation[np.ix_(which, which)])
        square = np.einsum("gi,ij,gj->g", unit, inverse, unit)
        log_density = -0.5 * square - np.log(deviation).sum(axis=1)
        density = np.exp(log_density - log_density.max())
        least, greatest = self.range
        grid = least + (u + 1.0) / 2.0 * (greatest - least)
        step = grid[1] - grid[0]
        cumulated = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2.0 * step)])
        low, high = _shortest(grid, cumulated / cumulated[-1])
        return Answer(
            grid=grid,
            density=density / cumulated[-1],
            best=float(grid[np.argmax(density)]),
            low=low,
            high=high,
            chance=float(stats.chi2.sf(square.min(), len(which))),
        )


def check_measured(fraction: float | None, free_path_px: float | None, patches: int = 1) -> None:
    """Refuse what cannot have been measured, before anything is drawn for it.

    Raises
    ------
    ValueError
        If neither is given, or one cannot be.
    """
    if fraction is None and free_path_px is None:
        raise ValueError("give a fraction, a mean free path, or both")
    if fraction is not None and not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction {fraction:g}: expected a number between 0 and 1")
    if free_path_px is not None and not 0.0 < free_path_px < np.inf:
        raise ValueError(f"mean free path {free_path_px:g} px: expected a number greater than 0")
    if patches < 1:
        raise ValueError(f"patches {patches}: expected 1 or more")


def _shortest(grid: FloatArray, cumulated: FloatArray, share: float = 0.9) -> tuple[float, float]:
    # All intervals that begin or end at a place of the grid; so those at both ends of the range are there.
    first, last = cumulated <= 1.0 - share, cumulated >= share
    starts = np.concatenate([grid[first], np.interp(cumulated[last] - share, cumulated, grid)])
    ends = np.concatenate([np.interp(cumulated[first] + share, cumulated, grid), grid[last]])
    best = int(np.argmin(ends - starts))
    return float(starts[best]), float(ends[best])


def _unit(values: FloatArray, over: tuple[float, float]) -> FloatArray:
    low, high = over
    return 2.0 * (values - low) / (high - low) - 1.0
