"""The course of the demo: single frames, then a scan, then the map."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from daemon.demo.sample import Sample
from daemon.demo.scenes import Scene
from daemon.demo.station import MICROGRAPHS, SCAN, Accounts, DemoError, Station
from daemon.demo.verdict import Verdict, compare
from daemon.demo.view import HEAD, View
from grainwatch.map_state import MapState
from grainwatch.messages import AnyMessage, LaueResult, MapUpdate, MicrographResult
from grainwatch.stream import ResultStream
from pipelines.maps.plot import draw_map, save
from pipelines.maps.series_map import read_map
from pipelines.results_files import results_files

#: How often the daemon is asked for its accounts, seconds.
ASK_EVERY_S: Final = 0.25
#: How long nothing may come before the demo gives up, seconds.
PATIENCE_S: Final = 60.0
SINGLE_RATE_HZ: Final = 2.0
#: Share of false crystals from which a map counts as wrong.
MOST_STRANGE: Final = 0.01


@dataclass
class Tally:
    """What has come so far."""

    results: int = 0
    crystals: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    rates: dict[int, tuple[float, float]] = field(default_factory=dict)
    first_crystal_s: float | None = None
    map_state: MapState | None = None
    snapshot: MapUpdate | None = None


class Show:
    """Runs the demo at a station and tells a view about it.

    Parameters
    ----------
    station : Station
    view : View
    scenes : sequence of Scene
    sample : Sample
    began : float
        When the command was started, monotonic.
    """

    def __init__(
        self, station: Station, view: View, scenes: Sequence[Scene], sample: Sample, began: float
    ) -> None:
        self._station = station
        self._view = view
        self._scenes = scenes
        self._sample = sample
        self._began = began
        self.tally = Tally()

    def run(self, repeat: int, picture: Path) -> list[str]:
        """Go through all of it; return what was not as it should be, nothing when all was well.

        Parameters
        ----------
        repeat : int
            Frames of each of the first streams.
        picture : Path
            Where the map is drawn.

        Raises
        ------
        DemoError
            If a part of it failed.
        """
        with self._station.subscribe() as results:
            expected = self._station.show_scenes(repeat, SINGLE_RATE_HZ)
            self._view.say(f"\n{HEAD}")
            accounts = self._follow(results, expected)
            self._view.figures(accounts, None, now=True)
            self._say_rates()
            grid = self._sample.grid
            self._view.say(
                f"\nscan of {grid.shape[0]} x {grid.shape[1]} points over a polycrystal of"
                f" {self._sample.n_grains} copper grains, simulated while it is streamed"
            )
            self._station.scan()
            self.tally.map_state = MapState()
            accounts = self._follow(results, expected + grid.size)
            self._wait_for_snapshot(results)
            self._view.figures(accounts, self._shown_map, now=True)
            lost = results.lost
        self._station.stop_daemon()
        verdict = self._draw(picture)
        complaints = self._complaints(accounts, expected + grid.size, verdict)
        if lost:
            complaints.append(f"{lost} messages did not reach the screen")
        return complaints

    def _follow(self, results: ResultStream, expected: int) -> Accounts:
        """Show what comes until `expected` frames have their end; return the accounts then."""
        accounts = self._station.accounts()
        asked = moved = time.monotonic()
        # A result may be here before the daemon has booked it, and the other way round.
        while min(self.tally.results, accounts.done) + accounts.gone < expected:
            message = results.next(0.05)
            now = time.monotonic()
            if message is not None:
                self._take(message)
                moved = now
            if now - asked > ASK_EVERY_S:
                asked = now
                self._station.check()
                accounts = self._station.accounts()
                if accounts.received:
                    self._view.figures(accounts, self._shown_map)
            if now - moved > PATIENCE_S:
                raise DemoError(
                    f"{self.tally.results} results of {expected} frames, and nothing for {PATIENCE_S:.0f} s"
                )
        return accounts

    @property
    def _shown_map(self) -> MapState | None:
        state = self.tally.map_state
        return state if state is not None and state.points else None

    def _take(self, message: AnyMessage) -> None:
        tally = self.tally
        if isinstance(message, MapUpdate) and tally.map_state is not None:
            tally.map_state.apply(message)
            if message.kind == "snapshot" and message.filled == self._sample.grid.size:
                tally.snapshot = message
        if not isinstance(message, (LaueResult, MicrographResult)):
            return
        tally.results += 1
        if message.key.source not in tally.seen:
            tally.seen.add(message.key.source)
            model = message.provenance.model
            self._view.say(
                f"({message.key.source}: what follows is the work of {model.name} {model.version})"
            )
        if isinstance(message, MicrographResult):
            self._take_micrograph(message)
            return
        if message.key.source != SCAN:
            self._view.result(message)
        tally.crystals.update({message.key.source: len(message.crystals)})
        if message.crystals and tally.first_crystal_s is None:
            tally.first_crystal_s = time.monotonic() - self._began
            self._view.say(f"(the first crystal, {tally.first_crystal_s:.1f} s after the command was given)")

    def _take_micrograph(self, result: MicrographResult) -> None:
        true, posterior = self._station.true_rate(result.key.frame), result.posterior
        self._view.result(result, f"made with {true:.2f}")
        if posterior is not None and posterior.mean is not None:
            self.tally.rates[result.key.frame] = (posterior.mean, true)

    def _say_rates(self) -> None:
        if self.tally.rates:
            said, true = zip(*self.tally.rates.values(), strict=True)
            self._view.say(
                f"(ln of the cooling rate of {len(true)} micrographs, read from the image alone: off by"
                f" {math.dist(said, true) / math.sqrt(len(true)):.2f} of {max(true) - min(true):.2f})"
            )

    def _wait_for_snapshot(self, results: ResultStream) -> None:
        """The map of a series is published as a whole when the series is over."""
        deadline = time.monotonic() + PATIENCE_S
        while self.tally.snapshot is None and time.monotonic() < deadline:
            message = results.next(0.1)
            if message is not None:
                self._take(message)

    def _draw(self, picture: Path) -> Verdict:
        files = sorted(
            (p for p in results_files(self._station.results) if p.name.startswith(f"{SCAN}-")),
            key=lambda p: p.stat().st_mtime,
        )
        if not files:
            raise DemoError(f"{self._station.results} holds no results of the scan")
        series = read_map(files[-1:])
        save(draw_map(series), picture)
        verdict = compare(series.snapshot, self._sample)
        self._view.say(str(verdict))
        self._view.say(f"map written: {picture}")
        return verdict

    def _complaints(self, accounts: Accounts, expected: int, verdict: Verdict) -> list[str]:
        found = []
        if not accounts.balanced or accounts.received != expected or accounts.done != expected:
            found.append(f"{expected} frames were sent, the daemon says: {accounts}; {accounts.last_error}")
        if self.tally.results != expected:
            found.append(f"{self.tally.results} results of {expected} frames were published")
        found += [
            f"no crystal was found in the stream {name}"
            for name in (*(scene.stream for scene in self._scenes), SCAN)
            if not self.tally.crystals[name]
        ]
        if not self.tally.rates:
            found.append(f"no cooling rate was read in the stream {MICROGRAPHS}")
        if self.tally.snapshot is None:
            found.append("the daemon did not publish the whole map")
        if verdict.grains_found < verdict.grains_true or verdict.strange > MOST_STRANGE * verdict.crystals:
            found.append("the map is not that of the sample")
        return found
