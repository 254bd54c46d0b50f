"""How many orientations must a network have seen? Supporting information of LaueNN, section 5.

A fixed set of patterns, made of N orientations and no others, is learned again and again; the
network is judged on patterns of orientations of their own. Every N is given the same number of
batches: with the same number of epochs small N would be short of training, not of orientations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offline_training.laue.domain import PatternRange
from offline_training.laue.evaluation import logits_of
from offline_training.laue.export import data_fingerprint
from offline_training.laue.networks import Tuning, recipe_of
from offline_training.laue.preparation import HELD_OUT, Prepared
from offline_training.laue.simulator import PatternSimulator
from offline_training.laue.study import Study
from offline_training.laue.training import TrainingSettings, train
from offline_training.loop import Progress
from pipelines import rotations
from pipelines.laue.classes import REJECT
from pipelines.laue.features import FeatureMaker, Features

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

MOST_CRYSTALS = 5
"""Of a pattern that is learned, as in the paper."""

RECALL_AT = 0.5
"""What LaueNN's training calls accuracy is Keras' Recall: the true class has at least this probability."""

LEARNED = PatternRange(crystals=(1, MOST_CRYSTALS))
FIVE_CRYSTALS = replace(HELD_OUT, crystals=(MOST_CRYSTALS, MOST_CRYSTALS))
"""Conditions of the patterns that are learned, with other orientations those of validation, and of the
patterns of five crystals on which the paper tests."""

_SPOTS_EACH = 32
_JUDGED_PATTERNS = 100
_JUDGED_SPOTS_EACH = 180
_TRAINED_JUDGED = 10_000


@dataclass(frozen=True)
class CurveSettings:
    """What a curve is told, besides the material and the detector.

    Attributes
    ----------
    orientations : tuple of int
    seeds, first_seed : int
        Trainings of each number, each with orientations of its own.
    recipe : str
    tuning : Tuning
    steps : int
        Batches.
    unlisted : bool
        Learn and judge the spots without a class too, as the reject class; LaueNN leaves them out.
    reuse : bool
        Every crystal has one of the N orientations. If not, N patterns of each number of crystals
        are made of orientations that occur once, which is what the script of the paper does.
    """

    orientations: tuple[int, ...] = (10, 20, 50, 100, 200, 500, 1000, 2000)
    seeds: int = 1
    recipe: str = "lauenn-2022"
    tuning: Tuning = field(default_factory=Tuning)
    steps: int = 1500
    unlisted: bool = False
    reuse: bool = True
    first_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        recipe_of(self.recipe, self.tuning)
        if not self.orientations or not all(1 <= n <= 20_000 for n in self.orientations):
            raise ValueError(f"orientations {self.orientations}: expected numbers from 1 to 20000")
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")


@dataclass(frozen=True)
class Doing:
    """What a curve is at: training number `number` of `trainings`."""

    number: int
    trainings: int
    orientations: int
    seed: int
    training: Progress


class FixedSpots:
    """The spots of a fixed set of patterns, in a random order that begins anew each epoch."""

    def __init__(
        self, simulator: PatternSimulator, patterns: int, unlisted: bool, spots_each: int = 0
    ) -> None:
        """Simulate.

        Parameters
        ----------
        simulator : PatternSimulator
        patterns : int
        unlisted : bool
            Keep the spots of the reject class.
        spots_each : int
            Spots kept of each pattern at random; 0 for all.
        """
        self._seed = simulator.seed
        self._q: list[npt.NDArray[np.float32]] = []
        of, spot, label = [], [], []
        for number in range(patterns):
            made = simulator.pattern(number)
            kept = np.arange(len(made.label)) if unlisted else np.flatnonzero(made.label != REJECT)
            if spots_each and len(kept) > spots_each:
                kept = np.random.default_rng((self._seed, number, 1)).choice(kept, spots_each, replace=False)
            self._q.append(made.q.astype(np.float32))
            of.append(np.full(len(kept), number))
            spot.append(kept)
            label.append(made.label[kept])
        self._pattern = np.concatenate(of).astype(np.int32)
        self._spot = np.concatenate(spot).astype(np.int32)
        self.labels: IntArray = np.concatenate(label).astype(np.int32)
        self._order = (-1, np.empty(0, dtype=np.int64))
        if not len(self):
            raise ValueError("no spot of these patterns has a class: ask for a larger --max-index")

    def __len__(self) -> int:
        """Return the number of spots of an epoch."""
        return len(self._spot)

    def batch(
        self, first: int, count: int, maker: FeatureMaker, spots_each: int = 0
    ) -> tuple[Features, IntArray]:
        """Return `count` times `spots_each` spots; see `training.PatternSource`."""
        size = max(spots_each, 1)
        places = np.arange(first * size, (first + count) * size)
        epochs, at = np.divmod(places, len(self))
        chosen = np.concatenate([self._of_epoch(int(e))[at[epochs == e]] for e in np.unique(epochs)])
        return self.features(chosen, maker)

    def features(self, chosen: npt.NDArray[np.int64], maker: FeatureMaker) -> tuple[Features, IntArray]:
        """Return the features and classes of spots."""
        # Sorted by pattern, so that the spots of one are filled in one call.
        chosen = chosen[np.argsort(self._pattern[chosen], kind="stable")]
        pattern, spot = self._pattern[chosen], self._spot[chosen]
        out = np.zeros((len(chosen), maker.spec.width), dtype=np.float32)
        edges = np.flatnonzero(np.diff(pattern, prepend=-1, append=-1))
        for low, high in itertools.pairwise(edges):
            q = self._q[pattern[low]].astype(np.float64)
            maker.fill(q, np.ascontiguousarray(spot[low:high]), out[low:high])
        return out, self.labels[chosen]

    def _of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self._seed, epoch, 2)).permutation(len(self)))
        return self._order[1]


def _orientations(count: int, seed: int, purpose: int) -> FloatArray:
    # A seed of their own for each purpose: what judges is never among what is learned.
    rng = np.random.default_rng((seed, purpose, 77))
    return np.asarray(rotations.to_matrix(rotations.random_rotations(count, rng)))


def learned_spots(prepared: Prepared, settings: CurveSettings, n: int, seed: int) -> FixedSpots:
    """Return the spots of N patterns of each number of crystals."""
    simulator = PatternSimulator(
        prepared.reflections,
        prepared.classes,
        prepared.nominal,
        prepared.geometry,
        LEARNED,
        seed=1_000_000 * (seed + 1) + n,
        orientations=_orientations(n, seed, 1) if settings.reuse else None,
    )
    return FixedSpots(simulator, n * MOST_CRYSTALS, settings.unlisted)


def judging_spots(
    prepared: Prepared, settings: CurveSettings, patterns: PatternRange, seed: int
) -> FixedSpots:
    """Return the spots of held-out patterns, every crystal of an orientation of its own."""
    simulator = PatternSimulator(
        prepared.reflections,
        prepared.classes,
        prepared.nominal,
        prepared.geometry,
        patterns,
        seed=3_000_017 + seed,
    )
    return FixedSpots(simulator, _JUDGED_PATTERNS, settings.unlisted, _JUDGED_SPOTS_EACH)


def run_curve(
    prepared: Prepared,
    settings: CurveSettings,
    out: Path,
    report: Callable[[Doing], None] = lambda _: None,
) -> dict[str, Any]:
    """Train once for every number of orientations and seed, or go on with what is missing.

    Parameters
    ----------
    prepared : Prepared
    settings : CurveSettings
    out : Path
        Folder of ``curve.json`` and, while a training runs, of its checkpoint.

    Returns
    -------
    dict
        ``curve`` (one row for each number of orientations) and ``baseline``.

    Raises
    ------
    StudyError
        If `out` holds another run.
    TrainingError
        As `training.train`.
    """
    stated = asdict(settings) | {"tuning": settings.tuning.given()}
    asked = {
        name: value for name, value in stated.items() if name not in ("orientations", "seeds", "first_seed")
    }
    asked |= {"learned": asdict(LEARNED), "five_crystals": asdict(FIVE_CRYSTALS)}
    study = Study(out / "curve.json", "laue-curve", prepared.stated() | asked, _summary)
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    todo = [(n, seed) for seed in seeds for n in sorted(set(settings.orientations))]
    for number, (n, seed) in enumerate(todo, start=1):
        if f"{n}/{seed}" in study.parts:
            continue

        def told(p: Progress, number: int = number, n: int = n, seed: int = seed) -> None:
            report(Doing(number, len(todo), n, seed, p))

        study.add(f"{n}/{seed}", _one(prepared, settings, n, seed, out, told))
    return study.summary()


def _one(
    prepared: Prepared,
    settings: CurveSettings,
    n: int,
    seed: int,
    out: Path,
    report: Callable[[Progress], None],
) -> dict[str, Any]:
    recipe = recipe_of(settings.recipe, settings.tuning)
    maker = FeatureMaker(recipe.features)
    learned = learned_spots(prepared, settings, n, seed)
    fingerprint = data_fingerprint(
        prepared.reflections, prepared.classes, prepared.nominal, prepared.geometry, LEARNED, seed
    )
    checkpoint = out / f"curve-{n}-{seed}.pt"
    told = TrainingSettings(settings.recipe, settings.steps, _SPOTS_EACH, seed, settings.tuning)
    network, _, seconds = train(
        learned,
        len(prepared.classes),
        told,
        checkpoint,
        f"{fingerprint} {n} {settings.reuse} {settings.unlisted}",
        report=report,
    )
    some = np.random.default_rng((seed, n)).permutation(len(learned))[:_TRAINED_JUDGED]
    figures = {"training": _accuracy(network, settings, *learned.features(some, maker))}
    for name, patterns in (("validation", LEARNED), ("five_crystals", FIVE_CRYSTALS)):
        judging = judging_spots(prepared, settings, patterns, seed)
        figures[name] = _accuracy(network, settings, *judging.features(np.arange(len(judging)), maker))
    checkpoint.unlink()
    return {
        "orientations": n,
        "seed": seed,
        "spots": len(learned),
        "epochs": settings.steps * told.patterns * _SPOTS_EACH / len(learned),
        **figures,
        "seconds": seconds,
    }


def _accuracy(
    network: nn.Module, settings: CurveSettings, features: Features, labels: IntArray
) -> dict[str, float]:
    logits = logits_of(network, features)
    if not settings.unlisted:
        logits[:, REJECT] = -torch.inf  # no answer that anything was learned of
    probability = torch.softmax(logits, dim=1).numpy()
    classes = logits.shape[1] - (0 if settings.unlisted else 1)
    of_truth = probability[np.arange(len(labels)), labels]
    right = float((probability.argmax(axis=1) == labels).mean())
    most = float(np.bincount(labels).max() / len(labels))
    return {
        "accuracy": right,
        "recall": float((of_truth >= RECALL_AT).mean()),
        "most_frequent_class": most,
        "chance": 1.0 / classes,
        "spots": len(labels),
        "standard_error": math.sqrt(max(right * (1 - right), 1e-12) / len(labels)),
    }


def _summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for n in sorted({part["orientations"] for part in parts}):
        here = [part for part in parts if part["orientations"] == n]
        row: dict[str, Any] = {"orientations": n, "seeds": len(here)}
        row["spots"] = float(np.mean([part["spots"] for part in here]))
        row["epochs"] = float(np.mean([part["epochs"] for part in here]))
        for of in ("training", "validation", "five_crystals"):
            for figure in ("accuracy", "recall"):
                values = np.array([part[of][figure] for part in here])
                row[f"{of}_{figure}"] = float(values.mean())
                row[f"{of}_{figure}_spread"] = float(values.std(ddof=1)) if len(values) > 1 else None
        row["seconds"] = float(np.sum([part["seconds"] for part in here]))
        rows.append(row)
    baseline = {
        name: float(np.mean([part["validation"][name] for part in parts]))
        for name in ("most_frequent_class", "chance")
    }
    return {"curve": rows, "baseline": baseline}
