"""Train a network on patterns that are simulated while it learns.

Every batch is new and follows from the seed and its number, so a run that was interrupted goes on
as if it had not been; nothing is learned by heart, so there is nothing to stop early for.
"""

from __future__ import annotations

import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offline_training.laue.errors import DivergedError, Interrupted, TrainingError
from offline_training.laue.networks import Recipe, Tuning, recipe_of
from pipelines.laue.features import FeatureMaker, Features

_CHECKPOINT_EVERY_S = 20.0
_CHECKPOINT_SHARE = 0.02
"""Of the time, for writing: checkpoints of a large network come more rarely."""

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


@dataclass(frozen=True)
class Progress:
    """Where a training stands: smoothed loss and share of right classes in training; time since the start."""

    step: int
    steps: int
    loss: float
    accuracy: float
    patterns_per_s: float
    seconds: float
    left_s: float


def use_cores(cores: int) -> None:
    """Let training use so many cores: one makes patterns, the others run the network.

    Threads beyond the cores that are free wait for each other by spinning: a training on two
    cores with two threads for the network alone took ten times as long as with one.
    """
    torch.set_num_threads(max(cores - 1, 1))


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
    identity = {**settings.as_dict(), "fingerprint": fingerprint, "classes": n_classes}
    done, before = _resume(checkpoint, network, optimiser, identity)
    network.train()
    start = saved = time.monotonic()
    loss_mean, right_mean, writing = math.nan, math.nan, 0.0
    first = done
    with _stop_asked() as stop, _Batches(source, recipe, settings, done) as batches:
        for features, labels in batches:
            _set_rate(optimiser, recipe, done, settings.steps)
            # Dropout of a step depends on the step alone, so that a resumed run is the same run.
            torch.manual_seed(settings.seed * 1_000_003 + done)
            loss, right = _step(network, optimiser, recipe, features, labels)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss} at step {done + 1} of {settings.steps}: training stopped, nothing"
                    f" was exported; the last good state is {checkpoint}. Start again with another --seed"
                    f" or a lower --set learning_rate (it was {recipe.learning_rate:g})"
                )
            done += 1
            mix = 1.0 / min(done - first, 50)
            loss_mean = loss if done - first == 1 else (1 - mix) * loss_mean + mix * loss
            right_mean = right if done - first == 1 else (1 - mix) * right_mean + mix * right
            now = time.monotonic()
            rate = (done - first) * settings.patterns / max(now - start, 1e-9)
            left = (settings.steps - done) * (now - start) / (done - first)
            report(Progress(done, settings.steps, loss_mean, right_mean, rate, now - start, left))
            if now - saved > max(_CHECKPOINT_EVERY_S, writing / _CHECKPOINT_SHARE):
                _save(checkpoint, network, optimiser, identity, done, before + now - start)
                saved = time.monotonic()
                writing = saved - now
            if stop.is_set() or now - start > budget_s:
                break
    seconds = before + time.monotonic() - start
    if done > first:
        _save(checkpoint, network, optimiser, identity, done, seconds)
    if stop.is_set() and done < settings.steps:
        raise Interrupted(f"interrupted after step {done} of {settings.steps}, which {checkpoint} keeps")
    network.eval()
    return network, done, seconds if done > first else before


@contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    # A batch ends before the training does, so that a checkpoint is never half a step. A second
    # Ctrl-C ends it at once. Signals belong to the main thread; elsewhere nobody asks.
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, _frame: object) -> None:
        signal.signal(number, before[signal.Signals(number)])
        asked.set()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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

    def __init__(self, source: PatternSource, recipe: Recipe, settings: TrainingSettings, first: int) -> None:
        self._source, self._settings, self._first = source, settings, first
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
                x, y = self._source.batch(step * s.patterns, s.patterns, self._maker, s.spots_each)
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
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch wraps what its file object raises
        with suppress(OSError):
            part.unlink()
        raise TrainingError(
            f"{path}: the checkpoint cannot be written ({error}); make room and give the command again"
        ) from error


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
