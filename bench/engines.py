"""What runs the networks, and in how many bits: time, answers, and the crystals that come of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bench.patterns import BAND_KEV, GEOMETRY_C, Condition, pattern
from bench.report import Report, repetitions_s
from offline_training.laue.scoring import Tally, score
from pipelines.engines.bundle import Bundle, load_bundle
from pipelines.engines.engine import Engine
from pipelines.engines.flavours import EngineError
from pipelines.engines.onnxruntime_engine import OnnxEngine
from pipelines.engines.openvino_engine import OpenVinoEngine
from pipelines.engines.selftest import deviation, read_self_test
from pipelines.engines.shipped import shipped_bundles
from pipelines.laue.crystal import Material, load_material
from pipelines.laue.forward import Pattern
from pipelines.laue.geometry import DetectorArea
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.indexing.parameters import IndexingParameters, Phase
from pipelines.laue.proposals import KIND, Proposer, SpotClassifier

FloatArray = npt.NDArray[np.float64]

_GRAINS = {"Cu": 5, "Si": 5, "Ge": 5, "GaN": 2, "ZrO2": 2}
_PATTERNS = 40
_RUNS = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
"""The first one is what the others are compared with."""

_FRAME = IndexingParameters().max_named
_LARGE = 512


@dataclass
class _Seen:
    """One engine at work on the patterns of its bundle, and what came of it."""

    engine: Engine
    classifier: SpotClassifier
    indexer: Indexer
    crystals: list[FloatArray] = field(default_factory=list)
    classes: list[npt.NDArray[np.int32]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    times_s: list[float] = field(default_factory=list)

    def take(self, made: Pattern, phase: Phase) -> None:
        self.tally.add(self.indexer, made.xy_px, made.ubs)
        # Of the processor: the differences are smaller than what other work on the machine takes.
        start = time.process_time()
        found = self.indexer.index(made.xy_px)
        self.times_s.append(time.process_time() - start)
        self.crystals.append(np.array([c.matrix @ phase.material.B0 for c in found]).reshape(-1, 3, 3))
        q = np.ascontiguousarray(GEOMETRY_C.scattering_vectors(made.xy_px))
        self.classes.append(self.classifier.names(q).best)


def rows(report: Report) -> None:
    """Add the rows."""
    for folder in shipped_bundles(KIND).values():
        _bundle(report, folder.name, load_bundle(folder))


def _bundle(report: Report, name: str, bundle: Bundle) -> None:
    condition = Condition(name, _GRAINS[name])
    count = report.scale(full=_PATTERNS, quick=5)
    material = load_material(name)
    phase = Phase.prepare(material, GEOMETRY_C, DetectorArea.of(GEOMETRY_C), BAND_KEV)
    runs: dict[tuple[str, str], _Seen] = {}
    for backend, precision in _RUNS:
        try:
            engine = _open(bundle, backend, precision)
        except EngineError as error:
            report.add(
                f"{name}, {backend} {precision}: frames with the crystals of float32", f"none: {error}"
            )
            continue
        classifier = _Classifier(bundle, engine)
        proposer = Proposer(classifier, phase.scene.reflections, phase.angles)
        runs[backend, precision] = _Seen(engine, classifier, Indexer((phase,), proposers=(proposer,)))
    for seen in runs.values():
        seen.indexer.index(pattern(report, condition, count).xy_px)
    for number in range(count):
        made = pattern(report, condition, number)
        for seen in runs.values():
            seen.take(made, phase)
    reference = runs[_RUNS[0]]
    peers: dict[str, str] = {}
    for (backend, precision), seen in runs.items():
        label = f"{name}, {backend} {precision}"
        same = _same(seen, reference, material)
        classes, expected = (np.concatenate(s.classes) for s in (seen, reference))
        changed = 100 * float(np.mean(classes != expected))
        off = deviation(seen.engine.run, read_self_test(bundle))
        report.add(
            f"{label}: frames with the crystals of float32",
            100 * same / count,
            "%",
            conditions=f"{count} patterns, {condition}, seed {report.seed}; found {seen.tally.found} of"
            f" {seen.tally.truths} crystals, {seen.tally.false} false; {changed:.2g} % of"
            f" {len(classes)} spots named otherwise; self-test off by {off:.2g}",
            data={"same": same, "found": seen.tally.found, "false": seen.tally.false, "changed_pct": changed},
        )
        saved = 1e3 * (np.array(reference.times_s) - np.array(seen.times_s))
        low, middle, high = np.percentile(saved, [25, 50, 75])
        what = "peaks to refined crystals, processor time"
        median = 1e3 * float(np.median(seen.times_s))
        report.add(
            f"{label}: {what}",
            median,
            "ms",
            peer=peers.get(what, ""),
            conditions=f"median of {count}, one core; pattern by pattern {middle:.2g} ms less than"
            f" onnxruntime fp32, half of them {low:.2g} to {high:.2g} ms",
            data={"times_s": seen.times_s, "saved_ms": saved.tolist()},
        )
        peers.setdefault(what, f"onnxruntime fp32: {median:.3g} ms")
        times = {}
        for rows_, what in ((_FRAME, "the network, spots of a frame"), (_LARGE, "the network, a batch")):
            times[f"{what}, {rows_} rows"] = _times(report, bundle, seen.engine, rows_)
        for what, taken in times.items():
            median = 1e3 * float(np.median(taken))
            report.add(
                f"{label}: {what}",
                median,
                "ms",
                peer=peers.get(what, ""),
                conditions=f"median of {len(taken)}, fastest {1e3 * min(taken):.3g} ms, one core;"
                f" {backend} {seen.engine.about.version}",
                data={"times_s": taken},
            )
            peers.setdefault(what, f"onnxruntime fp32: {median:.3g} ms")


def _open(bundle: Bundle, backend: str, precision: str) -> Engine:
    return OnnxEngine(bundle, precision) if backend == "onnxruntime" else OpenVinoEngine(bundle, precision)


class _Classifier(SpotClassifier):
    """A classifier with exactly this engine: none that stands in for it."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        super().__init__(bundle)
        self._run = engine.run

    def probabilities(self, q: FloatArray, spots: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        return np.asarray(
            self._run({"features": self._maker.features(q, spots)})["probability"], dtype=np.float32
        )


def _same(seen: _Seen, reference: _Seen, material: Material) -> int:
    """Patterns whose crystals are the same ones, none more and none less."""
    same = 0
    for ours, theirs in zip(seen.crystals, reference.crystals, strict=True):
        judged = score(ours, theirs, material)
        same += judged.found == judged.truths == judged.returned
    return same


def _times(report: Report, bundle: Bundle, engine: Engine, rows_: int) -> list[float]:
    given = read_self_test(bundle).inputs
    batch = {name: np.resize(x, (rows_, *x.shape[1:])) for name, x in given.items()}
    return repetitions_s(lambda: engine.run(batch), report.scale(full=50, quick=10))
