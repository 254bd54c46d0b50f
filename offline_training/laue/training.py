"""Train a network on patterns that are simulated while it learns.

Every batch is new and follows from the seed and its number, so a run that was interrupted goes on
as if it had not been; nothing is learned by heart, so there is nothing to stop early for.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from offline_training.laue.networks import RECIPES, Recipe
from offline_training.laue.simulator import PatternSimulator
from pipelines.laue.features import FeatureMaker

_CHECKPOINT_EVERY_S = 20.0
_AHEAD = 4


class TrainingError(Exception):
    """Training cannot go on, and why."""


@dataclass(frozen=True)
class TrainingSettings:
    """What a training is told; with the data it determines the result.

    Attributes
    ----------
    recipe : str
    steps : int
        Batches.
    patterns : int
        Patterns of a batch.
    spots_each : int
        Spots taken from each pattern.
    seed : int
    """

    recipe: str = "residual"
    steps: int = 2000
    patterns: int = 32
    spots_each: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe {self.recipe!r} is not known; known: {', '.join(RECIPES)}")
        for name in ("steps", "patterns", "spots_each"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")


@dataclass(frozen=True)
class Progress:
    """Where a training stands: smoothed loss and share of right classes in training."""

    step: int
    steps: int
    loss: float
    accuracy: float
    patterns_per_s: float
    seconds: float


def train(
    simulator: PatternSimulator,
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
    simulator : PatternSimulator
        Pattern numbers from 0 are trained on.
    n_classes : int
    settings : TrainingSettings
    checkpoint : Path
        Written every 20 s and at the end; replaced as a whole.
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
    TrainingError
        If the loss is no number, or the checkpoint is of another training.
    """
    recipe = RECIPES[settings.recipe]
    torch.manual_seed(settings.seed)
    network = recipe.make(recipe.features.width, n_classes)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    identity = {**asdict(settings), "fingerprint": fingerprint, "classes": n_classes}
    done, before = _resume(checkpoint, network, optimiser, identity)
    network.train()
    start = saved = time.monotonic()
    loss_mean, right_mean = math.nan, math.nan
    first = done
    with _Batches(simulator, recipe, settings, done) as batches:
        for features, labels in batches:
            _set_rate(optimiser, recipe, done, settings.steps)
            # Dropout of a step depends on the step alone, so that a resumed run is the same run.
            torch.manual_seed(settings.seed * 1_000_003 + done)
            loss, right = _step(network, optimiser, recipe, features, labels)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {done + 1} of {settings.steps}: training stopped, nothing"
                    f" was exported; the last good state is {checkpoint}. Start again with another --seed"
                    " or a lower learning rate"
                )
            done += 1
            mix = 1.0 / min(done - first, 50)
            loss_mean = loss if done - first == 1 else (1 - mix) * loss_mean + mix * loss
            right_mean = right if done - first == 1 else (1 - mix) * right_mean + mix * right
            now = time.monotonic()
            rate = (done - first) * settings.patterns / max(now - start, 1e-9)
            report(Progress(done, settings.steps, loss_mean, right_mean, rate, now - start))
            if now - saved > _CHECKPOINT_EVERY_S:
                _save(checkpoint, network, optimiser, identity, done, before + now - start)
                saved = now
            if now - start > budget_s:
                break
    seconds = before + time.monotonic() - start
    if done > first:
        _save(checkpoint, network, optimiser, identity, done, seconds)
    network.eval()
    return network, done, seconds if done > first else before


def _step(
    network: nn.Module, optimiser: torch.optim.Optimizer, recipe: Recipe, x: torch.Tensor, y: torch.Tensor
) -> tuple[float, float]:
    # Half precision where the processor has it; the loss and the weights stay float32.
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x)
    logits = logits.float()
    loss = nn.functional.cross_entropy(logits, y, label_smoothing=recipe.smoothing)
    value = float(loss.detach())
    if math.isfinite(value):
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return value, float((logits.argmax(1) == y).float().mean())


def _set_rate(optimiser: torch.optim.Optimizer, recipe: Recipe, step: int, steps: int) -> None:
    # A short ramp, then half a cosine to nothing.
    ramp = min(100, max(1, steps // 10))
    share = (step + 1) / ramp if step < ramp else 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimiser.param_groups:
        group["lr"] = recipe.learning_rate * max(share, 1e-3)


class _Batches:
    """Batches from a thread of their own: the kernels release the interpreter lock."""

    def __init__(
        self, simulator: PatternSimulator, recipe: Recipe, settings: TrainingSettings, first: int
    ) -> None:
        self._simulator, self._settings, self._first = simulator, settings, first
        self._maker = FeatureMaker(recipe.features)
        self._ready: queue.Queue[tuple[torch.Tensor, torch.Tensor] | BaseException | None] = queue.Queue(
            _AHEAD
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="patterns", daemon=True)

    def __enter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._thread.start()
        return self._iterate()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _iterate(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _put(self, item: tuple[torch.Tensor, torch.Tensor] | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _work(self) -> None:
        s = self._settings
        try:
            for step in range(self._first, s.steps):
                if self._stop.is_set():
                    return
                x, y = self._simulator.batch(step * s.patterns, s.patterns, self._maker, s.spots_each)
                if len(y) > 1:
                    self._put((torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))))
        except Exception as error:  # noqa: BLE001 - handed to the thread that trains, which raises it
            self._put(error)
        self._put(None)


def _save(
    path: Path,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    identity: dict[str, Any],
    done: int,
    seconds: float,
) -> None:
    state = {
        "network": network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "identity": identity,
        "step": done,
        "seconds": seconds,
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def _resume(
    path: Path, network: nn.Module, optimiser: torch.optim.Optimizer, identity: dict[str, Any]
) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, weights_only=True)
        stored, step, seconds = state["identity"], int(state["step"]), float(state["seconds"])
    except Exception as error:  # a damaged file fails in torch in many ways
        raise TrainingError(
            f"{path} is no checkpoint of this program ({error}): remove it to start anew"
        ) from error
    if stored != identity:
        different = sorted(k for k in identity if stored.get(k) != identity[k])
        raise TrainingError(
            f"{path} is of another training ({', '.join(different)} differ): choose another --out,"
            " or remove it to start anew"
        )
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    return step, seconds
