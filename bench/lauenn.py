"""Networks that name spots: right, honest, and what they are worth to the indexer."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from bench.bounds import mean_at_most_95
from bench.patterns import BAND_KEV, GEOMETRY_C, Condition, pattern, reflections
from bench.report import ROOT, Report, repetitions_s
from offline_training.laue.figures import measure
from offline_training.laue.scoring import Tally
from offline_training.laue.simulator import PatternSimulator
from pipelines.engines.shipped import shipped_bundles
from pipelines.laue.analysis import LaueAnalysis
from pipelines.laue.classes import REJECT
from pipelines.laue.crystal import load_material
from pipelines.laue.features import LAUENN_2022, FeatureMaker
from pipelines.laue.forward import Pattern
from pipelines.laue.geometry import DetectorArea
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.indexing.parameters import Phase
from pipelines.laue.proposals import KIND, Proposer, SpotClassifier

BUNDLES = ROOT / "bundles"
_COVERAGE = {"Cu": 85.0, "ZrO2": 50.0}
_PEER_COVERAGE = {"Cu": "LaueNN 74 %", "ZrO2": "LaueNN 19 %"}
_PATTERNS = 50
_CRYSTALS = 250
"""Crystals behind each figure of the classes, however many stand in one pattern."""


def rows(report: Report) -> None:
    """Add the rows."""
    for folder in shipped_bundles(KIND).values():
        classifier = SpotClassifier(folder)
        for grains in (1, 5, 10):
            _classes(report, classifier, folder.name, grains)
        _coverage(report, classifier, folder.name)
    false = total = 0
    for material, grains, found_least, ms_most in (
        ("Cu", 5, 99.0, 30.0),
        ("Ti", 1, 98.0, None),
        ("Ti", 2, 97.0, None),
        ("Al2O3", 1, 98.0, None),
        ("Al2O3", 2, 97.0, None),
        ("ZrO2", 1, 98.0, None),
        ("ZrO2", 2, 97.0, None),
        ("ZrO2", 5, 92.0, 200.0),
    ):
        if (BUNDLES / material).is_dir():
            false += _with_and_without(report, material, grains, found_least, ms_most)
        else:
            false += _without_a_bundle(report, material, grains, found_least)
        total += report.scale(full=_PATTERNS, quick=5)
    report.add(
        "false crystals per 100 patterns, all of the above",
        100.0 * false / total,
        at_most=0.5,
        conditions=f"{false} in {total} patterns; 95 % bound {100 * mean_at_most_95(false, total):.2f}",
    )
    _nulls(report)
    _speed(report)


def _labels(classifier: SpotClassifier, material: str, made: Pattern) -> npt.NDArray[np.int32]:
    """True class of every peak of a pattern (n,)."""
    listed, span = reflections(material), 2**16
    of = classifier.classes.of_reflections(listed)
    wide = made.hkl.astype(np.int64)
    coprime = wide // np.maximum(np.gcd.reduce(wide, axis=1), 1)[:, None]
    codes, asked = ((h @ [span * span, span, 1]) for h in (listed.hkl.astype(np.int64), coprime))
    order = np.argsort(codes)
    row = order[np.searchsorted(codes[order], asked) % len(order)]
    if not np.array_equal(codes[row][wide.any(axis=1)], asked[wide.any(axis=1)]):
        raise ValueError(f"{material}: a spot of the pattern is in no list of reflections")
    return np.where(wide.any(axis=1), of[row], REJECT).astype(np.int32)


def _classes(report: Report, classifier: SpotClassifier, name: str, grains: int) -> None:
    # Made by the forward simulation, not by the simulator that the network learned from.
    material = classifier.domain.material
    count = max(report.scale(full=_CRYSTALS, quick=20) // grains, 1)
    condition = Condition(material, grains)
    probabilities, labels = [], []
    for number in range(count):
        made = pattern(report, condition, number)
        q = np.ascontiguousarray(GEOMETRY_C.scattering_vectors(made.xy_px))
        probabilities.append(classifier.probabilities(q))
        labels.append(_labels(classifier, material, made))
    m = measure(np.concatenate(probabilities), np.concatenate(labels), classifier.threshold)
    rejects = int(np.count_nonzero(np.concatenate(labels) == REJECT))
    where = (
        f"{count} patterns, {condition}, seed {report.seed}, geometry C, {BAND_KEV[0]:g}-{BAND_KEV[1]:g} keV,"
        f" {m.spots} spots, {rejects} of them spurious or unlisted, confident from {m.threshold};"
        f" bundle {name}"
    )
    label = f"{material} {grains} grain{'s' if grains > 1 else ''}"
    report.add(
        f"{label}: confident spots whose class is right",
        100 * m.confident_right,
        "%",
        at_least=98.0,
        peer="LaueNN 94 % (5 grains)" if material == "Cu" else "",
        conditions=where,
        data=m.as_dict(),
    )
    report.add(
        f"{label}: spots with a class that are confident and right",
        100 * m.confident_share,
        "%",
        conditions=where,
    )
    report.add(
        f"{label}: all spots right",
        100 * m.accuracy,
        "%",
        at_least=100 * m.majority_accuracy,
        peer=f"baseline, always the most frequent class: {100 * m.majority_accuracy:.1f} %",
        conditions=where,
    )
    report.add(f"{label}: expected calibration error", m.ece, at_most=0.03, conditions=where)
    report.add(
        f"{label}: spurious or unlisted spots called confident",
        100 * m.rejects_confident,
        "%",
        at_most=2.0,
        peer="LaueNN 32-50 %",
        conditions=where,
    )


def _coverage(report: Report, classifier: SpotClassifier, name: str) -> None:
    # Measured on whole patterns: lost spots are mostly weak, and weak ones have fewer classes.
    material = classifier.domain.material
    count = report.scale(full=_CRYSTALS, quick=20)
    condition = Condition(material, 1, noise_px=0.0, missing=0.0, spurious=0.0)
    labels = [_labels(classifier, material, pattern(report, condition, n)) for n in range(count)]
    has_class = np.concatenate(labels) != REJECT
    report.add(
        f"{material}: spots on the detector that have a class",
        100 * float(has_class.mean()),
        "%",
        at_least=_COVERAGE.get(material),
        peer=_PEER_COVERAGE.get(material, ""),
        conditions=f"{len(has_class)} spots of {count} crystals, none lost, geometry C, seed {report.seed};"
        f" {len(classifier.classes) - 1} classes, bundle {name}, which states"
        f" {100 * classifier.classes.coverage:.1f} % over its whole domain",
    )


def _without_a_bundle(report: Report, material: str, grains: int, found_least: float) -> int:
    # What a user gets who names the shipped bundles and a material that none of them is for.
    others = [SpotClassifier(path) for path in shipped_bundles(KIND).values()]
    analysis = LaueAnalysis([load_material(material)], GEOMETRY_C, classifiers=others)
    count, condition, tally = report.scale(full=_PATTERNS, quick=5), Condition(material, grains), Tally()
    flags = analysis.analyse_peaks(pattern(report, condition, count).xy_px).flags
    for number in range(count):
        made = pattern(report, condition, number)
        tally.add(analysis.indexer, made.xy_px, made.ubs)
    label = f"{material} {grains} grain{'s' if grains > 1 else ''}, no bundle"
    report.add(
        f"{label}: crystals found, count unknown",
        100.0 * tally.found / tally.truths,
        "%",
        at_least=found_least,
        conditions=f"{count} patterns, {condition}, seed {report.seed}; the classical way beside"
        f" {len(others)} bundles of other materials, flags of the frames: {', '.join(flags) or 'none'};"
        f" {tally.false} false",
        data={"found": tally.found, "truths": tally.truths, "false": tally.false},
    )
    report.add(
        f"{label}: peaks to refined crystals",
        1e3 * float(np.median(tally.times_s)),
        "ms",
        conditions=f"median of {count}, one core",
        data={"times_s": tally.times_s},
    )
    return tally.false


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
) -> int:
    indexers = _indexers(material)
    tallies = {name: Tally() for name in indexers}
    count = report.scale(full=_PATTERNS, quick=5)
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
    return named.false


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
