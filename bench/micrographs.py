"""Models of micrographs that come along, on images that nothing of them has seen; and what an image costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import numpy as np
import numpy.typing as npt

from bench.data import micrographs_dir
from bench.micrograph_models import (
    AT_ONCE,
    BUNDLES,
    ONE_THREAD,
    SUPERALLOY,
    TAKEN,
    TRAINED_SEED,
    ByteImage,
    codes_of,
    patches_of,
    shown,
    synthetic_bundle,
    synthetic_images,
)
from bench.report import Report, repetitions_s
from offline_training.micrograph.baselines import ContextCoder, order_0_bits, pooled, psnr_dB
from pipelines.engines.bundle import Bundle, load_bundle
from pipelines.engines.choice import open_engine
from pipelines.files import open_images
from pipelines.micrograph.analysis import ImageAnalysis, MicrographAnalysis, MicrographSettings
from pipelines.micrograph.model_bundle import FURTHER_VAE, PIXELS_PER_CODE, PRIOR
from pipelines.micrograph.networks import MicrographModel
from pipelines.micrograph.synthetic import STRUCTURES, MicrographSimulator

_COUNTED_IMAGES = 190
"""Whose codes the baselines of the PixelCNN are counted in: about 3000 patches."""


def rows(report: Report) -> None:
    """Add the rows."""
    synthetic, superalloy = synthetic_bundle(report), load_bundle(BUNDLES / SUPERALLOY)
    fresh = synthetic_images(report, report.scale(full=60, quick=3))
    _codes(report, synthetic, fresh, f"{len(fresh)} synthetic images, seed {report.seed}")
    _prior(report, synthetic, fresh)
    _real_codes(report, superalloy)
    for bundle in (synthetic, superalloy):
        _time(report, bundle)
    _made(report)


def _codes(report: Report, bundle: Bundle, images: list[ByteImage], said: str) -> None:
    patches = patches_of(bundle, images)
    codes = codes_of(bundle, patches)
    entries = int(bundle.description.decision["codebook"])
    bits = math.log2(entries)
    pooling = max(psnr_dB(patches, pooled(patches, PIXELS_PER_CODE, bits, order)) for order in range(4))
    name = bundle.description.name
    size = codes[0].size * bits / 8
    where = f"{len(patches)} patches of {said}; {size:g} bytes each"
    report.add(
        f"{name}: held-out patches as their codes show them",
        psnr_dB(patches, shown(bundle, codes)),
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
    codes = codes_of(bundle, patches_of(bundle, images))
    simulator = MicrographSimulator(seed=report.seed)
    rates = [s.condition.ln_cooling_rate for s in simulator.samples(0, len(images))]
    each = np.repeat(np.array(rates, dtype=np.float32), len(codes) // len(images))[:, None]
    prior = open_engine(bundle.network(PRIOR), ONE_THREAD)

    def bits(conditions: npt.NDArray[np.float32]) -> float:
        nats = [
            prior.run(
                {
                    "codes": codes[i : i + AT_ONCE].astype(np.int32),
                    "condition": np.ascontiguousarray(conditions[i : i + AT_ONCE]),
                }
            )["log_likelihood"]
            for i in range(0, len(codes), AT_ONCE)
        ]
        mean = float(np.concatenate(nats).mean())
        return -mean / float(codes[0].size) / math.log(2.0)

    count = report.scale(full=_COUNTED_IMAGES, quick=10)
    counted = [s.image for s in MicrographSimulator(seed=TRAINED_SEED).samples(0, count)]
    known = codes_of(bundle, patches_of(bundle, counted))
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


def _bare(bundle: Bundle) -> Bundle:
    """Return a bundle that gives fingerprints and judges nothing."""
    told = bundle.description
    networks = {name: net for name, net in told.networks.items() if name == FURTHER_VAE}
    decision = {"codebook": told.decision["codebook"], "novelty": None, "posterior": None, "alarm": []}
    return replace(bundle, description=msgspec.structs.replace(told, networks=networks, decision=decision))


def _time(report: Report, bundle: Bundle) -> None:
    image = synthetic_images(report, 1)[0]
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


def _made(report: Report) -> None:
    for structure in STRUCTURES:
        simulator = MicrographSimulator(seed=report.seed, structure=structure)
        numbers = itertools.count()

        def once(simulator: MicrographSimulator = simulator, numbers: Iterator[int] = numbers) -> object:
            return simulator.sample(next(numbers))

        times = repetitions_s(once, report.scale(full=20, quick=3))
        report.add(
            f"synthetic micrograph made: {structure}",
            1e3 * float(np.median(times)),
            "ms",
            at_most=100.0,
            conditions=f"512 x 512 px, one core, median of {len(times)}",
            data={"times_s": times},
        )
