"""A search for good numbers of a recipe: random trials, the worse ones given up early.

Successive halving (Jamieson and Talwalkar, AISTATS 2016) with thirds: all trials learn a ninth of
the spots, the best third of them a third, the best third of those all. Section 3 of LaueNN's
supporting information searches a grid; random trials find as much with fewer (Bergstra and
Bengio, JMLR 13, 281, 2012). The recipe as it is takes part in every round, so that what the
search is worth can be read.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from offline_training.errors import DivergedError
from offline_training.laue.domain import PatternRange
from offline_training.laue.evaluation import fit_calibration, logits_of, probabilities_of
from offline_training.laue.export import data_fingerprint
from offline_training.laue.networks import RECIPES, Tuning, recipe_of
from offline_training.laue.preparation import HELD_OUT, Prepared
from offline_training.laue.simulator import PatternSimulator
from offline_training.laue.study import Study
from offline_training.laue.training import TrainingSettings, train
from offline_training.loop import Progress
from pipelines.laue.features import FeatureMaker

_THIRD = 3
_SPOTS_EACH = 32
_JUDGED_PATTERNS, _JUDGED_SPOTS_EACH = 100, 100
_JUDGING_SEED, _FRESH_SEED = 4_000_037, 5_000_011

_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (3e-4, 1e-2),
    "weight_decay": (1e-5, 1e-1),
}
"""Drawn evenly in the logarithm."""

_CHOICES: dict[str, tuple[float, ...]] = {
    "batch": (256, 512, 1024, 2048),
    "dropout": (0.0, 0.05, 0.1, 0.2, 0.3, 0.4),
    "blocks": (1, 2, 3, 4),
    "bin_deg": (0.025, 0.05, 0.1, 0.2),
    "range_deg": (50.0, 70.0, 90.0, 120.0),
}
_WIDTHS = {
    "residual": (128, 192, 256, 384, 512),
    "lauenn-2022": (5, 10, 15, 30),
    "lauenn-2022-cnn": (64, 128, 256, 512),
}


@dataclass(frozen=True)
class SearchSettings:
    """What a search is told, besides the material and the detector.

    Attributes
    ----------
    recipe : str
    vary : dict of str to tuple of float
        Names of a `Tuning`, and the values to try; no values: a usual range.
    grid : bool
        Try all combinations of the values instead of random ones.
    trials : int
        Random trials beside the recipe as it is.
    steps : int
        Batches of 1024 spots of a full training; other batches make as many spots.
    seed : int
    """

    recipe: str = "residual"
    vary: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    grid: bool = False
    trials: int = 18
    steps: int = 800
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        known = recipe_of(self.recipe).values()
        if alien := sorted(self.vary.keys() - known.keys()):
            raise ValueError(f"{', '.join(alien)}: {self.recipe} has {', '.join(known)}")
        if self.grid and not (self.vary and all(self.vary.values())):
            raise ValueError("a grid needs values: --vary learning_rate=0.001,0.003")
        for name in ("trials", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")
        for trial in range(self.count):
            recipe_of(self.recipe, self.tuning(trial))

    @property
    def names(self) -> list[str]:
        """What is varied."""
        return sorted(self.vary or recipe_of(self.recipe).values())

    @property
    def count(self) -> int:
        """Trials, the recipe as it is among them."""
        return 1 + (math.prod(len(v) for v in self.vary.values()) if self.grid else self.trials)

    def tuning(self, trial: int) -> Tuning:
        """Return what a trial sets; trial 0 is the recipe as it is."""
        if trial == 0:
            return Tuning()
        if self.grid:
            names = self.names
            combination = next(
                itertools.islice(itertools.product(*(self.vary[name] for name in names)), trial - 1, None)
            )
            return _tuning(dict(zip(names, combination, strict=True)))
        # A generator for each number: to vary one more leaves the others as they were drawn.
        drawn = {}
        for name in self.names:
            rng = np.random.default_rng((self.seed, trial, *name.encode()))
            choices = self.vary.get(name) or _CHOICES.get(name) or _WIDTHS[self.recipe]
            if name in _RANGES and not self.vary.get(name):
                low, high = np.log(_RANGES[name])
                drawn[name] = float(f"{np.exp(rng.uniform(low, high)):.2g}")
            else:
                drawn[name] = float(choices[int(rng.integers(len(choices)))])
        return _tuning(drawn)


@dataclass(frozen=True)
class Trying:
    """What a search is at: training `number` of at most `trainings`."""

    number: int
    trainings: int
    trial: int
    training: Progress


def _tuning(values: Mapping[str, float]) -> Tuning:
    whole = ("batch", "width", "blocks")
    return Tuning(**{k: int(v) if k in whole else v for k, v in values.items()})  # type: ignore[arg-type]


def rounds_of(settings: SearchSettings) -> list[tuple[int, int]]:
    """Return trials and batches (of 1024 spots) of each round; the last one has the full training."""
    rounds = []
    kept, share = settings.count, _THIRD**2 if settings.count > _THIRD else 1
    while True:
        rounds.append((kept, max(settings.steps // share, 1)))
        if share == 1:
            return rounds
        kept, share = max(math.ceil(kept / _THIRD), 2), share // _THIRD


def run_search(
    prepared: Prepared,
    settings: SearchSettings,
    out: Path,
    budget_s: float = math.inf,
    report: Callable[[Trying], None] = lambda _: None,
) -> dict[str, Any]:
    """Search, or go on with a search.

    Parameters
    ----------
    prepared : Prepared
    settings : SearchSettings
    out : Path
        Folder of ``search.json`` and, while a training runs, of its checkpoint.
    budget_s : float
        No training begins after this time, and one that runs is ended then, to go on next time.
    report : callable

    Returns
    -------
    dict
        ``trials`` (values and rounds of each), ``best``, ``finished`` (all rounds are done).

    Raises
    ------
    StudyError
        If `out` holds another search.
    TrainingError
        As `training.train`; a trial whose loss is no number is not one, it is the worst.
    """
    stated = asdict(settings) | {
        "vary": {name: list(v) for name, v in settings.vary.items()},
        "learned": asdict(PatternRange()),
        "judged": asdict(HELD_OUT),
    }
    study = Study(
        out / "search.json",
        "laue-search",
        prepared.stated() | stated,
        lambda parts: _summary(settings, parts),
    )
    start = time.monotonic()
    rounds = rounds_of(settings)
    total = sum(kept for kept, _ in rounds)
    number = 0
    entered = list(range(settings.count))
    for place, (_, steps) in enumerate(rounds):
        if place:
            entered = _promoted(study, place - 1, entered, rounds[place][0])
        for trial in entered:
            number += 1
            left = budget_s - (time.monotonic() - start)
            if f"{place}/{trial}" in study.parts:
                continue

            def told(p: Progress, number: int = number, trial: int = trial) -> None:
                report(Trying(number, total, trial, p))

            part = _one(prepared, settings, trial, place, steps, out, left, told) if left > 0 else None
            if part is None:
                return study.summary()
            study.add(f"{place}/{trial}", part)
    return study.summary()


def _promoted(study: Study, place: int, entered: Sequence[int], count: int) -> list[int]:
    # The recipe as it is stays, besides the best.
    others = [trial for trial in entered if trial != 0]
    ranked = sorted(others, key=lambda trial: study.parts[f"{place}/{trial}"]["log_loss"])
    return [0, *sorted(ranked[: count - 1])]


def _one(
    prepared: Prepared,
    settings: SearchSettings,
    trial: int,
    place: int,
    steps: int,
    out: Path,
    budget_s: float,
    report: Callable[[Progress], None],
) -> dict[str, Any] | None:
    tuning = settings.tuning(trial)
    recipe = recipe_of(settings.recipe, tuning)
    wanted = max(round(steps * RECIPES[settings.recipe].batch / recipe.batch), 1)
    told = TrainingSettings(settings.recipe, wanted, _SPOTS_EACH, settings.seed, tuning)
    patterns = PatternRange()
    reflections, classes, nominal = prepared.reflections, prepared.classes, prepared.nominal
    fingerprint = data_fingerprint(reflections, classes, nominal, prepared.geometry, patterns, settings.seed)
    checkpoint = out / f"search-{place}-{trial}.pt"
    source = PatternSimulator(reflections, classes, nominal, prepared.geometry, patterns, settings.seed)
    try:
        network, done, seconds = train(source, len(classes), told, checkpoint, fingerprint, budget_s, report)
    except DivergedError:
        checkpoint.unlink(missing_ok=True)
        return _entry(trial, place, told, recipe.batch, 0.0, _DIVERGED)
    if done < wanted:
        return None
    maker = FeatureMaker(recipe.features)
    judged = {
        "": _judged(network, prepared, maker, _JUDGING_SEED),
        "fresh_": _judged(network, prepared, maker, _FRESH_SEED),
    }
    checkpoint.unlink()
    figures = {prefix + name: value for prefix, of in judged.items() for name, value in of.items()}
    return _entry(trial, place, told, recipe.batch, seconds, figures)


_DIVERGED = {"log_loss": 1e3, "accuracy": 0.0, "fresh_log_loss": 1e3, "fresh_accuracy": 0.0, "majority": 0.0}
"""Of a training whose loss was no number."""


def _entry(
    trial: int,
    place: int,
    told: TrainingSettings,
    batch: int,
    seconds: float,
    figures: Mapping[str, float],
) -> dict[str, Any]:
    return {
        "trial": trial,
        "round": place,
        "steps": told.steps,
        "batch": batch,
        "seconds": round(seconds, 1),
        **figures,
    }


def _judged(network: nn.Module, prepared: Prepared, maker: FeatureMaker, seed: int) -> dict[str, float]:
    source = PatternSimulator(
        prepared.reflections, prepared.classes, prepared.nominal, prepared.geometry, HELD_OUT, seed
    )
    x, y = source.batch(0, _JUDGED_PATTERNS, maker, _JUDGED_SPOTS_EACH)
    logits = logits_of(network, x)
    # As it will be in a bundle; two numbers for ten thousand spots fit nothing by heart.
    probability = probabilities_of(logits, *fit_calibration(logits, y))
    of_truth = probability[np.arange(len(y)), y]
    return {
        "log_loss": float(-np.log(np.maximum(of_truth, 1e-12)).mean()),
        "accuracy": float((probability.argmax(axis=1) == y).mean()),
        "majority": float(np.bincount(y).max() / len(y)),
    }


def _summary(settings: SearchSettings, parts: list[dict[str, Any]]) -> dict[str, Any]:
    rounds = rounds_of(settings)
    default = recipe_of(settings.recipe).values()
    trials: dict[int, dict[str, Any]] = {}
    for part in sorted(parts, key=lambda part: (part["round"], part["trial"])):
        trial = part["trial"]
        values = default | settings.tuning(trial).given()
        entry = trials.setdefault(
            trial, {"trial": trial, "values": {name: values[name] for name in settings.names}, "rungs": []}
        )
        entry["rungs"].append({k: v for k, v in part.items() if k not in ("trial", "round")})
    if not trials:
        return {"finished": False, "trials": [], "best": None}
    last = max(len(entry["rungs"]) for entry in trials.values())
    best = min(
        (entry for entry in trials.values() if len(entry["rungs"]) == last),
        key=lambda entry: float(entry["rungs"][-1]["log_loss"]),
    )
    return {
        "finished": len(parts) == sum(kept for kept, _ in rounds),
        "trainings_done": len(parts),
        "trainings": sum(kept for kept, _ in rounds),
        "best": {
            "trial": best["trial"],
            "set": settings.tuning(best["trial"]).given(),
            "steps": best["rungs"][-1]["steps"],
        },
        "trials": sorted(trials.values(), key=lambda entry: int(entry["trial"])),
    }
