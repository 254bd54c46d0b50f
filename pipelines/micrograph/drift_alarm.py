"""Has a stream of images changed? A sequential alarm on a number, or several, per image.

Statistics of images are not normally distributed and have no known mean, so nothing of the kind is
assumed:

1. Each component is replaced by a score from its rank among all so far. Ranks of independent values are
   independent and uniform whatever their distribution (Rényi, 1962), so Φ⁻¹((rank − 1/2) / n) is nearly
   standard normal (Conover, Tercero-Gómez & Cordero-Franco, Qual. Eng. 29, 2017).
2. Several scores are made independent of each other. With A_t = Σ s sᵀ over all so far and L its Cholesky
   factor, v_t = L⁻¹ s_t is a column of a matrix with orthonormal rows. For normal s that matrix is
   uniformly distributed, and so v_t has no direction, |v_t|² ~ Beta(p/2, (t − p)/2), and v_t is independent
   of A_t and with it of all before; its length is stretched to that of a standard normal vector. Scores of
   components that hang together otherwise than normal ones do (two kinds of images in a stream) make
   long vectors more frequent: after 20 blocks a component the length, too, is judged by its rank.
3. `pipelines.control_chart` follows those.

Frames that follow each other are often alike, which is no drift but breaks the independence that the
false-alarm rate stands on. `block` images are averaged into one value for that; `Drift.correlation` shows
whether it was enough.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import betaincc, chdtri, ndtri

from pipelines.control_chart import LEAST_MEMORY, EwmaChart

FloatArray = npt.NDArray[np.float64]

_LEAST = 10
"""So many values make the first ranks; before them nothing is said."""
_HISTORY = 20_000
"""Values that ranks are taken among: later ones add nothing to it."""
_RIDGE = 1e-6
_LENGTHS = 20
"""So many vectors a component are enough to rank lengths among them."""
_LEARNING_SEED = 0
"""Of the order in which values are learnt: the same values make the same alarm."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What is known after an image.

    Attributes
    ----------
    images : int
        Seen, without those of `DriftAlarm.learn`.
    statistic, limit : float
        |z| and what it must exceed.
    alarm : bool
        It did, now or earlier: the alarm stays until it is made anew.
    alarm_image : int
        The first image with an alarm, counted from 0; −1 without.
    foremost : str
        The component that moved most in the last images.
    change : tuple of float
        Of each component: mean score of the last 2/λ − 1 blocks (exponential weights), in standard deviations
        of single blocks; above 0 it grew.
    correlation : float
        Of what enters the chart with what entered before, −1 to 1.
    correlated : bool
        It is larger than chance makes it (4 sigma): false alarms are more frequent than asked for, larger
        blocks are called for.
    """

    images: int
    statistic: float
    limit: float
    alarm: bool
    alarm_image: int
    foremost: str
    change: tuple[float, ...]
    correlation: float
    correlated: bool


class DriftAlarm:
    """Follows the statistics of a stream of images.

    Parameters
    ----------
    names : sequence of str
        Of the components: one for a scalar.
    images_between_false_alarms : float
        Mean number of images until a stream that does not change raises an alarm.
    memory : float
        λ, 0.01 to 1: small finds slow and small changes, large finds jumps sooner.
    block : int
        Images that are averaged into one value, for streams whose images resemble those just before.

    Raises
    ------
    ValueError
        Naming the parameter that is wrong.
    """

    def __init__(
        self,
        names: Sequence[str],
        images_between_false_alarms: float = 1e4,
        memory: float = 0.1,
        block: int = 1,
    ) -> None:
        if not names:
            raise ValueError("names: expected one at least")
        check_alarm(images_between_false_alarms, memory, block)
        blocks = images_between_false_alarms / block
        self.names = tuple(names)
        self._size = len(self.names)
        self._block = block
        self._memory = memory
        self._chart = EwmaChart(blocks, memory, self._size)
        self._baseline: list[list[float]] = [[] for _ in self.names]
        self._lengths: list[float] = []
        self._scatter = np.zeros((self._size, self._size))
        self._blocks = self._images = 0
        self._pending: list[FloatArray] = []
        self._recent = np.zeros(self._size)
        self._alarm_image = -1
        self._last = np.zeros(self._size)
        self._products, self._squares, self._pairs = 0.0, 0.0, 0

    @property
    def learning(self) -> bool:
        """Whether too little was seen to say anything."""
        return self._blocks <= max(_LEAST, self._size + 1)

    def learn(self, values: npt.ArrayLike) -> None:
        """Take values of images that are as they should be into the baseline, without judging them.

        Parameters
        ----------
        values : (n, components) array
            Of single images. Their order says nothing: it is that of files, often by specimen, and no time.
        """
        table = np.asarray(values, dtype=np.float64).reshape(-1, self._size)
        if not np.isfinite(table).all():
            raise ValueError("learn: expected finite values")
        # Ranks among those before take them for a stream: in order of size, or specimen by specimen, it would
        # be one that drifts all the time, and what drifts later would be nothing new.
        table = table[np.lexsort(table.T[::-1])]
        table = np.random.default_rng(_LEARNING_SEED).permutation(table)
        for start in range(0, len(table) - self._block + 1, self._block):
            self._whitened(self._scores(table[start : start + self._block].mean(axis=0)))

    def update(self, values: npt.ArrayLike) -> Drift:
        """Take in an image.

        Parameters
        ----------
        values : (components,) array

        Raises
        ------
        ValueError
            If there is another number of values, or one is not finite. Nothing changes then.
        """
        row = np.atleast_1d(np.asarray(values, dtype=np.float64))
        if row.shape != (self._size,) or not np.isfinite(row).all():
            raise ValueError(f"drift alarm: expected {self._size} finite values, got {row.tolist()}")
        self._images += 1
        self._pending.append(row)
        if len(self._pending) == self._block:
            block = np.mean(self._pending, axis=0)
            self._pending.clear()
            self._take(block)
        return self._state()

    def _take(self, block: FloatArray) -> None:
        scores = self._scores(block)
        y = self._whitened(scores)
        self._recent = self._memory * scores + (1.0 - self._memory) * self._recent
        if y is None:
            return
        self._chart.take(y)
        if self._alarm_image < 0:  # what comes after a change is alike because of it
            self._pairs += 1
            self._products += float(y @ self._last)
            self._squares += float(y @ y)
            self._last = y
        if self._chart.statistic > self._chart.limit and self._alarm_image < 0:
            self._alarm_image = self._images - 1

    def _scores(self, block: FloatArray) -> FloatArray:
        """Return the normal scores of a block, and take it into the baseline as long as there is no alarm."""
        scores = np.empty(self._size)
        for number, (value, known) in enumerate(zip(block.tolist(), self._baseline, strict=True)):
            # Equal values share the middle of their ranks: no score where nothing ever changes.
            rank = (bisect_left(known, value) + bisect_right(known, value)) / 2 + 0.5
            n = len(known) + 1
            scores[number] = float(ndtri(rank / n)) / _score_spread(n)
            if self._alarm_image < 0 and n <= _HISTORY:
                insort(known, value)
        return scores

    def _whitened(self, scores: FloatArray) -> FloatArray | None:
        """Return the scores made independent of each other; None as long as too few came before."""
        if self._alarm_image < 0:
            self._scatter += np.outer(scores, scores)
            self._blocks += 1
            scatter, count = self._scatter, self._blocks
        else:
            scatter, count = self._scatter + np.outer(scores, scores), self._blocks + 1
        if count <= max(_LEAST, self._size + 1):
            return None
        if self._size == 1:
            return scores
        # A component that never changed has no spread of its own; the ridge keeps it at 0.
        lower = np.linalg.cholesky(scatter + _RIDGE * count * np.eye(self._size))
        v = np.linalg.solve(lower, scores)
        square = float(v @ v)
        if square == 0.0:
            return np.zeros(self._size)
        return np.asarray(v * (self._length(square, count) / math.sqrt(square)), dtype=np.float64)

    def _length(self, square: float, count: int) -> float:
        """Return the length of a standard normal vector that is as rare as |v|² after so many blocks."""
        share = min(square, 1.0 - 1e-12)
        tail = float(betaincc(self._size / 2, (count - self._size) / 2, share))
        # Its place among all so far, too, once they are many: |v|² itself gets smaller with every block.
        place = math.log(share / (1.0 - share) * count)
        known = self._lengths
        if len(known) >= _LENGTHS * self._size:
            rank = (bisect_left(known, place) + bisect_right(known, place)) / 2 + 0.5
            tail = 1.0 - rank / (len(known) + 1)
        if self._alarm_image < 0 and len(known) < _HISTORY:
            insort(known, place)
        return math.sqrt(float(chdtri(self._size, max(tail, 1e-300))))

    def _state(self) -> Drift:
        correlation = self._products / self._squares if self._squares > 0.0 else 0.0
        # Products of independent vectors of p components have a variance of p, their squares a mean of p.
        chance = 1.0 / math.sqrt(max(self._pairs * self._size, 1))
        foremost = int(np.argmax(np.abs(self._recent)))
        return Drift(
            images=self._images,
            statistic=self._chart.statistic,
            limit=self._chart.limit,
            alarm=self._alarm_image >= 0,
            alarm_image=self._alarm_image,
            foremost=self.names[foremost],
            change=tuple(self._recent.tolist()),
            correlation=correlation,
            correlated=self._pairs >= 30 and correlation > 4.0 * chance,
        )


def check_alarm(images_between_false_alarms: float, memory: float, block: int) -> None:
    """Refuse parameters of which no alarm can be made; making one takes a second.

    Raises
    ------
    ValueError
        Naming the parameter that is wrong.
    """
    if block < 1:
        raise ValueError(f"block: expected 1 or more, got {block}")
    if not 10.0 <= images_between_false_alarms / block <= 1e9:
        raise ValueError(
            f"images_between_false_alarms: expected {10 * block} to 1e9, for blocks of {block},"
            f" got {images_between_false_alarms:g}"
        )
    if not LEAST_MEMORY <= memory <= 1.0:
        raise ValueError(f"memory: expected {LEAST_MEMORY:g} to 1, got {memory:g}")


@lru_cache(maxsize=512)
def _score_spread(n: int) -> float:
    """Return the standard deviation of scores among n ranks: ranks are few at first, and so are the ends."""
    if n < 2:
        return 1.0
    if n > 400:
        # Φ⁻¹ at the middles of n cells leaves out the spread within the cells, above all the last two.
        return _score_spread(400)
    return float(np.sqrt(np.mean(np.square(ndtri((np.arange(n) + 0.5) / n)))))
