"""Options, progress and errors that the commands of training share."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from grainwatch.config import ConfigError
from offline_training.errors import Interrupted, TrainingError

if TYPE_CHECKING:
    from offline_training.loop import Progress

Material = Annotated[str, typer.Option("--material", "-m", help="Built-in name or CIF file.")]
Geometry = Annotated[
    str, typer.Option("--geometry", "-g", help="Calibration that patterns are made around: a .det file.")
]
Energy = Annotated[tuple[float, float], typer.Option(help="Energy band of the beam, keV.")]
Recipe = Annotated[str, typer.Option(help="residual, lauenn-2022 or lauenn-2022-cnn.")]
Coverage = Annotated[float, typer.Option(help="Share of the spots on the detector that are to have a class.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Change a number of the recipe: learning_rate, weight_decay, batch, dropout, width, blocks,"
        " bin_deg, range_deg. Again for more.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Start of all random numbers.")]
Cores = Annotated[int, typer.Option(help="Cores: one makes patterns, the others run the network.")]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

INSTALL = (
    "python -m pip install torch==2.13.0",
    "python -m pip install -c constraints.txt -e '.[daemon,training]'",
)
"""torch first, by the pin that constraints.txt names: plain torch pulls gigabytes of CUDA."""

_NEEDS = ("torch", "onnx", "onnxscript", "onnxruntime")
_TERMINAL_EVERY_S, _LOG_EVERY_S = 0.2, 15.0


def need_torch(command: str = "train") -> None:
    """Say what is not installed, before anything is imported."""
    need(_NEEDS, command)


def need(modules: Sequence[str], command: str = "train") -> None:
    """Say which modules are not installed, and how they are, in the order that matters.

    Raises
    ------
    ConfigError
        If one is not.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        how = "\n  ".join(INSTALL)
        raise ConfigError(f"{command}: {', '.join(missing)} not installed; in the source tree:\n  {how}")


@contextmanager
def plainly(again: str = "the same command goes on there", command: str = "train") -> Iterator[None]:
    """Turn what can go wrong into one line; an interruption says how to go on."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"\ngrainwatch: {command}: {str(error) or 'interrupted'}; {again}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except (OSError, ValueError, TrainingError) as error:
        raise ConfigError(f"{command}: {error}") from error


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read ``10,20,50``.

    Raises
    ------
    ValueError
        If something between the commas is no whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected whole numbers with commas, as 10,20,50") from None


class ProgressLine:
    """Shows where a training stands: one line, renewed on a terminal, now and then in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = 0.0
        self._width = 0

    def show(self, progress: Progress, before: str = "") -> None:
        """Show it, unless that was done a moment ago."""
        now = time.monotonic()
        wait = _TERMINAL_EVERY_S if self._terminal else _LOG_EVERY_S
        if progress.step != progress.steps and now - self._last < wait:
            return
        self._last = now
        rate = "" if before else f"  {progress.steps_per_s:.3g} steps/s"
        figures = "".join(f"  {name} {value:.3g}" for name, value in progress.figures.items())
        line = (
            f"{before}step {progress.step}/{progress.steps}  loss {progress.loss:.3f}{figures}{rate}"
            f"  {duration(progress.seconds)}, {duration(progress.left_s)} left"
        )
        if self._terminal:
            print("\r" + line.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._terminal and self._width:
            print(file=sys.stderr)
            self._width = 0


def duration(seconds: float) -> str:
    """Return seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns of text, the first one to the left and the others to the right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *[cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]]
        ).rstrip()
        for line in lines
    )
