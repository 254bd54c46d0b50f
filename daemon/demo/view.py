"""What the demo shows: lines, and on a terminal a map and a line of figures that stay below them."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Final, Protocol, Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from daemon.demo.station import Accounts
from grainwatch.map_state import MapState
from grainwatch.messages import AnyResult, Crystal, LaueResult
from grainwatch.words import micrograph_words
from pipelines.laue.crystal import Material
from pipelines.maps.colours import ColourKey

HEAD: Final = (
    f"{'stream':<10}{'frame':>6}  {'crystal':<8}{'spots':>9}  {'match rate':>10}  {'residual':>8}"
    f"  {'P(false)':>8}  {'phi1':>6} {'Phi':>6} {'phi2':>6}  {'latency':>8}"
)
#: How often a line of figures is printed where nothing can stay in place, seconds.
LINE_EVERY_S: Final = 2.0
_HUES: Final = {"Ge": "cyan", "Si": "green", "GaN": "magenta", "Cu": "yellow"}


def crystal_line(result: LaueResult, crystal: Crystal, *, first: bool) -> str:
    """Return what is said of one crystal; stream, frame and latency stand on the first line of a frame."""
    phi1, tilt, phi2 = crystal.euler_deg
    lead = f"{result.key.source:<10}{result.key.frame:>6}" if first else " " * 16
    latency = f"{1e3 * (result.times.published - result.times.received):>5.0f} ms" if first else ""
    return (
        f"{lead}  {crystal.material:<8}{crystal.spots_matched:>4}/{crystal.spots_expected:<4}"
        f"  {100 * crystal.match_rate:>8.0f} %  {crystal.residual_px:>5.2f} px"
        f"  {probability(crystal.false_probability):>8}  {phi1:>6.1f} {tilt:>6.1f} {phi2:>6.1f}  {latency}"
    ).rstrip()


def probability(p: float) -> str:
    """Return a probability in a few characters, also one that has run out of digits."""
    return f"{p:.0e}" if p > 0 else "<1e-300"


class View(Protocol):
    """Where the demo shows itself."""

    def say(self, text: str) -> None:
        """Show a line of text."""
        ...

    def result(self, result: AnyResult, truth: str = "") -> None:
        """Show the crystals of a frame, or what a micrograph shows and is."""
        ...

    def figures(self, accounts: Accounts, map_state: MapState | None, *, now: bool = False) -> None:
        """Show rate, latency, losses and the map as it is; `now`: whatever was shown before."""
        ...


class Lines:
    """Plain lines, for logs and pipes."""

    def __init__(self) -> None:
        self._next_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def result(self, result: AnyResult, truth: str = "") -> None:
        """Print a line a crystal, or a micrograph."""
        for line, _ in _result_lines(result, truth):
            print(line, flush=True)

    def figures(self, accounts: Accounts, map_state: MapState | None, *, now: bool = False) -> None:
        """Print a line now and then."""
        if now or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_S
            grown = f"{map_words(map_state)} | " if map_state is not None else ""
            print(f"{grown}{accounts}", flush=True)


class Screen:
    """A terminal: crystals run through, below them stay the map, as it grows, and the figures."""

    def __init__(self, material: Material) -> None:
        self._colours = ColourKey.of(material.proper_point_group)
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(Text(text), soft_wrap=True)

    def result(self, result: AnyResult, truth: str = "") -> None:
        """Print a line a crystal, each material in its colour, or a micrograph."""
        for line, material in _result_lines(result, truth):
            self._console.print(Text(line, style=_HUES.get(material, "")), soft_wrap=True)

    def figures(self, accounts: Accounts, map_state: MapState | None, *, now: bool = False) -> None:
        """Renew what stays below."""
        below = [Text(str(accounts), style="bold" if not accounts.gone else "bold red")]
        if map_state is not None:
            below = [self._picture(map_state), Text(map_words(map_state)), *below]
        self._live.update(Group(*below), refresh=now)

    def _picture(self, map_state: MapState) -> Text:
        """Draw a point as two characters, which are about as wide as they are high; y goes up."""
        best = {index: points[0] for index, points in map_state.points.items() if points}
        picture = Text()
        if not best:
            return picture
        colours = self._colours.orientation_colours(np.array([p.quaternion for p in best.values()]))
        red_green_blue = dict(zip(best, np.rint(255 * colours).astype(int).tolist(), strict=True))
        nx, ny = map_state.shape[:2]
        for iy in reversed(range(ny)):
            for ix in range(nx):
                if (ix, iy) in red_green_blue:
                    r, g, b = red_green_blue[ix, iy]
                    picture.append("  ", Style(bgcolor=f"rgb({r},{g},{b})"))
                else:
                    picture.append("··" if (ix, iy) not in map_state.points else "  ", Style(dim=True))
            picture.append("\n")
        picture.rstrip()
        return picture


def open_view(material: Material) -> Lines | Screen:
    """Return a screen where standard output is a terminal, lines where it is none."""
    return Screen(material) if sys.stdout.isatty() else Lines()


def map_words(map_state: MapState) -> str:
    """Return how far the map has grown."""
    of = math.prod(map_state.shape)
    return f"map {len(map_state.points)} of {of} points, {len(map_state.grains)} grains"


def _result_lines(result: AnyResult, truth: str) -> list[tuple[str, str]]:
    if not isinstance(result, LaueResult):
        latency = f"{1e3 * (result.times.published - result.times.received):.0f} ms"
        words = micrograph_words(result.morphology, result.posterior)
        said = "; ".join([*words, *([truth] if truth else []), *result.flags])
        return [(f"{result.key.source:<10}{result.key.frame:>6}  {said}  ({latency})", "")]
    if not result.crystals:
        return [(f"{result.key.source:<10}{result.key.frame:>6}  no crystal in {result.n_peaks} peaks", "")]
    return [
        (crystal_line(result, crystal, first=rank == 0), crystal.material)
        for rank, crystal in enumerate(result.crystals)
    ]
