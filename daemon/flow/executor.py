"""Where frames are computed: in this process, in local workers, elsewhere later.

The flow knows this protocol alone; `daemon.flow.local` computes in the front process,
`daemon.flow.workers` in spawned processes that share a memory ring with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from grainwatch.messages import AnyMessage
from pipelines.frame import Failure, Frame

Outcome: TypeAlias = AnyMessage | Failure


@dataclass(frozen=True, slots=True)
class ExecutorStatus:
    """How it does: `alive` of `workers` processes, `restarts` since the start, `busy` batches."""

    workers: int
    alive: int
    restarts: int
    busy: int


class Executor(Protocol):
    """Computes batches of frames of a stream, by one configuration."""

    @property
    def config_hash(self) -> str:
        """Of the configuration that it computes by."""
        ...

    @property
    def progress(self) -> int:
        """A number that changes whenever something gets on in it. Takes no lock."""
        ...

    @property
    def engines(self) -> tuple[str, ...]:
        """What runs the networks of its models, a line each; another line when it has to help itself."""
        ...

    @property
    def problem(self) -> str:
        """What keeps a worker from starting again, "" when nothing does. Takes no lock."""
        ...

    @property
    def patience_s(self) -> float:
        """How long it may stand still at present before it acts itself, seconds. Takes no lock."""
        ...

    def start(self) -> None:
        """Start workers and warm the pipelines; returns when the first frame would not wait.

        Raises
        ------
        grainwatch.config.ConfigError
            If a pipeline cannot be built, or the executor was closed meanwhile.
        """
        ...

    def free(self) -> int:
        """Return how many more batches can be taken now without waiting."""
        ...

    def submit(self, stream: str, batch: Sequence[Frame]) -> Future[list[Outcome]]:
        """Compute a batch: one outcome a frame, in order.

        The future never raises for what is in a frame or for a worker that dies: the frames of a
        dead worker run once more and then end as ``Failure("worker died ...")``.
        """
        ...

    def give_up(self, reason: str) -> None:
        """Begin nothing any more: what waits fails as a fault, for another executor to compute it."""
        ...

    def status(self) -> ExecutorStatus:
        """Return counters."""
        ...

    def close(self) -> None:
        """Finish what runs and stop."""
        ...
