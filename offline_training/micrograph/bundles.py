"""From images to a bundle of a VQ-VAE or a VAE: training, judgement beside baselines, export."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from offline_training.export import git_revision
from offline_training.loop import Progress
from offline_training.micrograph.baselines import code_bytes, pooled
from offline_training.micrograph.crops import side_by_side
from offline_training.micrograph.data import Data, DataRequest, load_data
from offline_training.micrograph.export import (
    Coder,
    Exported,
    Means,
    export_decoder,
    export_encoder,
    export_means,
)
from offline_training.micrograph.figures import codes_of, vae_figures, vqvae_figures
from offline_training.micrograph.plots import plot_codebook, plot_latents, plot_reconstructions
from offline_training.micrograph.references import fit_parts
from offline_training.micrograph.soft_morphology import brought_in
from offline_training.micrograph.training import Trained, TrainingSettings, train_vae, train_vqvae
from offline_training.micrograph.vae import Vae
from offline_training.micrograph.vqvae import VqVae
from pipelines.engines.bundle import SCHEMA, Bundle, BundleError, Description, load_bundle, write_bundle
from pipelines.engines.choice import open_engine
from pipelines.micrograph.matching import ReferenceHistogram
from pipelines.micrograph.model_bundle import DECODER, FURTHER_VAE, VAE, VQVAE, BundleParts, describe, pack
from pipelines.micrograph.synthetic import MicrographSimulator

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

CHECKPOINT: Final = "checkpoint.pt"
EVALUATION: Final = "evaluation.json"

_SAFE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_JUDGED_PATCHES: Final = 1500
_TYPICAL_CODES: Final = 16
_SELF_TEST_SEED: Final = 1_000_003
_TYPICAL_OF: Final = 200


@dataclass(frozen=True)
class Naming:
    """What a bundle is called, and the command that makes it again.

    Raises
    ------
    ValueError
        If a registry of models would not take name or version.
    """

    name: str
    version: str
    command: str = ""

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), ("version", self.version)):
            if not _SAFE.fullmatch(text):
                raise ValueError(
                    f"--{what} {text!r}: expected letters, digits and . _ + -, at most 100, a letter or digit"
                    " first"
                )


@dataclass(frozen=True)
class Request:
    """What is to be trained; see ``grainwatch train vqvae``."""

    data: DataRequest
    settings: TrainingSettings
    naming: Naming


@dataclass(frozen=True)
class Watching:
    """Who is told: of progress, and of what should be known, in words."""

    progress: Callable[[Progress], None] = lambda _: None
    tell: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Made:
    """A bundle that was written, and its metrics."""

    bundle: Bundle
    metrics: dict[str, Any]
    pictures: list[str] = field(default_factory=list)


def make_vqvae(request: Request, out: Path, watching: Watching | None = None) -> Made:
    """Train a VQ-VAE and write its bundle.

    Raises
    ------
    ValueError
        If the images or a setting cannot be used.
    TrainingError
        As `loop.fit`; or if no backend could be tested with the encoder.
    """
    watching = watching or Watching()
    data = load_data(request.data)
    for line in data.text():
        watching.tell(line)
    out.mkdir(parents=True, exist_ok=True)
    seed = request.settings.seed
    model, trained = train_vqvae(data.crops(seed), request.settings, out / CHECKPOINT, watching.progress)
    patches, of = judged_patches(data)
    tested = self_test_patches(data)
    encoder, margin = export_encoder(model, tested)
    decoder = export_decoder(model, codes_of(model, tested[:8]))
    base = in_memory(VQVAE, encoder, {DECODER: decoder})
    coder = Coder(base)
    codes, latents = coder.read(patches)
    seen = coder.shown(codes)
    n_codes = model.sizes.codes
    parts, found, remarks = fit_parts(data, lambda p: coder.read(p)[::-1], n_codes)
    if request.settings.recipe["morphology"] > 0.0:
        weight = brought_in(trained.steps, request.settings.steps)
        if weight < 1.0:
            remarks.append(
                f"errors of morphology reached {100 * weight:.0f} % of their weight: the training ended after"
                f" {trained.steps} of {request.settings.steps} steps; fewer --steps, or more --minutes"
            )
    metrics = {
        "held_out": asdict(vqvae_figures(patches, codes, seen, n_codes)),
        "conditions": conditions_of(data, len(patches)),
        "baseline": "pooling_psnr_dB: average pooling at the same length,"
        f" {code_bytes(data.patch_px, data.patch_px, n_codes):g} bytes a patch; mean_psnr_dB: its mean grey",
        "codes": n_codes,
        "self_test_margin": margin,
        **found,
        **effort(trained, request.settings),
    }
    description = description_of(
        VQVAE,
        request.naming,
        f"Describes micrographs ({parts.domain.about}) by {n_codes} codes of 8 x 8 pixels",
        encoder,
        {DECODER: decoder},
        parts,
        training={"data": data.record(), "vqvae": record_of(request.settings, trained)},
        metrics=metrics,
    )
    title = f"{request.naming.name}, held-out images"
    some = _spread(len(patches))
    by_pooling = _pooled(patches[some], n_codes)
    plot_reconstructions(
        [("held out", patches[some]), ("by codes", seen[some]), ("pooled", by_pooling)],
        f"{title}: {metrics['held_out']['psnr_dB']:.2f} dB by codes,"
        f" {metrics['held_out']['pooling_psnr_dB']:.2f} dB pooled",
        out / "reconstructions.png",
    )
    _plot_codebook(model, coder, codes, title, out / "codebook.png")
    plot_latents(
        latents.astype(np.float64), data.images.conditions, of, f"{title}, patches", out / "latents.png"
    )
    bundle = finish(out, description, {**encoder.files(), **decoder.files(DECODER)}, parts)
    write_evaluation(metrics, remarks, watching, out)
    return Made(bundle, metrics, ["reconstructions.png", "codebook.png", "latents.png"])


def make_vae(
    request: Request, out: Path, into: Bundle | None = None, watching: Watching | None = None
) -> Made:
    """Train a VAE and write its bundle, or a bundle of a VQ-VAE to which it is added.

    Parameters
    ----------
    request : Request
    out : Path
    into : Bundle, optional
        Of a VQ-VAE; it stays as it is, the one that is written has both.
    watching : Watching, optional

    Raises
    ------
    ValueError, TrainingError
        See `make_vqvae`.
    """
    watching = watching or Watching()
    if into is not None and into.description.kind != VQVAE:
        raise ValueError(f"{into.folder}: is a bundle of kind {into.description.kind}, expected {VQVAE}")
    if into is not None:
        _check_out(into, out)
    data = load_data(request.data, into)
    for line in data.text():
        watching.tell(line)
    out.mkdir(parents=True, exist_ok=True)
    seed = request.settings.seed
    model, trained = train_vae(data.crops(seed), request.settings, out / CHECKPOINT, watching.progress)
    patches, of = judged_patches(data)
    exported = export_means(model, self_test_patches(data))
    means = Means(in_memory(VAE, exported, {}))
    training_patches, _ = data.patches(data.parts.trained_on)
    figures, seen = vae_figures(model, patches, training_patches)
    metrics: dict[str, Any] = {
        "held_out": asdict(figures),
        "conditions": conditions_of(data, len(patches)),
        "baseline": "pca_psnr_dB: as many principal components of training patches as latent numbers;"
        " pooling_psnr_dB: average pooling to as many numbers",
        **effort(trained, request.settings),
    }
    record = record_of(request.settings, trained)
    title = f"{request.naming.name}, held-out images"
    if into is None:
        parts, found, remarks = fit_parts(data, lambda p: (means.of(p), None), 0)
        metrics |= found
        description = description_of(
            VAE,
            request.naming,
            f"Describes micrographs ({parts.domain.about}) by {model.sizes.latent} numbers a patch",
            exported,
            {},
            parts,
            training={"data": data.record(), "vae": record},
            metrics=metrics,
        )
        bundle_files, further = exported.files(), parts
        _plot_vae(model, patches, seen, title, out)
        made = finish(out, description, bundle_files, further)
    else:
        remarks = []
        _plot_vae(model, patches, seen, title, out)
        made = add_network(
            into,
            out,
            request.naming,
            {FURTHER_VAE: exported},
            training={"vae": {**record, "data": data.record()}},
            metrics={"vae": metrics},
        )
    latents = means.of(patches).astype(np.float64)
    plot_latents(latents, data.images.conditions, of, f"{title}, patches", out / "latents.png")
    write_evaluation(metrics, remarks, watching, out)
    return Made(made, metrics, ["reconstructions.png", "latents.png"])


def judged_patches(data: Data) -> tuple[ByteImage, IntArray]:
    """Return patches of the images that are judged by, evenly chosen where there are very many."""
    patches, of = data.patches(data.parts.judged)
    some = np.linspace(0, len(patches) - 1, min(len(patches), _JUDGED_PATCHES)).astype(np.int64)
    return patches[some], of[some]


def self_test_patches(data: Data) -> ByteImage:
    """Return patches that the self-tests of networks are made of: synthetic ones, in the greys of the data.

    A bundle shows nothing of the images that it was made of, so that it can be passed on.
    """
    simulator = MicrographSimulator(shape=(4 * data.patch_px, 4 * data.patch_px), seed=_SELF_TEST_SEED)
    trained = [data.seen[i] for i in data.parts.trained_on]
    greys = ReferenceHistogram.typical(trained[:_TYPICAL_OF])
    images = [greys.match(sample.image) for sample in simulator.samples(0, 16)]
    return side_by_side(images, data.patch_px)[0]


def conditions_of(data: Data, patches: int) -> dict[str, Any]:
    """Return what figures hold for."""
    return {
        "images": len(data.parts.judged),
        "patches": patches,
        "groups": len({data.images.groups[i] for i in data.parts.judged}),
        "calibrated_elsewhere": data.parts.calibrated_elsewhere,
        "synthetic": data.images.about["synthetic"],
    }


def effort(trained: Trained, settings: TrainingSettings) -> dict[str, Any]:
    """Return what a training took."""
    return {
        "time": {
            "training_s": round(trained.seconds, 1),
            "steps": trained.steps,
            "crops": trained.steps * settings.recipe.whole("batch"),
            "cores": torch.get_num_threads(),
        }
    }


def record_of(settings: TrainingSettings, trained: Trained) -> dict[str, Any]:
    """Return what a network was trained with."""
    return {
        **settings.recipe.as_dict(),
        "steps": settings.steps,
        "steps_done": trained.steps,
        "seed": settings.seed,
        "torch": str(torch.__version__),
    }


def description_of(
    kind: str,
    naming: Naming,
    about: str,
    first: Exported,
    networks: Mapping[str, Exported],
    parts: BundleParts | None,
    *,
    training: dict[str, Any],
    metrics: dict[str, Any],
) -> Description:
    """Return what ``bundle.json`` will hold."""
    described = first.described
    told = {"preparation": {}, "domain": {}, "decision": {}} if parts is None else describe(parts)
    return Description(
        schema=SCHEMA,
        kind=kind,
        name=naming.name,
        version=naming.version,
        about=about,
        inputs=described.inputs,
        outputs=described.outputs,
        tolerances=described.tolerances,
        batch=described.batch,
        networks={name: exported.described for name, exported in networks.items()},
        training=training,
        metrics=metrics,
        git_revision=git_revision(),
        command=naming.command,
        **told,
    )


def in_memory(kind: str, first: Exported, networks: Mapping[str, Exported]) -> Bundle:
    """Return networks as a bundle that lies nowhere, so that what is judged is what will run."""
    description = description_of(
        kind, Naming("unfinished", "0"), "", first, networks, None, training={}, metrics={}
    )
    files = first.files()
    for name, exported in networks.items():
        files |= exported.files(name)
    return Bundle(Path("(unfinished bundle)"), description, "", files)


def finish(out: Path, description: Description, files: dict[str, bytes], parts: BundleParts | None) -> Bundle:
    """Write a bundle, read it again, and run every network's self-test."""
    write_bundle(out, description, {**files, **({} if parts is None else pack(parts))})
    bundle = load_bundle(out)
    for network in bundle.networks():
        open_engine(network)
    return bundle


