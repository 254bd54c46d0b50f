"""A small micrograph model whose parts are known in closed form, as a bundle like any other.

A code is the mean grey (8 levels) and the spread (4 levels) of 8 x 8 pixels; the latent vector is their means
over the patch, and those of their squares. Codes are independent of each other under a condition x, with
log p = A + B x but for the norm, fitted to synthetic micrographs.
"""

from __future__ import annotations

import io
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from pipelines.engines.bundle import SCHEMA, Description, Network, load_bundle, write_bundle
from pipelines.micrograph.image_statistics import STATISTICS
from pipelines.micrograph.model_bundle import (
    ALARM_COMPONENTS,
    VAE,
    VQVAE,
    BundleParts,
    BundlePreparation,
    Domain,
    describe,
    pack,
)
from pipelines.micrograph.morphology import morphology
from pipelines.micrograph.novelty import ImageFeatures, fit_novelty
from pipelines.micrograph.posterior import fit_posterior
from pipelines.micrograph.preparation import PreparationParameters, cut_patches, prepare
from pipelines.micrograph.synthetic import MicrographSimulator
from testkit.networks import Graph

PATCH = 64
SIDE = PATCH // 8
CODEBOOK = 32
SHAPE = (192, 192)
CANDIDATES = (0.0, 1.0, 2.0, 3.0)
PREPARATION = PreparationParameters(patch_px=PATCH)
SIMULATOR = MicrographSimulator(shape=SHAPE, ln_cooling_rates=(0.0, 3.0), seed=3)


