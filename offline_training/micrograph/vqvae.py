"""VQ-VAE: patches of a micrograph as maps of codes (van den Oord, Vinyals & Kavukcuoglu, NeurIPS 2017).

Sizes are those that Noguchi & Inoue (Phys. Rev. E 104, 025302, 2021) and their published program use: one
code for 8 × 8 pixels, 512 codes of 128 numbers; a patch of 128 px is a map of 16 × 16. Their codebook
learns by gradient and collapses early in training (4 of 512 codes in use); the default here follows the
encoder by moving averages and gives codes that nobody uses a new place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from offline_training.micrograph.soft_morphology import morphology_error

PIXELS_PER_CODE: Final = 8
"""Side of the square that one code stands for."""

_LAPLACE = 1e-5


class _Residual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, inner, 3, padding=1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.inner(x)
        return out


@dataclass(frozen=True)
class VqSizes:
    """Of a VQ-VAE; the defaults are the paper's.

    Attributes
    ----------
    codes, width : int
        K and D of the codebook.
    channels : (int, int)
        Of the first two convolutions.
    inner : int
        Channels inside a residual block.
    blocks : int
        Residual blocks of the encoder, and of the decoder.
    """

    codes: int = 512
    width: int = 128
    channels: tuple[int, int] = (32, 64)
    inner: int = 32
    blocks: int = 2

    def __post_init__(self) -> None:
        if self.codes < 2 or min(self.width, *self.channels, self.inner) < 1 or self.blocks < 0:
            raise ValueError(f"{self}: expected 2 codes or more and widths of 1 or more")


class Encoder(nn.Module):
    """Pixels to one vector for each square of 8 × 8."""

    def __init__(self, sizes: VqSizes) -> None:
        super().__init__()
        a, b = sizes.channels
        self.layers = nn.Sequential(
            nn.Conv2d(1, a, 4, 2, 1),
            nn.BatchNorm2d(a),
            nn.ReLU(),
            nn.Conv2d(a, b, 4, 2, 1),
            nn.BatchNorm2d(b),
            nn.ReLU(),
            nn.Conv2d(b, sizes.width, 4, 2, 1),
            *(_Residual(sizes.width, sizes.inner) for _ in range(sizes.blocks)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, width, rows/8, columns/8) of pixels (n, 1, rows, columns) from −1 to 1."""
        out: torch.Tensor = self.layers(x)
        return out


