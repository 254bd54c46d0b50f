"""Models in the shadow of a running daemon: set up beside the live ones, compared, noted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from daemon.changes import ChangeRefused
from daemon.executors import Executors
from daemon.flow.dispatcher import Dispatcher
from daemon.flow.shadow import Pair, Shadow
from daemon.models.at_work import AtWork
from daemon.models.registry import Comparison, Model, Registry
from grainwatch.messages import encode
from pipelines.frame import Comparer, Failure

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A model in the shadow, and what it was set up beside."""

    model: Model
    shadow: Shadow
    beside: AtWork


class Shadows:
    """Sets models up in the shadow and takes them down. All but `status` in the thread of changes."""

    def __init__(self, registry: Registry, executors: Executors, dispatcher: Dispatcher) -> None:
        self._registry = registry
        self._executors = executors
        self._dispatcher = dispatcher
        self._entries: dict[str, _Entry] = {}
        self._problem = ""

    @property
    def problems(self) -> list[str]:
        """What keeps models from being tried, each with the model's name in front."""
        found = [self._problem] if self._problem else []
        for name, entry in tuple(self._entries.items()):
            if problem := entry.shadow.executor.problem or entry.shadow.problem:
                found.append(f"{name} {entry.model.version} in the shadow: {problem}")
        return found

    def begin(
        self, model: Model, share: float, at_work: AtWork, note: Callable[[], object] | None = None
    ) -> None:
        """Have a model compute a share of the frames of the streams that use it.

        One of its name that is there goes on until it is warm, and until `note` has written that down.

        Raises
        ------
        ConfigError, RegistryError
            If it cannot get ready, or what `note` raises: then nothing has changed.
        """
        configuration = at_work.configuration
        comparers = {name: p.comparer() for name, p in configuration.pipelines().items()}
        executor = self._executors.make_background(configuration, at_work.with_model(model).models)
        self._executors.warm(executor)
        if note is not None:
            try:
                note()
            except Exception:
                self._executors.close(executor)
                raise
        self.end(model.name)
        notes = _Notes(self._registry, model, comparers, configuration.config.models.shadow_kept)
        shadow = Shadow(executor, share, at_work.streams_of(model.name), notes.take)
        self._entries[model.name] = _Entry(model, shadow, at_work)
        self._tell()
        log.info("model %s %s computes %.3g %% in the shadow", model.name, model.version, 100 * share)

    def end(self, name: str) -> None:
        """Take the model of this name down, if it is there."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._tell()
            entry.shadow.close()
            self._executors.close(entry.shadow.executor)

    def renew(self, at_work: AtWork) -> None:
        """Have those that the registry names compute beside what is at work now.

        Beside anything else they would be held to what they are not like.
        """
        self._problem = ""
        wanted = {m.name: m for m in self._registry.models() if m.state == "shadow"}
        for name, entry in list(self._entries.items()):
            if entry.beside is not at_work or name not in wanted:
                self.end(name)
        for name, model in wanted.items():
            if name in self._entries or not at_work.streams_of(name):
                continue
            try:
                self._registry.verify(model)
                self.begin(model, model.share, at_work)
            except ChangeRefused:
                return
            except ValueError as error:
                self._problem = f"{name} {model.version} cannot be tried in the shadow: {error}"
                log.error("model %s", self._problem)

    def close(self) -> None:
        """Compare no more. The executors are closed with all others."""
        entries, self._entries = self._entries, {}
        self._tell()
        for entry in entries.values():
            entry.shadow.close()

    def status(self) -> dict[str, Any]:
        """Return version and counts of each."""
        return {
            name: {
                "version": entry.model.version,
                "share": entry.shadow.share,
                "offered": entry.shadow.offered,
                "passed_over": entry.shadow.passed_over,
            }
            for name, entry in tuple(self._entries.items())
        }

    def _tell(self) -> None:
        self._dispatcher.shadows = tuple(entry.shadow for entry in self._entries.values())


class _Notes:
    """Compares the two results of a frame and writes that into the registry."""

    def __init__(
        self, registry: Registry, model: Model, comparers: Mapping[str, Comparer], kept: int
    ) -> None:
        self._registry = registry
        self._model = model
        self._comparers = comparers
        self._kept = kept

    def take(self, pair: Pair) -> None:
        """Take what both said of a frame; where the live model failed there is nothing to compare."""
        live, other = pair.live, pair.other
        if live is None or other is None or isinstance(live, Failure):
            return
        provenance = getattr(live, "provenance", None)
        row = Comparison(
            time=time.time(),
            stream=pair.stream,
            series_uid=pair.key.series_uid,
            frame=pair.key.frame,
            channel=pair.key.channel,
            live_sha256=provenance.model.sha256 if provenance else "",
            agree=False,
            live_ms=getattr(live, "compute_ms", 0.0),
        )
        if isinstance(other, Failure):
            row = replace(row, error=other.reason)
        else:
            found = self._comparers[pair.stream](live, other)
            row = replace(
                row,
                agree=found.agree,
                figures=dict(found.figures),
                shadow_ms=getattr(other, "compute_ms", 0.0),
                result=encode(other),
            )
        self._registry.compare_put(self._model, row, self._kept)
