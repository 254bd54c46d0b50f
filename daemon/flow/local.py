"""Computing in the front process itself: ``workers = 0``, for small rates and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from daemon.flow.compute import compute
from daemon.flow.executor import ExecutorStatus, Outcome
from daemon.flow.plugins import build_pipelines, engines_of
from grainwatch.config import Config
from pipelines.frame import Frame, ModelRef, Pipeline


class LocalExecutor:
    """Implements `daemon.flow.executor.Executor` without workers: `submit` computes before it returns."""

    def __init__(
        self, config: Config, config_hash: str, where: str, models: Mapping[str, ModelRef] | None = None
    ) -> None:
        self._config = config
        self.config_hash = config_hash
        self.progress = 0
        self.problem = ""
        self._where = where
        self._models = models
        self._pipelines: dict[str, Pipeline] = {}

    @property
    def engines(self) -> tuple[str, ...]:
        """Return what runs the networks."""
        return engines_of(self._pipelines)

    @property
    def patience_s(self) -> float:
        """Return how long a batch may take."""
        return self._config.daemon.compute_timeout_s

    def start(self) -> None:
        """Build and warm the pipelines."""
        self._pipelines = build_pipelines(self._config, self.config_hash, self._where, self._models)

    def free(self) -> int:
        """Return 1: nothing waits inside."""
        return 1

    def submit(self, stream: str, batch: Sequence[Frame]) -> Future[list[Outcome]]:
        """Compute a batch."""
        future: Future[list[Outcome]] = Future()
        future.set_result(compute(self._pipelines[stream], batch))
        self.progress += 1
        return future

    def give_up(self, reason: str) -> None:
        """Do nothing: nothing waits inside."""

    def status(self) -> ExecutorStatus:
        """Return counters: there are no workers."""
        return ExecutorStatus(workers=0, alive=0, restarts=0, busy=0)

    def close(self) -> None:
        """Do nothing: nothing runs."""
