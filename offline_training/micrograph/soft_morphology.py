"""Fraction and boundaries of phases, as a decoder can learn them by gradient.

The picture of least squared error is too smooth: a feature that its code cannot place becomes grey, falls
under the threshold and is gone, and the mean free path grows. Here the threshold is a slope instead of a
step. With s the sigmoid of (grey − threshold) / width, the share of a phase is the mean of s, and what lines
along rows and columns cross is the sum of |s_i − s_(i+1)|, whose limit for a narrow slope is the number of
crossings from which `pipelines.micrograph.morphology` takes the mean free path.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from pipelines.micrograph.otsu import otsu

_LEVELS: Final = 256
_GREY: Final = 1.0 / 127.5
_SLOPE: Final = 0.2
"""Width in standard deviations: a tenth of the distance of two phases that are equally frequent."""


def thresholds_of(pixels: torch.Tensor) -> torch.Tensor:
    """Return Otsu's threshold of each patch, (n,), for pixels (n, 1, rows, columns) from −1 to 1.

    It lies halfway between the brightest dark grey and the darkest bright one that occur: anywhere between
    them parts a patch alike, but a slope has to have as much of both phases on its sides.
    """
    n = pixels.shape[0]
    greys = ((pixels.detach().flatten(1) + 1.0) * 127.5).round().clamp(0, _LEVELS - 1).long()
    own = torch.arange(n, device=greys.device)[:, None] * _LEVELS
    counts = torch.bincount((greys + own).flatten(), minlength=n * _LEVELS).view(n, _LEVELS).cpu().numpy()
    level = otsu(counts)[0][:, None]
    grey = np.arange(_LEVELS)
    occurs = counts > 0
    darkest_bright = np.where(occurs & (grey > level), grey, _LEVELS).min(axis=1)
    brightest_dark = np.where(occurs & (grey <= level), grey, -1).max(axis=1)
    return torch.from_numpy((brightest_dark + darkest_bright) / 2.0).to(pixels) * _GREY - 1.0


def widths_of(pixels: torch.Tensor) -> torch.Tensor:
    """Return how wide the slope of each patch is, (n,): by its contrast, one grey level at least."""
    return (_SLOPE * pixels.detach().flatten(1).std(1)).clamp(min=_GREY)


def soft_morphology(
    pixels: torch.Tensor, thresholds: torch.Tensor, widths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return share of the bright phase and crossings, (n,) each; they have gradients.

    Parameters
    ----------
    pixels : (n, 1, rows, columns) tensor
    thresholds, widths : (n,) tensors
        Of the slope, in the units of the pixels.

    Returns
    -------
    (n,) tensor
        Share, 0 to 1.
    (n,) tensor
        Crossings for each pixel of line, mean along rows plus mean along columns.
    """
    bright = torch.sigmoid((pixels - thresholds[:, None, None, None]) / widths[:, None, None, None])
    along_rows = (bright[..., 1:] - bright[..., :-1]).abs().mean((1, 2, 3))
    along_columns = (bright[..., 1:, :] - bright[..., :-1, :]).abs().mean((1, 2, 3))
    return bright.mean((1, 2, 3)), along_rows + along_columns


def morphology_error(seen: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return how far pictures are off in share and crossings, () tensor.

    Squared errors: of shares in units of p (1 − p), of crossings in units of their squared mean, both over
    the batch.

    Parameters
    ----------
    seen : (n, 1, rows, columns) tensor
        What a decoder makes of them.
    pixels : (n, 1, rows, columns) tensor
        From −1 to 1; thresholds are theirs.
    """
    thresholds, widths = thresholds_of(pixels), widths_of(pixels)
    share, crossings = soft_morphology(seen, thresholds, widths)
    true_share, true_crossings = soft_morphology(pixels, thresholds, widths)
    # A batch without boundaries has no scale of its own: one pixel in a hundred, one crossing a line.
    of_share = (true_share * (1.0 - true_share)).mean().clamp(min=0.01)
    of_crossings = true_crossings.mean().clamp(min=1.0 / max(pixels.shape[-2:])) ** 2
    return ((share - true_share) ** 2).mean() / of_share + (
        (crossings - true_crossings) ** 2
    ).mean() / of_crossings


def brought_in(step: int, steps: int) -> float:
    """Return the share of its weight that the error has at a step.

    None in the first half of a training, all of it in the last quarter: a decoder that cannot draw yet
    learns to cross often instead of where.
    """
    return min(max(4.0 * step / steps - 2.0, 0.0), 1.0)
