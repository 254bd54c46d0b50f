"""What the benchmarks of micrographs share: the models that come along, and images that these never saw."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bench.report import ROOT, Report
from grainwatch.config import EnginesTable
from offline_training.micrograph.crops import side_by_side
from pipelines.engines.bundle import Bundle, load_bundle
from pipelines.engines.choice import open_engine
from pipelines.micrograph.acquisition import Acquisition
from pipelines.micrograph.model_bundle import DECODER
from pipelines.micrograph.networks import MicrographModel
from pipelines.micrograph.preparation import prepare
from pipelines.micrograph.synthetic import MicrographSimulator, Structure

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

BUNDLES = ROOT / "bundles"
SYNTHETIC, SUPERALLOY = "two-phase-synthetic", "ni-superalloy"
ONE_THREAD = EnginesTable(backend="onnxruntime", precision="fp32")
TAKEN = Acquisition(pixel_size_um=0.25, data_bar_px=0, source="bench")
TRAINED_SEED = 0
"""Of the images of the synthetic bundle; those of all rows have other seeds."""
AT_ONCE = 16


def synthetic_bundle(report: Report) -> Bundle:
    """Return the bundle of synthetic images; refuse the seed of those that it was trained on."""
    if TRAINED_SEED in range(report.seed, report.seed + 4):
        raise ValueError(f"--seed {report.seed}: {SYNTHETIC} was trained on these images")
    return load_bundle(BUNDLES / SYNTHETIC)


def synthetic_images(report: Report, count: int, structure: Structure = "islands") -> list[ByteImage]:
    """Return the first micrographs of the seed of a run."""
    simulator = MicrographSimulator(seed=report.seed, structure=structure)
    return [sample.image for sample in simulator.samples(0, count)]


def patches_of(bundle: Bundle, images: list[ByteImage]) -> ByteImage:
    """Return the patches of images as the networks of a bundle are given them."""
    parameters = MicrographModel(bundle, ONE_THREAD).parts.preparation.parameters
    ready = [prepare(image, parameters, TAKEN).image for image in images]
    return side_by_side(ready, parameters.patch_px)[0]


def codes_of(bundle: Bundle, patches: ByteImage) -> IntArray:
    """Return the codes (n, rows, columns) of patches."""
    encoder = open_engine(bundle, ONE_THREAD)
    parts = [
        encoder.run({"image": patches[i : i + AT_ONCE, None].astype(np.float32)})["codes"]
        for i in range(0, len(patches), AT_ONCE)
    ]
    return np.concatenate(parts).astype(np.int64)


def shown(bundle: Bundle, codes: IntArray) -> ByteImage:
    """Return patches as their codes show them."""
    decoder = open_engine(bundle.network(DECODER), ONE_THREAD)
    parts = [
        decoder.run({"codes": codes[i : i + AT_ONCE].astype(np.int32)})["image"][:, 0]
        for i in range(0, len(codes), AT_ONCE)
    ]
    greys: ByteImage = np.clip(np.rint(np.concatenate(parts)), 0.0, 255.0).astype(np.uint8)
    return greys
