"""The networks that name spots: features of a spot in, one logit a class out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import get_type_hints

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


def _as_keras_begins(network: nn.Module) -> nn.Module:
    # Glorot and Bengio (AISTATS 2010), biases 0: LaueNN was written in Keras. Torch's own start is
    # smaller by 1.7 a layer, from which four layers take thousands of batches to learn anything.
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def lauenn_2022_mlp(bins: int, classes: int, width: int = 15, dropout: float = 0.3) -> nn.Module:
    """Return the multilayer perceptron of LaueNN.

    Three hidden layers between the number of bins and `width` per class, ReLU, dropout after each
    (Purohit et al., J. Appl. Cryst. 55, 737, 2022; sizes as in the published code, which has 15
    per class; its networks for ZrO2 were made with 30).
    """
    p = classes if classes < bins else bins if 15 * bins >= 2 * classes else (bins + classes) // 2
    sizes = [bins, bins, (width * p + bins) // 2, width * p]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
    return _as_keras_begins(nn.Sequential(*layers, nn.Linear(sizes[-1], classes)))


class LaueNN2022Cnn(nn.Module):
    """The convolutional variant: the histogram as a signal of one channel, then a dense layer.

    The supporting information of LaueNN names such a variant without its sizes; these are ours.
    """

    def __init__(self, bins: int, classes: int, width: int = 256, dropout: float = 0.3) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(1, 16, 9, stride=2, padding=4),
            nn.ReLU(),
            nn.Conv1d(16, 32, 9, stride=4, padding=4),
            nn.ReLU(),
        )
        left = ((bins + 1) // 2 + 3) // 4
        self.dense = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32 * left, width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )
        _as_keras_begins(self)

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
class Tuning:
    """What may be set beside a recipe; None is as the recipe has it.

    Attributes
    ----------
    learning_rate, weight_decay, dropout : float or None
    batch : int or None
        Spots of a batch.
    width : int or None
        Of the hidden layers of `residual` and the dense one of `lauenn-2022-cnn`; neurons a class
        in the last hidden layer of `lauenn-2022`.
    blocks : int or None
        Residual blocks; `residual` alone has them.
    bin_deg, range_deg : float or None
        Width of a bin, and where the histogram of angles ends.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    batch: int | None = None
    dropout: float | None = None
    width: int | None = None
    blocks: int | None = None
    bin_deg: float | None = None
    range_deg: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name, low, high in (
            ("learning_rate", 0.0, 1.0),
            ("weight_decay", 0.0, 1.0),
            ("batch", 32, 65536),
            ("dropout", 0.0, 0.9),
            ("width", 1, 4096),
            ("blocks", 1, 16),
            ("bin_deg", 0.01, 10.0),
            ("range_deg", 5.0, 180.0),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} {value:g}: expected {low:g} to {high:g}")

    def given(self) -> dict[str, float]:
        """Return what is set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Recipe:
    """A network with its features and how it is trained.

    Attributes
    ----------
    features : FeatureSpec
    network : callable
        Number of inputs, number of classes and the numbers of `layers` to a network.
    layers : dict
        What a `Tuning` can change of the network, and its values.
    learning_rate : float
        At its highest; warmed up, then let down along a cosine.
    weight_decay, smoothing : float
    batch : int
        Spots.
    """

    features: FeatureSpec
    network: Callable[..., nn.Module]
    layers: dict[str, float]
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    smoothing: float = 0.0
    batch: int = 1024

    def make(self, inputs: int, classes: int) -> nn.Module:
        """Return an untrained network."""
        return self.network(inputs, classes, **self.layers)

    def values(self) -> dict[str, float]:
        """Return the numbers that a `Tuning` can change, by its names."""
        spec = self.features
        return {
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "batch": self.batch,
            **self.layers,
            "bin_deg": spec.step_deg,
            "range_deg": round(spec.bins * spec.step_deg, 6),
        }

    def tuned(self, tuning: Tuning) -> Recipe:
        """Return the recipe with what a tuning sets.

        Raises
        ------
        ValueError
            If the network has no such number.
        """
        given = tuning.given()
        if alien := sorted(given.keys() - self.values().keys()):
            raise ValueError(f"{', '.join(alien)}: this recipe has no such number to set")
        now = self.values() | given
        bins = max(round(now["range_deg"] / now["bin_deg"]), 1)
        return replace(
            self,
            features=replace(self.features, bins=bins, step_deg=now["bin_deg"]),
            layers={name: type(self.layers[name])(now[name]) for name in self.layers},
            learning_rate=now["learning_rate"],
            weight_decay=now["weight_decay"],
            batch=int(now["batch"]),
        )


RECIPES: dict[str, Recipe] = {
    "residual": Recipe(
        FeatureSpec(), ResidualNetwork, {"width": 256, "blocks": 2, "dropout": 0.1}, smoothing=0.01
    ),
    "lauenn-2022": Recipe(LAUENN_2022, lauenn_2022_mlp, {"width": 15, "dropout": 0.3}, 1e-3, 1e-5),
    "lauenn-2022-cnn": Recipe(LAUENN_2022, LaueNN2022Cnn, {"width": 256, "dropout": 0.3}, 1e-3, 1e-5),
}
"""By name, as ``--recipe`` takes them."""


def parse_tuning(given: Sequence[str]) -> Tuning:
    """Read what a command line sets, ``NAME=VALUE`` each.

    Raises
    ------
    ValueError
        If a name is unknown or a value is no such number.
    """
    types = get_type_hints(Tuning)
    values: dict[str, float] = {}
    for text in given:
        name, equals, number = text.partition("=")
        if not equals or name not in types:
            raise ValueError(f"{text!r}: expected NAME=VALUE with NAME one of {', '.join(types)}")
        whole = types[name] == int | None
        try:
            values[name] = int(number) if whole else float(number)
        except ValueError:
            raise ValueError(f"{text!r}: expected a {'whole ' if whole else ''}number") from None
    return Tuning(**values)  # type: ignore[arg-type]


def recipe_of(name: str, tuning: Tuning | None = None) -> Recipe:
    """Return a recipe, tuned.

    Raises
    ------
    ValueError
        If the name is unknown, or the tuning cannot be.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not known; known: {', '.join(RECIPES)}")
    return RECIPES[name].tuned(tuning or Tuning())