def read(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The encoder, without a network: codes (n, 8, 8) and latent vectors (n, 4)."""
    cells = patches.reshape(len(patches), SIDE, 8, SIDE, 8).astype(np.float32)
    mean, square = cells.mean(axis=(2, 4)), (cells**2).mean(axis=(2, 4))
    spread = np.sqrt(np.maximum(square - mean**2, 0.0))
    codes = np.clip(mean // 32, 0, 7) * 4 + np.clip(spread // 16, 0, 3)
    parts = [mean, spread, mean**2 / 100, spread**2 / 100]
    return codes.astype(np.int32), np.stack([p.mean(axis=(1, 2)) for p in parts], axis=1)


def encoder(version: int = 1) -> bytes:
    """The same as a network."""
    g = Graph()

    def pooled(x: str) -> str:
        return g.add("AveragePool", x, kernel_shape=[8, 8], strides=[8, 8])

    def level(x: str, width: float, levels: int) -> str:
        whole = g.add("Floor", g.add("Div", x, g.constant(np.array(width, np.float32))))
        return g.add("Clip", whole, g.constant(np.float32(0)), g.constant(np.float32(levels - 1)))

    mean = pooled("image")
    square = pooled(g.add("Mul", "image", "image"))
    variance = g.add("Sub", square, g.add("Mul", mean, mean))
    spread = g.add("Sqrt", g.add("Max", variance, g.constant(np.float32(0))))
    four = g.constant(np.array(4.0, np.float32))
    code = g.add("Add", g.add("Mul", level(mean, 32, 8), four), level(spread, 16, 4))
    code = g.add("Reshape", code, g.constant(np.array([-1, SIDE, SIDE], np.int64)))
    hundred = g.constant(np.array(100.0, np.float32))
    squares = [g.add("Div", g.add("Mul", x, x), hundred) for x in (mean, spread)]
    stacked = g.add("Concat", mean, spread, *squares, axis=1)
    latent = g.add("ReduceMean", stacked, g.constant(np.array([2, 3], np.int64)), keepdims=0)
    if version != 1:  # another network, the same answers
        latent = g.add("Identity", latent)
    return g.model(
        {"image": (TensorProto.FLOAT, ["batch", 1, PATCH, PATCH])},
        {
            "codes": (g.add("Cast", code, to=TensorProto.INT32), TensorProto.INT32, ["batch", SIDE, SIDE]),
            "latent": (latent, TensorProto.FLOAT, ["batch", 4]),
        },
    )


def vae() -> bytes:
    """A further encoder: mean grey and mean square."""
    g = Graph()
    axes = g.constant(np.array([1, 2, 3], np.int64))
    scaled = g.add("Div", "image", g.constant(np.array(255.0, np.float32)))
    parts = [g.add("ReduceMean", x, axes, keepdims=0) for x in (scaled, g.add("Mul", scaled, scaled))]
    column = g.constant(np.array([-1, 1], np.int64))
    mu = g.add("Concat", *(g.add("Reshape", x, column) for x in parts), axis=1)
    return g.model(
        {"image": (TensorProto.FLOAT, ["batch", 1, PATCH, PATCH])},
        {"mu": (mu, TensorProto.FLOAT, ["batch", 2])},
    )


def prior(a: np.ndarray, b: np.ndarray) -> bytes:
    """Log-likelihoods of maps: the histogram of codes times their log-probabilities."""
    g = Graph()
    logits = g.add("Add", g.add("MatMul", "condition", g.constant(b[None])), g.constant(a[None]))
    hot = g.add("Gather", g.constant(np.eye(CODEBOOK, dtype=np.float32)), "codes", axis=0)
    counts = g.add("ReduceSum", hot, g.constant(np.array([1, 2], np.int64)), keepdims=0)
    product = g.add("Mul", counts, g.add("LogSoftmax", logits, axis=1))
    total = g.add("ReduceSum", product, g.constant(np.array([1], np.int64)), keepdims=0)
    return g.model(
        {
            "codes": (TensorProto.INT32, ["batch", SIDE, SIDE]),
            "condition": (TensorProto.FLOAT, ["batch", 1]),
        },
        {"log_likelihood": (total, TensorProto.FLOAT, ["batch"])},
    )


@lru_cache(maxsize=1)
def fitted() -> tuple[BundleParts, np.ndarray, np.ndarray]:
    """Everything that is learnt, from 60 training and 60 held-out images; and A and B."""
    images = [SIMULATOR.sample(number) for number in range(120)]
    rates = np.array([image.condition.ln_cooling_rate for image in images])
    ready = [prepare(image.image, PREPARATION) for image in images]
    patches = [cut_patches(r.image, PATCH).view.reshape(-1, PATCH, PATCH) for r in ready]
    seen = [read(p) for p in patches]
    counts = np.array([np.bincount(c.ravel(), minlength=CODEBOOK) for c, _ in seen[:60]]) + 0.5
    logs = np.log(counts / counts.sum(axis=1, keepdims=True))
    b, a = np.polyfit(rates[:60], logs, 1).astype(np.float32)
    candidates = np.array(CANDIDATES, np.float32)[:, None]
    held_out = [
        ImageFeatures(
            latents, codes, likelihood(codes, a, b), condition=int(np.abs(candidates[:, 0] - rate).argmin())
        )
        for (codes, latents), rate in zip(seen[60:], rates[60:], strict=True)
    ]
    novelty = fit_novelty(
        np.concatenate([latents for _, latents in seen[:60]]),
        held_out,
        training_images=np.repeat(np.arange(60), len(patches[0])),
        training_codes=np.concatenate([codes for codes, _ in seen[:60]]),
        codebook=CODEBOOK,
    )
    names = [f"{value:g}" for value in CANDIDATES]
    posterior = fit_posterior("ln_cooling_rate", names, candidates, held_out, values=CANDIDATES)
    found = [novelty.judge(image) for image in held_out]
    alarm = [
        [*vars_of(r.statistics), morphology(r.filtered).fraction, f.latent_distance, f.code_divergence_bits]
        for r, f in zip(ready[60:], found, strict=True)
    ]
    parts = BundleParts(
        BundlePreparation(parameters=PREPARATION),
        Domain(pixel_size_um=(0.2, 0.3), smallest_px=PATCH, detectors=("SE", "SIM-SE"), about="synthetic"),
        CODEBOOK,
        novelty,
        posterior,
        ALARM_COMPONENTS,
        np.array(alarm),
    )
    return parts, a, b


def likelihood(codes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Nats (n, candidates) of code maps, without a network."""
    logits = a + np.array(CANDIDATES)[:, None] * b
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    counts = np.array([np.bincount(c.ravel(), minlength=CODEBOOK) for c in codes])
    return counts @ log_p.T


def vars_of(statistics: Any) -> list[float]:
    return [getattr(statistics, name) for name in STATISTICS]


def make_bundle(folder: Path, name: str = "two-phase-trial", version: int = 1, **changes: Any) -> str:
    """Write a bundle with all networks; return its sha256. `changes` are those of `BundleParts`."""
    parts, a, b = fitted()
    image = cut_patches(SIMULATOR.sample(0).image, PATCH).view[0, :3][:, None].astype(np.float32)
    codes, latents = read(image[:, 0])
    x = np.array([[0.0], [1.5], [3.0]], np.float32)
    table = likelihood(codes, a, b)
    # Half-way between two candidates nothing is tabulated: the self-test asks for those that are.
    nats = np.array([table[0, 0], table[1, 1], table[2, 3]], np.float32)
    x[1] = CANDIDATES[1]
    scaled = image / 255.0
    mu = np.stack([scaled.mean(axis=(1, 2, 3)), (scaled**2).mean(axis=(1, 2, 3))], axis=1)
    description = Description(
        schema=SCHEMA,
        kind=VQVAE,
        name=name,
        version=str(version),
        about="Greys and their spread.",
        inputs=port("image", "float32", 1, PATCH, PATCH),
        outputs={**port("codes", "int32", SIDE, SIDE), **port("latent", "float32", 4)},
        training={},
        metrics={},
        tolerances={"self_test": 1e-2},
        git_revision="",
        command="",
        networks={
            "prior": Network(
                inputs={**port("codes", "int32", SIDE, SIDE), **port("condition", "float32", 1)},
                outputs=port("log_likelihood", "float32"),
                tolerances={"self_test": 1e-2},
                batch=(1, 5, 64),
            ),
            "vae": Network(
                inputs=port("image", "float32", 1, PATCH, PATCH),
                outputs=port("mu", "float32", 2),
                tolerances={"self_test": 1e-4},
            ),
        },
        **describe(replace(parts, **changes)),
    )
    files = {
        "model.onnx": encoder(version),
        "selftest.npz": arrays(image=image, codes=codes, latent=latents.astype(np.float32)),
        "prior.onnx": prior(a, b),
        "prior.selftest.npz": arrays(codes=codes, condition=x, log_likelihood=nats),
        "vae.onnx": vae(),
        "vae.selftest.npz": arrays(image=image, mu=mu),
        **pack(replace(parts, **changes)),
    }
    write_bundle(folder, description, files)
    return load_bundle(folder).sha256


def make_vae_bundle(folder: Path) -> str:
    """Write a bundle of kind "micrograph-vae" that judges nothing; return its sha256."""
    image = cut_patches(SIMULATOR.sample(0).image, PATCH).view[0, :3][:, None].astype(np.float32)
    scaled = image / 255.0
    mu = np.stack([scaled.mean(axis=(1, 2, 3)), (scaled**2).mean(axis=(1, 2, 3))], axis=1)
    parts = BundleParts(BundlePreparation(parameters=PREPARATION), Domain())
    description = Description(
        schema=SCHEMA,
        kind=VAE,
        name="greys",
        version="1",
        about="Mean grey and mean square.",
        inputs=port("image", "float32", 1, PATCH, PATCH),
        outputs=port("mu", "float32", 2),
        training={},
        metrics={},
        tolerances={"self_test": 1e-4},
        git_revision="",
        command="",
        **describe(parts),
    )
    write_bundle(
        folder, description, {"model.onnx": vae(), "selftest.npz": arrays(image=image, mu=mu), **pack(parts)}
    )
    return load_bundle(folder).sha256


def port(name: str, kind: str, *shape: int) -> dict[str, Any]:
    return {name: {"type": kind, "shape": ["batch", *shape]}}


def arrays(**named: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, **named)
    return content.getvalue()