class Decoder(nn.Module):
    """One vector for each square of 8 × 8 to pixels."""

    def __init__(self, sizes: VqSizes) -> None:
        super().__init__()
        a, b = sizes.channels
        self.layers = nn.Sequential(
            *(_Residual(sizes.width, sizes.inner) for _ in range(sizes.blocks)),
            nn.ReLU(),
            nn.ConvTranspose2d(sizes.width, b, 4, 2, 1),
            nn.BatchNorm2d(b),
            nn.ReLU(),
            nn.ConvTranspose2d(b, a, 4, 2, 1),
            nn.BatchNorm2d(a),
            nn.ReLU(),
            nn.ConvTranspose2d(a, 1, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return pixels (n, 1, rows, columns) from −1 to 1 of vectors (n, width, rows/8, columns/8)."""
        out: torch.Tensor = self.layers(z)
        return out


class Codebook(nn.Module):
    """Vectors that stand for all others: the nearest one does.

    A vector of a gradient codebook is a parameter, pulled to its encoder outputs by a loss. One of an EMA
    codebook is their moving average, m / N with

        N ← γ N + (1 − γ) n,    m ← γ m + (1 − γ) Σ z

    over the n outputs z nearest to it in a batch, N smoothed as Laplace does so that no code divides by 0
    (van den Oord et al., appendix A.1). Averages and counts are buffers: checkpoints hold them.
    """

    vectors: torch.Tensor
    count: torch.Tensor
    total: torch.Tensor
    begun: torch.Tensor

    def __init__(
        self, codes: int, width: int, *, ema: bool = True, decay: float = 0.99, revive_below: float = 0.02
    ) -> None:
        """Begin with random vectors.

        Parameters
        ----------
        codes, width : int
        ema : bool
            False learns by gradient, without revival.
        decay : float
            γ.
        revive_below : float
            A code is moved onto a random encoder output when its N falls below this share of the mean N.
        """
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay {decay:g}: expected 0 to below 1")
        if not 0.0 <= revive_below < 1.0:
            raise ValueError(f"revive_below {revive_below:g}: expected 0 to below 1")
        self.ema, self.decay, self.revive_below = ema, decay, revive_below
        start = torch.empty(codes, width).uniform_(-1.0 / codes, 1.0 / codes)
        if ema:
            self.register_buffer("vectors", start)
            self.register_buffer("count", torch.zeros(codes))
            self.register_buffer("total", torch.zeros(codes, width))
            self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        else:
            self.vectors = nn.Parameter(start)

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Return the codes (n, rows, columns) int64 of vectors (n, width, rows, columns)."""
        # |z − e|² without |z|², which is the same for all codes.
        flat = z.movedim(1, -1)
        distance = (self.vectors**2).sum(1) - 2.0 * (flat @ self.vectors.T)
        return distance.argmin(-1)

    def look_up(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the vectors (n, width, rows, columns) of codes (n, rows, columns)."""
        return nn.functional.embedding(codes, self.vectors).movedim(-1, 1)

    def begin(self, z: torch.Tensor) -> None:
        """Put the vectors of an EMA codebook onto encoder outputs (m, width), where codes are needed."""
        with torch.no_grad():
            self.vectors.copy_(_some(z, len(self.vectors)))
            # As if each had been met once: none is dead before it had a chance.
            self.count.fill_(1.0)
            self.total.copy_(self.vectors)
            self.begun.fill_(True)

    def follow(self, z: torch.Tensor, codes: torch.Tensor) -> int:
        """Move the vectors of an EMA codebook to what a batch shows; revive dead ones.

        Parameters
        ----------
        z : (m, width) tensor
            Encoder outputs.
        codes : (m,) int64 tensor
            Their codes.

        Returns
        -------
        int
            How many codes were revived.
        """
        with torch.no_grad():
            return self._follow(z, codes)

    def _follow(self, z: torch.Tensor, codes: torch.Tensor) -> int:
        k = len(self.vectors)
        met = torch.bincount(codes, minlength=k).to(self.count.dtype)
        total = torch.zeros_like(self.total).index_add_(0, codes, z)
        self.count.mul_(self.decay).add_(met, alpha=1.0 - self.decay)
        self.total.mul_(self.decay).add_(total, alpha=1.0 - self.decay)
        n = self.count.sum()
        smooth = (self.count + _LAPLACE) / (n + k * _LAPLACE) * n
        self.vectors.copy_(self.total / smooth[:, None])
        dead = torch.nonzero(self.count < self.revive_below * n / k).flatten()
        if len(dead):
            self.vectors[dead] = _some(z, len(dead))
            # A share of the mean: enough to be met, too little to weigh.
            self.count[dead] = n / k
            self.total[dead] = self.vectors[dead] * self.count[dead, None]
        return len(dead)


def _some(z: torch.Tensor, n: int) -> torch.Tensor:
    # Without repeats where there are enough; repeats are told apart by a little noise.
    if len(z) >= n:
        return z[torch.randperm(len(z))[:n]]
    taken = z[torch.randint(len(z), (n,))]
    return taken + 0.01 * z.std() * torch.randn_like(taken)


@dataclass(frozen=True)
class VqLoss:
    """What a batch costs, and which codes it used.

    Attributes
    ----------
    total : () tensor
        To be minimised.
    reconstruction : float
        Mean squared error, pixels from −1 to 1.
    commitment : float
        Mean squared distance of encoder outputs to their codes.
    perplexity : float
        2 to the entropy in bits of the codes of the batch.
    revived : int
    codes : (n, rows/8, columns/8) int64 tensor
    """

    total: torch.Tensor
    reconstruction: float
    commitment: float
    perplexity: float
    revived: int
    codes: torch.Tensor


class VqVae(nn.Module):
    """Encoder, codebook and decoder. Pixels are float32 from −1 to 1; see `to_pixels`."""

    def __init__(
        self,
        sizes: VqSizes | None = None,
        *,
        ema: bool = True,
        beta: float = 0.25,
        variance: float = 1.0,
        morphology: float = 0.0,
    ) -> None:
        """Begin with random weights (Glorot & Bengio, AISTATS 2010, as the paper's program does).

        Parameters
        ----------
        sizes : VqSizes, optional
        ema : bool
            See `Codebook`.
        beta : float
            Weight of the commitment loss.
        variance : float
            Of the pixels: squared errors are taken in shares of it. Without that, the commitment outweighs
            the picture of a micrograph of little contrast, and the encoder learns to say nothing.
        morphology : float
            Weight of errors in phase fraction and boundaries beside those in pixels; see `soft_morphology`.

        Raises
        ------
        ValueError
            If the variance is not greater than 0: images of one grey hold nothing to learn.
        """
        super().__init__()
        if not variance > 0.0:
            raise ValueError(f"variance of the pixels {variance:g}: expected more than 0")
        self.sizes = sizes or VqSizes()
        self.beta, self.variance, self.morphology = beta, variance, morphology
        self.encoder = Encoder(self.sizes)
        self.codebook = Codebook(self.sizes.codes, self.sizes.width, ema=ema)
        self.decoder = Decoder(self.sizes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return codes (n, rows/8, columns/8) int64 of pixels (n, 1, rows, columns).

        Raises
        ------
        ValueError
            If a side is no multiple of 8.
        """
        _check_sides(x)
        return self.codebook.nearest(self.encoder(x).float())

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return pixels (n, 1, rows, columns) of codes (n, rows/8, columns/8)."""
        return self.decoder(self.codebook.look_up(codes)).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return pixels as their codes show them."""
        return self.decode(self.encode(x))

    def loss(self, x: torch.Tensor) -> VqLoss:
        """Return the loss of a batch (n, 1, rows, columns); in training, an EMA codebook follows it.

        Half precision is the encoder's and the decoder's alone: distances and averages stay float32.
        """
        _check_sides(x)
        book = self.codebook
        z = self.encoder(x).float()
        with torch.autocast(x.device.type, enabled=False):
            flat = z.detach().movedim(1, -1).reshape(-1, z.shape[1])
            if self.training and book.ema and not bool(book.begun):
                book.begin(flat)
            codes = book.nearest(z.detach())
            chosen = book.look_up(codes)
            commitment = nn.functional.mse_loss(z, chosen.detach())
            total = self.beta * commitment
            if not book.ema:
                total = total + nn.functional.mse_loss(chosen, z.detach())
            # Straight through: the decoder sees the code, the encoder its gradient.
            passed = z + (chosen - z).detach()
            revived = book.follow(flat, codes.flatten()) if self.training and book.ema else 0
        seen = self.decoder(passed).float()
        reconstruction = nn.functional.mse_loss(seen, x)
        total = total + reconstruction / self.variance
        if self.morphology > 0.0:
            total = total + self.morphology * morphology_error(seen, x)
        return VqLoss(
            total=total,
            reconstruction=float(reconstruction.detach()),
            commitment=float(commitment.detach()),
            perplexity=perplexity(torch.bincount(codes.flatten(), minlength=self.sizes.codes)),
            revived=revived,
            codes=codes,
        )


class CodeReader(nn.Module):
    """What a bundle exports: 8-bit greys as float32 in; codes and the mean of the encoder's vectors out."""

    def __init__(self, model: VqVae) -> None:
        super().__init__()
        self.encoder, self.codebook = model.encoder, model.codebook

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and mean vector of greys (n, 1, rows, columns) from 0 to 255.

        Codes are (n, rows/8, columns/8) int32, mean vectors (n, width).
        """
        z = self.encoder(image / 127.5 - 1.0)
        return self.codebook.nearest(z).to(torch.int32), z.mean((2, 3))


class CodeShower(nn.Module):
    """What a bundle exports, the other way: codes in, greys as float32 out."""

    def __init__(self, model: VqVae) -> None:
        super().__init__()
        self.codebook, self.decoder = model.codebook, model.decoder

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Return greys (n, 1, 8 rows, 8 columns) from 0 to 255 of codes (n, rows, columns) int32."""
        return (self.decoder(self.codebook.look_up(codes)) + 1.0) * 127.5


def to_pixels(greys: torch.Tensor) -> torch.Tensor:
    """Return 8-bit greys (n, rows, columns) as (n, 1, rows, columns) float32 from −1 to 1."""
    return greys[:, None].float() / 127.5 - 1.0


def perplexity(counts: torch.Tensor) -> float:
    """Return 2 to the entropy in bits of how often codes were met: that many equal ones say as much."""
    share = counts.double() / counts.sum().clamp(min=1)
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def codes_alive(counts: torch.Tensor) -> int:
    """Return how many codes were met at all."""
    return int((counts > 0).sum())


def _check_sides(x: torch.Tensor) -> None:
    rows, columns = x.shape[-2:]
    if rows % PIXELS_PER_CODE or columns % PIXELS_PER_CODE or not rows or not columns:
        raise ValueError(f"image of {rows} x {columns} px: expected multiples of {PIXELS_PER_CODE}")
