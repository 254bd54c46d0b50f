"""Models of micrographs that come along, on images that nothing of them has seen; and what an image costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import msgspec
import numpy as np
import numpy.typing as npt

from bench.data import micrographs_dir
from bench.foreign import cells
from bench.report import ROOT, Report, repetitions_s
from grainwatch.config import EnginesTable
from grainwatch.messages import FrameKey, MicrographResult, Provenance
from offline_training.micrograph.baselines import ContextCoder, order_0_bits, pooled, psnr_dB
from offline_training.micrograph.crops import side_by_side
from pipelines.engines.bundle import Bundle, load_bundle
from pipelines.engines.choice import open_engine
from pipelines.files import open_images
from pipelines.micrograph.acquisition import Acquisition
from pipelines.micrograph.analysis import ImageAnalysis, MicrographAnalysis, MicrographSettings
from pipelines.micrograph.model_bundle import DECODER, FURTHER_VAE, PIXELS_PER_CODE, PRIOR
from pipelines.micrograph.networks import MicrographModel
from pipelines.micrograph.pipeline import result_of
from pipelines.micrograph.posterior import calibration_error, log_score
from pipelines.micrograph.preparation import prepare
from pipelines.micrograph.stream_watch import STREAM_CHANGED, DriftTable, StreamWatch
from pipelines.micrograph.synthetic import MicrographSimulator, Structure

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

BUNDLES = ROOT / "bundles"
SYNTHETIC, SUPERALLOY = "two-phase-synthetic", "ni-superalloy"
ONE_THREAD = EnginesTable(backend="onnxruntime", precision="fp32")
TAKEN = Acquisition(pixel_size_um=0.25, data_bar_px=0, source="bench")
TRAINED_SEED = 0
"""Of the images of the synthetic bundle; those of all rows have other seeds."""
_AT_ONCE = 16
_COUNTED_IMAGES = 190
"""Whose codes the baselines of the PixelCNN are counted in: about 3000 patches."""
_BETWEEN_ALARMS = 1000.0
_BEFORE = 150
"""Images of the known kind before a change: the alarm learns from the first hundred."""
_AT_MOST = 200


def rows(report: Report) -> None:
    """Add the rows."""
    if report.seed == TRAINED_SEED:
        raise ValueError(f"--seed {TRAINED_SEED}: the synthetic bundle was trained on these images")
    synthetic, superalloy = load_bundle(BUNDLES / SYNTHETIC), load_bundle(BUNDLES / SUPERALLOY)
    fresh = _synthetic(report, report.scale(full=60, quick=3))
    _codes(report, synthetic, fresh, f"{len(fresh)} synthetic images, seed {report.seed}")
    _prior(report, synthetic, fresh)
    _real_codes(report, superalloy)
    _judgements(report, synthetic)
    for bundle in (synthetic, superalloy):
        _time(report, bundle)
    _drawing(report, synthetic)


def _synthetic(report: Report, count: int, structure: Structure = "islands") -> list[ByteImage]:
    simulator = MicrographSimulator(seed=report.seed, structure=structure)
    return [sample.image for sample in simulator.samples(0, count)]


def _patches(bundle: Bundle, images: list[ByteImage]) -> ByteImage:
    """Return the patches of images as the networks of a bundle are given them."""
    parameters = MicrographModel(bundle, ONE_THREAD).parts.preparation.parameters
    ready = [prepare(image, parameters, TAKEN).image for image in images]
    return side_by_side(ready, parameters.patch_px)[0]


def _codes_of(bundle: Bundle, patches: ByteImage) -> IntArray:
    encoder = open_engine(bundle, ONE_THREAD)
    parts = [
        encoder.run({"image": patches[i : i + _AT_ONCE, None].astype(np.float32)})["codes"]
        for i in range(0, len(patches), _AT_ONCE)
    ]
    return np.concatenate(parts).astype(np.int64)


def _shown(bundle: Bundle, codes: IntArray) -> ByteImage:
    decoder = open_engine(bundle.network(DECODER), ONE_THREAD)
    parts = [
        decoder.run({"codes": codes[i : i + _AT_ONCE].astype(np.int32)})["image"][:, 0]
        for i in range(0, len(codes), _AT_ONCE)
    ]
    shown: ByteImage = np.clip(np.rint(np.concatenate(parts)), 0.0, 255.0).astype(np.uint8)
    return shown


def _codes(report: Report, bundle: Bundle, images: list[ByteImage], said: str) -> None:
    patches = _patches(bundle, images)
    codes = _codes_of(bundle, patches)
    entries = int(bundle.description.decision["codebook"])
    bits = math.log2(entries)
    pooling = max(psnr_dB(patches, pooled(patches, PIXELS_PER_CODE, bits, order)) for order in range(4))
    name = bundle.description.name
    size = codes[0].size * bits / 8
    where = f"{len(patches)} patches of {said}; {size:g} bytes each"
    report.add(
        f"{name}: held-out patches as their codes show them",
        psnr_dB(patches, _shown(bundle, codes)),
        "dB",
        at_least=pooling,
        peer=f"average pooling to as many bytes, best of splines of order 0 to 3: {pooling:.2f} dB",
        conditions=where,
    )
    report.add(
        f"{name}: codes met in these patches",
        float(len(np.unique(codes))),
        at_least=65,
        peer="published recipe: 4 of 512 after a short training",
        conditions=f"of {entries}",
    )


def _real_codes(report: Report, bundle: Bundle) -> None:
    folder = micrographs_dir()
    held_out = bundle.description.training["data"]["held_out"]
    files = [] if folder is None else sorted((folder / "ni_superalloy" / "images").glob("*.png"))
    files = [path for path in files if any(group in path.name for group in held_out)]
    if not files:
        report.add(f"{bundle.description.name}: held-out patches", "not measured", conditions="no images")
        return
    images = [next(iter(open_images(path))).pixels for path in files]
    said = f"{len(images)} images of {' and '.join(held_out)}, histograms matched"
    _codes(report, bundle, images, said)


def _prior(report: Report, bundle: Bundle, images: list[ByteImage]) -> None:
    codes = _codes_of(bundle, _patches(bundle, images))
    simulator = MicrographSimulator(seed=report.seed)
    rates = [s.condition.ln_cooling_rate for s in simulator.samples(0, len(images))]
    each = np.repeat(np.array(rates, dtype=np.float32), len(codes) // len(images))[:, None]
    prior = open_engine(bundle.network(PRIOR), ONE_THREAD)

    def bits(conditions: npt.NDArray[np.float32]) -> float:
        nats = [
            prior.run(
                {
                    "codes": codes[i : i + _AT_ONCE].astype(np.int32),
                    "condition": np.ascontiguousarray(conditions[i : i + _AT_ONCE]),
                }
            )["log_likelihood"]
            for i in range(0, len(codes), _AT_ONCE)
        ]
        mean = float(np.concatenate(nats).mean())
        return -mean / float(codes[0].size) / math.log(2.0)

    count = report.scale(full=_COUNTED_IMAGES, quick=10)
    counted = [s.image for s in MicrographSimulator(seed=TRAINED_SEED).samples(0, count)]
    known = _codes_of(bundle, _patches(bundle, counted))
    entries = int(bundle.description.decision["codebook"])
    order_0 = float(order_0_bits(known, codes, entries).mean())
    context = float(ContextCoder.fit(known, entries).bits_per_code(codes).mean())
    report.add(
        f"{bundle.description.name}: PixelCNN on held-out images",
        bits(each),
        "bits a code",
        at_most=min(order_0, context),
        peer=f"order 0: {order_0:.3f}, 3 x 3 context: {context:.3f}, both counted in {len(known)} patches",
        conditions=f"{len(codes)} patches of {len(images)} images, seed {report.seed}; under the conditions"
        f" of other images {bits(np.roll(each, len(each) // 2, axis=0)):.3f}",
    )


@dataclass(frozen=True, eq=False)
class _Judged:
    """What a stream of images of one kind brought."""

    results: list[MicrographResult]

    def share(self, flag: str) -> float:
        """Return the share of the images that have a flag."""
        return sum(flag in result.flags for result in self.results) / len(self.results)


def _judged(analysis: MicrographAnalysis, images: Iterable[ByteImage], kind: str) -> _Judged:
    model = analysis.models[0].model
    provenance = Provenance(model=model, config_hash="")
    found = []
    for number, image in enumerate(images):
        key = FrameKey(source="bench", series_uid=kind, frame=number)
        found.append(result_of(analysis.analyse(image, TAKEN), key, provenance))
    return _Judged(found)


def _judgements(report: Report, bundle: Bundle) -> None:
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
    foreign = {
        "labyrinth": _synthetic(report, few, "labyrinth"),
        "particles": _synthetic(report, few, "particles"),
        "cells": cells(report.rng("cells"), few),
    }
    report.add(
        f"{name}: images of the known kind called none of these",
        100 * known.share("none_of_these"),
        "%",
        at_most=7.5,
        conditions=f"{where}; 5 is stated, novel {100 * known.share('novel'):.1f} %",
    )
    strange = {kind: _judged(analysis, images, kind) for kind, images in foreign.items()}
    for kind, judged in strange.items():
        tuned = "what is strange was chosen on this structure" if kind != "cells" else "never used to choose"
        report.add(
            f"{name}: {kind} called none of these",
            100 * judged.share("none_of_these"),
            "%",
            at_least=90.0,
            conditions=f"{few} images, fraction and free path by the same law; {tuned}; novel"
            f" {100 * judged.share('novel'):.0f} %",
        )
    _alarm(report, name, known, strange)


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
        report.add(
            f"{name}: images until a change to {kind} is seen, 95 % of the trials",
            float(np.quantile(needed, 0.95)),
            at_most=20,
            conditions=f"{len(needed)} streams, after {_BEFORE} images of the known kind; median"
            f" {np.median(needed):.0f}; once in {_BETWEEN_ALARMS:g} images by chance",
            data={"needed": needed},
        )


def _until_seen(watch: StreamWatch, judged: _Judged, rng: np.random.Generator) -> int:
    for step, number in enumerate(rng.integers(0, len(judged.results), _AT_MOST), start=1):
        watch.take(judged.results[number])
        if watch.alarm:
            return step
    return _AT_MOST


def _bare(bundle: Bundle) -> Bundle:
    """Return a bundle that gives fingerprints and judges nothing."""
    told = bundle.description
    networks = {name: net for name, net in told.networks.items() if name == FURTHER_VAE}
    decision = {"codebook": told.decision["codebook"], "novelty": None, "posterior": None, "alarm": []}
    return replace(bundle, description=msgspec.structs.replace(told, networks=networks, decision=decision))


def _time(report: Report, bundle: Bundle) -> None:
    image = _synthetic(report, 1)[0]
    name = bundle.description.name
    networks = " and ".join(["VQ-VAE", *(["VAE"] if FURTHER_VAE in bundle.description.networks else [])])
    for what, source, patches, most in (
        ("fingerprint and morphology", _bare(bundle), 16, 80.0),
        ("all: posterior and novelty, too", bundle, 16, 400.0),
        ("all, 4 patches for the posterior", bundle, 4, None),
    ):
        analysis = MicrographAnalysis(
            [MicrographModel(source, ONE_THREAD)], MicrographSettings(posterior_patches=patches)
        )

        def once(analysis: MicrographAnalysis = analysis) -> ImageAnalysis:
            return analysis.analyse(image, TAKEN)

        times = repetitions_s(once, report.scale(full=30, quick=3))
        report.add(
            f"{name}: {what}, one image",
            1e3 * float(np.median(times)),
            "ms",
            at_most=most,
            conditions=f"512 x 512 px of 8 bits, 16 patches, {networks}, one core, median of {len(times)}",
            data={"times_s": times},
        )


def _drawing(report: Report, bundle: Bundle) -> None:
    what = f"{bundle.description.name}: a map of 16 x 16 codes drawn"
    if find_spec("torch") is None:
        report.add(what, "not measured", conditions="torch is not installed (grainwatch[training])")
        return
    import torch

    from offline_training.micrograph.generator import Generator

    torch.set_num_threads(1)
    generator = Generator.open(bundle)
    condition = torch.zeros(1, len(generator.names))
    rng = report.rng("drawing")
    times = repetitions_s(
        lambda: generator.sampler.sample(1, generator.shape, condition, rng), report.scale(full=20, quick=3)
    )
    report.add(
        what,
        1e3 * float(np.median(times)),
        "ms",
        at_most=200.0,
        peer="published program: 256 passes of the whole network for each map",
        conditions=f"one at a time, one core, median of {len(times)}",
        data={"times_s": times},
    )
