"""From a material and a calibration to a bundle: classes, training, judgement, export."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grainwatch import __version__
from offline_training.laue.domain import PatternRange
from offline_training.laue.evaluation import fit_calibration, logits_of, probabilities_of
from offline_training.laue.export import data_fingerprint, domain_of, export_bundle
from offline_training.laue.figures import choose_threshold, measure
from offline_training.laue.networks import Tuning, recipe_of
from offline_training.laue.preparation import HELD_OUT, prepare
from offline_training.laue.simulator import PatternSimulator
from offline_training.laue.training import TrainingSettings, train
from offline_training.loop import Progress, use_cores
from pipelines.laue.features import FeatureMaker

CHECKPOINT = "checkpoint.pt"

_JUDGED_PATTERNS = 100
_MAX_FITTED, _MAX_JUDGED = 20000, 30000
_CALIBRATION_SEED, _HELD_OUT_SEED = 1_000_001, 2_000_003

# The promise is 98 % and 2 %; what is chosen on one sample must hold on another.
_RIGHT, _REJECTS = 0.987, 0.014


@dataclass(frozen=True)
class BundleRequest:
    """What is to be trained; see ``grainwatch train laue``."""

    material: str
    geometry: str
    recipe: str = "residual"
    steps: int = 800
    spots_each: int = 32
    coverage: float = 0.86
    energy_keV: tuple[float, float] = (5.0, 22.0)
    seed: int = 0
    tuning: Tuning = field(default_factory=Tuning)


def make_bundle(
    request: BundleRequest,
    out: Path,
    command: str,
    budget_s: float = math.inf,
    cores: int = 2,
    report: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Train and write a bundle; return its metrics.

    Raises
    ------
    ValueError
        If the material, the calibration or a setting cannot be used.
    TrainingError
        If the loss is no number, or `out` holds the checkpoint of another training.
    """
    settings = TrainingSettings(
        request.recipe, request.steps, request.spots_each, request.seed, request.tuning
    )
    begin = time.monotonic()
    use_cores(cores)
    prepared = prepare(
        request.material, request.geometry, request.energy_keV, coverage=request.coverage, seed=request.seed
    )
    reflections, classes = prepared.reflections, prepared.classes
    nominal, geometry = prepared.nominal, prepared.geometry
    patterns = PatternRange()

    def simulator(of: PatternRange, seed: int) -> PatternSimulator:
        return PatternSimulator(reflections, classes, nominal, geometry, of, seed)

    fingerprint = data_fingerprint(reflections, classes, nominal, geometry, patterns, request.seed)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    network, done, seconds = train(
        simulator(patterns, request.seed),
        len(classes),
        settings,
        out / CHECKPOINT,
        fingerprint,
        budget_s,
        report,
    )
    trained = time.monotonic()

    spec = recipe_of(request.recipe, request.tuning).features
    maker = FeatureMaker(spec)
    x, y = _sample(simulator(HELD_OUT, _CALIBRATION_SEED), maker, _MAX_FITTED)
    logits = logits_of(network, x)
    calibration = fit_calibration(logits, y)
    threshold = choose_threshold(probabilities_of(logits, *calibration), y, _RIGHT, _REJECTS)
    x, y = _sample(simulator(HELD_OUT, _HELD_OUT_SEED), maker, _MAX_JUDGED)
    probability = probabilities_of(logits_of(network, x), *calibration)
    metrics = {
        "held_out": measure(probability, y, threshold).as_dict(),
        "conditions": asdict(HELD_OUT) | {"geometry": "the whole domain", "seed": _HELD_OUT_SEED},
        "baseline": "majority_accuracy: every spot is given the most frequent class",
        "coverage_on_detector": classes.coverage,
        "classes": len(classes),
        # From the first simulated pattern to the figures above; an interruption does not count.
        "time": {
            "total_s": round(seconds + started - begin + time.monotonic() - trained, 1),
            "training_s": round(seconds, 1),
            "patterns_per_s": round(done * settings.patterns / max(seconds, 1e-9), 1),
            "cores": cores,
        },
    }
    export_bundle(
        out,
        network,
        calibration,
        threshold,
        spec,
        classes,
        x,
        domain=domain_of(reflections, nominal, geometry, patterns),
        training=settings.as_dict()
        | {
            "steps_done": done,
            "data_sha256": fingerprint,
            "patterns": asdict(patterns),
            "seconds": round(seconds, 1),
            "cores": cores,
            "torch": str(torch.__version__),
        },
        metrics=metrics,
        version=__version__,
        command=command,
    )
    return metrics


def _sample(
    simulator: PatternSimulator, maker: FeatureMaker, spots: int
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int32]]]:
    # Many patterns count more than many spots of each: the spots of one pattern share their luck.
    return simulator.batch(0, _JUDGED_PATTERNS, maker, spots // _JUDGED_PATTERNS)
