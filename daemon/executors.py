"""The executors of a daemon: one computes, others warm up, are held in reserve or serve a shadow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Final

import msgspec

from daemon.changes import ChangeRefused
from daemon.configuration import Configuration
from daemon.flow.dispatcher import Dispatcher
from daemon.flow.executor import Executor
from daemon.flow.local import LocalExecutor
from daemon.flow.quarantine import Quarantine
from daemon.flow.succession import Switched
from daemon.flow.workers import WorkersExecutor
from grainwatch.config import RingTable
from pipelines.frame import ModelRef

#: Frames on their way to a worker in the background.
BACKGROUND_SLOTS: Final = 4


class Executors:
    """Makes executors and sees to it that each is closed once, also when the daemon stops meanwhile."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._lock = threading.Lock()
        self._all: list[Executor] = []
        self._warming: list[Executor] = []
        self._stopping = False
        self._restarts = 0

    @property
    def restarts(self) -> int:
        """How often workers were started again, by all executors that there are and were."""
        return self._restarts + sum(executor.status().restarts for executor in tuple(self._all))

    def make(self, configuration: Configuration, models: Mapping[str, ModelRef]) -> Executor:
        """Make the executor of a configuration, with these bundles for the names in it; it is not warm."""
        config = configuration.config
        executor: Executor
        if config.daemon.workers == 0:
            executor = LocalExecutor(config, configuration.config_hash, configuration.where, models)
        else:
            executor = WorkersExecutor(
                config, configuration.raw, configuration.where, self._quarantine(configuration), models
            )
        return self._known(executor)

    def make_background(self, configuration: Configuration, models: Mapping[str, ModelRef]) -> Executor:
        """Make one of a single worker, which computes only while nobody else wants the cores."""
        config = configuration.config
        small = msgspec.structs.replace(
            config,
            daemon=msgspec.structs.replace(config.daemon, workers=1),
            ring=RingTable(slots=BACKGROUND_SLOTS, slot_bytes=config.ring.slot_bytes),
        )
        quarantine = self._quarantine(configuration)
        executor = WorkersExecutor(small, configuration.raw, configuration.where, quarantine, models, True)
        return self._known(executor)

    def warm(self, executor: Executor) -> None:
        """Start it; what cannot start is closed.

        Raises
        ------
        ConfigError
            If it cannot start.
        ChangeRefused
            If the daemon stops.
        """
        with self._lock:
            if self._stopping:
                raise ChangeRefused("the daemon stops")
            self._warming.append(executor)
        try:
            executor.start()
        except Exception:
            self.close(executor)
            raise
        finally:
            self._warming.remove(executor)

    def put_in_place(
        self,
        executor: Executor,
        dispatcher: Dispatcher,
        probation: int = 0,
        note: Callable[[], object] | None = None,
    ) -> Future[Switched]:
        """Have the dispatcher switch to an executor that is warm.

        `note` writes that down just before. What it raises, or a stop of the daemon, is raised, the executor
        closed, and nothing has changed.
        """
        try:
            # A stop does not come in between: what is written down is done.
            with self._lock:
                if self._stopping:
                    raise ChangeRefused("the daemon stops")
                if note is not None:
                    note()
                return dispatcher.switch(executor, probation)
        except Exception:
            self.close(executor)
            raise

    def close(self, executor: Executor) -> None:
        """Close one and forget it."""
        executor.close()
        with self._lock:
            if executor in self._all:
                self._all.remove(executor)
                self._restarts += executor.status().restarts

    def break_off(self) -> None:
        """The daemon stops: none is put in place any more, those that get warm are closed."""
        with self._lock:
            self._stopping = True
            warming = list(self._warming)
        for executor in warming:
            executor.close()

    def close_all(self) -> None:
        """Close all."""
        for executor in list(self._all):
            executor.close()

    def _known(self, executor: Executor) -> Executor:
        with self._lock:
            self._all.append(executor)
        return executor

    def _quarantine(self, configuration: Configuration) -> Quarantine:
        return Quarantine(self._state_dir / "quarantine", configuration.config.daemon.quarantine)
