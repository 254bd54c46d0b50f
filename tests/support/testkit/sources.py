"""Sources for tests: one that counts, one that follows a script line by line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from daemon.sources.base import Arrival, Bad, Event, Exhausted, Idle, SeriesEnd, SeriesStart
from grainwatch.config import Table
from pipelines.frame import PlainImage


class Config(Table, frozen=True, kw_only=True):
    """`script` holds one JSON list a line; a line is consumed once, also across restarts, as a
    message of a PUSH socket is. Without a script it counts `frames` frames at `rate_hz`.
    """

    script: str = ""
    frames: int = 100
    rate_hz: float = 0.0
    shape: tuple[int, int] = (16, 16)
    series: str = "1/a"


class CountingSource:
    def __init__(self, config: Config, stream: str) -> None:
        self.config = config

    def describe(self) -> str:
        return f"counts to {self.config.frames}"

    def events(self) -> Iterator[Event]:
        config = self.config
        yield SeriesStart(config.series, config.frames)
        pixels = np.ones(config.shape, np.uint16)
        pixels[0, 0] = 0
        image = PlainImage(pixels)
        begin = time.monotonic()
        for n in range(config.frames):
            while config.rate_hz and time.monotonic() < begin + n / config.rate_hz:
                yield Idle()
                time.sleep(max(0.0, min(0.1, begin + n / config.rate_hz - time.monotonic())))
            yield Arrival(config.series, n, image)
        yield SeriesEnd(config.series)
        yield Exhausted()

    def close(self) -> None:
        pass


class ScriptSource:
    def __init__(self, config: Config, stream: str) -> None:
        self.config = config
        self.path = Path(config.script)
        self.consumed = self.path.with_suffix(".consumed")
        self.path.touch()

    def describe(self) -> str:
        return f"follows {self.path}"

    def events(self) -> Iterator[Event]:
        at = int(self.consumed.read_text()) if self.consumed.exists() else 0
        while True:
            with self.path.open("rb") as file:
                file.seek(at)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    at += len(line)
                    self.note(at)
                    yield self.event(json.loads(line))
            time.sleep(0.01)
            yield Idle()

    def note(self, at: int) -> None:
        # In one go: whoever is killed in between leaves the old number, not half of a new one.
        fresh = self.consumed.with_suffix(".new")
        fresh.write_text(str(at))
        fresh.replace(self.consumed)

    def event(self, line: list[object]) -> Event:
        match line:
            case ["start", str(series), *n]:
                return SeriesStart(series, n[0] if n else None)  # type: ignore[arg-type]
            case ["image", str(series), int(frame), int(code), *shape]:
                pixels = np.ones(shape[0] if shape else self.config.shape, np.uint16)  # type: ignore[call-overload]
                pixels[0, 0] = code
                return Arrival(series, frame, PlainImage(pixels))
            case ["bad", str(reason), series, frame]:
                return Bad(reason, series, frame)  # type: ignore[arg-type]
            case ["end", str(series)]:
                return SeriesEnd(series)
            case ["sleep", float(seconds)]:
                time.sleep(seconds)
                return Idle()
            case ["raise", str(what)]:
                raise RuntimeError(what)
            case ["exhausted"]:
                return Exhausted()
        raise ValueError(f"unknown line {line}")

    def close(self) -> None:
        pass


def open_source(config: Config, stream: str) -> CountingSource | ScriptSource:
    return ScriptSource(config, stream) if config.script else CountingSource(config, stream)
