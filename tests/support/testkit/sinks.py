"""A sink for tests: one JSON line an event, flushed."""

from __future__ import annotations

import gc
import json
import time
from concurrent.futures import Future
from pathlib import Path

from daemon.flow.dispatcher import Dispatcher
from daemon.sinks.base import Published, SeriesClosed, SeriesOpened, SinkContext, SinkEvent
from grainwatch.config import ConfigError, EdgeTable, Table
from grainwatch.messages import Health, LaueResult


class Config(Table, frozen=True, kw_only=True):
    path: str
    sleep_s: float = 0.0
    raise_on: int = -1
    hang_dispatcher_at: int = -1  # frame
    edge: EdgeTable = EdgeTable()


class LinesSink:
    def __init__(self, config: Config) -> None:
        self.config = config
        try:
            Path(config.path).touch()
        except OSError as error:
            raise ConfigError(f"path: {config.path} cannot be written: {error.strerror}") from error

    def handle(self, events: list[SinkEvent]) -> None:
        with Path(self.config.path).open("a") as file:
            for event in events:
                time.sleep(self.config.sleep_s)
                file.write(json.dumps(self.line(event)) + "\n")
                file.flush()
        frames = [e.message.key.frame for e in events if isinstance(getattr(e, "message", None), LaueResult)]
        if self.config.hang_dispatcher_at in frames:
            hang_dispatcher()
        if any(isinstance(e, Published) and e.message.seq == self.config.raise_on for e in events):
            raise OSError("the disk is full, it says")

    def line(self, event: SinkEvent) -> dict[str, object]:
        match event:
            case SeriesOpened():
                return {"event": "opened", "uid": event.series_uid, "n_frames": event.n_frames}
            case SeriesClosed():
                return {"event": "closed", "uid": event.series_uid, "counts": dict(event.counts)}
            case Published(message=LaueResult() as m):
                return {
                    "event": "result", "uid": m.key.series_uid, "frame": m.key.frame, "seq": m.seq,
                    "again": m.again, "grid_index": m.grid_index, "n_peaks": m.n_peaks,
                    "latency_s": m.times.published - m.times.received, "publisher": m.publisher,
                    "config_hash": m.provenance.config_hash, "flags": m.flags,
                    "model": m.provenance.model.sha256,
                }  # fmt: skip
            case Published(message=Health() as m):
                return {"event": "health", "seq": m.seq, "state": m.state}
        return {"event": "message", "seq": event.message.seq, "schema": type(event.message).SCHEMA}

    def idle(self) -> None:
        pass

    def close(self) -> None:
        pass


def hang_dispatcher() -> None:
    """Have the dispatcher of this process wait for a batch that never comes back."""
    (dispatcher,) = [o for o in gc.get_objects() if isinstance(o, Dispatcher)]
    dispatcher._finished.put((None, None, [], Future()))
    dispatcher._wake.set()


def open_sink(config: Config, context: SinkContext) -> LinesSink:
    return LinesSink(config)
