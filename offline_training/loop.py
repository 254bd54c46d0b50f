"""The loop that all trainings share: steps, checkpoints, an end that loses nothing."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offline_training.errors import DivergedError, Interrupted, TrainingError

_CHECKPOINT_EVERY_S = 20.0
_CHECKPOINT_SHARE = 0.02
"""Of the time, for writing: checkpoints of a large network come more rarely."""

LossOf = Callable[[int], tuple[torch.Tensor, Mapping[str, float]] | None]
"""From the number of a step to the loss that is minimised and figures to show; None if its batch is empty."""


@dataclass(frozen=True)
class Progress:
    """Where a training stands: smoothed loss and figures; steps a second and time since the start."""

    step: int
    steps: int
    loss: float
    figures: Mapping[str, float]
    steps_per_s: float
    seconds: float
    left_s: float


def use_cores(cores: int) -> None:
    """Let training use so many cores: one makes batches, the others run the network.

    Threads beyond the cores that are free wait for each other by spinning: a training on two
    cores with two threads for the network alone took ten times as long as with one.
    """
    torch.set_num_threads(max(cores - 1, 1))


def fit(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    loss_of: LossOf,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path,
    identity: dict[str, Any],
    budget_s: float = math.inf,
    report: Callable[[Progress], None] = lambda _: None,
) -> tuple[int, float]:
    """Train, or go on where the checkpoint stopped; the model is left in evaluation mode.

    Parameters
    ----------
    model, optimiser
    loss_of : callable
        Called with steps from 0 under half precision; its randomness is that of the step alone.
    steps : int
    learning_rate : float
        At its highest; warmed up, then let down along a cosine.
    seed : int
    checkpoint : Path
        Written every 20 s (large ones more rarely) and at the end; replaced as a whole.
    identity : dict
        What the result follows from; a checkpoint with another one is refused.
    budget_s : float
        The training ends early, with what it has learned, when this time is over.
    report : callable

    Returns
    -------
    steps : int
        That were learned.
    seconds : float
        What that took, the time before an interruption included.

    Raises
    ------
    DivergedError
        If the loss is no number.
    TrainingError
        If the checkpoint is of another training, or cannot be written.
    Interrupted
        After Ctrl-C or SIGTERM, at the end of the step and with a checkpoint written.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}: expected 1 or more")
    identity = {**identity, "steps": steps, "seed": seed}
    done, before = _resume(checkpoint, model, optimiser, identity)
    model.train()
    first, learned, mean, figures, writing = done, 0, math.nan, dict[str, float](), 0.0
    start = saved = time.monotonic()
    with _stop_asked() as stop:
        while done < steps and not stop.is_set() and (done == first or time.monotonic() - start <= budget_s):
            _set_rate(optimiser, learning_rate, done, steps)
            # Noise of a step depends on the step alone, so that a resumed run is the same run.
            torch.manual_seed(seed * 1_000_003 + done)
            with torch.autocast("cpu", torch.bfloat16):
                found = loss_of(done)
            done += 1
            if found is None:
                continue
            total, shown = found
            loss = float(total.detach())
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss} at step {done} of {steps}: training stopped, nothing was exported;"
                    f" the last good state is {checkpoint}. Start again with another --seed or a lower"
                    f" --set learning_rate (it was {learning_rate:g})"
                )
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            learned += 1
            mix = 1.0 / min(learned, 50)
            mean = loss if learned == 1 else (1 - mix) * mean + mix * loss
            figures = {k: (1 - mix) * figures.get(k, v) + mix * v for k, v in shown.items()}
            now = time.monotonic()
            rate = (done - first) / max(now - start, 1e-9)
            report(Progress(done, steps, mean, figures, rate, now - start, (steps - done) / rate))
            if now - saved > max(_CHECKPOINT_EVERY_S, writing / _CHECKPOINT_SHARE):
                _save(checkpoint, model, optimiser, identity, done, before + now - start)
                saved = time.monotonic()
                writing = saved - now
    seconds = before + (time.monotonic() - start if done > first else 0.0)
    if done > first:
        _save(checkpoint, model, optimiser, identity, done, seconds)
    if stop.is_set() and done < steps:
        raise Interrupted(f"interrupted after step {done} of {steps}, which {checkpoint} keeps")
    model.eval()
    return done, seconds


@contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    # A step ends before the training does, so that a checkpoint is never half a step. A second Ctrl-C ends
    # it at once. Signals belong to the main thread; elsewhere nobody asks.
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


def _set_rate(optimiser: torch.optim.Optimizer, learning_rate: float, step: int, steps: int) -> None:
    # A short ramp, then half a cosine to nothing.
    ramp = min(100, max(1, steps // 10))
    share = (step + 1) / ramp if step < ramp else 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimiser.param_groups:
        group["lr"] = learning_rate * max(share, 1e-3)


def _save(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    identity: dict[str, Any],
    done: int,
    seconds: float,
) -> None:
    state = {
        "model": model.state_dict(),
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
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, identity: dict[str, Any]
) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, weights_only=True)
        stored, step, seconds = state["identity"], int(state["step"]), float(state["seconds"])
        learned, moments = state["model"], state["optimiser"]
        ours = isinstance(stored, dict)
    except Exception as error:  # a damaged file fails in torch in many ways
        raise TrainingError(
            f"{path} is no checkpoint of this program ({error}): remove it to start anew"
        ) from error
    if not ours or stored != identity:
        different = sorted(k for k in identity if not ours or stored.get(k) != identity[k])
        raise TrainingError(
            f"{path} is of another training ({', '.join(different)} differ): choose another --out,"
            " or remove it to start anew"
        )
    model.load_state_dict(learned)
    optimiser.load_state_dict(moments)
    return step, seconds
