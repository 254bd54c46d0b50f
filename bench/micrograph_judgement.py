"""What a model says of images that it never saw: cooling rate, whether they are strange, when they change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.data import micrographs_dir
from bench.foreign import cells
from bench.micrograph_models import ONE_THREAD, TAKEN, ByteImage, synthetic_bundle, synthetic_images
from bench.report import Report
from grainwatch.messages import FrameKey, MicrographResult, Provenance
from pipelines.files import open_images
from pipelines.micrograph.analysis import MicrographAnalysis
from pipelines.micrograph.networks import MicrographModel
from pipelines.micrograph.pipeline import result_of
from pipelines.micrograph.posterior import calibration_error, log_score
from pipelines.micrograph.stream_watch import STREAM_CHANGED, DriftTable, StreamWatch
from pipelines.micrograph.synthetic import MicrographSimulator

_BETWEEN_ALARMS = 1000.0
_BEFORE = 150
"""Images of the known kind before a change: the alarm learns from the first hundred."""
_AT_MOST = 200


@dataclass(frozen=True, eq=False)
class _Judged:
    """What a stream of images of one kind brought."""

    results: list[MicrographResult]

    def share(self, flag: str) -> float:
        """Return the share of the images that have a flag."""
        return sum(flag in result.flags for result in self.results) / len(self.results)

    def by_quarter(self, flag: str, rates: npt.NDArray[np.float64]) -> str:
        """Return that share in each quarter of the cooling rates, in words: it is stated for all together."""
        has = np.array([flag in result.flags for result in self.results])
        quarters = np.array_split(has[np.argsort(rates)], 4)
        return ", ".join(f"{100 * float(quarter.mean()):.1f}" for quarter in quarters) + " %"


@dataclass(frozen=True)
class _Foreign:
    """Images of a kind that the model was not trained on."""

    name: str
    images: list[ByteImage]
    said: str


def _judged(analysis: MicrographAnalysis, images: Iterable[ByteImage], kind: str) -> _Judged:
    model = analysis.models[0].model
    provenance = Provenance(model=model, config_hash="")
    found = []
    for number, image in enumerate(images):
        key = FrameKey(source="bench", series_uid=kind, frame=number)
        found.append(result_of(analysis.analyse(image, TAKEN), key, provenance))
    return _Judged(found)


def rows(report: Report) -> None:
    """Add the rows."""
    bundle = synthetic_bundle(report)
    analysis = MicrographAnalysis([MicrographModel(bundle, ONE_THREAD)])
    name = bundle.description.name
    count = report.scale(full=2000, quick=12)
    simulator = MicrographSimulator(seed=report.seed + 1)
    drawn: list[float] = []

    def one_by_one() -> Iterator[ByteImage]:
        for sample in simulator.samples(0, count):
            drawn.append(sample.condition.ln_cooling_rate)
            yield sample.image

    known = _judged(analysis, one_by_one(), "known")
    posterior = analysis.models[0].parts.posterior
    assert posterior is not None
    values = np.array(posterior.values)
    rates = np.array(drawn)
    true = np.abs(rates[:, None] - values).argmin(axis=1)
    said = [r.posterior for r in known.results]
    table = np.array([p.probability for p in said if p is not None])
    where = (
        f"{count} synthetic images of ln(cooling rate) {values[0]:.2g} to {values[-1]:.2g}, seed"
        f" {simulator.seed}, {len(values)} candidates, {analysis.settings.posterior_patches} patches an image"
    )
    report.add(
        f"{name}: logarithmic score of the posterior",
        log_score(table, true),
        "nats",
        at_least=-math.log(len(values)),
        peer=f"flat guess: {-math.log(len(values)):.3f}",
        conditions=where,
    )
    report.add(
        f"{name}: calibration error of the posterior",
        calibration_error(table, true),
        at_most=0.05,
        conditions=f"{where}; most probable candidate right in"
        f" {100 * float((table.argmax(axis=1) == true).mean()):.0f} %",
    )
    means = np.array([p.mean for p in said if p is not None and p.mean is not None])
    report.add(
        f"{name}: cooling rate read from an image, off by (rms of ln)",
        float(np.sqrt(np.mean(np.square(means - rates)))),
        peer=f"always the mean: {float(rates.std()):.3f}",
        conditions=where,
    )
    few = report.scale(full=100, quick=4)
    chosen_on = "fraction and free path by the same law; what is strange was chosen on this structure"
    foreign = [
        _Foreign("labyrinth", synthetic_images(report, few, "labyrinth"), chosen_on),
        _Foreign("particles", synthetic_images(report, few, "particles"), chosen_on),
        _Foreign(
            "cells",
            cells(report.rng("cells"), few),
            "fraction and free path by the same law; never used to choose",
        ),
        *_micrographs(few),
    ]
    report.add(
        f"{name}: images of the known kind called none of these",
        100 * known.share("none_of_these"),
        "%",
        at_most=7.5,
        conditions=f"{where}; 5 is stated, novel {100 * known.share('novel'):.1f} %; from the slowest"
        f" to the fastest quarter {known.by_quarter('none_of_these', rates)}, novel"
        f" {known.by_quarter('novel', rates)}",
    )
    strange = {kind.name: _judged(analysis, kind.images, kind.name) for kind in foreign}
    for kind in foreign:
        judged = strange[kind.name]
        report.add(
            f"{name}: {kind.name} called none of these",
            100 * judged.share("none_of_these"),
            "%",
            at_least=90.0,
            conditions=f"{len(kind.images)} images, {kind.said}; novel {100 * judged.share('novel'):.0f} %",
        )
    _alarm(report, name, known, strange)


def _micrographs(most: int) -> list[_Foreign]:
    """Return real images of other materials, where they are: the wrong specimen in the microscope."""
    folder = micrographs_dir()
    if folder is None:
        return []
    found = []
    for kind in ("ni_superalloy", "uhc_steel"):
        files = sorted(
            path for path in (folder / kind / "images").iterdir() if path.suffix in (".png", ".jpg")
        )
        images = [
            next(iter(open_images(path))).pixels for path in files[:: max(1, len(files) // most)][:most]
        ]
        found.append(_Foreign(f"micrographs of {kind}", images, "another material; never used to choose"))
    return found


def _alarm(report: Report, name: str, known: _Judged, strange: dict[str, _Judged]) -> None:
    rng = report.rng("alarm")
    table = DriftTable(images_between_false_alarms=_BETWEEN_ALARMS)
    length = report.scale(full=100_000, quick=2000)
    stream = rng.integers(0, len(known.results), length)
    alarms, watch = 0, StreamWatch(table, 0)
    for number in stream:
        result, _ = watch.take(known.results[number])
        if STREAM_CHANGED in result.flags:
            alarms, watch = alarms + 1, StreamWatch(table, 0)
    report.add(
        f"{name}: images between false alarms of the drift alarm",
        length / max(alarms, 1),
        at_least=0.8 * _BETWEEN_ALARMS,
        conditions=f"{_BETWEEN_ALARMS:g} stated; {alarms} alarms in {length} draws with replacement from"
        f" {len(known.results)} images of the known kind, begun anew after each",
    )
    trials = report.scale(full=50, quick=3)
    for kind, judged in strange.items():
        needed = []
        for _ in range(trials):
            watch = StreamWatch(table, 0)
            for number in rng.integers(0, len(known.results), _BEFORE):
                watch.take(known.results[number])
            if watch.alarm:
                continue  # false, and counted above
            needed.append(_until_seen(watch, judged, rng))
        missed = sum(steps > _AT_MOST for steps in needed)
        report.add(
            f"{name}: images until a change to {kind} is seen, 95 % of the trials",
            float(np.quantile(needed, 0.95, method="higher")) if needed else math.nan,
            at_most=20,
            conditions=f"{len(needed)} streams, after {_BEFORE} images of the known kind; median"
            f" {np.median(needed) if needed else math.nan:.0f}; {missed} had not seen it after {_AT_MOST};"
            f" once in {_BETWEEN_ALARMS:g} images by chance",
            data={"needed": needed},
        )


def _until_seen(watch: StreamWatch, judged: _Judged, rng: np.random.Generator) -> int:
    """Return after how many images a change is seen, more than `_AT_MOST` where it is not."""
    for step, number in enumerate(rng.integers(0, len(judged.results), _AT_MOST), start=1):
        watch.take(judged.results[number])
        if watch.alarm:
            return step
    return _AT_MOST + 1
