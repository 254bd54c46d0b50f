"""Train a network on patterns that are simulated while it learns.

Every batch is new and follows from the seed and its number, so a run that was interrupted goes on
as if it had not been; nothing is learned by heart, so there is nothing to stop early for.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offline_training.laue.networks import Recipe, Tuning, recipe_of
from offline_training.loop import Progress, fit
from pipelines.laue.features import FeatureMaker, Features

_AHEAD = 4


class PatternSource(Protocol):
    """Where batches come from: `PatternSimulator`, or a fixed set of patterns."""

    def batch(
        self, first: int, count: int, maker: FeatureMaker, spots_each: int = 0
    ) -> tuple[Features, npt.NDArray[np.int32]]:
        """Return features and classes of spots of patterns `first` ... `first + count − 1`."""
        ...


@dataclass(frozen=True)
class TrainingSettings:
    """What a training is told; with the data it determines the result.

    Attributes
    ----------
    recipe : str
    steps : int
        Batches.
    spots_each : int
        Spots taken from each pattern.
    seed : int
    tuning : Tuning
    """

    recipe: str = "residual"
    steps: int = 2000
    spots_each: int = 32
    seed: int = 0
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}: expected 1 or more")
        batch = recipe_of(self.recipe, self.tuning).batch
        if not 1 <= self.spots_each <= batch:
            raise ValueError(f"spots_each {self.spots_each}: expected 1 to {batch}, the spots of a batch")

    @property
    def patterns(self) -> int:
        """Patterns of a batch."""
        return recipe_of(self.recipe, self.tuning).batch // self.spots_each

    def as_dict(self) -> dict[str, Any]:
        """Return the settings by name; of the tuning, what is set."""
        return asdict(self) | {"tuning": self.tuning.given()}


def train(
    source: PatternSource,
    n_classes: int,
    settings: TrainingSettings,
    checkpoint: Path,
    fingerprint: str = "",
    budget_s: float = math.inf,
    report: Callable[[Progress], None] = lambda _: None,
) -> tuple[nn.Module, int, float]:
    """Train, or go on where the checkpoint stopped.

    Parameters
    ----------
    source : PatternSource
        Pattern numbers from 0 are trained on.
    n_classes : int
    settings : TrainingSettings
    checkpoint : Path
        Written every 20 s (large ones more rarely) and at the end; replaced as a whole.
    fingerprint : str
        Of the data; a checkpoint with another one is refused.
    budget_s : float
        The training ends early, with what it has learned, when this time is over.
    report : callable

    Returns
    -------
    network : torch.nn.Module
        In evaluation mode.
    steps : int
        Batches that were learned.
    seconds : float
        What that took, the time before an interruption included.

    Raises
    ------
    DivergedError
        If the loss is no number.
    TrainingError
        If the checkpoint is of another training.
    Interrupted
        After Ctrl-C or SIGTERM, at the end of the batch and with a checkpoint written.
    """
    recipe = recipe_of(settings.recipe, settings.tuning)
    torch.manual_seed(settings.seed)
    network = recipe.make(recipe.features.width, n_classes)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    with _Batches(source, recipe, settings) as batches:

        def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]] | None:
            x, y = batches.take(step)
            if len(y) < 2:  # too few to normalise over
                return None
            logits = network(x).float()
            with torch.autocast("cpu", enabled=False):
                loss = nn.functional.cross_entropy(logits, y, label_smoothing=recipe.smoothing)
            return loss, {"right": float((logits.argmax(1) == y).float().mean())}

        done, seconds = fit(
            network,
            optimiser,
            loss_of,
            steps=settings.steps,
            learning_rate=recipe.learning_rate,
            seed=settings.seed,
            checkpoint=checkpoint,
            identity={**settings.as_dict(), "fingerprint": fingerprint, "classes": n_classes},
            budget_s=budget_s,
            report=report,
        )
    return network, done, seconds


class _Batches:
    """Batches in a row, from a thread of their own: the kernels release the interpreter lock."""

    def __init__(self, source: PatternSource, recipe: Recipe, settings: TrainingSettings) -> None:
        self._source, self._settings = source, settings
        self._maker = FeatureMaker(recipe.features)
        self._ready: queue.Queue[tuple[torch.Tensor, torch.Tensor] | BaseException] = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def take(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features and classes of a step: any one at first, from then on the next."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(step,), name="patterns", daemon=True)
            self._thread.start()
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _put(self, item: tuple[torch.Tensor, torch.Tensor] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _work(self, first: int) -> None:
        s = self._settings
        try:
            for step in range(first, s.steps):
                if self._stop.is_set():
                    return
                x, y = self._source.batch(step * s.patterns, s.patterns, self._maker, s.spots_each)
                self._put((torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))))
        except Exception as error:  # noqa: BLE001 - handed to the thread that trains, which raises it
            self._put(error)
