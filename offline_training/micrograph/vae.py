"""VAE: a patch of a micrograph as one vector (Kingma & Welling, ICLR 2014), by a residual network.

The form is that of White et al.'s 3-D autoencoder in two dimensions (a strided convolution and residual
blocks at each scale, a latent space of 256), with two differences. The Kullback-Leibler term is there, with
weight β (Higgins et al., ICLR 2017), so that the latent space has the prior that its distances are measured
by; and a narrow convolution stands before the dense layers, which otherwise hold nine weights in ten. The
fingerprint is the mean, never a sample.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class VaeSizes:
    """Of a VAE.

    Attributes
    ----------
    patch_px : int
        Side of the patches; a multiple of 16.
    latent : int
        Numbers of a fingerprint.
    width : int
        Channels at the finest scale; they double at each of the next three, to at most eight times.
    blocks : tuple of int
        Residual blocks at each of the four scales, in the encoder and in the decoder; ResNet18 has 2 each,
        ResNet34 3, 4, 6, 3.
    neck : int
        Channels between convolutions and dense layers.
    """

    patch_px: int = 128
    latent: int = 256
    width: int = 16
    blocks: tuple[int, int, int, int] = (1, 1, 1, 1)
    neck: int = 16

    def __post_init__(self) -> None:
        if self.patch_px < 16 or self.patch_px % 16:
            raise ValueError(f"patch_px {self.patch_px}: expected a multiple of 16")
        if min(self.latent, self.width, self.neck) < 1 or len(self.blocks) != 4 or min(self.blocks) < 0:
            raise ValueError(f"{self}: expected widths of 1 or more and four numbers of blocks")

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Of the four scales, the finest first."""
        w = self.width
        return w, 2 * w, 4 * w, 8 * w


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.inner(x))


class VaeEncoder(nn.Module):
    """Pixels to mean and log-variance of each latent number. This is what a bundle exports."""

    def __init__(self, sizes: VaeSizes) -> None:
        super().__init__()
        widths = sizes.channels
        layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 7, 2, 3, bias=False)]
        for i, n in enumerate(sizes.blocks):
            if i:
                layers.append(nn.Conv2d(widths[i - 1], widths[i], 3, 2, 1, bias=False))
            layers += [nn.BatchNorm2d(widths[i]), nn.ReLU()]
            layers += [_Residual(widths[i]) for _ in range(n)]
        side = sizes.patch_px // 16
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], sizes.neck, 1), nn.ReLU(), nn.Flatten())
        self.mean = nn.Linear(sizes.neck * side * side, sizes.latent)
        self.log_variance = nn.Linear(sizes.neck * side * side, sizes.latent)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log-variance, (n, latent) each, of pixels (n, 1, patch_px, patch_px), −1 to 1."""
        flat = self.layers(x)
        # Variances beyond these are nonsense that would only end in a loss that is no number.
        return self.mean(flat), self.log_variance(flat).clamp(-12.0, 6.0)


class VaeDecoder(nn.Module):
    """Latent numbers to pixels."""

    def __init__(self, sizes: VaeSizes) -> None:
        super().__init__()
        side = sizes.patch_px // 16
        widths = sizes.channels[::-1]
        self.dense = nn.Sequential(nn.Linear(sizes.latent, sizes.neck * side * side), nn.ReLU())
        self.unflatten = nn.Unflatten(1, (sizes.neck, side, side))
        layers: list[nn.Module] = [nn.Conv2d(sizes.neck, widths[0], 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        layers += [_Residual(widths[0]) for _ in range(sizes.blocks[3])]
        for (wide, narrow), n in zip(itertools.pairwise(widths), sizes.blocks[2::-1], strict=True):
            layers += [
                nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.ReLU(),
            ]
            layers += [_Residual(narrow) for _ in range(n)]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], 1, 4, 2, 1), nn.Tanh())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return pixels (n, 1, patch_px, patch_px) from −1 to 1 of latent numbers (n, latent)."""
        out: torch.Tensor = self.layers(self.unflatten(self.dense(z)))
        return out


@dataclass(frozen=True)
class VaeLoss:
    """What a batch costs.

    Attributes
    ----------
    total : () tensor
        To be minimised: mean squared error + β · KL / number of pixels.
    reconstruction : float
        Mean squared error, pixels from −1 to 1.
    kl_nats : float
        Of a patch, all latent numbers together.
    used : int
        Latent numbers that say something: those with a KL above 0.01 nats.
    least_deviation : float
        The smallest σ: 0 would mean that the space has lost its prior.
    """

    total: torch.Tensor
    reconstruction: float
    kl_nats: float
    used: int
    least_deviation: float


class Vae(nn.Module):
    """Encoder and decoder. Pixels are float32 from −1 to 1."""

    def __init__(self, sizes: VaeSizes | None = None) -> None:
        super().__init__()
        self.sizes = sizes or VaeSizes()
        self.encoder = VaeEncoder(self.sizes)
        self.decoder = VaeDecoder(self.sizes)

    def fingerprint(self, x: torch.Tensor) -> torch.Tensor:
        """Return the means (n, latent): the same for the same patch, always."""
        self._check(x)
        mean: torch.Tensor = self.encoder(x)[0].float()
        return mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return pixels as their fingerprints show them."""
        return self.decoder(self.fingerprint(x)).float()

    def loss(self, x: torch.Tensor, beta: float = 1.0) -> VaeLoss:
        """Return the loss of a batch (n, 1, patch_px, patch_px); each patch has noise of its own in training.

        Parameters
        ----------
        x : (n, 1, patch_px, patch_px) tensor
        beta : float
            Weight of the KL term; 2 σ² makes the loss the evidence bound for pixel noise of standard
            deviation σ, 1 would be that of pixels that are mostly noise. See `warmed_up`.
        """
        self._check(x)
        mean, log_variance = (part.float() for part in self.encoder(x))
        deviation = torch.exp(0.5 * log_variance)
        z = mean + deviation * torch.randn_like(mean) if self.training else mean
        seen = self.decoder(z).float()
        reconstruction = nn.functional.mse_loss(seen, x)
        kl = gaussian_kl(mean, log_variance)
        of_patch = kl.sum(1).mean()
        return VaeLoss(
            total=reconstruction + beta * of_patch / x[0].numel(),
            reconstruction=float(reconstruction.detach()),
            kl_nats=float(of_patch.detach()),
            used=int((kl.detach().mean(0) > 0.01).sum()),
            least_deviation=float(deviation.detach().min()),
        )

    def _check(self, x: torch.Tensor) -> None:
        side = self.sizes.patch_px
        if tuple(x.shape[1:]) != (1, side, side):
            raise ValueError(f"patches of shape {tuple(x.shape)}: expected (n, 1, {side}, {side})")


class MeanReader(nn.Module):
    """What a bundle exports: 8-bit greys as float32 in, fingerprints out."""

    def __init__(self, model: Vae) -> None:
        super().__init__()
        self.layers, self.mean = model.encoder.layers, model.encoder.mean

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return means (n, latent) of greys (n, 1, patch_px, patch_px) from 0 to 255."""
        out: torch.Tensor = self.mean(self.layers(image / 127.5 - 1.0))
        return out


def gaussian_kl(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, variance) ‖ N(0, 1)) in nats of each number (Kingma & Welling, appendix B)."""
    return 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance)


def warmed_up(beta: float, step: int, steps: int) -> float:
    """Return β of a step: it rises evenly to its value over so many steps, so that images come first."""
    return beta * min((step + 1) / max(steps, 1), 1.0)
