"""What trained networks reach on held-out images, each number with the baseline that it has to beat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offline_training.micrograph.baselines import ContextCoder, by_components, order_0_bits, pooled, psnr_dB
from offline_training.micrograph.pixelcnn import PixelCnn
from offline_training.micrograph.vae import Vae, gaussian_kl
from offline_training.micrograph.vqvae import PIXELS_PER_CODE, VqVae, codes_alive, perplexity, to_pixels

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

_AT_ONCE = 16


@dataclass(frozen=True)
class VqFigures:
    """Of a VQ-VAE on held-out patches.

    Attributes
    ----------
    patches : int
    psnr_dB : float
        Over all pixels; of patches as 8-bit images show them.
    pooling_psnr_dB : float
        Of average pooling at the same length in bytes, with the best of splines of order 0 to 3 between.
    mean_psnr_dB : float
        Of the mean of each patch.
    codes_alive : int
        Met at all in the held-out patches.
    perplexity : float
        Of all held-out codes together.
    """

    patches: int
    psnr_dB: float
    pooling_psnr_dB: float
    mean_psnr_dB: float
    codes_alive: int
    perplexity: float


def codes_of(model: VqVae, patches: ByteImage) -> IntArray:
    """Return the codes (n, rows/8, columns/8) of patches (n, rows, columns)."""
    model.eval()
    with torch.no_grad():
        parts = [
            model.encode(to_pixels(torch.from_numpy(patches[i : i + _AT_ONCE]))).numpy()
            for i in range(0, len(patches), _AT_ONCE)
        ]
    return np.concatenate(parts)


def shown(model: VqVae, codes: IntArray) -> ByteImage:
    """Return codes (n, rows, columns) as 8-bit images (n, 8 rows, 8 columns)."""
    model.eval()
    with torch.no_grad():
        parts = [
            model.decode(torch.from_numpy(codes[i : i + _AT_ONCE]))[:, 0].numpy()
            for i in range(0, len(codes), _AT_ONCE)
        ]
    greys = (np.concatenate(parts) + 1.0) * 127.5
    return np.clip(np.rint(greys), 0.0, 255.0).astype(np.uint8)


def vqvae_figures(patches: ByteImage, codes: IntArray, seen: ByteImage, n_codes: int) -> VqFigures:
    """Measure a VQ-VAE on patches of sources that it was not trained on.

    Parameters
    ----------
    patches : (n, rows, columns) uint8
    codes : (n, rows/8, columns/8) int64
        Of the patches.
    seen : (n, rows, columns) uint8
        The patches as their codes show them.
    n_codes : int
        Of the codebook.
    """
    counts = torch.from_numpy(np.bincount(codes.ravel(), minlength=n_codes))
    bits = math.log2(n_codes)
    pooling = [psnr_dB(patches, pooled(patches, PIXELS_PER_CODE, bits, order)) for order in range(4)]
    flat = np.broadcast_to(patches.mean((1, 2), keepdims=True), patches.shape)
    return VqFigures(
        patches=len(patches),
        psnr_dB=psnr_dB(patches, seen),
        pooling_psnr_dB=max(pooling),
        mean_psnr_dB=psnr_dB(patches, flat),
        codes_alive=codes_alive(counts),
        perplexity=perplexity(counts),
    )


@dataclass(frozen=True)
class VaeFigures:
    """Of a VAE on held-out patches.

    Attributes
    ----------
    patches : int
    psnr_dB : float
        Of patches as their fingerprints show them.
    pca_psnr_dB : float
        Of as many principal components of training patches, or all where there are fewer patches than that.
    pooling_psnr_dB : float
        Of average pooling to as many numbers, or the next fewer that make squares; NaN if there are none.
    mean_psnr_dB : float
        Of the mean of each patch.
    kl_nats : float
        Of a patch.
    used : int
        Latent numbers with a KL above 0.01 nats.
    least_deviation : float
        The smallest σ.
    """

    patches: int
    psnr_dB: float
    pca_psnr_dB: float
    pooling_psnr_dB: float
    mean_psnr_dB: float
    kl_nats: float
    used: int
    least_deviation: float


def vae_figures(model: Vae, patches: ByteImage, training: ByteImage) -> tuple[VaeFigures, ByteImage]:
    """Measure a VAE on patches of sources that it was not trained on; also return what it shows.

    Parameters
    ----------
    model : Vae
    patches : (n, side, side) uint8
    training : (m, side, side) uint8
        That principal components are taken from.
    """
    model.eval()
    shown_, kl, least = [], [], np.inf
    with torch.no_grad():
        for i in range(0, len(patches), _AT_ONCE):
            mean, log_variance = model.encoder(to_pixels(torch.from_numpy(patches[i : i + _AT_ONCE])))
            shown_.append(model.decoder(mean)[:, 0].numpy())
            kl.append(gaussian_kl(mean, log_variance).numpy())
            least = min(least, float(torch.exp(0.5 * log_variance).min()))
    greys = (np.concatenate(shown_) + 1.0) * 127.5
    seen = np.clip(np.rint(greys), 0.0, 255.0).astype(np.uint8)
    nats = np.concatenate(kl)
    latent = model.sizes.latent
    side = next((s for s in (4, 8, 16, 32, 64, 128) if (patches.shape[1] // s) ** 2 <= latent), 0)
    poolings = [psnr_dB(patches, pooled(patches, side, 16.0, order)) for order in range(4)] if side else []
    flat = np.broadcast_to(patches.mean((1, 2), keepdims=True), patches.shape)
    return (
        VaeFigures(
            patches=len(patches),
            psnr_dB=psnr_dB(patches, seen),
            pca_psnr_dB=psnr_dB(patches, by_components(training, patches, latent)),
            pooling_psnr_dB=max(poolings, default=math.nan),
            mean_psnr_dB=psnr_dB(patches, flat),
            kl_nats=float(nats.sum(axis=1).mean()),
            used=int((nats.mean(axis=0) > 0.01).sum()),
            least_deviation=least,
        ),
        seen,
    )


@dataclass(frozen=True)
class PixelFigures:
    """Of a PixelCNN on held-out maps of codes, in bits for each code.

    Attributes
    ----------
    maps : int
    bits : float
    wrong_condition_bits : float
        With the conditions of other maps (turned round by half); NaN without conditions. A model that heeds
        its condition loses by that.
    order_0_bits, context_bits : float
        Of codes counted alone, and after their four earlier neighbours.
    """

    maps: int
    bits: float
    wrong_condition_bits: float
    order_0_bits: float
    context_bits: float


def pixelcnn_figures(
    network: PixelCnn,
    training: IntArray,
    held_out: IntArray,
    conditions: torch.Tensor | None,
) -> PixelFigures:
    """Measure a PixelCNN on the codes of sources that it was not trained on.

    Parameters
    ----------
    network : PixelCnn
    training : (m, rows, columns) int64
        Codes that the baselines are counted in.
    held_out : (n, rows, columns) int64
    conditions : (n, scalars) float or (n,) int64 tensor, or None
        Of the held-out maps.
    """
    codes = network.sizes.codes
    wrong = math.nan
    if conditions is not None:
        wrong = float(bits_of(network, held_out, conditions.roll(len(conditions) // 2, 0)).mean())
    return PixelFigures(
        maps=len(held_out),
        bits=float(bits_of(network, held_out, conditions).mean()),
        wrong_condition_bits=wrong,
        order_0_bits=float(order_0_bits(training, held_out, codes).mean()),
        context_bits=float(ContextCoder.fit(training, codes).bits_per_code(held_out).mean()),
    )


def bits_of(network: PixelCnn, maps: IntArray, conditions: torch.Tensor | None) -> npt.NDArray[np.float32]:
    """Return bits for each code of each map (n, rows, columns), (n,)."""
    network.eval()
    with torch.no_grad():
        parts = [
            network.bits_per_code(
                torch.from_numpy(maps[i : i + _AT_ONCE]),
                None if conditions is None else conditions[i : i + _AT_ONCE],
            ).numpy()
            for i in range(0, len(maps), _AT_ONCE)
        ]
    return np.concatenate(parts)
