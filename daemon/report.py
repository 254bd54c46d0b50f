"""What a daemon says of itself: its health, the answer to `status`, a line for the service manager."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from daemon.executors import Executors
from daemon.flow.dispatcher import Dispatcher
from daemon.flow.ledger import Ledger
from daemon.flow.outbox import Outbox
from daemon.flow.stream import Stream
from daemon.models.exchange import ModelExchange
from daemon.service import Service
from grainwatch import __version__
from grainwatch.messages import Health


class Report:
    """Puts together what the parts of a running daemon know.

    Attributes
    ----------
    state : str
        "starting", "running", "draining".
    refused : str
        Why the last reload was refused, "" when it was not.
    """

    def __init__(self, name: str, service: Service) -> None:
        self.name = name
        self.state = "starting"
        self.refused = ""
        self._service = service
        self._started = time.monotonic()

    def of(
        self,
        streams: Mapping[str, Stream],
        dispatcher: Dispatcher,
        outbox: Outbox,
        ledger: Ledger,
        executors: Executors,
        models: ModelExchange,
    ) -> None:
        """Take the parts, when they are there."""
        self._streams = streams
        self._dispatcher = dispatcher
        self._outbox = outbox
        self._ledger = ledger
        self._executors = executors
        self._models = models

    def health(self) -> Health:
        """Return the state of the daemon."""
        executor = self._dispatcher.executor.status()
        streams = self._streams.values()
        edges = [s.intake.health() for s in streams]
        edges += [s.aggregation.edge.health() for s in streams if s.aggregation is not None]
        edges += [s.edge.health() for s in self._outbox.sinks]
        dead = executor.workers > 0 and executor.alive == 0
        sick = dead or self._dispatcher.broken or self._ledger.fault or any(s.fault for s in streams)
        return Health(
            name=self.name,
            version=__version__,
            state="fault" if sick and self.state == "running" else self.state,
            uptime_s=time.monotonic() - self._started,
            workers=executor.alive,
            worker_restarts=self._executors.restarts,
            streams=tuple(s.health() for s in streams),
            edges=tuple(edges),
        )

    def status(self) -> dict[str, Any]:
        """Return the answer to the control command `status`."""
        if self.state == "starting":
            return {"status": {"name": self.name, "version": __version__, "state": "starting"}}
        return {
            "status": msgspec.to_builtins(self.health()),
            "sources": {s.name: s.describe() for s in self._streams.values()},
            "models": self._models.status(),
            "engines": list(self._dispatcher.executor.engines),
            "errors": self._errors(),
            "unbalanced": self._ledger.balance(),
        }

    def line(self) -> str:
        """Return the state, rates and what did not go well, in one line."""
        health = self.health()
        said = [health.state]
        for stream in health.streams:
            bad = [f"{n} {getattr(stream, n)}" for n in ("failed", "dropped", "lost") if getattr(stream, n)]
            counts = ", ".join([f"done {stream.done}", *bad])
            said.append(f"{stream.stream} {stream.state}, {stream.rate_hz:.1f} frames/s, {counts}")
        said += [f"{where}: {error}" for where, error in self._errors().items()]
        return "; ".join(said)

    def _errors(self) -> dict[str, str]:
        errors = {f"sink {s.name}": s.last_error for s in self._outbox.sinks if s.last_error}
        errors |= {f"source {s.name}": s.problem for s in self._streams.values() if s.problem}
        if self._ledger.fault:
            errors["ledger"] = self._ledger.fault
        if self._dispatcher.broken:
            errors["dispatcher"] = self._dispatcher.broken
        errors |= {f"model {p.partition(' ')[0]}": p.partition(" ")[2] for p in self._models.problems}
        if problem := self._dispatcher.executor.problem:
            errors["workers"] = problem
        if self.refused:
            errors["reload"] = f"reload refused: {self.refused}"
        errors |= {name: f"hangs for {seconds:.0f} s" for name, seconds in self._service.hung.items()}
        return errors
