"""The inverse question: which condition gives this fraction and this mean free path.

Images are drawn over the range of one number of the condition and measured. Fraction and the logarithm of the
free path are taken as normally distributed about a parabola in that number, with standard deviations that
change exponentially with it; Bayes' rule with a flat prior over the range says the rest.

Three things make the answer less sure than the scatter of patches, and only the first one shrinks with more
patches: that scatter; the law, which is known from so many drawn images alone; and what images differ by
from what the model draws. The last one is measured on held-out images (`ConditionLaw.off`): a bias of the
model, and what one image has in common that the next one under the same condition has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_GRID: Final = 401
_LEAST: Final = 30
_JUDGED: Final = 400
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
    doubt : (2, 3, 2, 3) float64
        Covariance of the coefficients of fraction and of free path.
    """

    range: tuple[float, float]
    mean: FloatArray
    log_deviation: FloatArray
    correlation: FloatArray
    doubt: FloatArray

    @classmethod
    def fit(cls, values: npt.ArrayLike, measures: FloatArray) -> Self:
        """Fit to patches: conditions (n,), fraction and free path (n, 2).

        Raises
        ------
        ValueError
            If there are fewer than 30 patches with a boundary, or one condition only.
        """
        good = np.isfinite(measures).all(axis=1)
        values, measures = np.asarray(values, dtype=np.float64)[good], measures[good]
        # Of patches with a boundary: where there are none the law says nothing.
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
        # White's covariance (Econometrica 48, 817, 1980): the scatter is not the same everywhere.
        inverse = np.linalg.inv(basis.T @ basis)
        pulls = rest[:, :, None] * (basis @ inverse)[:, None, :]
        doubt = np.einsum("nqi,nrl->qirl", pulls, pulls)
        return cls((low, high), mean, log_deviation, np.corrcoef(rest, rowvar=False), doubt)

    def off(self, values: npt.ArrayLike, measures: FloatArray, images: IntArray) -> FloatArray:
        """Return how far images are from the law, beyond the scatter of their patches.

        Parameters
        ----------
        values : (n,) float64
            Condition of each patch's image.
        measures : (n, 2) float64
            Fraction and free path of patches of images that nothing was trained on.
        images : (n,) int64
            Which image a patch is of.

        Returns
        -------
        (2, 2) float64
            Mean square of an image's fraction and of the logarithm of its free path, and their mean product:
            for `ask`.

        Raises
        ------
        ValueError
            If no image has two patches with a boundary.
        """
        values = np.asarray(values, dtype=np.float64)
        good = np.isfinite(measures).all(axis=1)
        place = np.unique(images[good], return_inverse=True)[1]
        counts = np.bincount(place)
        if not np.any(counts >= 2):
            raise ValueError("no held-out image has two patches with a boundary")
        mean, _ = self._expected(_unit(values[good], self.range))
        rest = np.stack([measures[good, 0], np.log(measures[good, 1])], axis=1) - mean
        own = np.stack([np.bincount(place, column) / counts for column in rest.T], axis=1)
        of = counts >= 2
        inside = (rest - own[place])[of[place]]
        each = counts[of]
        # What patches of an image scatter by leaves its mean uncertain: that is counted in `ask` already.
        weights = 1.0 / (each * (each - 1))
        chance = np.einsum("ni,nj,n->ij", inside, inside, _each(weights, of, place))
        products = (own[of].T @ own[of] - chance) / of.sum()
        # Chance alone can leave less than nothing.
        found, axes = np.linalg.eigh(products)
        return np.asarray((axes * np.maximum(found, 0.0)) @ axes.T)

    def _expected(self, u: FloatArray) -> tuple[FloatArray, FloatArray]:
        # Of a patch under each condition: means and standard deviations, (n, 2) each.
        basis = np.stack([np.ones_like(u), u, u * u], axis=1)
        return basis @ self.mean, np.exp(basis[:, :2] @ self.log_deviation)

    def ask(
        self,
        fraction: float | None,
        free_path_px: float | None,
        patches: int = 1,
        off: FloatArray | None = None,
    ) -> Answer:
        """Return the conditions that give means over so many patches.

        Parameters
        ----------
        fraction, free_path_px : float, optional
            Arithmetic means over the patches.
        patches : int
            Of one image, or of several.
        off : (2, 2) float64, optional
            See the method `off`; None takes what the model draws for what images show.

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
        mean, scatter = self._expected(u)
        # The mean of free paths is not the free path of the mean logarithm.
        mean[:, 1] += 0.5 * scatter[:, 1] ** 2 * (1.0 - 1.0 / patches)
        basis = np.stack([np.ones_like(u), u, u * u], axis=1)
        both = np.ix_(range(len(u)), which, which)
        covariance = scatter[:, :, None] * self.correlation * scatter[:, None, :] / patches
        covariance += np.einsum("gi,qirl,gl->gqr", basis, self.doubt, basis, optimize=True)
        covariance = (covariance if off is None else covariance + off)[both]
        far = np.array([v for _, v in given]) - mean[:, which]
        square = np.einsum("gi,gij,gj->g", far, np.linalg.inv(covariance), far)
        log_density = -0.5 * (square + np.linalg.slogdet(covariance)[1])
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


def judge_law(
    law: ConditionLaw, off: FloatArray, values: npt.NDArray[Any], measures: FloatArray, images: IntArray
) -> dict[str, Any]:
    """Ask about held-out patches one by one, and about whole images; return how good the answers are.

    Parameters
    ----------
    law : ConditionLaw
    off : (2, 2) float64
        Measured on other images than these.
    values, measures, images
        As for `ConditionLaw.off`.

    Returns
    -------
    dict
        Share of the intervals of 90 % that hold the condition, and errors; the same under "images".
    """
    good = np.flatnonzero(np.isfinite(measures).all(axis=1))
    some = good[np.linspace(0, len(good) - 1, min(len(good), _JUDGED)).astype(np.int64)]
    one_by_one = [(measures[i], 1, float(values[i])) for i in some]
    members = [good[images[good] == image] for image in np.unique(images[good])]
    whole = [(measures[of].mean(axis=0), len(of), float(values[of[0]])) for of in members]
    return {
        **_held(law, off, one_by_one),
        "images": {**_held(law, off, whole), "patches_each": float(np.mean([n for _, n, _ in whole]))},
        "off": off.tolist(),
        "interval": 0.9,
        "range": list(law.range),
    }


def _held(
    law: ConditionLaw, off: FloatArray, asked: Sequence[tuple[FloatArray, int, float]]
) -> dict[str, Any]:
    answers = [law.ask(float(mean[0]), float(mean[1]), n, off) for mean, n, _ in asked]
    true = np.array([value for _, _, value in asked])
    low, high = (np.array([getattr(a, end) for a in answers]) for end in ("low", "high"))
    best = np.array([a.best for a in answers])
    return {
        "asked": len(asked),
        "holds_the_true_one": float(((low <= true) & (true <= high)).mean()),
        "none_gives_it": float(np.mean([a.chance < UNLIKELY for a in answers])),
        "median_width": float(np.median(high - low)),
        "rms_error": float(np.sqrt(np.mean(np.square(best - true)))),
        "guess_rms_error": float(np.std(true)),
    }


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


def _each(weights: FloatArray, of: npt.NDArray[np.bool_], place: IntArray) -> FloatArray:
    # Of each patch the weight of its image; of images that `of` leaves out there are none.
    spread = np.zeros(len(of))
    spread[of] = weights
    return np.asarray(spread[place][of[place]])


def _unit(values: FloatArray, over: tuple[float, float]) -> FloatArray:
    low, high = over
    return 2.0 * (values - low) / (high - low) - 1.0
