"""Which images are trained on and which are held out: by source, never by crop.

Crops of one image overlap or at least resemble each other; a score on crops whose neighbours were trained
on says nothing. A split that parts a source cannot be made here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class LeakyError(ValueError):
    """Two crops of one source are in two folds."""


@dataclass(frozen=True, eq=False)
class GroupedFolds:
    """Items in folds, each source whole in one.

    Attributes
    ----------
    sources : tuple of str
        One an item: the image, spot or sample that it is a crop of.
    fold : (n,) int64
        From 0.

    Raises
    ------
    LeakyError
        If a source is in two folds.
    ValueError
        If the numbers of items differ, a fold is negative, or one has no items.
    """

    sources: tuple[str, ...]
    fold: IntArray

    def __post_init__(self) -> None:
        fold = np.array(self.fold, dtype=np.int64)
        if fold.shape != (len(self.sources),):
            raise ValueError(f"fold: expected {len(self.sources)} numbers, one an item, got {fold.shape}")
        home: dict[str, int] = {}
        for source, number in zip(self.sources, fold.tolist(), strict=True):
            if home.setdefault(source, number) != number:
                raise LeakyError(
                    f"source {source!r} is in folds {home[source]} and {number}: what is learned from one"
                    " crop would be tested on another; put whole sources into folds"
                )
        empty = sorted(set(range(int(fold.max(initial=0)) + 1)) - set(fold.tolist()))
        if np.any(fold < 0) or empty:
            raise ValueError(f"fold: expected numbers from 0 with items in each, got none in {empty}")
        fold.flags.writeable = False
        object.__setattr__(self, "fold", fold)

    @classmethod
    def draw(
        cls,
        sources: Sequence[str],
        folds: int = 5,
        seed: int = 0,
        labels: Sequence[Hashable] | None = None,
    ) -> Self:
        """Deal sources into folds at random, in equal numbers.

        Parameters
        ----------
        sources : (n,) sequence of str
            One an item.
        folds : int
        seed : int
        labels : (n,) sequence, optional
            Classes that all folds shall have in like shares; a source has the one most of its items have.

        Raises
        ------
        ValueError
            If there are fewer sources than folds.
        """
        names = sorted(set(sources))
        if not 2 <= folds <= len(names):
            raise ValueError(f"folds {folds}: expected 2 to {len(names)}, the number of sources")
        if labels is not None and len(labels) != len(sources):
            raise ValueError(f"labels: expected {len(sources)}, one an item, got {len(labels)}")
        order = np.random.default_rng(seed).permutation(len(names)).tolist()
        if labels is not None:
            counts: dict[str, Counter[str]] = {}
            for source, label in zip(sources, labels, strict=True):
                counts.setdefault(source, Counter())[repr(label)] += 1
            # Dealing from a pile sorted by class gives each fold its share of each.
            order.sort(key=lambda i: counts[names[i]].most_common(1)[0][0])
        home = {names[i]: place % folds for place, i in enumerate(order)}
        return cls(tuple(sources), np.array([home[source] for source in sources], dtype=np.int64))

    @property
    def folds(self) -> int:
        """How many there are."""
        return int(self.fold.max()) + 1

    def held_out(self, fold: int) -> IntArray:
        """Return the items of a fold."""
        self._check(fold)
        return np.flatnonzero(self.fold == fold)

    def trained_on(self, fold: int) -> IntArray:
        """Return the items of all other folds."""
        self._check(fold)
        return np.flatnonzero(self.fold != fold)

    def _check(self, fold: int) -> None:
        if not 0 <= fold < self.folds:
            raise ValueError(f"fold {fold}: expected 0 to {self.folds - 1}")
