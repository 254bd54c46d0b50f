"""The networks that name spots: features of a spot in, one logit a class out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipelines.laue.classes import REJECT
from pipelines.laue.features import LAUENN_2022, FeatureSpec


class _Residual(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.inner(x)
        return out


class ResidualNetwork(nn.Module):
    """Histogram and numbers of the spot meet in the first layer; residual blocks follow."""

    def __init__(
        self, inputs: int, classes: int, width: int = 256, blocks: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.Sequential(*(_Residual(width, dropout) for _ in range(blocks)))
        self.last = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, classes) of features (n, inputs)."""
        out: torch.Tensor = self.last(self.blocks(self.first(x)))
        return out


def lauenn_2022_mlp(bins: int, classes: int) -> nn.Module:
    """Return the multilayer perceptron of LaueNN.

    Three hidden layers between the number of bins and 15 per class, ReLU, dropout 0.3 after each
    (Purohit et al., J. Appl. Cryst. 55, 737, 2022; sizes as in the published code).
    """
    p = classes if classes < bins else bins if 15 * bins >= 2 * classes else (bins + classes) // 2
    sizes = [bins, bins, (15 * p + bins) // 2, 15 * p]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


class LaueNN2022Cnn(nn.Module):
    """The convolutional variant: the histogram as a signal of one channel, then a dense layer.

    The supporting information of LaueNN names such a variant without its sizes; these are ours.
    """

    def __init__(self, bins: int, classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(1, 16, 9, stride=2, padding=4),
            nn.ReLU(),
            nn.Conv1d(16, 32, 9, stride=4, padding=4),
            nn.ReLU(),
        )
        left = ((bins + 1) // 2 + 3) // 4
        self.dense = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * left, 256), nn.ReLU(), nn.Linear(256, classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, classes) of histograms (n, bins)."""
        out: torch.Tensor = self.dense(self.convolutions(x.unsqueeze(1)))
        return out


def reject_only(classes: int) -> torch.Tensor:
    """Return (classes,): 1 for the reject class, 0 for the others."""
    return nn.functional.one_hot(torch.tensor(REJECT), classes).float()


class Calibrated(nn.Module):
    """Probabilities: the softmax of calibrated logits (`evaluation.fit_calibration`), as exported."""

    def __init__(self, network: nn.Module, classes: int, temperature: float, reject_shift: float) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature
        self.register_buffer("shift", reject_shift * reject_only(classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return probabilities (n, classes) of features (n, inputs)."""
        return torch.softmax(self.network(features) / self.temperature + self.shift, dim=1)


@dataclass(frozen=True)
class Recipe:
    """A network with its features and how it is trained.

    Attributes
    ----------
    features : FeatureSpec
    make : callable
        Number of inputs and of classes to a network.
    learning_rate : float
        At its highest; warmed up, then let down along a cosine.
    weight_decay, smoothing : float
    """

    features: FeatureSpec
    make: Callable[[int, int], nn.Module]
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    smoothing: float = 0.0


RECIPES: dict[str, Recipe] = {
    "residual": Recipe(FeatureSpec(), ResidualNetwork, smoothing=0.01),
    "lauenn-2022": Recipe(LAUENN_2022, lauenn_2022_mlp, learning_rate=1e-3, weight_decay=1e-5),
    "lauenn-2022-cnn": Recipe(LAUENN_2022, LaueNN2022Cnn, learning_rate=1e-3, weight_decay=1e-5),
}
"""By name, as ``--recipe`` takes them."""
