"""Networks that name spots: right, honest, and what they are worth to the indexer."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.bounds import mean_at_most_95
from bench.indexing import Tally
from bench.patterns import BAND_KEV, GEOMETRY_C, Condition, pattern, reflections
from bench.report import ROOT, Report, repetitions_s
from offline_training.laue.figures import measure
from offline_training.laue.simulator import PatternSimulator
from pipelines.laue.crystal import load_material
from pipelines.laue.features import LAUENN_2022, FeatureMaker
from pipelines.laue.forward import Pattern
from pipelines.laue.geometry import DetectorArea
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.indexing.parameters import Phase
from pipelines.laue.proposals import Proposer, SpotClassifier

BUNDLES = ROOT / "bundles"
_COVERAGE = {"Cu": 85.0, "ZrO2": 50.0}
_PEER_COVERAGE = {"Cu": "LaueNN 74 %", "ZrO2": "LaueNN 19 %"}


def rows(report: Report) -> None:
    """Add the rows."""
    for folder in sorted(path.parent for path in BUNDLES.glob("*/manifest.sha256")):
        _classes(report, folder)
    for material, grains, found_least, ms_most in (
        ("Cu", 5, 99.0, 30.0),
        ("ZrO2", 1, 98.0, None),
        ("ZrO2", 2, 97.0, None),
        ("ZrO2", 5, 92.0, 200.0),
    ):
        _with_and_without(report, material, grains, found_least, ms_most)
    _nulls(report)
    _speed(report)


def _labels(classifier: SpotClassifier, material: str, made: Pattern) -> npt.NDArray[np.int32]:
    listed = reflections(material)
    of = classifier.classes.of_reflections(listed)
    row = {tuple(hkl): number for number, hkl in enumerate(listed.hkl.tolist())}
    coprime = made.hkl // np.maximum(np.gcd.reduce(made.hkl, axis=1), 1)[:, None]
    return np.array([of[row[tuple(h)]] if any(h) else 0 for h in coprime.tolist()], dtype=np.int32)


def _classes(report: Report, folder: Path) -> None:
    # Made by the forward simulation, not by the simulator that the network learned from.
    classifier = SpotClassifier(folder)
    material = classifier.domain.material
    count = report.scale(full=50, quick=5)
    condition = Condition(material, 5)
    probabilities, labels = [], []
    for number in range(count):
        made = pattern(report, condition, number)
        q = np.ascontiguousarray(GEOMETRY_C.scattering_vectors(made.xy_px))
        probabilities.append(classifier.probabilities(q))
        labels.append(_labels(classifier, material, made))
    m = measure(np.concatenate(probabilities), np.concatenate(labels), classifier.threshold)
    where = f"{count} patterns, {condition}, {m.spots} spots, confident from {m.threshold}; {folder.name}"
    report.add(
        f"{material}: confident spots whose class is right",
        100 * m.confident_right,
        "%",
        at_least=98.0,
        peer="LaueNN 94 % (Cu)" if material == "Cu" else "",
        conditions=where,
        data=m.as_dict(),
    )
    report.add(
        f"{material}: spots with a class that are confident and right",
        100 * m.confident_share,
        "%",
        conditions=where,
    )
    report.add(
        f"{material}: all spots right",
        100 * m.accuracy,
        "%",
        at_least=100 * m.majority_accuracy,
        peer=f"baseline, always the most frequent class: {100 * m.majority_accuracy:.1f} %",
        conditions=where,
    )
    report.add(f"{material}: expected calibration error", m.ece, at_most=0.03, conditions=where)
    report.add(
        f"{material}: spurious or unlisted spots called confident",
        100 * m.rejects_confident,
        "%",
        at_most=2.0,
        peer="LaueNN 32-50 %",
        conditions=where,
    )
    report.add(
        f"{material}: spots on the detector that have a class",
        100 * classifier.classes.coverage,
        "%",
        at_least=_COVERAGE.get(material),
        peer=_PEER_COVERAGE.get(material, ""),
        conditions=f"{len(classifier.classes) - 1} classes, random orientations, the whole domain",
    )


def _indexers(material: str) -> dict[str, Indexer]:
    phase = Phase.prepare(load_material(material), GEOMETRY_C, DetectorArea.of(GEOMETRY_C), BAND_KEV)
    proposer = Proposer(SpotClassifier(BUNDLES / material), phase.scene.reflections, phase.angles)
    return {"with": Indexer((phase,), proposers=(proposer,)), "without": Indexer((phase,))}


def _nulls(report: Report) -> None:
    share = report.scale(full=50, quick=5)
    false = total = 0
    for material, other in (("Cu", Condition("ZrO2", 1)), ("ZrO2", Condition("Cu", 5))):
        named = _indexers(material)["with"]
        for condition in (Condition("Cu", 0, peaks=60), Condition("Cu", 0, peaks=150), other):
            for number in range(share):
                false += len(named.index(pattern(report, condition, number).xy_px))
                total += 1
    report.add(
        "false crystals per 100 null patterns with the network (random peaks; wrong material)",
        100.0 * false / total,
        at_most=1.0,
        peer=report.peer("lauetools.null.60.false", published="LaueTools 0 of 24 patterns"),
        conditions=f"{false} in {total} patterns; 95 % bound {100 * mean_at_most_95(false, total):.2f}",
    )


def _with_and_without(
    report: Report, material: str, grains: int, found_least: float, ms_most: float | None
) -> None:
    indexers = _indexers(material)
    tallies = {name: Tally() for name in indexers}
    count = report.scale(full=50, quick=5)
    condition = Condition(material, grains)
    for indexer in indexers.values():
        indexer.index(pattern(report, condition, count).xy_px)
    for number in range(count):
        made = pattern(report, condition, number)
        for name, indexer in indexers.items():
            tallies[name].add(indexer, made.xy_px, made.ubs)
    named, plain = tallies["with"], tallies["without"]
    label = f"{material} {grains} grain{'s' if grains > 1 else ''} with the network"
    report.add(
        f"{label}: crystals found, count unknown",
        100.0 * named.found / named.truths,
        "%",
        at_least=found_least,
        peer=f"without: {100.0 * plain.found / plain.truths:.1f} %",
        conditions=f"{count} patterns, {condition}, seed {report.seed};"
        f" false: {named.false} with, {plain.false} without",
    )
    with_ms, without_ms = (1e3 * float(np.median(t.times_s)) for t in (named, plain))
    report.add(
        f"{label}: peaks to refined crystals",
        with_ms,
        "ms",
        at_most=ms_most,
        peer=f"without: {without_ms:.0f} ms",
        conditions=f"medians of {count}, the same patterns in turn, one core",
        data={"with_s": named.times_s, "without_s": plain.times_s},
    )


def _speed(report: Report) -> None:
    classifier = SpotClassifier(BUNDLES / "Cu")
    simulator = PatternSimulator(reflections("Cu"), classifier.classes, GEOMETRY_C)
    maker = FeatureMaker(classifier.spec)
    count = report.scale(full=500, quick=50)
    simulator.batch(0, 5, maker, 32)
    start = time.perf_counter()
    simulator.batch(0, count, maker, 32)
    report.add(
        "Cu patterns simulated for training, features of 32 spots each",
        count / (time.perf_counter() - start),
        "/s",
        at_least=500.0,
        peer="LaueNN 71 /s (2 processes)",
        conditions=f"{count} patterns of 1 to 10 crystals over the whole domain, one core",
    )
    rng = report.rng("features")
    plain = FeatureMaker(LAUENN_2022)
    for spots, most in ((150, 1.0), (1600, 30.0)):
        q = rng.normal((-0.7, 0.0, 0.7), 0.3, (spots, 3))
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        times = repetitions_s(lambda: plain.features(q), report.scale(full=20, quick=5))  # noqa: B023
        report.add(
            f"features of all of {spots} spots, every spot a partner",
            1e3 * float(np.median(times)),
            "ms",
            at_most=most,
            conditions=f"900 bins (lauenn-2022), median of {len(times)}, one core",
        )
