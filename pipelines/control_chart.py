"""A sequential alarm on a stream of random vectors whose mean may move.

Whitened vectors y_t, independent and standard normal as long as nothing moves, feed a multivariate
exponentially weighted moving average z_t = λ y_t + (1 − λ) z_{t−1}, and |z| above a limit is an alarm
(Lowry, Woodall, Champ & Rigdon, Technometrics 34, 46, 1992). The limit follows from the mean number of
steps between false alarms that is asked for: |z| is a Markov chain, because y has no direction (Runger &
Prabhu, J. Am. Stat. Assoc. 91, 1701, 1996).

One wild vector is no move: |y| is cut at a value that chance hardly reaches and that raises no alarm
alone (λ up to 0.2 or so).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import chndtr

FloatArray = npt.NDArray[np.float64]

_STATES = 120
LEAST_MEMORY = 0.01
"""With less the steps of |z| become as narrow as the rings of `_STATES`, and the limit too high."""
_WILD = 5.0
"""Normal |y| of three components exceeds it once in 65 000 steps, of six once in 2 900."""


class EwmaChart:
    """Follows standard normal vectors and says when their mean has moved.

    Parameters
    ----------
    frames_between_false_alarms : float
        Mean number of steps until a stream that does not move raises an alarm.
    memory : float
        λ, 0.01 to 1: small finds slow and small moves, large finds jumps sooner.
    dimensions : int
        Of the vectors.

    Attributes
    ----------
    limit : float
        On |z|.
    statistic : float
        |z|.
    """

    def __init__(self, frames_between_false_alarms: float, memory: float, dimensions: int) -> None:
        if not LEAST_MEMORY <= memory <= 1.0:
            raise ValueError(f"memory {memory:g}: expected {LEAST_MEMORY:g} to 1")
        if not 10.0 <= frames_between_false_alarms <= 1e9:
            raise ValueError(
                f"frames_between_false_alarms {frames_between_false_alarms:g}: expected 10 to 1e9"
            )
        self.limit = alarm_limit(frames_between_false_alarms, memory, dimensions)
        self.statistic = 0.0
        # With so large a λ that a frame alone may raise an alarm it is meant to; beyond a limit that cut
        # vectors hardly reach nothing else could.
        self._wild = _WILD if memory * _WILD < self.limit < 0.9 * _WILD else math.inf
        self._lambda = memory
        self._z = np.zeros(dimensions)

    @property
    def z(self) -> FloatArray:
        """The moving average, (dimensions,)."""
        return self._z.copy()

    def take(self, y: FloatArray) -> bool:
        """Take in a vector; return whether it is wild, and was cut."""
        length = float(np.linalg.norm(y))
        wild = length > self._wild
        self._z = self._lambda * (y * (self._wild / length) if wild else y) + (1.0 - self._lambda) * self._z
        self.statistic = float(np.linalg.norm(self._z))
        return wild


def frames_to_false_alarm(limit: float, memory: float, dimensions: int) -> float:
    """Return the mean number of steps until |z| first exceeds a limit, from z = 0, without drift.

    Parameters
    ----------
    limit : float
        On |z|.
    memory : float
        λ.
    dimensions : int
        Of the standard normal y.
    """
    # States are rings of |z|; |z'|²/λ² is a noncentral χ² about the ring's middle.
    width = 2.0 * limit / (2 * _STATES - 1)
    middle = np.arange(_STATES) * width
    edges = (np.arange(_STATES) + 0.5) * width
    noncentral = np.square((1.0 - memory) * middle / memory)
    below = chndtr(np.square(edges / memory)[None, :], float(dimensions), noncentral[:, None])
    transition = np.diff(below, axis=1, prepend=0.0)
    lengths = np.linalg.solve(np.eye(_STATES) - transition, np.ones(_STATES))
    return float(lengths[0])


@cache
def alarm_limit(frames: float, memory: float, dimensions: int) -> float:
    """Return the limit on |z| with this mean number of frames between false alarms."""
    spread = math.sqrt(memory / (2.0 - memory))  # standard deviation of a component of z in the long run

    def excess(limit: float) -> float:
        return math.log(frames_to_false_alarm(limit * spread, memory, dimensions) / frames)

    # Steps of 1: far beyond the answer the mean would be no finite number.
    high = 1.0
    while excess(high) < 0.0:
        high += 1.0
    return float(brentq(excess, high - 1.0 + 1e-6, high, xtol=1e-6)) * spread
