"""Has the detector moved? A sequential watch over frames of a reference crystal.

Each frame gives a small change of (dd, xcen, ycen), fitted to the residuals of its spots together with
the crystal's rotation (`observe`). `DriftWatch` compares each with all before it. Recursive residuals

    e_t = (x_t − x̄_{t−1}),   cov e_t = C_t + C̄_{t−1},

x̄ the mean of the frames so far weighted by C⁻¹, are independent as long as nothing moves, although the
true values are unknown (Brown, Durbin & Evans, J. R. Stat. Soc. B 37, 149, 1975). Whitened, they
feed a moving average that raises the alarm (`pipelines.control_chart`).

One wild frame (a beam that stumbled, a crystal mistaken for another) is no drift: its weight is bounded
there, and it does not enter x̄.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.control_chart import EwmaChart
from pipelines.laue.calibration_fit import CORE_MEDIANS, CORE_VARIANCE, PARAMETERS, Geometry, linearise

FloatArray = npt.NDArray[np.float64]

WATCHED = ("dd_mm", "xcen_px", "ycen_px")
"""What is followed. Tilts move too rarely, and resemble a shift of the centre too much, to be told apart
in single frames."""

_DIMENSIONS = 3
_FITTED = (0, 1, 2, 5, 6, 7)  # dd, xcen, ycen, rotation: columns of `linearise`
_FEWEST_SPOTS = 6
_MOST_SUSPECTS = 100
_LEAST_EIGENVALUE = 1e-9  # of normal equations with a diagonal of ones


@dataclass(frozen=True, eq=False)
class Observation:
    """What one frame says.

    Attributes
    ----------
    change : (3,) float64
        Of dd (mm), xcen, ycen (px) against the reference.
    unit_covariance : (3, 3) float64
        For residuals of 1 px in x and in y.
    square_sum_px2 : float
        Of the residuals that remain, corrected for the outliers that were left out.
    freedom : int
        Their number less that of the parameters.
    """

    change: FloatArray
    unit_covariance: FloatArray
    square_sum_px2: float
    freedom: int


@dataclass(frozen=True, eq=False)
class Drift:
    """Where the detector stands after a frame.

    Attributes
    ----------
    frames : int
        So far.
    change, sigma : (3,) float64
        Of dd (mm), xcen, ycen (px): weighted mean of the last 2/λ − 1 frames (exponential weights; after
        an alarm of those that led up to it and all since) less that of the frames that set the baseline.
    offset, offset_sigma : (3,) float64
        The baseline against the calibration.
    statistic, limit : float
        |z| and what it must exceed.
    alarm : bool
        It did, in this frame or an earlier one: the watch stays alarmed until it is made anew.
    alarm_frame : int
        The first frame with an alarm, counted from 0; −1 without.
    """

    frames: int
    change: FloatArray
    sigma: FloatArray
    offset: FloatArray
    offset_sigma: FloatArray
    statistic: float
    limit: float
    alarm: bool
    alarm_frame: int


def observe(
    reference: Geometry,
    g: npt.ArrayLike,
    xy_px: npt.ArrayLike,
    rotation: npt.ArrayLike,
    energy_keV: npt.ArrayLike | None = None,
) -> Observation:
    """Fit what moved to the spots of one frame.

    Parameters
    ----------
    reference : Geometry
        The calibration that holds; of its crystal only the depth counts.
    g : (n, 3) array
        B0 hkl of each spot.
    xy_px : (n, 2) array
        Measured positions.
    rotation : (3, 3) array
        R of the crystal in this frame, good to 0.2 deg; the crystal may turn between frames.
    energy_keV : (n,) array, optional
        With it the depth of penetration is fitted beside, which costs 1 % of precision: in
        silicon it moves spots by a pixel, and not all frames show the same spots.

    Raises
    ------
    ValueError
        If the spots do not determine the change.
    """
    vectors, xy = np.asarray(g, dtype=np.float64), np.asarray(xy_px, dtype=np.float64)
    start = Geometry(reference.calibration, np.asarray(rotation, dtype=np.float64), reference.depth_mm)
    energy = None if energy_keV is None else np.asarray(energy_keV, dtype=np.float64)
    computed, jacobian = linearise(start, vectors, energy)
    columns = list(_FITTED) if energy is None else [*_FITTED, PARAMETERS]
    design = jacobian.reshape(2 * len(xy), -1)[:, columns]
    norm = np.sqrt(np.einsum("ij,ij->j", design, design))
    design = design / np.where(norm > 0.0, norm, 1.0)
    residual = (xy - computed).ravel()
    keep = np.ones(len(xy), dtype=bool)
    # One outlier less biases the next fit less; two rounds settle it.
    for _ in range(3):
        count = int(np.count_nonzero(keep))
        if count < _FEWEST_SPOTS or 2 * count <= len(columns):
            raise ValueError(f"{count} spots are too few to see a drift")
        rows = np.repeat(keep, 2)
        kept = design[rows]
        normal = kept.T @ kept
        diagonal = np.sqrt(np.diag(normal))
        if (
            not diagonal.all()
            or np.linalg.eigvalsh(normal / np.outer(diagonal, diagonal))[0] < _LEAST_EIGENVALUE
        ):
            raise ValueError(f"{count} spots do not determine a drift: they lie too close")
        step = np.linalg.solve(normal, kept.T @ residual[rows])
        squares = np.square(residual - design @ step)
        square = squares[::2] + squares[1::2]
        used, keep = keep, square <= CORE_MEDIANS**2 * float(np.median(square)) + 1e-18
    inverse = np.linalg.inv(normal)[:_DIMENSIONS, :_DIMENSIONS]
    watched = norm[:_DIMENSIONS]
    return Observation(
        step[:_DIMENSIONS] / watched,
        inverse / np.outer(watched, watched),
        float(square[used].sum() / CORE_VARIANCE),
        2 * count - len(columns),
    )


class DriftWatch:
    """Follows observations of one crystal and says when the detector has moved.

    Parameters
    ----------
    frames_between_false_alarms : float
        Mean number of frames until a stream without drift raises an alarm.
    memory : float
        λ, 0.01 to 1: small finds slow and small drifts, large finds jumps sooner.
    jitter : (3,) array, optional
        Standard deviations of dd (mm), xcen, ycen (px) from frame to frame that are no drift
        (a beam that trembles); added to those that follow from the spots.
    """

    def __init__(
        self,
        frames_between_false_alarms: float = 1e5,
        memory: float = 0.1,
        jitter: npt.ArrayLike = (0.0, 0.0, 0.0),
    ) -> None:
        self._jitter = np.diag(np.square(np.asarray(jitter, dtype=np.float64)))
        self._lambda = memory
        self._chart = EwmaChart(frames_between_false_alarms, memory, _DIMENSIONS)
        self.limit = self._chart.limit
        self._frames = 0
        self._alarm_frame = -1
        self._square_sum, self._freedom = 0.0, 0
        self._precision, self._weighted = np.zeros((3, 3)), np.zeros(3)
        self._suspects: deque[tuple[FloatArray, FloatArray, bool]] = deque(maxlen=_MOST_SUSPECTS)
        self._recent, self._recent_covariance, self._recent_weight = np.zeros(3), np.zeros((3, 3)), 0.0

    def update(self, seen: Observation) -> Drift:
        """Take in a frame."""
        # The noise of all frames so far is known better than that of one.
        self._square_sum += seen.square_sum_px2
        self._freedom += seen.freedom
        variance = self._square_sum / max(self._freedom, 1)
        covariance = seen.unit_covariance * variance + self._jitter
        wild = False
        if self._frames:
            mean_covariance = np.linalg.inv(self._precision)
            mean = mean_covariance @ self._weighted
            lower = np.linalg.cholesky(covariance + mean_covariance)
            y = np.asarray(np.linalg.solve(lower, seen.change - mean), dtype=np.float64)
            wild = self._chart.take(y)
        statistic = self._chart.statistic
        if statistic > self.limit and self._alarm_frame < 0:
            self._alarm_frame = self._frames
        if self._alarm_frame == self._frames:
            # What led up to the alarm came after the move, too: it counts as new, not as baseline.
            self._recent, self._recent_covariance, self._recent_weight = np.zeros(3), np.zeros((3, 3)), 0.0
            for change, suspect, counted in self._suspects:
                if counted:
                    self._count(change, suspect, -1.0)
                self._follow(change, suspect)
        elif self._alarm_frame < 0:  # what comes after a move must not creep into the baseline
            if statistic < 0.5 * self.limit:
                self._suspects.clear()
            else:
                self._suspects.append((seen.change, covariance, not wild))
            if not wild:
                self._count(seen.change, covariance, 1.0)
        self._follow(seen.change, covariance)
        self._frames += 1
        baseline = np.linalg.solve(self._precision, self._weighted)
        of_baseline = np.diag(np.linalg.inv(self._precision))
        sigma = np.sqrt(np.diag(self._recent_covariance) / self._recent_weight**2 + of_baseline)
        return Drift(
            self._frames,
            self._recent / self._recent_weight - baseline,
            np.asarray(sigma),
            np.asarray(baseline, dtype=np.float64),
            np.asarray(np.sqrt(of_baseline)),
            statistic,
            self.limit,
            self._alarm_frame >= 0,
            self._alarm_frame,
        )

    def _count(self, change: FloatArray, covariance: FloatArray, sign: float) -> None:
        """Take a frame into the baseline, or (sign −1) out of it again."""
        precision = sign * np.linalg.inv(covariance)
        self._precision = self._precision + precision
        self._weighted = self._weighted + precision @ change

    def _follow(self, change: FloatArray, covariance: FloatArray) -> None:
        """Take a frame into the mean of the last ones."""
        keep = 1.0 - self._lambda
        self._recent = keep * self._recent + self._lambda * change
        self._recent_covariance = keep**2 * self._recent_covariance + self._lambda**2 * covariance
        self._recent_weight = keep * self._recent_weight + self._lambda
