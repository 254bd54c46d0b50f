"""What networks of micrographs are trained with, by name; single numbers can be set beside a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

Kind = Literal["vae", "vqvae", "pixelcnn"]

_RANGES: Final[dict[str, tuple[float, float]]] = {
    "learning_rate": (1e-7, 1.0),
    "weight_decay": (0.0, 1.0),
    "batch": (2, 4096),
    "beta": (0.0, 1000.0),
    "morphology": (0.0, 1000.0),
    "warm_up": (0, 1_000_000),
    "codes": (2, 6000),
    "width": (1, 1024),
    "latent": (1, 4096),
    "layers": (1, 64),
    "head": (1, 4096),
    "decay": (0.0, 0.9999),
    "revive_below": (0.0, 0.9),
}
_WHOLE: Final = frozenset({"batch", "warm_up", "codes", "width", "latent", "layers", "head"})


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained.

    Attributes
    ----------
    kind : str
        "vae", "vqvae" or "pixelcnn".
    name : str
    about : str
    values : dict
        All numbers that can be set, and what they are.
    ema : bool
        Of a VQ-VAE: whether its codebook follows by moving averages.
    by_variance : bool
        Of a VQ-VAE: whether errors are taken in shares of the variance of the pixels.
    """

    kind: Kind
    name: str
    about: str
    values: Mapping[str, float] = field(default_factory=dict)
    ema: bool = True
    by_variance: bool = True

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def whole(self, name: str) -> int:
        """Return a number that is a whole one."""
        return int(self.values[name])

    def set(self, given: Sequence[str]) -> Recipe:
        """Return the recipe with what a command line sets, ``NAME=VALUE`` each.

        Raises
        ------
        ValueError
            If the recipe has no such number, or it cannot have that value.
        """
        changed: dict[str, float] = {}
        for text in given:
            name, equals, value = text.partition("=")
            if not equals or name not in self.values:
                raise ValueError(f"{text!r}: expected NAME=VALUE with NAME one of {', '.join(self.values)}")
            whole, (low, high) = name in _WHOLE, _RANGES[name]
            try:
                number = int(value) if whole else float(value)
            except ValueError:
                raise ValueError(f"{text!r}: expected a {'whole ' if whole else ''}number") from None
            if not low <= number <= high:
                raise ValueError(f"{name} {number:g}: expected {low:g} to {high:g}")
            changed[name] = number
        return replace(self, values={**self.values, **changed})

    def as_dict(self) -> dict[str, str | bool | float]:
        """Return all that the recipe says."""
        switches = {"ema": self.ema, "by_variance": self.by_variance} if self.kind == "vqvae" else {}
        return {"kind": self.kind, "recipe": self.name, **switches, **self.values}


# Errors of phases have no weight unless somebody gives them one: not every micrograph has two phases.
_VQ: Final = {
    "learning_rate": 1e-3,
    "batch": 32,
    "beta": 0.25,
    "morphology": 0.0,
    "codes": 512,
    "width": 128,
}

RECIPES: Final[dict[Kind, dict[str, Recipe]]] = {
    "vae": {
        "residual": Recipe(
            "vae",
            "residual",
            "2-D residual VAE with a KL term",
            {
                "learning_rate": 1e-3,
                "weight_decay": 1e-5,
                "batch": 32,
                "beta": 0.05,
                "warm_up": 500,
                "latent": 256,
                "width": 16,
            },
        )
    },
    "vqvae": {
        "ema": Recipe(
            "vqvae",
            "ema",
            "codebook by moving averages, dead codes revived",
            {**_VQ, "decay": 0.99, "revive_below": 0.02},
        ),
        "noguchi-2021": Recipe(
            "vqvae",
            "noguchi-2021",
            "codebook by gradient, as Noguchi & Inoue published it",
            {**_VQ, "batch": 256, "beta": 1.0},
            ema=False,
            by_variance=False,
        ),
    },
    "pixelcnn": {
        "gated": Recipe(
            "pixelcnn",
            "gated",
            "half as wide and deep as the published one: for posteriors while images stream in",
            {"learning_rate": 1e-3, "batch": 32, "width": 32, "layers": 8, "head": 128},
        ),
        "noguchi-2021": Recipe(
            "pixelcnn",
            "noguchi-2021",
            "as Noguchi & Inoue published it",
            {"learning_rate": 3e-4, "batch": 128, "width": 64, "layers": 15, "head": 512},
        ),
    },
}
"""By kind and name, as ``--recipe`` takes them; the first one of a kind is its default."""


def recipe_of(kind: Kind, name: str = "", given: Sequence[str] = ()) -> Recipe:
    """Return a recipe with what is set beside it.

    Parameters
    ----------
    kind : str
    name : str
        Empty for the default.
    given : sequence of str
        See `Recipe.set`.

    Raises
    ------
    ValueError
        If there is no such recipe, or the numbers cannot be set.
    """
    known = RECIPES[kind]
    if name and name not in known:
        raise ValueError(f"recipe {name!r} of {kind} is not known; known: {', '.join(known)}")
    return known[name or next(iter(known))].set(given)
