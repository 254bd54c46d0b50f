"""What runs a network: the same few words for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.engines.flavours import EngineError
from pipelines.engines.tensors import Tensor

Arrays = Mapping[str, npt.NDArray[Any]]


class EngineFailure(EngineError):
    """An engine that was sound and no longer is: no memory on its device, a device that is gone."""


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is.

    Attributes
    ----------
    backend : str
        As ``[engines] backend`` calls it.
    precision : str
        "fp32", "fp16", "bf16" or "int8".
    device : str
        "the CPU", or the name of a card.
    version : str
        Of the library.
    why : str
        Why this one, and none that is better: one line.
    failures : int
        How many engines broke down before it while they ran.
    """

    backend: str
    precision: str
    device: str
    version: str
    why: str = ""
    failures: int = 0

    def __str__(self) -> str:
        """Return one line for a log."""
        because = f", because {self.why}" if self.why else ""
        return f"{self.backend} on {self.device}, {self.precision}{because}"


class Engine(Protocol):
    """A network, ready to run."""

    @property
    def about(self) -> EngineInfo:
        """What it is; another one after it broke down and was replaced."""
        ...

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """What it takes, by name; -1 stands for the batch."""
        ...

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """What it gives, by name."""
        ...

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        """Return the outputs of a batch of any number of rows.

        Raises
        ------
        EngineFailure
            If the engine breaks down.
        EngineError
            If the inputs are not what it takes: names, types, shapes, or unequal numbers of rows.
        """
        ...