def add_network(
    base: Bundle,
    out: Path,
    naming: Naming,
    networks: Mapping[str, Exported],
    *,
    training: dict[str, Any],
    metrics: dict[str, Any],
    parts: BundleParts | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Bundle:
    """Write a bundle that has all that another one has, and more networks.

    Parameters
    ----------
    parts : BundleParts, optional
        In place of the base's.
    files : mapping of str to bytes, optional
        Further ones.

    Raises
    ------
    BundleError
        If `out` is where the base lies.
    """
    _check_out(base, out)
    old = base.description
    described = msgspec.structs.replace(
        old,
        name=naming.name,
        version=naming.version,
        networks={**old.networks, **{name: each.described for name, each in networks.items()}},
        training={**old.training, **training, "added_to": {"sha256": base.sha256, "version": old.version}},
        metrics={**old.metrics, **metrics},
        git_revision=git_revision(),
        command=" && ".join(filter(None, (old.command, naming.command))),
    )
    if parts is not None:
        described = msgspec.structs.replace(described, **describe(parts))
    contents = {name: content for name, content in base.files.items() if name != "bundle.json"}
    for name, exported in networks.items():
        contents |= exported.files(name)
    return finish(out, described, {**contents, **(files or {})}, parts)


def _check_out(base: Bundle, out: Path) -> None:
    if out.resolve() == base.folder.resolve():
        raise BundleError(f"--out {out}: is the bundle that is added to; choose another folder")


def write_evaluation(metrics: dict[str, Any], remarks: list[str], watching: Watching, out: Path) -> None:
    """Tell the remarks, and write all figures beside the bundle."""
    for remark in remarks:
        watching.tell(remark)
    text = msgspec.json.encode({**metrics, "remarks": remarks}, enc_hook=float)
    (out / EVALUATION).write_bytes(msgspec.json.format(text, indent=1) + b"\n")


def _spread(count: int) -> IntArray:
    # Eight patches of as many images as there are.
    return np.linspace(0, count - 1, min(count, 8)).astype(np.int64)


def _pooled(patches: ByteImage, n_codes: int) -> ByteImage:
    return np.rint(pooled(patches, bits=float(np.log2(n_codes)))).astype(np.uint8)


def _plot_codebook(model: VqVae, coder: Coder, codes: IntArray, title: str, path: Path) -> None:
    counts = np.bincount(codes.ravel(), minlength=model.sizes.codes)
    often = np.argsort(-counts)[:_TYPICAL_CODES]
    often = often[counts[often] > 0]
    side = codes.shape[1]
    alone = np.broadcast_to(often[:, None, None], (len(often), side, side))
    vectors = model.codebook.vectors.detach().numpy().astype(np.float64)
    plot_codebook(vectors, counts, coder.shown(np.ascontiguousarray(alone)), title, path)


def _plot_vae(model: Vae, patches: ByteImage, seen: ByteImage, title: str, out: Path) -> None:
    some = _spread(len(patches))
    plot_reconstructions(
        [("held out", patches[some]), (f"by {model.sizes.latent}\nnumbers", seen[some])],
        title,
        out / "reconstructions.png",
    )
