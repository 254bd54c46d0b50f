"""Train a VAE or a VQ-VAE on crops, and a PixelCNN on the codes that a trained VQ-VAE gives to crops."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offline_training.loop import LossOf, Progress, fit
from offline_training.micrograph.crops import CropDraw
from offline_training.micrograph.pixelcnn import PixelCnn, PixelSizes
from offline_training.micrograph.recipes import Kind, Recipe
from offline_training.micrograph.soft_morphology import brought_in
from offline_training.micrograph.vae import Vae, VaeSizes, warmed_up
from offline_training.micrograph.vqvae import VqSizes, VqVae, to_pixels

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingSettings:
    """What a training is told; with the data it determines the result.

    Attributes
    ----------
    recipe : Recipe
    steps : int
        Batches.
    seed : int
    budget_s : float
        The training ends early, with what it has learned, when this time is over.
    """

    recipe: Recipe
    steps: int = 2000
    seed: int = 0
    budget_s: float = math.inf


@dataclass(frozen=True)
class Encoding:
    """What makes codes of patches.

    Attributes
    ----------
    of : callable
        From (n, rows, columns) uint8 to (n, rows/8, columns/8) int64.
    codes : int
        Of the codebook.
    digest : str
        Sha256 of what makes them: it binds a PixelCNN to it.
    """

    of: Callable[[ByteImage], IntArray]
    codes: int
    digest: str


@dataclass(frozen=True)
class Trained:
    """How a training ended: batches that were learned, and the seconds that took."""

    steps: int
    seconds: float


def train_vqvae(
    crops: CropDraw,
    settings: TrainingSettings,
    checkpoint: Path,
    report: Callable[[Progress], None] = lambda _: None,
) -> tuple[VqVae, Trained]:
    """Train a VQ-VAE, or go on where the checkpoint stopped; see `loop.fit` for what is raised.

    Parameters
    ----------
    crops : CropDraw
    settings : TrainingSettings
        With a recipe of kind "vqvae".
    checkpoint : Path
    report : callable
        Figures: reconstruction, commitment, perplexity, revived.
    """
    recipe = _of("vqvae", settings)
    torch.manual_seed(settings.seed)
    sizes = VqSizes(codes=recipe.whole("codes"), width=recipe.whole("width"))
    variance = crops.variance if recipe.by_variance else 1.0
    model = VqVae(sizes, ema=recipe.ema, beta=recipe["beta"], variance=variance)
    if recipe.ema:
        model.codebook.decay = recipe["decay"]
        model.codebook.revive_below = recipe["revive_below"]

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        model.morphology = recipe["morphology"] * brought_in(step, settings.steps)
        found = model.loss(_pixels(crops, step, recipe))
        return found.total, {
            "reconstruction": found.reconstruction,
            "commitment": found.commitment,
            "perplexity": found.perplexity,
            "revived": float(found.revived),
        }

    return model, _fit(model, loss_of, settings, checkpoint, crops.fingerprint, report)


def train_vae(
    crops: CropDraw,
    settings: TrainingSettings,
    checkpoint: Path,
    report: Callable[[Progress], None] = lambda _: None,
) -> tuple[Vae, Trained]:
    """Train a VAE, or go on where the checkpoint stopped; see `loop.fit` for what is raised.

    Parameters
    ----------
    crops : CropDraw
    settings : TrainingSettings
        With a recipe of kind "vae".
    checkpoint : Path
    report : callable
        Figures: reconstruction, kl_nats, used, least_deviation.
    """
    recipe = _of("vae", settings)
    torch.manual_seed(settings.seed)
    model = Vae(VaeSizes(patch_px=crops.side_px, latent=recipe.whole("latent"), width=recipe.whole("width")))

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        beta = warmed_up(recipe["beta"], step, recipe.whole("warm_up"))
        found = model.loss(_pixels(crops, step, recipe), beta)
        return found.total, {
            "reconstruction": found.reconstruction,
            "kl_nats": found.kl_nats,
            "used": float(found.used),
            "least_deviation": found.least_deviation,
        }

    return model, _fit(model, loss_of, settings, checkpoint, crops.fingerprint, report)


def train_pixelcnn(
    encoding: Encoding,
    crops: CropDraw,
    conditions: npt.NDArray[np.float32] | npt.NDArray[np.int64] | None,
    settings: TrainingSettings,
    checkpoint: Path,
    report: Callable[[Progress], None] = lambda _: None,
) -> tuple[PixelCnn, Trained]:
    """Train a PixelCNN on the codes of crops; what makes the codes stays as it is.

    Parameters
    ----------
    encoding : Encoding
    crops : CropDraw
    conditions : (images, scalars) float32 or (images,) int64 array, or None
        Of each image: numbers, or a class from 0.
    settings : TrainingSettings
        With a recipe of kind "pixelcnn".
    checkpoint : Path
        Refused for another encoding: its codes mean something else.
    report : callable
        Figures: bits_per_code.

    Raises
    ------
    ValueError
        If there is not one condition for each image.
    """
    recipe = _of("pixelcnn", settings)
    if conditions is not None and len(conditions) != len(crops.images):
        raise ValueError(f"conditions: expected {len(crops.images)}, one an image, got {len(conditions)}")
    numbers = conditions is not None and conditions.ndim == 2
    classes = conditions is not None and conditions.ndim == 1
    torch.manual_seed(settings.seed)
    network = PixelCnn(
        PixelSizes(
            codes=encoding.codes,
            width=recipe.whole("width"),
            layers=recipe.whole("layers"),
            head=recipe.whole("head"),
            scalars=conditions.shape[1] if conditions is not None and numbers else 0,
            classes=int(conditions.max()) + 1 if conditions is not None and classes else 0,
        )
    )
    known = None if conditions is None else torch.from_numpy(np.ascontiguousarray(conditions))
    if known is not None and numbers:
        network.standardise(known)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        greys, images = crops.batch(step, recipe.whole("batch"))
        with torch.autocast("cpu", enabled=False):
            # Full precision: half a code off is another code.
            codes = torch.from_numpy(encoding.of(greys))
        given = None if known is None else known[torch.from_numpy(images)]
        bits = network.bits_per_code(codes, given).mean()
        return bits, {"bits_per_code": float(bits.detach())}

    digest = hashlib.sha256(crops.fingerprint.encode())
    digest.update(encoding.digest.encode())
    if conditions is not None:
        digest.update(np.ascontiguousarray(conditions).tobytes())
    return network, _fit(network, loss_of, settings, checkpoint, digest.hexdigest(), report)


def weights_digest(model: nn.Module) -> str:
    """Return a sha256 of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()


def _of(kind: Kind, settings: TrainingSettings) -> Recipe:
    if settings.recipe.kind != kind:
        raise ValueError(f"recipe {settings.recipe.name!r} is one of {settings.recipe.kind}, not of {kind}")
    return settings.recipe


def _pixels(crops: CropDraw, step: int, recipe: Recipe) -> torch.Tensor:
    greys, _ = crops.batch(step, recipe.whole("batch"))
    return to_pixels(torch.from_numpy(greys)).contiguous(memory_format=torch.channels_last)


def _fit(
    model: nn.Module,
    loss_of: LossOf,
    settings: TrainingSettings,
    checkpoint: Path,
    data: str,
    report: Callable[[Progress], None],
) -> Trained:
    recipe = settings.recipe
    decay = recipe.values.get("weight_decay", 0.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe["learning_rate"], weight_decay=decay)
    steps, seconds = fit(
        model,
        optimiser,
        loss_of,
        steps=settings.steps,
        learning_rate=recipe["learning_rate"],
        seed=settings.seed,
        checkpoint=checkpoint,
        identity={**recipe.as_dict(), "data": data},
        budget_s=settings.budget_s,
        report=report,
    )
    return Trained(steps, seconds)
